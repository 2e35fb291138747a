"""Actors on Ray: every actor of rlx is one of Ray's, on whichever machine of the cluster has room for it.

Ray starts processes, moves bytes and notices deaths. Order, restarts, monitors, limits and what errors look like are
rlx's, the same as on the other engines. What Ray does not tell (a stall, a cancelled call that runs alone) is missing
from `capabilities`.
"""

from __future__ import annotations

import threading
import time
import uuid
from typing import Any

import ray

from rlx.actors.engines import ray_host
from rlx.actors.engines.inline import NoSlot
from rlx.actors.engines.ray_actor import RayActor
from rlx.actors.engines.ray_cluster import ClusterPool, connection
from rlx.actors.engines.ray_data import NAMESPACE, Parcel, RayChannel, RayRef, message_of
from rlx.actors.future import wait
from rlx.actors.interface import ActorSpec, Listener, Slot
from rlx.actors.monitor import EventThread
from rlx.actors.resources import Pool, Resources
from rlx.errors import ActorError, NotSupported

CLOSE_GRACE_S = 2.0  # for an idle actor's next call of those that it was sent
LOOK_EVERY_S = 0.2  # for the deaths of actors that nobody asks anything
WAITING = 10_000  # for something new in all channels, at most
Board = ray.remote(ray_host.Board)


class RayEngine:
    """A part in this process' Ray, which the first engine starts, or joins."""

    capabilities: frozenset[str] = frozenset({"processes", "machines"})

    def __init__(self, system_timeout_s: float, address: str | None = None, **options: Any) -> None:
        """address: of a running cluster, as ray.init takes it; None starts Ray here. options: of ray.init."""
        self._session = connection.join(address, system_timeout_s, options)
        self.system_timeout_s = system_timeout_s
        self._answers = EventThread("rlx-ray-answers")  # Ray's own thread must not be held up, nor call Ray
        self._actors: list[RayActor] = []
        self._channels: dict[str, RayChannel] = {}
        self._board_name = f"board/{uuid.uuid4().hex}"
        self._board: Any = None  # of all channels
        self._lock = threading.Lock()
        self._look_around()

    def pack(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Parcel:
        """Return the arguments as a message."""
        return Parcel((args, kwargs), "arguments")

    def put(self, value: Any) -> RayRef:
        """Copy the value into Ray's object store, once for any number of actors."""
        _check_ray()
        return RayRef(message_of(value, "the value"))

    def channel(self, name: str) -> RayChannel:
        """Return the channel of that name."""
        with self._lock:
            if name not in self._channels:
                _check_ray()
                if self._board is None:
                    options = {"name": self._board_name, "namespace": NAMESPACE, "num_cpus": 0}
                    self._board = Board.options(**options, max_concurrency=WAITING).remote()
                self._channels[name] = RayChannel(name, self._board_name, self._board, is_drivers=True)
            return self._channels[name]

    def pool(self, given: Resources) -> Pool:
        """Return what the living machines of the cluster have."""
        if given:
            raise NotSupported(
                "a cluster has what its nodes have; where Ray is started here, give num_cpus or num_gpus instead."
            )
        _check_ray()
        return ClusterPool([node["Resources"] for node in ray.nodes() if node["Alive"]])

    def slot(self, name: str) -> Slot:
        """Ray has a board of its own."""
        return NoSlot()

    def spawn(self, spec: ActorSpec, listener: Listener) -> RayActor:
        """Have Ray start a process; return at once."""
        _check_ray()
        parcel = Parcel((spec.make, spec.args, spec.kwargs), f"what {spec.name} is made of")
        actor = RayActor(spec, listener, parcel, self.system_timeout_s, self._answers, self._forget)
        with self._lock:
            self._actors = [one for one in self._actors if not one.gone.done()]
            self._actors.append(actor)
        return actor

    def close(self, timeout_s: float) -> None:
        """End the idle actors when they have finished, and the others; then the board, and Ray if nobody needs it."""
        began = time.monotonic()
        deadline = began + timeout_s
        with self._lock:
            actors, board = list(self._actors), self._board
        for actor in actors:
            actor.finish(began, CLOSE_GRACE_S, deadline - timeout_s / 4)  # the rest is for their ends
        for actor in actors:
            actor.end("was closed with its runtime")
        wait([actor.gone for actor in actors], len(actors), max(0.1, deadline - time.monotonic()))
        self._answers.close(max(0.1, deadline - time.monotonic()))
        if board is not None and ray.is_initialized():
            ray.kill(board)
        session, self._session = self._session, 0
        connection.leave(session)

    def _forget(self, name: str, pid: int | None) -> None:
        """An actor's process has ended."""
        if self._board is not None and ray.is_initialized():
            self._board.forget.remote((name, pid))

    def _look_around(self) -> None:
        self._answers.after(LOOK_EVERY_S, self._look_around)
        with self._lock:
            actors = list(self._actors)
        for actor in actors:
            actor.look()


def _check_ray() -> None:
    """Raise ActorError where the program has shut Ray down: Ray would start another one, of which nobody knows."""
    if not ray.is_initialized():
        raise ActorError("Ray was shut down under this runtime; open a new one with rlx.actors.runtime(...).")
