"""Actors as processes of this machine: the driver's side. Linux only; no port is opened.

A caller writes its frame itself, as far as the socket takes it; the reactor's thread writes the rest when there is
room, reads replies that no caller waits for, and notices deaths. It never blocks, so nobody can hold it up.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from rlx.actors.board import Board, RuntimeFolder
from rlx.actors.channel import Channel
from rlx.actors.engines import pickling
from rlx.actors.engines.death import count_oom_kills, describe_exit
from rlx.actors.engines.forkserver import MAX_MESSAGE
from rlx.actors.engines.local_actor import LocalActor
from rlx.actors.engines.memory import NO_ARGUMENTS, DriverMemory, Parcel, default_object_memory
from rlx.actors.engines.reactor import Reactor
from rlx.actors.future import wait
from rlx.actors.interface import ActorSpec, Listener, Slot
from rlx.actors.logs import Damper, LogFolder, LogFollower
from rlx.actors.monitor import EventThread
from rlx.actors.ref import Ref
from rlx.actors.resources import Pool, Resources
from rlx.errors import ActorError, NotSupported

CLOSE_GRACE_S = 2.0  # for idle actors to end by themselves
LOOK_EVERY_S = 1.0  # for stalls, and for memory that an idle driver could give back
BOOT = (
    "import json, sys; path, *rest = json.loads(sys.argv[1]); sys.path[:] = path; "
    "from rlx.actors.engines.forkserver import main; main(*rest)"
)

Actor = TypeVar("Actor", bound=LocalActor)


class LocalEngine:
    """A forkserver, the links to the actors it has forked, and the thread that reads them."""

    capabilities: frozenset[str] = frozenset({"processes", "stalls", "cancellation", "resources"})
    where = ""
    """In the text of a death, where it was: nothing on the reader's own machine."""

    def __init__(
        self,
        events: EventThread,
        system_timeout_s: float,
        preload: Sequence[str] | None = ("numpy", "torch"),
        object_memory: int | None = None,
        log_folder: Path | None = None,
        damper: Damper | None = None,
    ) -> None:
        """preload: what the forkserver imports; None: it is started later.

        damper: what gets the lines that actors print; by default one that prints them to stderr, but no floods.
        """
        if sys.platform != "linux":
            raise NotSupported(f"engine 'local' needs Linux and this is {sys.platform}; use engine 'inline'.")
        if isinstance(preload, str):
            raise TypeError(f"preload={preload!r} is one string; give a sequence of module names.")
        self.events, self.system_timeout_s = events, system_timeout_s
        self._lock = threading.Lock()
        self._actors: dict[int, LocalActor] = {}  # the living, by number
        self._count = 0
        self._lost: str | None = None  # why there is no forkserver any more
        self.closing = False
        self._oom_kills = count_oom_kills()
        self.memory = DriverMemory(object_memory or default_object_memory())
        self._channels: dict[str, Channel] = {}
        self._server: subprocess.Popen[bytes] | None = None
        with contextlib.ExitStack() as undo:  # where descriptors or processes have run out, say
            self._folder = RuntimeFolder.create(log_folder)
            undo.callback(self._folder.remove)
            self.board, self.logs = Board(self._folder.path), LogFolder(self._folder.logs)
            undo.callback(self.board.close)
            show = damper or Damper(self.logs, partial(events.post, _print_to_stderr))
            self._follower = LogFollower(self.logs, show)
            undo.callback(self._follower.close)
            self.reactor = Reactor()
            undo.callback(self.reactor.close, system_timeout_s)
            if preload is not None:
                self._start_forkserver(preload)
            undo.pop_all()
        if (fd := self._follower.fileno()) is not None:
            self.reactor.register(fd, lambda _: self._follow_in(self._follower.on_readable()))
        self._look_around()

    def pack(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Parcel:
        """Return the arguments as a message; its buffers are views, which are sent or copied when it is posted."""
        if not args and not kwargs:
            return NO_ARGUMENTS
        return Parcel(*pickling.dumps_with_channels((args, kwargs), "arguments"))

    @property
    def folder(self) -> Path:
        """Where other terminals find out about its actors."""
        return self._folder.path

    def put(self, value: Any) -> Ref:
        """Copy the value into shared memory, once, for any number of actors."""
        return self.memory.put(pickling.dumps(value, "the value"))

    def channel(self, name: str) -> Channel:
        """Return the channel of that name; its versions share the memory of one process."""
        with self._lock:
            if name not in self._channels:
                self._channels[name] = self._new_channel(name)
            return self._channels[name]

    def _new_channel(self, name: str) -> Channel:
        return Channel.create(name, self.memory.limit_bytes)

    def pool(self, given: Resources) -> Pool:
        """Return what this machine has."""
        return Pool.of_this_machine(given)

    def slot(self, name: str) -> Slot:
        """Return a new line of the board."""
        return self.board.add(name)

    def spawn(self, spec: ActorSpec, listener: Listener) -> LocalActor:
        """Ask the forkserver for a process, and put its first frame into its socket."""
        return self.start_here(spec, self.pack_actor(spec), listener)

    def pack_actor(self, spec: ActorSpec) -> Parcel:
        """Return what an actor is made of as a message."""
        made_of = (spec.make, spec.args, spec.kwargs)
        return Parcel(*pickling.dumps_with_channels(made_of, f"what {spec.name} is made of"))

    def start_here(self, spec: ActorSpec, parcel: Parcel, listener: Listener) -> LocalActor:
        """Start an actor on this machine."""
        settings = {"env": os.environ | spec.env, "cwd": os.getcwd(), "path": [*map(str, sys.path)]}
        settings |= {"threads": spec.threads, "concurrency": spec.concurrency}
        return self.start(spec.name, settings, parcel, lambda number: LocalActor(self, number, spec, listener))

    def start(self, name: str, settings: dict[str, Any], parcel: Parcel, make: Callable[[int], Actor]) -> Actor:
        """Return what `make(number)` returns, an actor, with its process on the way."""
        with self._lock:
            if self._lost is not None:
                raise ActorError(f"actor {name} cannot be started: {self._lost}; open a new runtime.")
            if self.closing:  # in another thread, which ends those that it has seen here
                raise ActorError(f"actor {name} cannot be started: this runtime is closed.")
            self._count += 1
            number = self._count
            try:
                actor = self._actors[number] = make(number)
            except OSError as error:
                raise ActorError(
                    f"actor {name} cannot be started ({error}); it takes files, descriptors and memory of this "
                    f"process: end other actors, or raise the limit (`ulimit -n`, `df`, `free`)."
                ) from error
        try:
            settings |= {"folder": str(self._folder.path), "serial": actor.slot.serial}
            self.follow(name)
            far_ends = actor.start(json.dumps(settings), parcel, self.system_timeout_s)
            order = {"do": "spawn", "actor": number, "name": name, "object_memory": self.memory.limit_bytes}
            self._order(self.system_timeout_s, far_ends, **order)
        except BaseException as error:
            actor.abandon(error)
            raise
        finally:
            actor.close_far_ends()
        return actor

    def close(self, timeout_s: float) -> None:
        """End the idle actors, then the forkserver, which kills the rest; give up after timeout_s.

        Every step may be taken again: an interrupt may have cut an earlier call short.
        """
        deadline = time.monotonic() + timeout_s
        with self._lock:
            self.closing = True
            actors = list(self._actors.values())
        idle = [actor for actor in actors if actor.stop()]
        grace = min(deadline, time.monotonic() + CLOSE_GRACE_S)
        wait([actor.gone for actor in idle], len(idle), grace - time.monotonic())
        if self._server is not None:
            self._end_forkserver(self._server, deadline)
        wait([actor.gone for actor in actors], len(actors), max(0.1, deadline - time.monotonic()))
        self.reactor.close(max(0.1, deadline - time.monotonic()))
        if self._server is not None:
            self._control.close()
        self._follower.close()
        self.board.close()
        self._folder.remove()
        self.memory.close()
        for channel in self._channels.values():
            channel.close()

    def kill(self, number: int, timeout_s: float) -> None:
        """Have the forkserver kill the actor: only a parent knows that the process id is still the actor's."""
        self.memory.arena.check_owner()
        with self._lock:
            lost = self._lost
        if lost is None:
            self._order(timeout_s, (), do="kill", actor=number)

    def bury(self, number: int, name: str) -> list[str]:
        """Forget an actor that has ended; return the last lines that it wrote."""
        with self._lock:
            self._actors.pop(number, None)
        try:
            self._follow_in(self._follower.finish(name))
            lines = self.logs.tail(name)
        except OSError as error:  # no descriptor is left, say: callers must hear of the death all the same
            lines = [f"(its log cannot be read: {error})"]
        self.logs.close(name)
        return lines

    def follow(self, name: str) -> None:
        """Show what comes into the actor's log from now on."""
        self._follow_in(self._follower.follow(name))

    def new_oom_kills(self) -> int:
        """Return how many processes have lacked memory since the last look."""
        before = self._oom_kills
        self._oom_kills = max(before, count_oom_kills())  # what cannot be read counts as 0
        return self._oom_kills - before

    def _start_forkserver(self, preload: Sequence[str]) -> None:
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._control.setblocking(False)
        with theirs, contextlib.ExitStack() as undo:
            undo.callback(self._control.close)
            folder = str(self._folder.path)
            boot = json.dumps([[*map(str, sys.path)], theirs.fileno(), os.getpid(), list(preload), folder])
            # One thread per BLAS pool: a pool made at import would be threads, and lost in every forked child.
            env = os.environ | dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
            self._server = subprocess.Popen(
                [sys.executable, "-c", BOOT, boot],
                env=env,
                stdin=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C in the terminal is not for it
                pass_fds=[theirs.fileno()],
            )
            undo.pop_all()
        self.reactor.register(self._control.fileno(), self._on_control)

    def _end_forkserver(self, server: subprocess.Popen[bytes], deadline: float) -> None:
        if self._control.fileno() >= 0:
            if self._lost is None:
                with contextlib.suppress(ActorError):  # it reads no orders, and is killed below
                    self._order(1.0, (), do="close")
            self._control.shutdown(socket.SHUT_WR)
        try:
            server.wait(max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait(1.0)

    def _look_around(self) -> None:
        self.reactor.set_deadline(self, LOOK_EVERY_S, self._look_around)
        now = time.monotonic()
        with self._lock:
            actors = list(self._actors.values())
        for actor in actors:
            actor.look_for_stall(now)
        self.memory.arena.reclaim()

    def _follow_in(self, in_s: float | None) -> None:
        if in_s is not None:
            self.reactor.set_deadline(self._follower, in_s, lambda: self._follow_in(self._follower.tick()))

    def _order(self, timeout_s: float, descriptors: Sequence[int], **order: Any) -> None:
        data, deadline = [json.dumps(order).encode()], time.monotonic() + timeout_s
        assert self._server is not None
        while True:
            try:
                socket.send_fds(self._control, data, list(descriptors))
                return
            except BlockingIOError:
                if not select.select([], [self._control], [], max(0.0, deadline - time.monotonic()))[1]:
                    raise ActorError(
                        f"the forkserver (process {self._server.pid}) has read nothing for {timeout_s:g} s; "
                        f"it may be stopped or still importing; raise system_timeout_s, or open a new runtime."
                    ) from None
            except ConnectionError:
                return  # the reactor sees the same, and tells everybody

    def _on_control(self, events: int) -> None:
        try:
            data = self._control.recv(MAX_MESSAGE)
        except BlockingIOError:
            return
        except ConnectionError:
            # It ended with orders unread. A packet socket reports that once, before what it had sent: read again.
            return
        if not data:
            self._lose_server()
            return
        event = json.loads(data)
        if event["event"] == "broken":
            with self._lock:
                self._lost = event["text"]
            return
        with self._lock:
            actor = self._actors.get(event["actor"])
        if actor is not None and event["event"] == "started":
            actor.on_started(event["pid"])
        elif actor is not None:
            actor.die(event["how"])

    def _lose_server(self) -> None:
        """The forkserver has ended, so the kernel has killed its actors; the rest of them is ours to kill."""
        assert self._server is not None
        self.reactor.unregister(self._control.fileno())
        try:
            how = describe_exit(self._server.wait(1.0))
        except subprocess.TimeoutExpired:
            how = "closed its socket"
        with self._lock:
            is_broken = self._lost is not None  # a new one could not import its modules either
            if self._lost is None:
                self._lost = f"the forkserver of this runtime (process {self._server.pid}) {how}"
            actors, why = list(self._actors.values()), self._lost
        self._end_without_server(actors, f"was ended because {why}", is_broken or self.closing)

    def _end_without_server(self, actors: Sequence[LocalActor], how: str, is_final: bool) -> None:
        """Tell of the deaths of its actors. is_final: whether no other forkserver would do better."""
        for actor in actors:
            if actor.pid is not None:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(actor.pid, signal.SIGKILL)
            actor.die(how)


def _print_to_stderr(text: str) -> None:
    sys.stderr.write(text)
    sys.stderr.flush()
