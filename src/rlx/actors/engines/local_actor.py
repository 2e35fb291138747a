"""One process actor, from the driver: its pending calls and streams, and its end."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from rlx.actors.channel import Channel
from rlx.actors.engines import descriptors, pickling, wire
from rlx.actors.engines.death import activity, describe
from rlx.actors.engines.link import Link
from rlx.actors.engines.memory import Parcel
from rlx.actors.engines.wire import Frame
from rlx.actors.future import Err, Future, Ok, Outcome, nothing, wait
from rlx.actors.interface import ActorSpec, ActorState, Listener, Stall
from rlx.actors.stream import OpenStream, Stream
from rlx.errors import ActorBusy, ActorDied, ActorError, CallCancelled, CallTimeout

if TYPE_CHECKING:
    from rlx.actors.engines.local import LocalEngine

_ANSWERS = {wire.REPLY, wire.ERROR, wire.CANCELLED, wire.ITEM}
EXIT_NEWS_S = 1.0  # from the end of the link to the forkserver's word on how the process ended


class LocalActor:
    """The driver's end of an actor: the EngineActor methods are for callers, the others for the reactor's thread."""

    def __init__(self, engine: LocalEngine, number: int, spec: ActorSpec, listener: Listener) -> None:
        self._engine, self._number, self._name = engine, number, spec.name
        self._max_pending, self._stall_after_s = spec.max_pending, spec.stall_after_s
        self._listener = listener
        self.pid: int | None = None
        self.ready: Future[None] = Future(spec.name, "__init__")
        self.gone: Future[None] = Future(spec.name, "end")
        self._lock = threading.Lock()  # of the order of frames, and of the moment after which no call is answered
        self._place: Future[None] | None = None  # settled by the next answer: somebody waits for it, to call on
        self._pending: dict[int, Future[Any] | OpenStream] = {}  # by call id, oldest first
        self._calls = 0
        self._check_owner = engine.memory.arena.check_owner
        self._killed: str | None = None  # how the error of a wanted death describes it
        self._end: Callable[[], Err] | None = None  # what every call gets from that moment on
        self._init_failed = False
        self._how: str | None = None  # how the process ended
        self._progress = time.monotonic()  # when it was last known to have nothing older to do
        self._stalled_call = 0
        self._rows: dict[str, tuple[Channel, int]] = {}  # by name: the channels it can read
        with contextlib.ExitStack() as undo:  # where descriptors have run out, none may be lost
            self._link = Link(engine.reactor, self._take, self._lose_link)
            undo.callback(self._link.far_end.close)
            undo.callback(self._link.close)
            self._descriptors, self._descriptors_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            undo.callback(self._descriptors.close)
            undo.callback(self._descriptors_end.close)
            self._memory = engine.memory.link(spec.name)
            undo.callback(self._memory.drop)
            undo.callback(self._memory.close_fds)
            self._log = engine.logs.open(spec.name)
            undo.pop_all()
        self.slot = spec.slot or engine.slot(spec.name)
        self.slot.update(pid=0, sent=0)  # of this process

    def start(self, settings: str, parcel: Parcel, patience_s: float) -> list[int]:
        """Put the first frame into the link; return the descriptors that the new process needs."""
        self._engine.reactor.set_deadline(self.ready, patience_s, self._on_no_start)
        self._link.open()
        self.ready.lead = self._link.lead
        self.slot.sent()  # for __init__
        self._hand_over(parcel.channels)
        self._link.write(wire.encode(wire.SPAWN, 0, settings, parcel.message, self._memory.lend(parcel)))
        return [self._link.far_end.fileno(), self._descriptors_end.fileno(), *self._memory.fds, self._log]

    def close_far_ends(self) -> None:
        """Let go of what the new process has, or will never have."""
        self._link.far_end.close()
        self._descriptors_end.close()
        self._memory.close_fds()
        os.close(self._log)

    def abandon(self) -> None:
        """The spawn has failed: have the reactor clean up."""
        self._engine.reactor.post(partial(self.die, "could not be started"))

    def post(self, method: str, message: Parcel, future: Future[Any] | None) -> None:
        """Queue the call behind all earlier ones; waits while the actor has too many of them, ActorBusy at last."""
        kind = wire.SEND if future is None else wire.CALL
        end = self._write_call(kind, method, method, message, future)
        if end is None:
            return
        if future is not None:
            future.settle(end)
        else:
            self._listener.failed(end)

    def stream(self, method: str, message: Parcel, stream: Stream[Any]) -> None:
        """Like `post`, for a method whose items the stream takes one by one."""
        end = self._write_call(wire.STREAM, method, f"{stream.credits} {method}", message, stream)
        if end is not None:
            stream.finish(end)

    def _write_call(
        self, kind: int, method: str, text: str, message: Parcel, answer: Future[Any] | Stream[Any] | None
    ) -> Callable[[], Err] | None:
        """Number the call, note who waits for its answer, and write it; return the actor's end if it has ended."""
        self._check_owner()
        if len(self._pending) >= self._max_pending or self._link.is_full:
            self._wait_for_room()
        places = self._memory.lend(message) if message.message[1] else None
        with self._lock:
            if self._end is not None:
                return self._end  # what was lent goes with the link
            if message.channels:
                self._hand_over(message.channels)
            call_id, urgent = self._next_call(), not self._pending
            try:
                if isinstance(answer, Future):
                    self._pending[call_id] = answer
                    answer.lead = self._link.lead
                    answer.request_cancel = partial(self._cancel, call_id)
                elif answer is not None:
                    # Not a finalizer: it could come while this thread has the lock, and wait for it for ever.
                    drop = partial(self._engine.reactor.post, partial(self._cancel, call_id))
                    self._pending[call_id] = OpenStream(method, weakref.ref(answer, lambda _: drop()))
                    answer.grant, answer.cancel = partial(self._grant, call_id), partial(self._cancel, call_id)
                self._link.write(wire.encode(kind, call_id, text, message.message, places), urgent)
            except BaseException:  # an interrupt: written or not, nobody will ever ask for the answer
                self._pending.pop(call_id, None)
                raise
        return None

    def kill(self, timeout_s: float, how: str = "was ended by kill()") -> None:
        """Kill the process and return when it is gone."""
        if self.gone.done():
            return
        self._killed = how
        self._engine.kill(self._number, timeout_s)
        if not wait([self.gone], 1, timeout_s)[0]:
            raise CallTimeout(f"actor {self._name} (pid {self.pid}) is not gone {timeout_s:g} s after kill().")

    def stop(self) -> bool:
        """Ask the process to end behind all that was sent to it; False if it has calls to answer or never started."""
        with self._lock:
            if self.pid is None or self._pending or self._end is not None:
                return False
            self._link.write(wire.encode(wire.STOP))
            return True

    def state(self) -> ActorState:
        """Return the state now."""
        with self._lock:
            end, pending = self._end, len(self._pending)
            method = None if end is not None else self._current_method()
        if end is not None:
            outcome, status = end(), "failed" if self._init_failed else "dead"
            return ActorState(self._name, status, self.pid, 0, None, str(outcome.error))
        return ActorState(self._name, "alive" if self.ready.done() else "starting", self.pid, pending, method, None)

    def on_started(self, pid: int) -> None:
        """The process exists."""
        self.pid = pid
        self.slot.update(pid=pid)
        self._engine.reactor.clear_deadline(self.ready)  # not that of a link lost before this news has come

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
            self._engine.reactor.clear_deadline(key)
        self._link.finish(self._bury)

    def _bury(self) -> None:
        assert self._how is not None
        tail = self._engine.bury(self._number, self._name)
        with self._lock:
            method = self._current_method()
            oom = self._engine.new_oom_kills() if "SIGKILL" in self._how else 0
            text = describe(self._name, self.pid, self._how, method, len(self._pending) - 1, oom, tail)
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

    def _wait_for_room(self) -> None:
        """Wait while the actor has too many unanswered calls, or leaves too much unread."""
        timeout_s, limit = self._engine.system_timeout_s, self._max_pending
        deadline = time.monotonic() + timeout_s
        while len(self._pending) >= limit:
            with self._lock:
                if len(self._pending) < limit:
                    break
                place = self._place = self._place or Future(self._name, "place")
            if not wait([place], 1, deadline - time.monotonic())[0]:
                raise ActorBusy(
                    f"{self._name} has {limit} unanswered calls and finished none within {timeout_s:g} s; wait for "
                    f"results before calling on, or raise max_pending at spawn."
                )
        if not self._link.wait_for_room(timeout_s):
            raise ActorBusy(
                f"{self._name} has read nothing for {timeout_s:g} s and much is waiting for it; look at what it does "
                f"with `rlx why {self._name}`, or kill() it."
            )

    def _next_call(self) -> int:
        """Return the number of a new call. Holds the lock."""
        self._calls += 1
        if not self._pending:
            self._progress = time.monotonic()
        self.slot.sent()
        return self._calls

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

    def _cancel(self, call_id: int) -> None:
        self._tell(wire.CANCEL, call_id, "")

    def _grant(self, call_id: int, count: int) -> None:
        self._tell(wire.CREDIT, call_id, str(count))

    def _tell(self, kind: int, call_id: int, text: str) -> None:
        self._check_owner()
        with self._lock:
            if self._end is None:
                self._link.write(wire.encode(kind, call_id, text))

    def _lose_link(self, how: str) -> None:
        """Wait for the forkserver's word on the end of the process; without it, end it ourselves."""

        def give_up() -> None:
            try:
                self._engine.kill(self._number, 0.0)
            finally:  # also when the forkserver takes no orders
                self.die(how)

        if self._how is None:
            self._engine.reactor.set_deadline(self, EXIT_NEWS_S, give_up)

    def _take(self, frame: Frame) -> None:
        kind, call_id = frame.kind, frame.call_id
        self._progress = time.monotonic()
        message = frame.open(self._memory.borrow)
        waiting = self._pending.get(call_id) if kind in _ANSWERS else None
        if waiting is None:
            if kind not in _ANSWERS:
                self._take_news(kind, frame.text, message)
            return  # else it is nobody's any more
        if kind == wire.REPLY:
            waiting.settle(partial(self._value, message, waiting.method))
        elif kind == wire.ERROR:
            waiting.settle(partial(pickling.load_error, frame.text, message))
        elif kind == wire.CANCELLED:
            cancelled = f"{self._name}.{waiting.method}() was cancelled {frame.text}."
            waiting.settle(lambda: Err(CallCancelled(cancelled)))
        else:
            self._take_item(waiting, frame.text, message)
            return
        with self._lock:  # `state` may be looking
            self._give_place()
            self._pending.pop(call_id, None)

    def _take_news(self, kind: int, text: str, message: pickling.Message) -> None:
        """Take a frame that answers no call."""
        if kind == wire.READY:
            self.ready.settle(nothing)
        elif kind == wire.INIT_FAILED:
            self._init_failed = True
            with self._lock:
                self._fail_all(partial(pickling.load_error, text, message))
        elif kind == wire.SEND_FAILED:
            self._listener.failed(partial(pickling.load_error, text, message))
        else:
            raise ActorError(f"a frame has the kind {kind}, which no actor sends; close the link.")

    def _take_item(self, stream: Future[Any] | OpenStream, text: str, message: pickling.Message) -> None:
        if not (isinstance(stream, OpenStream) and text.isdecimal()):
            raise ActorError(f"a frame is item {text[:20]!r} of {stream.method}(), no stream; close the link.")
        stream.feed(int(text), partial(self._value, message, stream.method))

    def _value(self, message: pickling.Message, method: str) -> Outcome[Any]:
        try:
            return Ok(pickling.loads(message) if message[0] else None)
        except Exception as error:
            error.add_note(f"while unpickling the result of {self._name}.{method}()")
            return Err(error)

    def _fail_all(self, end: Callable[[], Err]) -> None:
        """From now on every call gets `end`, unless an earlier end holds already. Holds the lock."""
        if self._end is None:
            self._end = end
        if not self.ready.done():
            self.ready.settle(self._end)
        for waiting in self._pending.values():
            waiting.settle(self._end)
        self._give_place()
        self._pending.clear()

    def _give_place(self) -> None:
        """Have who waits for a place look again. Holds the lock; an interrupt after this must not matter."""
        if self._place is not None:
            self._place.settle(nothing)
            self._place = None

    def _current_method(self) -> str | None:
        """Return what runs, or runs next: calls are answered in order. Holds the lock."""
        if not self.ready.done():
            return "__init__" if self.pid is not None else None
        return next((waiting.method for waiting in self._pending.values()), None)

    def _on_no_start(self) -> None:
        self.die("was not started in time by the forkserver, which is stopped or still importing")
