"""Where a process puts the large buffers that it sends: copied once into blocks of its shared memory, read there.

Blocks come in few sizes and are recycled with their pages, because a page touched for the first time costs ten times
its copy. A block is free when its Block has died; the lease of a receiver (leases.py) is a reference to it.
"""

from __future__ import annotations

import bisect
import logging
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

import numpy as np

from rlx.actors.engines.copying import Copier
from rlx.actors.engines.pickling import Buffer
from rlx.actors.engines.shared_memory import PAGE_BYTES, SharedMemory, Span, address_of, cut, populate, release
from rlx.actors.ref import ALIGN_BYTES
from rlx.errors import ActorError, ObjectMemoryFull

RETAIN_BYTES = 256 << 20
ROOM = 2  # virtual bytes per byte of the limit: blocks of unlike sizes leave gaps, which cost nothing

LOOK_BYTES = 128 << 10
"""Of a block, per ledger: that much is copied in ten times the time of a look into one."""

WARN_AFTER_S = 1.0
POLL_S, MAX_POLL_S = 0.001, 0.020

_log = logging.getLogger("rlx.actors")


class Block:
    """Bytes placed in an arena; they stay until the last reference to this object and the last lease of it are gone."""

    __slots__ = ("__weakref__", "_arena", "capacity", "offset", "populated", "spans", "viewed")

    def __init__(self, arena: Arena, offset: int, capacity: int, populated: bool) -> None:
        self._arena = arena
        self.offset, self.capacity, self.populated = offset, capacity, populated
        self.spans: list[Span] = []
        """One for each buffer placed, in their order."""
        self.viewed = False

    def __del__(self) -> None:
        # Anywhere, perhaps inside the arena's lock: an append needs none.
        self._arena._dead.append((self.offset, self.capacity, self.populated, self.viewed))

    @property
    def extent(self) -> int:
        """How many bytes the buffers placed take, with the gaps between them."""
        return sum(self.spans[-1]) - self.offset

    def view(self) -> memoryview:
        """Return all that was placed, read-only, for the owner itself; the block lives while the view does."""
        return self._arena._view(self)


class Holder(Protocol):
    """Somebody who reads blocks from elsewhere; known to the arena by being in `Arena.lenders`."""

    @property
    def holder(self) -> str:
        """Who that is, for messages."""
        ...

    @property
    def lent(self) -> Mapping[int, Block]:
        """What is held; changes under the arena's lock only."""
        ...

    def collect(self) -> None:
        """Drop from `lent` what is no longer read. The arena's lock is the caller's."""
        ...


