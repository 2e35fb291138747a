"""Leases: how a process lends what it has placed in its arena to another, and learns that it is no longer read.

    block = arena.place(buffers)                  # sender: the one copy
    lease = lender.lend(block)                    # the lease and block.spans travel in a frame
    views = borrower.borrow(lease, spans)         # receiver: read-only, no copy

A lease is one byte of a ledger, a page that both ends of a link map. The receiver changes it when its last view has
died: no message, no lock, so it may happen anywhere. The sender looks when it needs memory.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rlx.actors.engines.arena import ROOM, Arena, Block
from rlx.actors.engines.shared_memory import PAGE_BYTES, Borrowed, SharedMemory, Span, cut
from rlx.errors import ActorError

LEASES = 4096  # of one link and direction; more are not lent, the message then travels in the frame
LEDGER_BYTES = -(-LEASES // PAGE_BYTES) * PAGE_BYTES
FREE, LENT, BORROWED, RELEASED = range(4)  # the sender writes FREE and LENT, the receiver the others


class Lender:
    """The sender's end of one link: the leases of one holder."""

    def __init__(self, arena: Arena, ledger: np.ndarray, holder: str) -> None:
        """Lend blocks of `arena` to `holder`; `ledger` is the page that the two share, all zeros."""
        self.holder = holder
        self._arena, self._ledger = arena, ledger.data
        self.lent: dict[int, Block] = {}
        """By lease; changes under the arena's lock."""
        self._unused: list[int] = []  # leases that have come back
        self._ever_used = 0  # leases from here on have never been lent, their bytes need no look
        self._gone = False
        with arena.lock:
            arena.lenders.append(self)

    def lend(self, block: Block) -> int | None:
        """Return the lease by which the holder gets the block; None if all are lent, or the holder is gone."""
        self._arena.check_owner()
        with self._arena.lock:
            if not self._unused and self._ever_used == LEASES:
                self.collect()
            if self._gone or (not self._unused and self._ever_used == LEASES):
                return None
            if self._unused:
                lease = self._unused.pop()
            else:
                lease, self._ever_used = self._ever_used, self._ever_used + 1
            self.lent[lease] = block
            self._ledger[lease] = LENT
            return lease

    def take_back(self, lease: int) -> None:
        """End a lease whose frame has never been sent."""
        self._arena.check_owner()
        with self._arena.lock:
            if lease in self.lent:
                self._ledger[lease] = RELEASED

    def drop(self) -> None:
        """End all leases: the holder is gone, or the link to it. May be called twice."""
        with self._arena.lock:
            self._gone = True
            self.lent.clear()
            if self in self._arena.lenders:
                self._arena.lenders.remove(self)

    def collect(self) -> None:
        """End the leases that the holder has given back. The arena's lock is the caller's."""
        if not self.lent:
            return
        states = bytes(self._ledger[: self._ever_used])
        lease = states.find(RELEASED)
        while lease >= 0:
            known = self.lent.pop(lease, None) is not None  # else the ledger is corrupt
            self._ledger[lease] = FREE
            if known:
                self._unused.append(lease)
            lease = states.find(RELEASED, lease + 1)


class Borrower:
    """The receiver's end of one link: views of the sender's memory."""

    def __init__(self, data: np.ndarray, ledger: np.ndarray) -> None:
        """Read from `data`, the sender's arena mapped read-only; `ledger` is the page that the two share."""
        self._data, self._ledger = data, ledger.data

    def borrow(self, lease: int, spans: Sequence[Span]) -> list[memoryview]:
        """Return read-only views of the spans; the lease ends when the last view of any of them has died.

        ActorError for a lease or a span that cannot be: the frame that named it is corrupt.
        """
        if not 0 <= lease < LEASES or self._ledger[lease] != LENT:
            raise ActorError(f"a frame names lease {lease}, which is not lent; close the link.")
        size = len(self._data)
        for span in spans:
            if span[0] < 0 or span[1] < 0 or span[0] + span[1] > size:
                raise ActorError(f"a frame names the span {span} of an object memory of {size} bytes; close the link.")
        base = Borrowed.of(self._data, self._ledger, lease, RELEASED)
        self._ledger[lease] = BORROWED
        return cut(base, spans)


# The memory of a link: the ledger of what the driver lends it, that of what it lends the driver, and what it sends.
# What the driver sends, to all of them, is in a memory of its own.
_TO_DRIVER, _DATA = LEDGER_BYTES, 2 * LEDGER_BYTES


def driver_memory(limit_bytes: int) -> SharedMemory:
    """Return memory for the driver's arena; actors get its `reader_fd`."""
    return SharedMemory.create(ROOM * limit_bytes)


def link_memory(limit_bytes: int) -> SharedMemory:
    """Return memory for the link with one actor, which may send `limit_bytes` at a time; the actor gets its `fd`."""
    return SharedMemory.create(_DATA + ROOM * limit_bytes)


def driver_ends(arena: Arena, link: SharedMemory, holder: str) -> tuple[Lender, Borrower]:
    """Return the driver's ends of the link with the actor `holder`."""
    ledgers = link.map(0, _DATA, writable=True)
    return Lender(arena, ledgers[:_TO_DRIVER], holder), Borrower(link.map(_DATA), ledgers[_TO_DRIVER:])


def actor_ends(
    link: SharedMemory, driver: SharedMemory, limit_bytes: int, wait_s: float = 10.0
) -> tuple[Arena, Lender, Borrower]:
    """Return the actor's arena, and its ends of the link with the driver."""
    ledgers = link.map(0, _DATA, writable=True)
    arena = Arena(link, limit_bytes, start=_DATA, wait_s=wait_s)
    return arena, Lender(arena, ledgers[_TO_DRIVER:], "the driver"), Borrower(driver.map(), ledgers[:_TO_DRIVER])
