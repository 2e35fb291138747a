"""The memory of a channel: [header | a row for each reader | the blocks of the versions].

All numbers are 8 bytes, and stored at once. A place is where a block starts in the data, plus 1; 0 is nowhere.
"""

from __future__ import annotations

import struct
import threading
import zlib
from typing import NamedTuple

import numpy as np

from rlx.actors.engines.arena import ROOM, lay_out
from rlx.actors.engines.shared_memory import PAGE_BYTES, SharedMemory, Span
from rlx.errors import ActorError

# Words of the header. COUNT and VERSION, of the newest version, are for who asks how far behind a reader is; what a
# reader needs is in the block.
MAGIC, ROWS, LIMIT, PUBLISHER, NEWEST, COUNT, VERSION = range(7)
HEADER_WORDS = 32
MAGIC_WORD = int.from_bytes(b"rlxchan1", "little")

# Words of a row: the cells, what the reader took last and when (ns), and its name.
CELLS = 8
NAME_BYTES, TAKEN_COUNT, TAKEN_VERSION, TAKEN_AT, NAME = range(CELLS, CELLS + 5)
ROW_WORDS = 32
MAX_NAME_BYTES = 8 * (ROW_WORDS - NAME)

# At the start of a block: the checksum of the rest, then place, count, version, published at (ns), number of parts;
# then the parts' sizes. The parts follow: the pickle, and its buffers.
_CHECKSUM, _ENTRY = struct.Struct("<Q"), struct.Struct("<QQQQQ")


class Entry(NamedTuple):
    """What stands at the start of a version's block."""

    count: int
    """It was the count-th to be published."""
    version: int
    published_ns: int
    parts: list[Span]

    @property
    def end(self) -> int:
        """Where in the data the last part ends."""
        return sum(self.parts[-1])


class ChannelMemory:
    """A channel's memory as each process sees it."""

    def __init__(self, name: str, memory: SharedMemory) -> None:
        """Look into memory that `create` made here or elsewhere."""
        self.name, self.memory = name, memory
        header = memory.map(0, PAGE_BYTES).data.cast("Q")
        if header[MAGIC] != MAGIC_WORD:
            raise ActorError(f"the memory of channel {name!r} holds no channel; attach the descriptor that was sent.")
        self.row_count, self.limit_bytes = header[ROWS], header[LIMIT]
        self.start = _start(self.row_count)
        """Where the data starts."""
        self.words = memory.map(0, self.start, writable=True).data.cast("Q")
        """Header and rows, as numbers."""

    @classmethod
    def create(cls, name: str, limit_bytes: int, row_count: int) -> ChannelMemory:
        """Return new memory for `limit_bytes` of versions and `row_count` readers."""
        start = _start(row_count)
        memory = SharedMemory.create(start + ROOM * limit_bytes)
        words = memory.map(0, start, writable=True).data.cast("Q")
        words[ROWS], words[LIMIT], words[MAGIC] = row_count, limit_bytes, MAGIC_WORD
        return cls(name, memory)

    def row(self, index: int) -> memoryview:
        """Return the words of a reader's row."""
        start = HEADER_WORDS + index * ROW_WORDS
        return self.words[start : start + ROW_WORDS]

    def reader_name(self, index: int) -> str:
        """Return whose row that is, "" if nobody's."""
        row = self.row(index)
        return row[NAME:].tobytes()[: row[NAME_BYTES]].decode(errors="replace")

    def cells(self) -> np.ndarray:
        """Return the cells of all rows, uint64 [rows, cells]."""
        rows = np.frombuffer(self.words, np.uint64)[HEADER_WORDS : HEADER_WORDS + self.row_count * ROW_WORDS]
        return rows.reshape(-1, ROW_WORDS)[:, :CELLS]

    def read_entry(self, data: memoryview, place: int) -> Entry:
        """Return the entry at `place`; ActorError if there is none."""
        offset = place - 1
        start = offset + entry_bytes(0)
        if start <= len(data):
            same, count, version, published_ns, parts = _ENTRY.unpack_from(data, offset + _CHECKSUM.size)
            end = offset + entry_bytes(parts)
            if same == place and end <= len(data):
                (checksum,) = _CHECKSUM.unpack_from(data, offset)
                if checksum == zlib.crc32(data[offset + _CHECKSUM.size : end]):
                    sizes = struct.unpack_from(f"<{parts}Q", data, start)
                    spans, _ = lay_out([entry_bytes(parts), *sizes])
                    return Entry(count, version, published_ns, [(offset + at, size) for at, size in spans[1:]])
        raise ActorError(f"channel {self.name!r} has no version at byte {offset} of its data; it is corrupt, close it.")


def entry_bytes(parts: int) -> int:
    """Return the size of an entry for so many parts."""
    return _CHECKSUM.size + _ENTRY.size + 8 * parts


def pack_entry(place: int, count: int, version: int, published_ns: int, sizes: list[int]) -> bytes:
    """Return the entry of a version whose parts have these sizes."""
    rest = _ENTRY.pack(place, count, version, published_ns, len(sizes)) + struct.pack(f"<{len(sizes)}Q", *sizes)
    return _CHECKSUM.pack(zlib.crc32(rest)) + rest


def fence() -> None:
    """Have every store before it seen by the other processors before any load after it is made.

    Python has no such thing. Taking a lock and giving it back is one on x86, doing so twice is one on ARM.
    """
    lock = threading.Lock()
    for _ in range(2):
        lock.acquire()
        lock.release()


def _start(row_count: int) -> int:
    return -(-8 * (HEADER_WORDS + row_count * ROW_WORDS) // PAGE_BYTES) * PAGE_BYTES
