"""Frames on a stream socket: a fixed header with 64-bit sizes, descriptors of buffers, a short text, a pickle body.

A buffer follows in the stream, or lies in memory that both sides share and only its place is told (rlx's arena).
Outbox writes frames and FrameReader cuts them; both sides of a link use both. Nothing is unpickled here.

An interrupt (a signal handler that raises) at any instruction leaves both in step: each step first makes the socket
call, whose count is stored without a return to the interpreter in between, and then commits with one assignment.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from rlx.actors.engines.pickling import EMPTY, Buffer, Message
from rlx.errors import ActorError

# To the actor; each says whose text and message it carries.
SPAWN, CALL, SEND, STREAM = range(4)  # JSON + what to make; method (STREAM: credits before it) + arguments
CANCEL, CREDIT, STOP = range(4, 7)  # of a call: nothing; number of items more; nothing
# From the actor.
READY, INIT_FAILED, REPLY, ERROR, SEND_FAILED, CANCELLED, ITEM = range(10, 17)  # errors: traceback + the exception
# Between machines, where one link carries the frames of many actors, told apart by the call id (rlx.actors.cluster).
OPEN, KILL, CHANNEL = range(20, 23)  # to a node: JSON; how the death is to be described; the name of a channel
STARTED, EXITED, STALLED, PRINTED = range(23, 27)  # from a node: process id; why; JSON; lines
PUBLISH, PING = range(27, 29)  # both ways: JSON + a version of a channel; nothing
JOIN, NODES = range(29, 31)  # to the head, and back when it has taken place; from the head: JSON
READERS = 31  # of a channel, to a node: its name; from it: JSON
PROJECT = 32  # from a node: it needs the files of the project; to it: these
ASK = 35  # to a node: a command that looks, as JSON; from it: exit code, output and errors for each runtime
KEEP, DROP = range(36, 38)  # to a node: a buffer that later frames refer to as a lease of this call id; nothing
FULL, ROOM = range(33, 35)  # from a node: no more calls for this actor for now, which leaves them unread; more again

MAGIC = b"rx\x02"  # and the version
SHARED_BODY = 0x80  # set in the kind: the body is empty, and the last buffer is it
HEADER = struct.Struct("<3sBIIQQ")  # magic, kind, bytes of text, number of buffers, call id, bytes of body
PLACE = struct.Struct("<QQI")  # of a buffer: bytes, offset in shared memory, lease + 1; lease 0: it follows the body
WINDOW_BYTES = 256 * 1024
MAX_PARTS = 512  # of one sendmsg; the kernel takes 1024
MAX_TEXT, MAX_BUFFERS = 64 * 2**20, 2**20
MAX_FRAME_BYTES = 2**40

Lent = tuple[int, int, int]
"""A buffer in shared memory: its bytes, its offset, its lease."""
Allocate = Callable[[Sequence[int]], list[tuple[memoryview, memoryview]]]
"""Returns memory of these sizes in bytes: each as it is received into, and as it is shown, which keeps it."""
Borrow = Callable[[int, Sequence[tuple[int, int]]], list[memoryview]]
"""Returns views of the (offset, size) spans of a lease; the lease ends with the last of them."""


class Frame:
    """One message on a link."""

    __slots__ = ("_body", "_body_is_last", "_message", "_pieces", "call_id", "kind", "text")

    def __init__(
        self, kind: int, call_id: int, text: str, body: Buffer, pieces: Sequence[memoryview | Lent] = ()
    ) -> None:
        self.kind, self._body_is_last, self.call_id, self.text = kind & ~SHARED_BODY, kind & SHARED_BODY, call_id, text
        self._body, self._pieces = body, pieces
        self._message: Message | None = None if pieces or self._body_is_last else (body, ())

    def open(self, borrow: Borrow | None) -> Message:
        """Return the message, with views of the buffers in shared memory; each lease is taken once, here."""
        if self._message is None:
            views = self._views(borrow) if self._pieces else []
            if self._body_is_last and not views:
                raise ActorError("a frame has neither body nor buffers; close the link.")
            self._message = (views.pop(), views) if self._body_is_last else (self._body, views)
        return self._message

    def _views(self, borrow: Borrow | None) -> list[Buffer]:
        spans: dict[int, list[tuple[int, int]]] = {}
        for piece in self._pieces:
            if isinstance(piece, tuple):
                spans.setdefault(piece[2], []).append((piece[1], piece[0]))
        if not spans:
            return list(self._pieces)  # type: ignore[arg-type]
        if borrow is None:
            raise ActorError("a frame refers to shared memory and this link has none; close the link.")
        views = {lease: iter(borrow(lease, places)) for lease, places in spans.items()}
        return [next(views[piece[2]]) if isinstance(piece, tuple) else piece for piece in self._pieces]


def encode(
    kind: int, call_id: int = 0, text: str = "", message: Message = EMPTY, places: Sequence[Lent | None] | None = None
) -> list[Buffer]:
    """Return the parts of a frame, to be written one after another; `places[i]` says where buffer i lies if shared."""
    body, buffers = message
    data = text.encode("utf-8", "backslashreplace")
    if not buffers:
        return [HEADER.pack(MAGIC, kind, len(data), 0, call_id, len(body)) + data + body]
    if not body:
        kind |= SHARED_BODY
    pairs = list(zip(buffers, places or [None] * len(buffers), strict=True))
    descriptors = [
        PLACE.pack(len(buffer), 0, 0) if place is None else PLACE.pack(place[0], place[1], place[2] + 1)
        for buffer, place in pairs
    ]
    head = HEADER.pack(MAGIC, kind, len(data), len(buffers), call_id, len(body))
    return [b"".join([head, *descriptors, data, body]), *(buffer for buffer, place in pairs if place is None)]


class Outbox:
    """Frames on their way into a socket."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        # Parts not yet settled, and the counts that sendmsg returned since: one tuple, so both change together.
        self._queue: tuple[list[Buffer], list[int]] = ([], [])

    def add(self, parts: Sequence[Buffer]) -> None:
        """Queue a whole frame."""
        self._queue[0].extend(parts)

    def waiting_bytes(self) -> int:
        """Return about how many bytes are queued."""
        return sum(map(len, self._queue[0]))

    def copy_rest(self) -> None:
        """Have the queued parts be our own: who queued them may change the memory that they are views of."""
        if self._queue[1]:
            self._settle()
        self._queue = ([part if isinstance(part, bytes) else bytes(part) for part in self._queue[0]], [])

    def flush(self) -> bool:
        """Write; True once all is written, False when a non-blocking socket takes no more for now."""
        while True:
            if self._queue[1]:
                self._settle()
            parts, written = self._queue
            if not parts:
                return True
            try:
                if len(parts) == 1:  # as most are; send takes half the time
                    written.extend(map(self._sock.send, parts, (socket.MSG_NOSIGNAL,)))
                else:
                    written.extend(map(self._sock.sendmsg, (parts[:MAX_PARTS],), ((),), (socket.MSG_NOSIGNAL,)))
            except BlockingIOError:
                return False

    def _settle(self) -> None:
        """Drop what has been written."""
        parts, written = self._queue
        count, index = sum(written), 0
        if len(parts) == 1 and count == len(parts[0]):
            self._queue = ([], [])
            return
        while index < len(parts) and count >= len(parts[index]):
            count -= len(parts[index])
            index += 1
        rest = parts[index:]
        if count:
            rest[0] = memoryview(rest[0])[count:]
        self._queue = (rest, [])


