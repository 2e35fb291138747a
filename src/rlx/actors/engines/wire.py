"""Frames on a stream socket: a fixed header with 64-bit sizes, a short text, a pickle body, and its buffers.

Outbox writes frames and FrameReader cuts them; both sides of a link use both. Nothing is unpickled here.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from rlx.actors.engines.pickling import EMPTY, Buffer, Message
from rlx.errors import ActorError

# To the actor; each says whose text and message it carries.
SPAWN, CALL, SEND, CANCEL, STOP = range(5)  # JSON + what to make; method + arguments, twice; nothing; nothing
# From the actor.
READY, INIT_FAILED, REPLY, ERROR, SEND_FAILED, CANCELLED = range(10, 16)  # errors: traceback + the exception

MAGIC, VERSION = b"rx", 1
HEADER = struct.Struct("<2sBBIIQQ")  # magic, version, kind, bytes of text, number of buffers, call id, bytes of body
WINDOW_BYTES = 256 * 1024
JOIN_BYTES = 64 * 1024  # a smaller body is copied behind its header: one part less to send
MAX_PARTS = 512  # of one sendmsg; the kernel takes 1024


class Frame(NamedTuple):
    """One message on a link."""

    kind: int
    call_id: int
    text: str
    message: Message


def encode(kind: int, call_id: int = 0, text: str = "", message: Message = EMPTY) -> list[Buffer]:
    """Return the parts of a frame, to be written one after another."""
    body, buffers = message
    data = text.encode("utf-8", "backslashreplace")
    sizes = [len(buffer) for buffer in buffers]
    head = HEADER.pack(MAGIC, VERSION, kind, len(data), len(sizes), call_id, len(body))
    head += struct.pack(f"<{len(sizes)}Q", *sizes) + data
    return [head + body, *buffers] if len(body) < JOIN_BYTES else [head, body, *buffers]


class Outbox:
    """Frames on their way into a socket. A KeyboardInterrupt at any instruction leaves the stream in step."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        # Parts not yet settled, and the counts that sendmsg returned since: one tuple, so both change together.
        self._queue: tuple[list[Buffer], list[int]] = ([], [])

    def add(self, parts: Sequence[Buffer]) -> None:
        """Queue a whole frame."""
        self._queue[0].extend(parts)

    def flush(self) -> bool:
        """Write; True once all is written, False when a non-blocking socket takes no more for now."""
        while True:
            self._settle()
            parts, written = self._queue
            if not parts:
                return True
            try:
                # extend(map(...)) stores the count without returning to the interpreter in between: a signal
                # handler that raises right after sendmsg would otherwise lose it, and bytes would be sent twice.
                written.extend(map(self._sock.sendmsg, (parts[:MAX_PARTS],), ((),), (socket.MSG_NOSIGNAL,)))
            except BlockingIOError:
                return False

    def _settle(self) -> None:
        """Drop what has been written."""
        parts, written = self._queue
        count, index = sum(written), 0
        while index < len(parts) and count >= len(parts[index]):
            count -= len(parts[index])
            index += 1
        rest = parts[index:]
        if count:
            rest[0] = memoryview(rest[0])[count:]
        self._queue = (rest, [])


class FrameReader:
    """Cuts a stream into frames; what does not fit the window is received straight into its final memory."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._window = _allocate(WINDOW_BYTES)
        self._filled = 0
        self._partial: _Partial | None = None

    def read(self, flags: int = 0) -> list[Frame] | None:
        """Return the frames that one recv completed, perhaps none; None at the end of the stream."""
        hole = self._window[self._filled :] if self._partial is None else self._partial.hole()
        assert hole is not None
        count = self._sock.recv_into(hole, 0, flags)
        if count == 0:
            return None
        if self._partial is None:
            self._filled += count
            return self._cut()
        self._partial.advance(count)
        return self._completed()

    def _cut(self) -> list[Frame]:
        frames: list[Frame] = []
        start = 0
        while self._filled - start >= HEADER.size and self._partial is None:
            header = _unpack_header(self._window[start : start + HEADER.size])
            start += HEADER.size
            kind, text_size, buffer_count, call_id, body_size = header
            if buffer_count == 0 and self._filled - start >= text_size + body_size:
                text = str(self._window[start : start + text_size], "utf-8")
                start += text_size
                frames.append(Frame(kind, call_id, text, (bytes(self._window[start : start + body_size]), ())))
                start += body_size
            else:
                self._partial = _Partial(*header)
                start += self._partial.absorb(self._window[start : self._filled])
                frames += self._completed()
        rest = self._filled - start
        self._window[:rest] = bytes(self._window[start : self._filled])
        self._filled = rest
        return frames

    def _completed(self) -> list[Frame]:
        if self._partial is None or self._partial.hole() is not None:
            return []
        frame, self._partial = self._partial.frame(), None
        return [frame]


class _Partial:
    """A frame of which more is to come: first its head (sizes, text, body), then each buffer in its own memory."""

    def __init__(self, kind: int, text_size: int, buffer_count: int, call_id: int, body_size: int) -> None:
        self._kind, self._call_id = kind, call_id
        self._text_start = 8 * buffer_count
        self._body_start = self._text_start + text_size
        self._head = _allocate(self._body_start + body_size)
        self._buffers: list[memoryview] | None = None
        self._parts = [self._head]
        self._index = self._offset = 0

    def hole(self) -> memoryview | None:
        """Return the memory to be filled next, None when the frame is complete."""
        while True:
            if self._index == len(self._parts):
                if self._buffers is not None:
                    return None
                sizes = struct.unpack(f"<{self._text_start // 8}Q", self._head[: self._text_start])
                self._buffers = [_allocate(size) for size in sizes]
                self._parts += self._buffers
            elif self._offset < len(self._parts[self._index]):
                return self._parts[self._index][self._offset :]
            else:
                self._index, self._offset = self._index + 1, 0

    def advance(self, count: int) -> None:
        """Note that `count` bytes of the hole have been filled."""
        self._offset += count

    def absorb(self, data: memoryview) -> int:
        """Copy what belongs to this frame from the front of `data`; return how many bytes that was."""
        taken = 0
        while taken < len(data) and (hole := self.hole()) is not None:
            count = min(len(hole), len(data) - taken)
            hole[:count] = data[taken : taken + count]
            self.advance(count)
            taken += count
        return taken

    def frame(self) -> Frame:
        text = str(self._head[self._text_start : self._body_start], "utf-8")
        return Frame(self._kind, self._call_id, text, (self._head[self._body_start :], self._buffers or ()))


def _allocate(size: int) -> memoryview:
    return np.empty(size, np.uint8).data  # unlike bytearray(size) it is not zeroed first


def _unpack_header(data: memoryview) -> tuple[int, int, int, int, int]:
    magic, version, *header = HEADER.unpack(data)
    if (magic, version) != (MAGIC, VERSION):
        raise ActorError(
            f"a frame begins with {bytes(data[:3])!r}, not with {MAGIC!r} version {VERSION}; close the link."
        )
    return tuple(header)
