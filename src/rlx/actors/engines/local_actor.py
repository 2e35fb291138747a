"""One process of this machine that is an actor, from the driver: how it is started, watched and buried."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from rlx.actors.channel import Channel
from rlx.actors.engines import descriptors, pickling, wire
from rlx.actors.engines.death import activity, describe
from rlx.actors.engines.link import Link
from rlx.actors.engines.memory import Parcel
from rlx.actors.engines.process_actor import ProcessActor
from rlx.actors.engines.wire import Frame
from rlx.actors.future import Err, nothing, wait
from rlx.actors.interface import ActorSpec, Listener, Stall
from rlx.errors import ActorDied, ActorError, CallTimeout

if TYPE_CHECKING:
    from rlx.actors.engines.local import LocalEngine

EXIT_NEWS_S = 1.0  # from the end of the link to the forkserver's word on how the process ended


class LocalActor(ProcessActor):
    """Its methods that callers do not know are for the reactor's thread."""

    def __init__(self, engine: LocalEngine, number: int, spec: ActorSpec, listener: Listener) -> None:
        self._number, self._stall_after_s = number, spec.stall_after_s
        self._killed: str | None = None  # how the error of a wanted death describes it
        self._how: str | None = None  # how the process ended
        self._stalled_call = 0
        self._rows: dict[str, tuple[Channel, int]] = {}  # by name: the channels it can read
        with contextlib.ExitStack() as undo:  # where descriptors have run out, none may be lost
            ours, self._far_end = socket.socketpair()
            undo.callback(self._far_end.close)
            ours.setblocking(False)
            link = Link(engine.reactor, ours, self._take, self._lose_link)
            undo.callback(link.close)
            self._descriptors, self._descriptors_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            undo.callback(self._descriptors.close)
            undo.callback(self._descriptors_end.close)
            self._memory = engine.memory.link(spec.name)
            undo.callback(self._memory.drop)
            undo.callback(self._memory.close_fds)
            self._log = engine.logs.open(spec.name)
            undo.pop_all()
        super().__init__(engine, spec, listener, link)
        self._before_frame, self._lend = engine.memory.arena.check_owner, self._memory.lend
        self.slot = spec.slot or engine.slot(spec.name)
        self.slot.update(pid=0, sent=0, elsewhere=False)  # of this process

    def start(self, settings: str, parcel: Parcel, patience_s: float) -> list[int]:
        """Put the first frame into the link; return the descriptors that the new process needs."""
        self._reactor.set_deadline(self.ready, patience_s, self._on_no_start)
        self._link.open()
        self.ready.lead = self._link.lead
        self.slot.sent()  # for __init__
        self._hand_over(parcel.channels)
        self._link.write(wire.encode(wire.SPAWN, 0, settings, parcel.message, self._lend(parcel)))
        return [self._far_end.fileno(), self._descriptors_end.fileno(), *self._memory.fds, self._log]

    def close_far_ends(self) -> None:
        """Let go of what the new process has, or will never have."""
        self._far_end.close()
        self._descriptors_end.close()
        self._memory.close_fds()
        os.close(self._log)

    def abandon(self, error: BaseException) -> None:
        """The spawn has failed: have the reactor clean up."""
        self._reactor.post(partial(self.die, f"could not be started ({error})"))

    def kill(self, timeout_s: float, how: str = "was ended by kill()") -> None:
        """Kill the process and return when it is gone."""
        if self.gone.done():
            return
        self._killed = how
        self._engine.kill(self._number, timeout_s)
        if not wait([self.gone], 1, timeout_s)[0]:
            raise CallTimeout(f"actor {self._name} (pid {self.pid}) is not gone {timeout_s:g} s after kill().")

    def lose(self, how: str) -> None:
        """Its machine is given up: end it. Only the reactor."""
        with contextlib.suppress(ActorError):  # the forkserver takes no orders; it ends with the runtime
            self._engine.kill(self._number, 0.0)
        self.die(how)

    def stop(self) -> bool:
        """Ask the process to end behind all that was sent to it; False if it has calls to answer or never started."""
        with self._lock:
            if self.pid is None or self._pending or self._end is not None:
                return False
            self._link.write(wire.encode(wire.STOP))
            return True

    def on_started(self, pid: int) -> None:
        """The process exists."""
        self.pid = pid
        self.slot.update(pid=pid)
        self._reactor.clear_deadline(self.ready)  # not that of a link lost before this news has come

    def look_for_stall(self, now: float) -> None:
        """Tell the listener if one call has run for long; it is told once."""
        with self._lock:
            running_s = now - self._progress
            if self._end is not None or running_s < self._stall_after_s or self.pid is None:
                return
            call_id = next(iter(self._pending), None) if self.ready.done() else 0
            if call_id is None or (call_id == self._stalled_call and self._stalled_call):
                return
            method = self._current_method() or "__init__"
            self._stalled_call, self._progress = call_id, self._progress if call_id else now
        self._listener.stalled(Stall(self._name, self.pid, method, running_s, *activity(self.pid)))

    def die(self, how: str) -> None:
        """The process has ended: give out what it still sent, then fail every call that is left."""
        if self._how is not None:
            return
        self._how = how
        if self._killed and "SIGKILL" in how:
            self._how = self._killed
        elif self._engine.closing:
            self._how = "was closed with its runtime"
        for key in (self, self.ready):
            self._reactor.clear_deadline(key)
        self._link.finish(self._bury)

    def _bury(self) -> None:
        assert self._how is not None
        tail = self._engine.bury(self._number, self._name)
        with self._lock:
            method = self._current_method()
            oom = self._engine.new_oom_kills() if "SIGKILL" in self._how else 0
            waiting, where = len(self._pending) - 1, self._engine.where
            text = describe(self._name, self.pid, self._how, method, waiting, oom, tail, where)
        died = lambda: Err(ActorDied(text))  # noqa: E731  a fresh error for each caller's traceback
        self._listener.exited(self._end or died)  # first: who hears of the death from a call may call again at once
        with self._lock:
            self._fail_all(died)
        self._link.close()
        self._descriptors.close()
        self._memory.drop()
        for channel, row in self._rows.values():
            channel.remove_reader(row)
        self.gone.settle(nothing)

    def _hand_over(self, channels: Sequence[Channel]) -> None:
        """Give the actor the descriptors of channels that are new to it; it takes them when it unpickles one."""
        for channel in channels:
            if channel.name not in self._rows:
                row = channel.add_reader(self._name)
                try:
                    descriptors.send(self._descriptors, {"channel": channel.name, "row": row}, channel.fd)
                except BaseException:
                    channel.remove_reader(row)
                    raise
                self._rows[channel.name] = channel, row

    def _open(self, frame: Frame) -> pickling.Message:
        return frame.open(self._memory.borrow)

    def _lose_link(self, how: str) -> None:
        """Wait for the forkserver's word on the end of the process; without it, end it ourselves."""

        if self._how is None:
            self._reactor.set_deadline(self, EXIT_NEWS_S, partial(self.lose, how))

    def _on_no_start(self) -> None:
        self.die("was not started in time by the forkserver, which is stopped or still importing")
