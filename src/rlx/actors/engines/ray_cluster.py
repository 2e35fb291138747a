"""The cluster that actors on Ray live in: this process' connection to it, what it has, and what is set aside in it."""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from rlx.actors.engines.ray_data import NAMESPACE
from rlx.actors.monitor import logger
from rlx.actors.reservation import Reservation
from rlx.actors.resources import WAIT_WARNING_S, Claim, Pool, Resources
from rlx.errors import CallTimeout, ConfigError, Infeasible, NotSupported

JOIN_S = 15.0  # for a cluster to answer
MAX_WHY = 250  # characters of what Ray says of one that does not
MEASURES = {"cpu", "gpu", "memory"}


class Connection:
    """This process' Ray, of which there can be one: started or joined by the first engine, left with the last one."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._session = 0  # number of the Ray that was found or started last
        self._engines = 0  # in it
        self._is_ours = False
        self._address: str | None = None

    def join(self, address: str | None, timeout_s: float, options: Mapping[str, Any]) -> int:
        """Start Ray on this machine, or join the cluster at `address`; return what `leave` is to be told.

        ConfigError where that is not to be had.
        """
        with self._lock:
            if not ray.is_initialized():
                with _signal_handler_kept():
                    _initialize(address, timeout_s, options)
                self._session, self._engines = self._session + 1, 0  # the program may have ended the one before
                self._is_ours, self._address = True, address
            else:
                if not self._engines:
                    self._session, self._is_ours, self._address = self._session + 1, False, "auto"
                self._check(address, options)
            self._engines += 1
            return self._session

    def leave(self, session: int) -> None:
        """Shut Ray down, if it was joined here and nobody else needs it."""
        with self._lock:
            if session != self._session:
                return
            self._engines -= 1
            if self._engines == 0 and self._is_ours and ray.is_initialized():
                ray.shutdown()

    def _check(self, address: str | None, options: Mapping[str, Any]) -> None:
        """Raise ConfigError where what is asked for is not the Ray that runs."""
        running = ray.get_runtime_context().gcs_address
        if address not in (None, self._address, running):
            raise ConfigError(
                f"Ray runs in this process already, at {running}, so runtime.address={address} cannot be joined; leave "
                "the address out, or call ray.shutdown() first."
            )
        if options:
            raise ConfigError(
                f"Ray runs in this process already, so {', '.join(options)} cannot be set; leave it out, or call "
                "ray.shutdown() first."
            )


connection = Connection()


def _initialize(address: str | None, timeout_s: float, options: Mapping[str, Any]) -> None:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if address is None:
        quiet = {"include_dashboard": False, "logging_level": logging.WARNING}
        ray.init(address="local", namespace=NAMESPACE, **{**quiet, **options})
        return
    try:
        _ask_who_is_there(os.environ.get("RAY_ADDRESS", address) if address == "auto" else address, timeout_s)
        ray.init(address=address, namespace=NAMESPACE, **options)
    except (OSError, RuntimeError, ValueError, RayError) as error:
        raise ConfigError(
            f"there is no Ray cluster at runtime.address={address} ({_first_of(str(error))}); start one there (`ray "
            "start --head`), correct the address (auto or host:port), or leave it out to have Ray started on this "
            "machine."
        ) from error


def _ask_who_is_there(address: str, timeout_s: float) -> None:
    """Raise OSError where no cluster answers at host:port in time: Ray itself would try for many minutes."""
    if "://" in address:
        raise ValueError("that is one of Ray's client, which hears of no deaths")
    host, colon, port = address.rpartition(":")
    if not (colon and port.isdecimal()):
        return
    timeout_s = min(timeout_s, JOIN_S)
    socket.create_connection((host.strip("[]"), int(port)), timeout_s).close()
    command = [sys.executable, "-m", "ray.scripts.scripts", "health-check", "--address", address]
    try:
        asked = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, stdin=subprocess.DEVNULL)
    except subprocess.TimeoutExpired as error:
        raise OSError(f"somebody listens there, and has not answered as Ray does within {timeout_s:g} s") from error
    if asked.returncode:
        raise OSError(asked.stderr.rstrip().rpartition("\n")[2])


def _first_of(text: str) -> str:
    """Return what an error of Ray's says, of which the first sentences are enough."""
    return " ".join(text.split())[:MAX_WHY].rpartition(". ")[0] or text.rstrip(".")