class FrameReader:
    """Cuts a stream into frames; what does not fit the window is received straight into its final memory."""

    def __init__(self, sock: socket.socket, max_bytes: int = MAX_FRAME_BYTES, allocate: Allocate | None = None) -> None:
        """allocate: where the buffers of a frame go; by default into memory of their own."""
        self._sock = sock
        self._max_bytes, self._allocate = max_bytes, allocate or allocate_each
        self._window = _allocate(WINDOW_BYTES)
        self._state = _State(b"", None, [], [])

    @property
    def frames(self) -> list[Frame]:
        """The frames that have been cut and not yet taken, oldest first: pop(0) each when it is dealt with."""
        return self._state.frames

    @property
    def unfinished(self) -> bool:
        """Whether there is something that has been received and not dealt with: an interrupt came between."""
        return bool(self._state.counts or self._state.frames)

    def read(self, flags: int = 0) -> bool:
        """Receive once and cut; False at the end of the stream."""
        prefix, partial, counts, frames = self._state
        if not counts:
            hole = self._window[len(prefix) :] if partial is None else partial.hole()
            counts.extend(map(self._sock.recv_into, (hole,), (0,), (flags,)))
        if counts[0] == 0:
            counts.clear()
            return False
        if partial is None:
            cut, prefix, partial = self._cut(prefix, len(prefix) + counts[0])
        else:
            cut, partial = _grown(partial, counts[0])
        self._state = _State(prefix, partial, [], frames + cut)
        return True

    def _cut(self, prefix: bytes, filled: int) -> tuple[list[Frame], bytes, _Partial | None]:
        """Return the frames in the window's first `filled` bytes, and what is left of them."""
        window, frames, start = self._window, list[Frame](), 0
        window[: len(prefix)] = prefix
        while filled - start >= HEADER.size:
            magic, kind, text_size, buffer_count, call_id, body_size = HEADER.unpack_from(window, start)
            start += HEADER.size
            body_start, end = start + text_size, start + text_size + body_size
            if magic == MAGIC and buffer_count == 0 and end <= filled and body_size <= self._max_bytes:  # as most are
                text = _text(window[start:body_start]) if text_size else ""
                frames.append(Frame(kind, call_id, text, bytes(window[body_start:end]) if body_size else b""))
                start = end
                continue
            header = self._checked(magic, kind, text_size, buffer_count, call_id, body_size)
            partial: _Partial | None = _Partial.begin(header, self._max_bytes, self._allocate)
            while partial is not None and start < filled:
                count = min(len(partial.hole()), filled - start)
                partial.hole()[:count] = window[start : start + count]
                start += count
                cut, partial = _grown(partial, count)
                frames += cut
            if partial is not None:
                return frames, b"", partial
        return frames, bytes(window[start:filled]), None

    def _checked(self, magic: bytes, *header: int) -> tuple[int, ...]:
        """Return the header, before anything is allocated for it; ActorError if it cannot be one."""
        if magic != MAGIC:
            raise ActorError(
                f"a frame begins with {magic!r}, not with {MAGIC[:2]!r} version {MAGIC[2]}; close the link."
            )
        _, text_size, buffer_count, _, body_size = header
        if text_size > MAX_TEXT or buffer_count > MAX_BUFFERS or body_size > self._max_bytes:
            raise ActorError(
                f"a frame claims {text_size} bytes of text, {buffer_count} buffers and {body_size} bytes of body; "
                f"at most {MAX_TEXT}, {MAX_BUFFERS} and {self._max_bytes} are taken; close the link."
            )
        return header


