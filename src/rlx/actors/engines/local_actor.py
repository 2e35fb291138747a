"""One process actor, from the driver: its link, its pending calls, the last lines of its stderr, and its end."""

from __future__ import annotations

import collections
import os
import socket
import sys
import threading
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from rlx.actors.engines import pickling, wire
from rlx.actors.engines.death import describe
from rlx.actors.engines.reactor import READ, WRITE
from rlx.actors.engines.wire import Frame, FrameReader, Outbox
from rlx.actors.future import Err, Future, Ok
from rlx.actors.interface import ActorState, Listener
from rlx.errors import ActorDied, ActorError, CallCancelled, CallTimeout

if TYPE_CHECKING:
    from rlx.actors.engines.local import LocalEngine

STDERR_LINES = 20
STDERR_BYTES = 64 * 1024  # of one read, and of an unfinished line
EXIT_NEWS_S = 1.0  # from the end of the link to the forkserver's word on how the process ended


class LocalActor:
    """The driver's end of an actor: the EngineActor methods are for callers, the others for the reactor's thread."""

    def __init__(
        self,
        engine: LocalEngine,
        number: int,
        name: str,
        listener: Listener,
    ) -> None:
        self._engine, self._number, self._name = engine, number, name
        self._listener = listener
        self.pid: int | None = None
        self.ready: Future[None] = Future(name, "__init__")
        self.gone = threading.Event()
        self._lock = threading.Lock()  # of the outbox, and of the moment after which no call is answered
        self._pending: dict[int, Future[Any]] = {}  # by call id, oldest first
        self._calls = 0
        self._killed: str | None = None  # how the error of a wanted death describes it
        self._end: Callable[[], Err] | None = None  # what every call gets from that moment on
        self._init_failed = False
        self._how: str | None = None  # how the process ended
        self._stderr, self._stderr_end = os.pipe()
        os.set_blocking(self._stderr, False)
        self._lines: collections.deque[str] = collections.deque(maxlen=STDERR_LINES)
        self._line = b""  # the unfinished one
        self._sock, self._sock_end = socket.socketpair()
        self._sock.setblocking(False)
        self._reader, self._outbox = FrameReader(self._sock), Outbox(self._sock)
        self._backlogged = False  # the rest of the outbox is the reactor's to write
        self._watched: set[int] = set()

    def start(self, settings: str, message: pickling.Message, patience_s: float) -> tuple[int, int]:
        """Put the first frame into the link; return the ends of link and stderr that the new process needs."""
        self._engine.reactor.set_deadline(self, patience_s, self._on_no_start)
        with self._lock:
            for fd, handler in ((self._sock.fileno(), self._on_link), (self._stderr, self._on_stderr)):
                self._watched.add(fd)
                self._engine.reactor.register(fd, handler)
            self._write(wire.encode(wire.SPAWN, 0, settings, message))
        return self._sock_end.fileno(), self._stderr_end

    def close_far_ends(self) -> None:
        """Let go of what the new process has, or will never have."""
        self._sock_end.close()
        os.close(self._stderr_end)

    def abandon(self) -> None:
        """The spawn has failed: have the reactor clean up."""
        self._engine.reactor.set_deadline(self, 0.0, partial(self.die, "could not be started"))

    def post(self, method: str, message: pickling.Message, future: Future[Any] | None) -> None:
        """Queue the call behind all earlier ones."""
        with self._lock:
            end = self._end
            if end is None:
                self._calls += 1
                call_id = self._calls
                if future is not None:
                    self._pending[call_id] = future
                    future.request_cancel = partial(self._cancel, call_id)
                self._write(wire.encode(wire.SEND if future is None else wire.CALL, call_id, method, message))
                return
        if future is not None:
            future.settle(end)
        else:
            self._listener.failed(end)

    def kill(self, timeout_s: float, how: str = "was ended by kill()") -> None:
        """Kill the process and return when it is gone."""
        if self.gone.is_set():
            return
        self._killed = how
        self._engine.kill(self._number, timeout_s)
        if not self.gone.wait(timeout_s):
            raise CallTimeout(f"actor {self._name} (process {self.pid}) is not gone {timeout_s:g} s after kill().")

    def stop(self) -> bool:
        """Ask the process to end behind all that was sent to it; False if it has calls to answer or never started."""
        with self._lock:
            if self.pid is None or self._pending or self._end is not None:
                return False
            self._write(wire.encode(wire.STOP))
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
        self._engine.reactor.clear_deadline(self)

    def die(self, how: str) -> None:
        """The process has ended: give out what it still sent, then fail every call that is left."""
        if self._how is not None:
            return
        self._drain()
        self._how = how
        if self._killed and "SIGKILL" in how:
            self._how = self._killed
        elif self._engine.closing:
            self._how = "was closed with its runtime"
        with self._lock:
            method = self._current_method()
            text = describe(self._name, self.pid, self._how, method, len(self._pending) - 1, self._lines)
        died = lambda: Err(ActorDied(text))  # noqa: E731  a fresh error for each caller's traceback
        self._listener.exited(self._end or died)  # first: who hears of the death from a call may call again at once
        with self._lock:
            self._fail_all(died)
            for fd in self._watched:
                self._engine.reactor.unregister(fd)
            self._watched.clear()
            self._sock.close()
            os.close(self._stderr)
        self._engine.reactor.clear_deadline(self)
        self._engine.forget(self._number)
        self.gone.set()

    def _write(self, parts: list[pickling.Buffer]) -> None:
        """Write what the socket takes; the reactor writes the rest. Holds the lock."""
        self._outbox.add(parts)
        if self._backlogged or self._sock.fileno() not in self._watched:
            return
        finished = False
        try:
            finished = self._outbox.flush()
        except ConnectionError:
            finished = True  # the reactor sees the end of the link too, and settles every call
        finally:  # also after a KeyboardInterrupt: the frame is queued, and a torn one would spoil the link
            if not finished:
                self._backlogged = True
                self._engine.reactor.watch(self._sock.fileno(), READ | WRITE)

    def _cancel(self, call_id: int) -> None:
        with self._lock:
            if self._end is None:
                self._write(wire.encode(wire.CANCEL, call_id))

    def _on_link(self, events: int) -> None:
        if events & WRITE:
            self._write_rest()
        if not events & ~WRITE:
            return
        try:
            frames = self._reader.read()
        except BlockingIOError:
            return
        except ConnectionError:
            frames = None
        except ActorError as error:
            self._lose_link(f"sent what is no frame ({error})")
            return
        if frames is None:
            self._lose_link("closed its link")
        for frame in frames or ():
            self._take(frame)

    def _write_rest(self) -> None:
        with self._lock:
            try:
                finished = self._outbox.flush()
            except ConnectionError:
                finished = True
            if finished:
                self._backlogged = False
                self._engine.reactor.watch(self._sock.fileno(), READ)

    def _lose_link(self, how: str) -> None:
        """Wait for the forkserver's word on the end of the process; without it, end it ourselves."""

        def give_up() -> None:
            self._engine.kill(self._number, 0.0)
            self.die(how)

        with self._lock:
            self._watched.discard(self._sock.fileno())
            self._engine.reactor.unregister(self._sock.fileno())
        self._engine.reactor.set_deadline(self, EXIT_NEWS_S, give_up)

    def _take(self, frame: Frame) -> None:
        kind, call_id, text, message = frame
        if kind == wire.READY:
            self.ready.settle(lambda: Ok(None))
        elif kind == wire.INIT_FAILED:
            self._init_failed = True
            with self._lock:
                self._fail_all(partial(pickling.load_error, text, message))
        elif kind == wire.SEND_FAILED:
            self._listener.failed(partial(pickling.load_error, text, message))
        elif future := self._pop(call_id):
            if kind == wire.REPLY:
                what = f"the result of {self._name}.{future.method}()"
                future.settle(partial(pickling.load_outcome, message, what))
            elif kind == wire.ERROR:
                future.settle(partial(pickling.load_error, text, message))
            else:
                cancelled = f"{self._name}.{future.method}() was cancelled before it ran."
                future.settle(lambda: Err(CallCancelled(cancelled)))

    def _pop(self, call_id: int) -> Future[Any] | None:
        with self._lock:  # `state` may be looking
            return self._pending.pop(call_id, None)

    def _fail_all(self, end: Callable[[], Err]) -> None:
        """From now on every call gets `end`, unless an earlier end holds already. Holds the lock."""
        if self._end is None:
            self._end = end
        if not self.ready.done():
            self.ready.settle(self._end)
        for future in self._pending.values():
            future.settle(self._end)
        self._pending.clear()

    def _current_method(self) -> str | None:
        """Return what runs, or runs next: calls are answered in order. Holds the lock."""
        if not self.ready.done():
            return "__init__" if self.pid is not None else None
        return next((future.method for future in self._pending.values()), None)

    def _drain(self) -> None:
        """Take in all that the process sent before it ended."""
        try:
            while self._sock.fileno() in self._watched and (frames := self._reader.read()) is not None:
                for frame in frames:
                    self._take(frame)
        except (BlockingIOError, ConnectionError, ActorError):
            pass  # nothing more is there, or nothing whole
        for _ in range(STDERR_LINES):
            if self._stderr not in self._watched or not self._on_stderr(READ):
                break
        if self._line:
            self._show([self._line])

    def _on_stderr(self, _: int) -> bool:
        try:
            data = os.read(self._stderr, STDERR_BYTES)
        except BlockingIOError:
            return False
        if not data:
            self._watched.discard(self._stderr)
            self._engine.reactor.unregister(self._stderr)
            return False
        *lines, self._line = (self._line + data).split(b"\n")
        if len(self._line) > STDERR_BYTES:
            lines, self._line = [*lines, self._line], b""
        self._show(lines)
        return True

    def _show(self, lines: list[bytes]) -> None:
        texts = [line.decode("utf-8", "replace") for line in lines]
        self._lines.extend(texts)
        if texts:
            self._engine.events.post(_print_to_stderr, "".join(f"[{self._name}] {text}\n" for text in texts))

    def _on_no_start(self) -> None:
        self.die("was not started in time by the forkserver, which is stopped or still importing")


def _print_to_stderr(text: str) -> None:
    sys.stderr.write(text)
    sys.stderr.flush()
