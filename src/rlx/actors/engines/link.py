"""The driver's end of a link: callers write, and replies are read by the reactor's thread or by a caller that waits.

A caller that waits for a reply reads the link itself: one wake-up a call and not two, which nearly doubles the rate of
synchronous calls. While it does, the reactor does not watch the link for reading. Whoever else waits on that link is
served by it, and by the reactor again as soon as it leaves. Nobody ever waits for somebody else to begin to read.
"""

from __future__ import annotations

import contextlib
import select
import socket
import threading
import time
from collections.abc import Callable

from rlx.actors.engines.pickling import Buffer
from rlx.actors.engines.reactor import READ, WRITE, Reactor
from rlx.actors.engines.wire import Frame, FrameReader, Outbox
from rlx.actors.future import Future
from rlx.errors import ActorError

CORK_BYTES = 32 * 1024  # of frames that wait for company
BACKLOG_BYTES = 64 * 2**20  # of frames that the socket has not taken, above which writers wait


class Link:
    """`take(frame)` is called for each frame in order, perhaps twice when an interrupt cut the first call short.

    `lost(how)` is called once, in the reactor's thread, when nothing more can come.
    """

    def __init__(self, reactor: Reactor, take: Callable[[Frame], None], lost: Callable[[str], None]) -> None:
        self._reactor, self._take, self._lost = reactor, take, lost
        self._sock, self.far_end = socket.socketpair()
        self._sock.setblocking(False)
        self._fd = self._sock.fileno()
        self._reader, self._outbox = FrameReader(self._sock), Outbox(self._sock)
        self._poll = select.poll()
        self._poll.register(self._fd, READ)
        self._lock = threading.Lock()  # of what follows
        self._watched = False  # by the reactor
        self._corked = 0  # bytes of frames that the reactor will write, together, in a moment
        self._backlogged = False  # the rest of the outbox is the reactor's to write
        self._leader: int | None = None  # the thread that reads, if it is not the reactor's
        self._finished: Callable[[], None] | None = None
        self._how_lost = "closed its link"
        self._room = threading.Event()
        self._room.set()

    def open(self) -> None:
        """Have the reactor watch."""
        with self._lock:
            self._watched = True
            self._reactor.register(self._fd, self._on_ready)

    def write(self, parts: list[Buffer], urgent: bool = True) -> None:
        """Write what the socket takes; the reactor writes the rest. The caller sees to the order.

        A frame that is not urgent, because the actor is busy with others, may wait half a millisecond for company:
        one system call and one wake-up for many frames.
        """
        with self._lock:
            self._outbox.add(parts)
            if self._backlogged or not self._watched:
                return
            if not urgent and self._corked < CORK_BYTES:
                if not self._corked:
                    self._reactor.soon(self._uncork)
                self._corked += sum(map(len, parts))
                return
            self._flush()

    def full(self) -> bool:
        """Return whether so much waits for the socket that writers should."""
        return not self._room.is_set()

    def wait_for_room(self, timeout_s: float) -> bool:
        """Wait until the backlog is small; False after timeout_s."""
        return self._room.wait(timeout_s)

    def lead(self, future: Future[object], deadline: float | None) -> None:
        """Read in this thread until the future is done; return early if another thread reads, or at the end."""
        me = threading.get_ident()
        try:
            with self._lock:
                if self._leader not in (None, me) or not self._watched or self._finished is not None:
                    return
                if self._corked:
                    self._flush()
                self._leader = me
                self._arm()
            while not future.done():
                patience_ms = None if deadline is None else max(0.0, deadline - time.monotonic()) * 1e3
                if not self._poll.poll(patience_ms) or not self._read():
                    return
        finally:
            with self._lock:
                if self._leader == me:
                    self._leader = None
                    self._arm()
                    if self._finished is not None:
                        self._reactor.set_deadline(self, 0.0, self._finish)

    def finish(self, then: Callable[[], None]) -> None:
        """Nobody writes to us any more: take in what is still in the socket, then call `then`. Only the reactor."""
        with self._lock:
            if self._finished is not None:
                return
            self._finished = then
            with contextlib.suppress(OSError):  # not connected any more
                self._sock.shutdown(socket.SHUT_RD)  # so that a leader finds the end, whoever holds the far one open
            leader = self._leader
        if leader is None:
            self._finish()

    def close(self) -> None:
        """Let go of the socket. Only the reactor, after `finish`."""
        with self._lock:
            if self._watched:
                self._watched = False
                self._reactor.unregister(self._fd)
            self._sock.close()
            self._room.set()

    def _finish(self) -> None:
        try:
            while self._read():
                pass
        except BlockingIOError:
            pass
        assert self._finished is not None
        self._finished()

    def _read(self) -> bool:
        """Receive once and deal with the frames; False if nothing more can come."""
        try:
            more = self._reader.read()
            frames = self._reader.frames
            while frames:
                self._take(frames[0])
                frames.pop(0)
            return more
        except ConnectionError:
            return False
        except ActorError as error:
            self._how_lost = f"sent what is no frame ({error})"
            self._reactor.set_deadline(self, 0.0, self._lose)
            return False

    def _on_ready(self, events: int) -> None:
        if events & WRITE:
            self._write_rest()
        if not events & ~WRITE:
            return
        with self._lock:
            if self._leader is not None or not self._watched:
                return
            self._leader = threading.get_ident()
        try:
            more = self._read()
        except BlockingIOError:
            return  # a leader was faster
        finally:
            with self._lock:
                self._leader = None
        if not more:
            self._lose()

    def _lose(self) -> None:
        """Stop watching a link on which nothing comes any more."""
        with self._lock:
            if not self._watched:
                return
            self._watched = False
            self._reactor.unregister(self._fd)
            self._room.set()
        self._lost(self._how_lost)

    def _uncork(self) -> None:
        with self._lock:
            if self._corked and not self._backlogged and self._watched:
                self._flush()

    def _flush(self) -> None:
        """Write what the socket takes, and have the reactor write the rest. Holds the lock."""
        finished, self._corked = False, 0
        try:
            finished = self._outbox.flush()
        except ConnectionError:
            finished = True  # the end of the link is seen by who reads, and settles every call
        finally:  # also after a KeyboardInterrupt: the frame is queued, and a torn one would spoil the link
            if not finished:
                self._backlogged = True
                self._arm()
                if self._outbox.waiting_bytes() > BACKLOG_BYTES:
                    self._room.clear()

    def _write_rest(self) -> None:
        with self._lock:
            try:
                finished = self._outbox.flush()
            except ConnectionError:
                finished = True
            if finished:
                self._backlogged = False
                self._arm()
            if finished or self._outbox.waiting_bytes() < BACKLOG_BYTES // 2:
                self._room.set()

    def _arm(self) -> None:
        """Tell the reactor what to watch for. Holds the lock."""
        if self._watched:
            reading = 0 if self._leader is not None else READ
            self._reactor.watch(self._fd, reading | (WRITE if self._backlogged else 0))