@contextmanager
def _signal_handler_kept() -> Iterator[None]:
    """Put back the program's own handler of SIGTERM, which ray.init replaces."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        is_own = before not in (None, signal.SIG_DFL)
        if is_own and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)


class ClusterPool(Pool):
    """What the machines of a cluster have together, of which an actor gets its part from one of them."""

    def __init__(self, machines: Sequence[Mapping[str, float]]) -> None:
        self._machines = [_resources(machine) for machine in machines]
        found = [machine.amounts() for machine in self._machines]
        total = {name: sum(one.get(name, 0) for one in found) for each in found for name in each}
        custom = {name: amount for name, amount in total.items() if name not in MEASURES}
        gpus = int(total["gpu"])
        has = Resources(total["cpu"], gpus, int(total["memory"]), custom)
        super().__init__("the Ray cluster", has, {f"GPU {index}": 1.0 for index in range(gpus)})

    def claim(
        self, holder: str, wants: Sequence[Resources], strategy: str = "spread", beside: Sequence[Any] = ()
    ) -> Claim:
        """Return a claim, as every pool does; Infeasible also where no machine has all that one actor asks for."""
        for want in wants:
            if want.labels:
                raise NotSupported(f"{holder} asks for {want}: machines of {self.name} have no labels; leave them out.")
            asked = want.amounts().items()
            if not any(all(amount <= one.amounts().get(name, 0) for name, amount in asked) for one in self._machines):
                machines = "; ".join(map(str, self._machines))
                raise Infeasible(f"{holder} asks for {want}, and no machine of {self.name} has that: {machines}.")
        return super().claim(holder, wants, strategy, beside)

    def reserve(self, bundles: Sequence[Resources], timeout_s: float | None, strategy: str = "pack") -> Reservation:
        """Return a reservation, as every pool does, for which Ray has set the bundles aside in a placement group."""
        reservation = super().reserve(bundles, timeout_s, strategy)
        wanted = [index for index, bundle in enumerate(bundles) if bundle]  # Ray sets nothing aside for nothing
        if not wanted:
            return reservation
        group = placement_group([_bundle(bundles[index]) for index in wanted], strategy=strategy.upper())
        try:
            _wait_for(group, " + ".join(map(str, bundles)), timeout_s)
        except BaseException:
            remove_placement_group(group)
            reservation.release()
            raise
        places: list[Any] = [None] * len(bundles)
        for position, index in enumerate(wanted):
            places[index] = PlacementGroupSchedulingStrategy(group, position)
        reservation.set_aside(places, lambda: _remove(group))
        return reservation


def _resources(machine: Mapping[str, float]) -> Resources:
    """Return what Ray says of a machine; its own marks of nodes and kinds are no resources to ask for."""
    own = ("CPU", "GPU", "memory", "object_store_memory")
    custom = {name: n for name, n in machine.items() if name not in own and ":" not in name}
    return Resources(machine.get("CPU", 0), int(machine.get("GPU", 0)), int(machine.get("memory", 0)), custom)


def _bundle(wanted: Resources) -> dict[str, float]:
    amounts = {"CPU": wanted.cpu, "GPU": wanted.gpu, "memory": wanted.memory, **wanted.custom}
    return {name: amount for name, amount in amounts.items() if amount}


def _wait_for(group: PlacementGroup, what: str, timeout_s: float | None) -> None:
    """Return once Ray has set the group's bundles aside; CallTimeout after timeout_s."""
    began, is_told = time.monotonic(), False
    while not group.wait(1):  # seconds, in which Ray does not hear Ctrl-C
        waited_s = time.monotonic() - began
        if timeout_s is not None and waited_s >= timeout_s:
            raise CallTimeout(
                f"a reservation was not granted within {timeout_s:g} s: Ray has not set aside {what}, which other jobs "
                "may hold, or which do not fit on the machines together."
            )
        if waited_s >= WAIT_WARNING_S and not is_told:
            is_told = True
            logger.warning("a reservation waits for Ray to set aside %s, which other jobs may hold", what)


def _remove(group: PlacementGroup) -> None:
    if ray.is_initialized():
        remove_placement_group(group)
