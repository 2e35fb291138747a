"""An actor in another process, from the caller's side: its pending calls and streams, and its end.

How frames get there, and how one hears of the end, is a matter of the engine: LocalActor, RemoteActor.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from rlx.actors.channel import Channel
from rlx.actors.engines import pickling, wire
from rlx.actors.engines.link import Link
from rlx.actors.engines.memory import Parcel
from rlx.actors.engines.wire import Frame, Lent
from rlx.actors.future import Err, Future, Ok, Outcome, nothing, wait
from rlx.actors.interface import ActorSpec, ActorState, Listener, Slot
from rlx.actors.stream import OpenStream, Stream
from rlx.errors import ActorBusy, ActorError, CallCancelled

if TYPE_CHECKING:
    from rlx.actors.engines.local import LocalEngine

_ANSWERS = {wire.REPLY, wire.ERROR, wire.CANCELLED, wire.ITEM}


class ProcessActor:
    """`post`, `stream` and `state` are for callers, what is told of by frames and deaths for the reactor's thread."""

    slot: Slot
    _where = ""
    """Where it is, for errors: " on NAME", or nothing where that is clear."""

    def __init__(
        self, engine: LocalEngine, spec: ActorSpec, listener: Listener, link: Link, first_call: int = 0
    ) -> None:
        """Calls are numbered from `first_call` + 1 on: where many actors share a link, it says whose a call is."""
        self._engine, self._reactor, self._link, self._listener = engine, engine.reactor, link, listener
        self._name, self._max_pending = spec.name, spec.max_pending
        self.pid: int | None = None
        self.ready: Future[None] = Future(spec.name, "__init__")
        self.gone: Future[None] = Future(spec.name, "end")
        self._lock = threading.Lock()  # of the order of frames, and of the moment after which no call is answered
        self._place: Future[None] | None = None  # settled by the next answer: somebody waits for it, to call on
        self._pending: dict[int, Future[Any] | OpenStream] = {}  # by call id, oldest first
        self._calls = first_call
        self._room: Future[None] | None = None  # while callers are to wait, as its node says
        self._end: Callable[[], Err] | None = None  # what every call gets from that moment on
        self._init_failed = False
        self._progress = time.monotonic()  # when it was last known to have nothing older to do

    # What an engine has to say.

    def _before_frame(self) -> None:
        """Raise ActorError in a process that was forked from the driver."""
        raise NotImplementedError

    def _lend(self, parcel: Parcel) -> Sequence[Lent | None] | None:
        """Return where the buffers lie that do not travel in the frame."""
        raise NotImplementedError

    def _open(self, frame: Frame) -> pickling.Message:
        """Return the message of a frame that has come."""
        raise NotImplementedError

    def _hand_over(self, channels: Sequence[Channel]) -> None:
        """Have the actor know channels before the call that brings them. Holds the lock."""
        raise NotImplementedError

    # Calls.

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
        self._before_frame()
        if len(self._pending) >= self._max_pending or self._link.is_full or self._room is not None:
            self._wait_for_room()
        places = self._lend(message) if message.message[1] else None
        with self._lock:
            if self._end is not None:
                return self._end  # what was lent goes with the link
            if message.channels:
                self._hand_over(message.channels)
            call_id, urgent = self._next_call(), not self._pending
            try:
                if answer is not None:
                    answer.where = self._where
                if isinstance(answer, Future):
                    self._pending[call_id] = answer
                    answer.lead = self._link.lead
                    answer.request_cancel = partial(self._cancel, call_id)
                elif answer is not None:
                    # Not a finalizer: it could come while this thread has the lock, and wait for it for ever.
                    drop = partial(self._reactor.post, partial(self._cancel, call_id))
                    self._pending[call_id] = OpenStream(method, weakref.ref(answer, lambda _: drop()))
                    answer.grant, answer.cancel = partial(self._grant, call_id), partial(self._cancel, call_id)
                self._link.write(wire.encode(kind, call_id, text, message.message, places), urgent)
            except BaseException:  # an interrupt: written or not, nobody will ever ask for the answer
                self._pending.pop(call_id, None)
                raise
        return None

    def state(self) -> ActorState:
        """Return the state now."""
        with self._lock:
            end, pending = self._end, len(self._pending)
            method = None if end is not None else self._current_method()
        if end is not None:
            outcome, status = end(), "failed" if self._init_failed else "dead"
            return ActorState(self._name, status, self.pid, 0, None, str(outcome.error))
        return ActorState(self._name, "alive" if self.ready.done() else "starting", self.pid, pending, method, None)

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
        room = self._room
        if not self._link.wait_for_room(timeout_s) or not (room is None or wait([room], 1, timeout_s)[0]):
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

    def _cancel(self, call_id: int) -> None:
        self._tell(wire.CANCEL, call_id, "")

    def _grant(self, call_id: int, count: int) -> None:
        self._tell(wire.CREDIT, call_id, str(count))

    def _tell(self, kind: int, call_id: int, text: str) -> None:
        self._before_frame()
        with self._lock:
            if self._end is None:
                self._link.write(wire.encode(kind, call_id, text))

    def _take(self, frame: Frame) -> None:
        kind, call_id = frame.kind, frame.call_id
        self._progress = time.monotonic()
        message = self._open(frame)
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
        self._make_room()
        self._pending.clear()

    def _give_place(self) -> None:
        """Have who waits for a place look again. Holds the lock; an interrupt after this must not matter."""
        if self._place is not None:
            self._place.settle(nothing)
            self._place = None

    def _make_room(self) -> None:
        """Have who waits for room call on."""
        if self._room is not None:
            self._room.settle(nothing)
            self._room = None

    def _current_method(self) -> str | None:
        """Return what runs, or runs next: calls are answered in order. Holds the lock."""
        if not self.ready.done():
            return "__init__" if self.pid is not None else None
        return next((waiting.method for waiting in self._pending.values()), None)
