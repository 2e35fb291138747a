"""The driver's end of a link: callers write, and replies are read by the reactor's thread or by a caller that waits.

A caller that waits for a reply reads the link itself: one wake-up a call and not two, which nearly doubles the rate of
synchronous calls. While it does, the reactor does not watch the link for reading. Whoever else waits on that link is
served by it, and by the reactor again as soon as it leaves. Nobody ever waits for somebody else to begin to read.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

from rlx.actors.engines.pickling import Buffer
from rlx.actors.engines.reactor import READ, WRITE, Reactor
from rlx.actors.engines.wire import Allocate, Frame, FrameReader, Outbox
from rlx.actors.future import Future, nothing, seconds_to, wait
from rlx.errors import ActorError

CORK_BYTES = 8 * 1024  # of frames that wait for company; more, and the actor has nothing to do meanwhile
BACKLOG_BYTES = 64 * 2**20  # of frames that the socket has not taken, above which writers wait


class Link:
    """`take(frame)` is called for each frame in order, perhaps twice when an interrupt cut the first call short.

    `lost(how)` is called once, in the reactor's thread, when nothing more can come. `sock` does not block.
    """

    def __init__(
        self,
        reactor: Reactor,
        sock: Any,
        take: Callable[[Frame], None],
        lost: Callable[[str], None],
        allocate: Allocate | None = None,
    ) -> None:
        """allocate: where the buffers of frames that come are put, by default into memory of their own."""
        self._reactor, self._sock, self._take, self._lost = reactor, sock, take, lost
        # Bytes that a TLS socket has decrypted and nobody has read: the kernel does not tell of them.
        self._decrypted: Callable[[], int] = getattr(sock, "pending", int)
        self.heard_at = time.monotonic()
        """When something came last."""
        self._fd, self._pid = self._sock.fileno(), os.getpid()
        self._reader, self._outbox = FrameReader(self._sock, allocate=allocate), Outbox(self._sock)
        self._poll = select.poll()
        self._poll.register(self._fd, READ)
        self._lock = threading.Lock()  # of what follows
        self._watched = False  # by the reactor
        self._paused = False  # nothing is to be read for now
        self._corked = 0  # bytes of frames that the reactor will write, together, in a moment
        self._backlogged = False  # the rest of the outbox is the reactor's to write
        self._backlog_bytes = 0
        self._leader: int | None = None  # the thread that reads, if it is not the reactor's
        self._how_lost = "closed its link"
        self._ending = False
        self._then: Callable[[], None] | None = None  # what is left to do at the end
        self._room: Future[None] | None = None  # while writers must wait

    def open(self) -> None:
        """Have the reactor watch."""
        with self._lock:
            self._watched = True
            self._reactor.register(self._fd, self._on_ready)
        if self._decrypted():  # with the end of the handshake, and nothing more may come for long
            self._reactor.post(lambda: self._on_ready(READ))

    def write(self, parts: list[Buffer], urgent: bool = True, stable: bool = False) -> None:
        """Write what the socket takes; the reactor writes the rest. The caller sees to the order.

        A frame that is not urgent, because the actor is busy with others, may wait half a millisecond for company:
        one system call and one wake-up for many frames. What is written later is copied first, so the buffers are
        the caller's again; unless it says that they are stable: nobody ever changes them.
        """
        with self._lock:
            if self._ending:  # nobody would ever write it
                return
            if self._backlogged:
                self._outbox.add(parts if stable else [bytes(part) for part in parts])
                self._backlog_bytes += sum(map(len, parts))
                if self._backlog_bytes > BACKLOG_BYTES and self._room is None:
                    self._room = Future("link", "room")
                self._arm()  # again, for an interrupt may have cut it short
                return
            if not urgent and self._watched:
                size = sum(map(len, parts))
                if self._corked + size < CORK_BYTES:
                    if self._corked == 0:  # first: an interrupt behind this line costs a look for nothing
                        self._reactor.soon(self._uncork)
                    self._corked += size
                    self._outbox.add([bytes(part) for part in parts])
                    return
            self._flush(parts, stable)

    @property
    def _unfinished(self) -> bool:
        """Whether there is something to read of which poll() does not know."""
        return self._reader.unfinished or self._decrypted() > 0

    @property
    def is_backlogged(self) -> bool:
        """Whether the socket has not taken all yet."""
        return self._backlogged

    @property
    def is_full(self) -> bool:
        """Whether writers are to wait: the actor has left much unread."""
        return self._room is not None

    def when_room(self, then: Callable[[], object]) -> None:
        """Have the reactor call `then()` when the backlog is small, or at the end of the link."""
        room = self._room
        if room is None:
            self._reactor.post(then)
        else:
            room.when_done(lambda: self._reactor.post(then))

    def read_on(self, reading: bool) -> None:
        """Read on, or leave to its socket what comes, which holds up who sends it. Only for links that none leads."""
        with self._lock:
            self._paused = not reading
            self._arm()

    def wait_for_room(self, timeout_s: float) -> bool:
        """Wait until the backlog is small; False after timeout_s."""
        room = self._room  # a future and not an Event, which an interrupt at the wrong moment would lock for ever
        return room is None or bool(wait([room], 1, timeout_s)[0])

    def lead(self, future: Future[object], deadline: float | None) -> None:
        """Read in this thread until the future is done; return early if another thread reads, or at the end."""
        if os.getpid() != self._pid:
            raise ActorError(f"the answer of {future.actor}.{future.method}() comes to process {self._pid}, not here.")
        me = threading.get_ident()
        try:
            with self._lock:
                if self._leader not in (None, me) or not self._watched or self._ending:
                    return
                if self._corked:
                    self._flush([])
                self._leader = me
                self._arm()
            while not future.done():
                if not self._unfinished and not self._poll.poll(seconds_to(deadline) * 1e3):
                    if deadline is not None and time.monotonic() >= deadline:
                        return
                else:
                    with contextlib.suppress(BlockingIOError):  # of a record of TLS only the beginning has come
                        if not self._read():
                            return
        finally:
            try:
                self._stop_leading(me)
            except BaseException:  # an interrupt, here of all places: nobody else would ever read again
                self._stop_leading(me)
                raise

    def finish(self, then: Callable[[], None]) -> None:
        """Nobody writes to us any more: take in what is still in the socket, then call `then`. Only the reactor."""
        with self._lock:
            if self._ending:
                return
            self._ending, self._then = True, then
            with contextlib.suppress(OSError):  # not connected any more
                self._sock.shutdown(socket.SHUT_RD)  # so that a leader finds the end, whoever holds the far one open
            self._make_room()
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
            self._make_room()

    def _finish(self) -> None:
        then, self._then = self._then, None
        if then is None:
            return
        try:
            while self._read():
                pass
        except BlockingIOError:
            pass
        then()

    def _stop_leading(self, me: int) -> None:
        """Give the link back to the reactor. May be called again where an interrupt has cut the first call short."""
        with self._lock:
            if self._leader not in (None, me):
                return
            self._leader = None
            self._arm()
            if self._ending:
                self._reactor.post(self._finish)
            elif self._unfinished:  # an interrupt has left frames that the socket does not tell of
                self._reactor.post(lambda: self._on_ready(READ))

    def _read(self) -> bool:
        """Receive once and deal with the frames; False if nothing more can come."""
        try:
            frames = self._reader.frames
            more = bool(frames) or self._reader.read()
            self.heard_at = time.monotonic()
            frames = self._reader.frames
            while frames:
                self._take(frames[0])
                frames.pop(0)
            return more
        except ConnectionError:
            return False
        except ActorError as error:
            self._how_lost = f"sent what is no frame ({error})"
        except (ValueError, TypeError, LookupError) as error:  # it would be taken again and again
            self._how_lost = f"sent what is not understood ({error!r})"
        self._reactor.post(self._lose)
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
            while more and self._decrypted():
                more = self._read()
        except BlockingIOError:
            return  # a leader was faster
        finally:
            with self._lock:
                self._leader = None
                if self._ending:  # as a frame has said that was taken here
                    self._reactor.post(self._finish)
        if not more:
            self._lose()

    def _lose(self) -> None:
        """Stop watching a link on which nothing comes any more."""
        with self._lock:
            if not self._watched:
                return
            self._watched = False
            self._reactor.unregister(self._fd)
            self._make_room()
        self._lost(self._how_lost)

    def _uncork(self) -> None:
        with self._lock:
            if self._corked and not self._backlogged:
                self._flush([])

    def _flush(self, parts: list[Buffer], stable: bool = True) -> None:
        """Write these too, as far as the socket takes it, and have the reactor write the rest. Holds the lock."""
        finished, self._corked = False, 0
        try:
            self._outbox.add(parts)
            finished = not self._watched or self._outbox.flush()
        except ConnectionError:
            finished = True  # the end of the link is seen by who reads, and settles every call
        finally:  # also after a KeyboardInterrupt: the frame is queued, and a torn one would spoil the link
            if not finished:
                self._backlogged = True
                if not stable:
                    self._outbox.copy_rest()
                self._backlog_bytes = self._outbox.waiting_bytes()
                self._arm()

    def _write_rest(self) -> None:
        with self._lock:
            try:
                finished = self._outbox.flush()
            except ConnectionError:
                finished = True
            self._backlog_bytes = 0 if finished else self._outbox.waiting_bytes()
            if finished:
                self._backlogged = False
                self._arm()
            if self._backlog_bytes < BACKLOG_BYTES // 2:
                self._make_room()

    def _make_room(self) -> None:
        if self._room is not None:
            self._room.settle(nothing)
            self._room = None

    def _arm(self) -> None:
        """Tell the reactor what to watch for. Holds the lock."""
        if self._watched:
            # While the reactor reads, too: it would not begin again, and an actor whose replies nobody reads does not
            # read either, so that what is to be written would wait for ever.
            reading = READ if self._leader in (None, self._reactor.ident) and not self._paused else 0
            self._reactor.watch(self._fd, reading | (WRITE if self._backlogged else 0))