class _State(NamedTuple):
    prefix: bytes
    """The beginning of a header, to be put back to the front of the window."""
    partial: _Partial | None
    counts: list[int]
    """What recv_into has returned and nobody has looked at yet."""
    frames: list[Frame]


class _Partial(NamedTuple):
    """A frame of which more is to come: first its head (places, text, body), then each buffer in its own memory."""

    header: tuple[int, ...]
    """kind, bytes of text, number of buffers, call id, bytes of body."""
    parts: tuple[memoryview, ...]
    pieces: tuple[memoryview | Lent, ...] | None
    """All buffers, once the head is there."""
    index: int
    offset: int
    max_bytes: int
    allocate: Allocate

    @classmethod
    def begin(cls, header: tuple[int, ...], max_bytes: int, allocate: Allocate) -> _Partial:
        _, text_size, buffer_count, _, body_size = header
        head = _allocate(PLACE.size * buffer_count + text_size + body_size)
        return cls(header, (head,), None, 0, 0, max_bytes, allocate)

    def hole(self) -> memoryview:
        """Return the memory to be filled next; it is never empty."""
        return self.parts[self.index][self.offset :]


def _grown(partial: _Partial, count: int) -> tuple[list[Frame], _Partial | None]:
    """Return the frame that is complete with `count` more bytes, or what it is now."""
    offset, index, parts, pieces = partial.offset + count, partial.index, partial.parts, partial.pieces
    if offset < len(parts[index]):
        return [], partial._replace(offset=offset)
    _, text_size, buffer_count, _, _ = partial.header
    places_size = PLACE.size * buffer_count
    if pieces is None:
        holes, pieces = _pieces(parts[0][:places_size], partial.max_bytes, partial.allocate)
        parts = (parts[0], *filter(len, holes))
    if index + 1 < len(parts):
        return [], partial._replace(parts=parts, pieces=pieces, index=index + 1, offset=0)
    head, body_start = parts[0], places_size + text_size
    kind, call_id = partial.header[0], partial.header[3]
    return [Frame(kind, call_id, _text(head[places_size:body_start]), head[body_start:], pieces)], None


def _pieces(
    places: memoryview, max_bytes: int, allocate: Allocate
) -> tuple[list[memoryview], tuple[memoryview | Lent, ...]]:
    """Return new memory for each buffer that follows, and all buffers: that memory, or the place of one elsewhere."""
    descriptors = list(PLACE.iter_unpack(places))
    sizes = [size for size, _, lease in descriptors if lease == 0]
    if sum(sizes) > max_bytes:
        raise ActorError(
            f"a frame claims {sum(sizes)} bytes of buffers; at most {max_bytes} are taken; close the link."
        )
    memory = allocate(sizes)
    shown = iter([view for _, view in memory])
    pieces = (next(shown) if lease == 0 else (size, offset, lease - 1) for size, offset, lease in descriptors)
    return [hole for hole, _ in memory], tuple(pieces)


def allocate_each(sizes: Sequence[int]) -> list[tuple[memoryview, memoryview]]:
    """Return new memory of each of these sizes; ActorError if there is none."""
    return [(hole, hole.toreadonly()) for hole in map(_allocate, sizes)]


def _text(data: memoryview) -> str:
    try:
        return str(data, "utf-8")
    except UnicodeDecodeError as error:
        raise ActorError(f"a frame has a text that is not UTF-8 ({error}); close the link.") from None


def _allocate(size: int) -> memoryview:
    try:
        return np.empty(size, np.uint8).data  # unlike bytearray(size) it is not zeroed, and takes no page yet
    except MemoryError:
        raise ActorError(f"a frame needs {size} bytes and this process cannot have them; close the link.") from None
