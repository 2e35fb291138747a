"""The actor's end of its link: frames that have come in, cancellations and credits that overtake them."""

from __future__ import annotations

import collections
import select
import socket
import threading
import time

from rlx.actors.engines import pickling, wire
from rlx.actors.engines.memory import ActorMemory
from rlx.actors.engines.wire import Frame, FrameReader, Outbox
from rlx.errors import ObjectMemoryFull

READ_AHEAD_FRAMES = 1024
LOOK_EVERY_S = 20e-6  # less than it takes another process to cancel anything


class ActorLink:
    """Calls are read by one thread at a time and answered by any."""

    def __init__(self, sock: socket.socket, memory: ActorMemory) -> None:
        self.sock, self.memory = sock, memory
        self._reader, self._outbox = FrameReader(sock), Outbox(sock)
        self._frames: collections.deque[Frame] = collections.deque()
        self._cancelled: set[int] = set()  # calls that wait or run
        self._open: set[int] = set()  # calls that have come in and are not answered
        self._credits: dict[int, int] = {}
        self._looked_at = 0.0
        self._poll = select.poll()
        self._poll.register(sock, select.POLLIN)
        self._reading, self._sending = threading.Lock(), threading.Lock()
        self.news = threading.Condition()  # of cancellations and credits, for other threads than the reading one

    def receive(self) -> Frame | None:
        """Return the next call, None when the driver is gone."""
        # So that a cancellation overtakes the call it is for; not before every one of many short calls.
        if 0 < len(self._frames) < READ_AHEAD_FRAMES and time.monotonic() > self._looked_at + LOOK_EVERY_S:
            self.look()
        while not self._frames:
            if not self.read():
                return None
        return self._frames.popleft()

    def next_received(self) -> Frame | None:
        """Return the next call that `read` has taken in, None if there is none."""
        return self._frames.popleft() if self._frames else None

    def look(self) -> None:
        """Take in what has arrived, without waiting; nothing while another thread does."""
        self._looked_at = time.monotonic()
        if self._reading.acquire(blocking=False):
            try:
                if self._poll.poll(0):
                    self._take_in(socket.MSG_DONTWAIT)
            except BlockingIOError:
                pass
            finally:
                self._reading.release()

    def read(self, flags: int = 0) -> bool:
        """Wait for something and take it in; False when the driver is gone."""
        with self._reading:
            return self._take_in(flags)

    def _take_in(self, flags: int) -> bool:
        more = self._reader.read(flags)
        frames = self._reader.frames
        if frames:
            with self.news:
                for frame in frames:
                    self._accept(frame)
                frames.clear()
        return more

    def send(self, kind: int, call_id: int = 0, text: str = "", message: pickling.Message = pickling.EMPTY) -> None:
        """Write a frame; waits for the driver, which always reads."""
        message, places = self.memory.lend(message)
        parts = wire.encode(kind, call_id, text, message, places)
        with self._sending:
            self._outbox.add(parts)
            self._outbox.flush()

    def send_error(self, kind: int, call_id: int, error: BaseException, where: str) -> None:
        """Send an error and its traceback; only the text if it carries more than the object memory holds."""
        text, message = pickling.dump_error(error, where)
        try:
            self.send(kind, call_id, text, message)
        except ObjectMemoryFull as full:
            self.send(kind, call_id, f"{text}\n(the error itself cannot be sent: {full})")

    def is_cancelled(self, call_id: int) -> bool:
        """Return whether the caller has taken the call back."""
        return call_id in self._cancelled

    def credits(self, call_id: int) -> int:
        """Return how many items a stream may send."""
        return self._credits.get(call_id, 0)

    def spend_credit(self, call_id: int) -> None:
        """Note that an item has been sent."""
        with self.news:
            self._credits[call_id] -= 1

    def close_call(self, call_id: int) -> None:
        """The call has been answered."""
        self._open.discard(call_id)
        if self._cancelled or self._credits:
            with self.news:
                self._cancelled.discard(call_id)
                self._credits.pop(call_id, None)

    def _accept(self, frame: Frame) -> None:
        if frame.kind == wire.CANCEL:
            if frame.call_id in self._open:
                self._cancelled.add(frame.call_id)
        elif frame.kind == wire.CREDIT:
            if frame.call_id in self._open:
                self._credits[frame.call_id] = self._credits.get(frame.call_id, 0) + int(frame.text)
        else:
            if frame.kind == wire.STREAM:
                number, _, frame.text = frame.text.partition(" ")
                self._credits[frame.call_id] = int(number)
            if frame.kind != wire.SEND:
                self._open.add(frame.call_id)
            self._frames.append(frame)
            return
        self.news.notify_all()
