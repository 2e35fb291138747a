"""What the two ends of a link share: where the buffers of a message go, and where those of a frame lie."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Sequence
from functools import partial
from typing import Any

from rlx.actors import channel, machine
from rlx.actors.engines import descriptors, wire
from rlx.actors.engines.arena import Arena, Block, Span
from rlx.actors.engines.leases import Borrower, Lender, actor_ends, driver_ends, driver_memory, link_memory
from rlx.actors.engines.pickling import EMPTY, Buffer, Message
from rlx.actors.engines.shared_memory import SharedMemory
from rlx.actors.engines.wire import Lent
from rlx.actors.ref import Ref
from rlx.errors import ObjectMemoryFull

DESCRIPTOR_TIMEOUT_S = 30.0  # it was sent before the frame that needs it
SHARED_BYTES = 64 * 1024  # less goes through the socket, whose two copies cost less than a lease


class Parcel:
    """A message on its way to one or many receivers; large buffers are copied into shared memory once, for all."""

    __slots__ = ("_lock", "_placed", "channels", "message")

    def __init__(self, message: Message, channels: tuple[Any, ...] = ()) -> None:
        body, buffers = message
        if len(body) >= SHARED_BYTES:  # a long string, say: it travels as one more buffer
            body, buffers = b"", [*buffers, body]
        self.message: Message = (body, buffers)
        self.channels = channels
        """The channels among what was packed; a receiver needs their descriptors."""
        self._placed: list[tuple[Block, Span] | None] | None = None
        self._lock = threading.Lock()

    def place(self, arena: Arena, wait_s: float | None = None) -> list[tuple[Block, Span] | None]:
        """Return where each buffer lies in the arena, once for all receivers; None for those that are too small."""
        with self._lock:
            if self._placed is None:
                self._placed = _place(arena, self.message[1], wait_s)
            return self._placed

    def lend(self, arena: Arena, lender: Lender) -> list[Lent | None] | None:
        """Return where each buffer lies in the arena, on lease to this receiver; None for those in the frame itself."""
        if not self.message[1]:
            return None
        leases: dict[int, int | None] = {}
        places: list[Lent | None] = []
        for place in self.place(arena):
            lease = None
            if place is not None:
                block, (offset, size) = place
                if block.offset not in leases:
                    leases[block.offset] = lender.lend(block)
                lease = leases[block.offset]
            places.append(None if place is None or lease is None else (size, offset, lease))
        return places


NO_ARGUMENTS = Parcel(EMPTY)


def default_object_memory() -> int:
    """Return how many bytes a process may lend at a time where nobody has set it: three tenths of the memory."""
    return int(0.3 * machine.memory_bytes())


def _place(arena: Arena, buffers: list[Buffer] | Any, wait_s: float | None) -> list[tuple[Block, Span] | None]:
    placed = [arena.find(buffer) for buffer in buffers]
    rest = [buffer for buffer, place in zip(buffers, placed, strict=True) if place is None]
    if sum(map(len, rest)) < SHARED_BYTES:
        return placed
    block = arena.place(rest, wait_s)
    spans = iter(block.spans)
    return [(block, next(spans)) if place is None else place for place in placed]


class DriverMemory:
    """What the driver sends from, to all actors."""

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self._memory = driver_memory(limit_bytes)
        self.arena = Arena(self._memory, limit_bytes)
        self._reader = SharedMemory(self._memory.reader_fd())

    def link(self, name: str) -> LinkMemory:
        """Return the driver's side of the memory that it shares with one new actor."""
        return LinkMemory(self.arena, self._reader, self.limit_bytes, name)

    def put(self, message: Message) -> Ref:
        """Place the message in the arena if it is large; return what stands for it."""
        parts = [message[0], *message[1]]
        if sum(map(len, parts)) < SHARED_BYTES:
            return Ref.to_copy_of(parts)
        block = self.arena.place(parts)
        return Ref(block.view(), [(start - block.offset, size) for start, size in block.spans])

    def allocate(self, sizes: Sequence[int]) -> list[tuple[memoryview, memoryview]]:
        """Return memory to receive a frame's buffers into: of the arena, where that is worth it.

        Half of the arena is left for what is sent, however much of what has come is kept.
        """
        if SHARED_BYTES <= sum(sizes) <= self.arena.free_bytes - self.limit_bytes // 2:
            with contextlib.suppress(ObjectMemoryFull):
                return self.arena.room(sizes)
        return wire.allocate_each(sizes)

    def close(self) -> None:
        """Close the descriptors; views that are still held stay valid."""
        self.arena.close()
        self._reader.close()
        self._memory.close()


class LinkMemory:
    """The driver's side: what it lends to one actor, and what it borrows from it."""

    def __init__(self, arena: Arena, reader: SharedMemory, limit_bytes: int, name: str) -> None:
        self._arena, self._own = arena, link_memory(limit_bytes)
        self._borrower: Borrower | None
        self._lender, self._borrower = driver_ends(arena, self._own, name)
        self.fds = [self._own.fd, reader.fd]
        """For the new process."""

    def lend(self, parcel: Parcel) -> list[Lent | None] | None:
        """Return the places of a parcel's buffers."""
        return parcel.lend(self._arena, self._lender)

    def borrow(self, lease: int, spans: Any) -> list[memoryview]:
        """Return views of what the actor has lent."""
        assert self._borrower is not None
        return self._borrower.borrow(lease, spans)

    def close_fds(self) -> None:
        """The new process has them."""
        self._own.close()

    def drop(self) -> None:
        """The actor is gone, and with it all that it has borrowed; of what it has lent, what is still viewed stays."""
        self._lender.drop()
        self._borrower = None  # its mapping is the last that keeps the actor's pages, and handles live long


class ActorMemory:
    """The actor's side."""

    def __init__(self, own_fd: int, driver_fd: int, limit_bytes: int, later: socket.socket) -> None:
        own, driver = SharedMemory(own_fd), SharedMemory(driver_fd)
        self._arena, self._lender, self._borrower = actor_ends(own, driver, limit_bytes)
        driver.close()
        channel.receive_descriptor = partial(descriptors.receive, later, DESCRIPTOR_TIMEOUT_S)

    def lend(self, message: Message) -> tuple[Message, list[Lent | None] | None]:
        """Return the message as it travels, and the places of its buffers."""
        if not message[1] and len(message[0]) < SHARED_BYTES:
            return message, None
        parcel = Parcel(message)
        return parcel.message, parcel.lend(self._arena, self._lender)

    def borrow(self, lease: int, spans: Any) -> list[memoryview]:
        """Return views of what the driver has lent."""
        return self._borrower.borrow(lease, spans)