class Arena:
    """The sender's side: takes blocks from its memory, and takes them back."""

    def __init__(
        self,
        memory: SharedMemory,
        limit_bytes: int,
        *,
        start: int = 0,
        retain_bytes: int = RETAIN_BYTES,
        wait_s: float = 10.0,
    ) -> None:
        """Own the bytes of `memory` from `start` on (spans count from there), at most `limit_bytes` of them at a time.

        Of what is free, `retain_bytes` stay warm; the rest goes back to the system. `wait_s` is how long `place`
        waits for others to let go when the limit is reached.
        """
        self._memory, self._start = memory, start
        self.data = memory.map(start, writable=True)
        """What spans count in, uint8."""
        self._shown: np.ndarray | None = None  # the same bytes, which nobody can write to: torch writes where it can
        self.limit_bytes = limit_bytes // PAGE_BYTES * PAGE_BYTES
        self.retain_bytes, self.wait_s = retain_bytes, wait_s
        self.lock = threading.Lock()
        """Guards the blocks, and the leases of every lender."""
        self.lenders: list[Holder] = []
        self._pid = os.getpid()
        self._copier = Copier()
        self._dead: deque[tuple[int, int, bool, bool]] = deque()  # of blocks: offset, capacity, populated, viewed
        self._used = self._retained = 0
        self._warm: dict[int, list[int]] = {}  # by capacity, the one freed longest ago first: offsets, latest last
        self._cold: list[Span] = [(0, len(self.data))]  # no pages behind them; by offset, no two adjacent
        self._viewed: dict[int, weakref.ref[Block]] = {}  # by offset: blocks that this process looks into itself
        self._viewed_offsets: list[int] = []  # sorted

    @property
    def used_bytes(self) -> int:
        """Bytes of blocks that are referred to or lent, as far as known without looking into the ledgers."""
        return self._used

    @property
    def free_bytes(self) -> int:
        """Bytes that are left before `place` waits."""
        return self.limit_bytes - self._used

    def holders(self) -> dict[str, int]:
        """Return the bytes that each holder keeps, largest first; a block held by several counts for each."""
        self.check_owner()
        with self.lock:
            self._reclaim()
            leased = {lender.holder: set(lender.lent.values()) for lender in self.lenders}
            own = self._used - sum({block.offset: block.capacity for b in leased.values() for block in b}.values())
        held = {holder: sum(block.capacity for block in blocks) for holder, blocks in leased.items()}
        held["this process"] = own
        return {holder: size for holder, size in sorted(held.items(), key=lambda item: -item[1]) if size}

    def place(self, buffers: Sequence[Buffer], wait_s: float | None = None) -> Block:
        """Copy flat byte buffers into one new block; blocks while the limit is reached.

        ObjectMemoryFull, naming who holds how much, after `wait_s` (by default the arena's), or at once for what can
        never fit.
        """
        block = self._block(map(len, buffers), self.wait_s if wait_s is None else wait_s)
        self._copier.copy(
            self.data, [(span[0], buffer) for span, buffer in zip(block.spans, buffers, strict=True)], block
        )
        return block

    def room(self, sizes: Iterable[int]) -> list[tuple[memoryview, memoryview]]:
        """Return parts of one new block, each to receive into and as read-only view. Waits for nobody.

        The block lives while any of the views does, and can be lent without a copy. ObjectMemoryFull.
        """
        block = self._block(sizes, 0.0)
        return list(zip(cut(self.data, block.spans), cut(self._own(block), block.spans), strict=True))

    def adopt(self, spans: Iterable[Span]) -> list[Block | None]:
        """Take over the blocks at `spans` from an owner that has died; all else becomes free.

        For an arena that has placed nothing yet. None for a span that overlaps an earlier one.
        """
        with self.lock:
            blocks = [self._adopt(offset, min(capacity_for(size), self.limit_bytes)) for offset, size in spans]
            for offset, size in self._cold:
                release(self.data[offset : offset + size])
        return blocks

    def _adopt(self, offset: int, capacity: int) -> Block | None:
        end = offset + capacity
        for index, (start, size) in enumerate(self._cold):
            if start <= offset and end <= start + size:
                rest = [(start, offset - start), (end, start + size - end)]
                self._cold[index : index + 1] = [span for span in rest if span[1]]
                self._used += capacity
                return Block(self, offset, capacity, True)
        return None

    def find(self, buffer: Buffer) -> tuple[Block, Span] | None:
        """Return the block that `buffer` already lies in, and where: it can be lent without another copy.

        None for memory outside the arena. Buffers inside come from `Block.view`.
        """
        if self._shown is None:
            return None
        start = address_of(np.frombuffer(buffer, np.uint8)) - address_of(self._shown)
        with self.lock:
            index = bisect.bisect_right(self._viewed_offsets, start) - 1
            viewed = self._viewed.get(self._viewed_offsets[index]) if index >= 0 else None
            block = None if viewed is None else viewed()
        if block is None or start + len(buffer) > block.offset + block.capacity:
            return None
        return block, (start, len(buffer))

    def reclaim(self) -> int:
        """Take back what has been let go, give the system what is not worth keeping; return `used_bytes`.

        `place` does so by itself when it needs memory; call this now and then for the memory of an idle process.
        """
        self.check_owner()
        with self.lock:
            self._reclaim()
            self._trim(self.retain_bytes)
            return self._used

    def close(self) -> None:
        """End the thread that helps with copies; what has been placed stays."""
        self._copier.close()

    def _block(self, sizes: Iterable[int], wait_s: float) -> Block:
        """Return a new block for parts of these sizes, with pages behind it."""
        spans, end = lay_out(sizes)
        block = self._allocate(end, wait_s)
        if not block.populated:
            whole = self.data[block.offset : block.offset + block.capacity]
            populate(self._memory, whole, self._start + block.offset)
            block.populated = True
        block.spans = [(block.offset + start, size) for start, size in spans]
        return block

    def _allocate(self, size: int, wait_s: float) -> Block:
        self.check_owner()
        fits = size <= self.limit_bytes
        capacity = min(capacity_for(size), self.limit_bytes)
        began, pause, warned = time.monotonic(), POLL_S, False
        while True:
            with self.lock:
                block = self._take(capacity) if fits else None
            if block is not None:
                return block
            waited = time.monotonic() - began
            if not fits or waited >= wait_s:
                raise ObjectMemoryFull(self._shortage(size, waited))
            if waited >= WARN_AFTER_S and not warned:
                warned = True
                _log.warning("%s", self._shortage(size, waited))
            time.sleep(min(pause, max(0.0, wait_s - waited)))
            pause = min(2 * pause, MAX_POLL_S)

    def check_owner(self) -> None:
        """Raise ActorError in a fork: both processes would write."""
        if os.getpid() != self._pid:
            raise ActorError(
                f"this object memory belongs to process {self._pid}, of which process {os.getpid()} is a fork; "
                f"send from the process that opened the runtime."
            )

    def _shortage(self, size: int, waited_s: float) -> str:
        held = ", ".join(f"{holder} {_mib(kept)}" for holder, kept in self.holders().items()) or "nobody"
        return (
            f"no room for a message of {_mib(size)} after {waited_s:.1f} s: of {_mib(self.limit_bytes)} object memory "
            f"{_mib(self._used)} are held, by {held}; copy what is kept of received arrays, or raise object_memory."
        )

    def _take(self, capacity: int) -> Block | None:
        # The block that was read last is still in the caches. For a small one, many ledgers are not worth a look.
        if not self._warm.get(capacity) or capacity >= LOOK_BYTES * len(self.lenders):
            self._reclaim()
        if offsets := self._warm.get(capacity):
            offset, populated = offsets.pop(), True
            self._retained -= capacity
        else:
            spare = self.limit_bytes - self._used - capacity
            if spare < 0:
                return None
            self._trim(spare)
            offset, populated = self._carve(capacity), False
            if offset is None:
                self._trim(0)
                offset = self._carve(capacity)
            if offset is None:
                return None
        self._used += capacity
        self._trim(self.retain_bytes)
        return Block(self, offset, capacity, populated)

    def _reclaim(self) -> None:
        for lender in self.lenders:
            lender.collect()
        while self._dead:
            offset, capacity, populated, viewed = self._dead.popleft()
            self._used -= capacity
            if viewed:
                self._forget_view(offset)
            if populated:
                offsets = self._warm.pop(capacity, [])
                offsets.append(offset)
                self._warm[capacity] = offsets
                self._retained += capacity
            else:
                self._cool(offset, capacity)

    def _trim(self, retain_bytes: int) -> None:
        """Give warm blocks back to the system until no more than `retain_bytes` are warm."""
        while self._retained > retain_bytes:
            capacity, offsets = next(iter(self._warm.items()))
            if offsets:
                self._cool(offsets.pop(0), capacity)
                self._retained -= capacity
            else:
                del self._warm[capacity]

    def _carve(self, capacity: int) -> int | None:
        for index, (offset, size) in enumerate(self._cold):
            if size >= capacity:
                self._cold[index : index + 1] = [(offset + capacity, size - capacity)] if size > capacity else []
                return offset
        return None

    def _cool(self, offset: int, size: int) -> None:
        release(self.data[offset : offset + size])
        index = bisect.bisect(self._cold, (offset, size))
        if index < len(self._cold) and self._cold[index][0] == offset + size:
            size += self._cold.pop(index)[1]
        if index and sum(self._cold[index - 1]) == offset:
            index -= 1
            before = self._cold.pop(index)
            offset, size = before[0], before[1] + size
        self._cold.insert(index, (offset, size))

    def _forget_view(self, offset: int) -> None:
        self._viewed.pop(offset, None)
        if offset in self._viewed_offsets:
            self._viewed_offsets.remove(offset)

    def _view(self, block: Block) -> memoryview:
        return cut(self._own(block), [(block.offset, block.extent)])[0]

    def _own(self, block: Block) -> _OwnLease:
        """Return all memory, read-only, as an array that keeps the block, in which `find` will find it."""
        with self.lock:
            if self._shown is None:
                self._shown = self._memory.map(self._start)
            if not block.viewed:  # an interrupt in here leaves what is not found, and no harm
                self._forget_view(block.offset)
                bisect.insort(self._viewed_offsets, block.offset)
                self._viewed[block.offset] = weakref.ref(block)
                block.viewed = True
        base = self._shown.view(_OwnLease)
        base.block = block
        return base


class _OwnLease(np.ndarray):
    """The owner's view of a block; keeps it."""

    block: Block


def lay_out(sizes: Iterable[int]) -> tuple[list[Span], int]:
    """Return where parts of these sizes lie in a block, and where the last ends."""
    spans, end = [], 0
    for size in sizes:
        spans.append((end, size))
        end += -(-size // ALIGN_BYTES) * ALIGN_BYTES
    return spans, end


def capacity_for(size: int) -> int:
    """Return the bytes of the block for a message of `size` bytes: at most an eighth more, in whole pages.

    Few sizes, so that a freed block fits the next message although that is a little longer.
    """
    step = max(PAGE_BYTES, 1 << max(0, size.bit_length() - 4))
    return max(1, -(-size // step)) * step


def _mib(size: int) -> str:
    return f"{size / (1 << 20):.1f} MiB"
