"""The publishing process' side of a channel: the arena of its blocks, and which reader has which."""

from __future__ import annotations

import os
import time
import weakref

import numpy as np

from rlx.actors.engines.arena import Arena, Block
from rlx.actors.engines.channel_memory import (
    CELLS,
    COUNT,
    NEWEST,
    PUBLISHER,
    VERSION,
    ChannelMemory,
    Entry,
    entry_bytes,
    fence,
    pack_entry,
)
from rlx.actors.engines.pickling import Message
from rlx.errors import ActorError, ObjectMemoryFull

MAX_VERSION = (1 << 63) - 1

# The publishers of this process. A process id in a header that is ours may be that of a dead process before us.
_alive: weakref.WeakValueDictionary[int, Publisher] = weakref.WeakValueDictionary()


class Publisher:
    """The one who publishes on a channel. Not thread-safe."""

    def __init__(self, channel: ChannelMemory) -> None:
        """Become the channel's publisher, and go on where one that has died stopped; ActorError if it lives."""
        self._channel, self._words = channel, channel.words
        _refuse_another(channel)
        self._identity = self._words[PUBLISHER] = os.getpid() << 32 | int.from_bytes(os.urandom(4), "little")
        _alive[self._identity] = self
        self._arena = Arena(channel.memory, channel.limit_bytes, start=channel.start)
        self._cells = channel.cells()
        self._readers: dict[int, _Reader] = {}  # by row
        self._kept: list[Block] = []  # the newest last; others only while publish runs
        self._count = self._version = 0
        if self._words[NEWEST]:
            self._succeed()

    def publish(self, message: Message, version: int | None, wait_s: float) -> int:
        """Make a message the newest version; return its number, by default one more than the last.

        ObjectMemoryFull when readers keep too much for more than wait_s.
        """
        self._arena.wait_s = wait_s
        if self._words[PUBLISHER] != self._identity:
            _refuse_another(self._channel)
            raise ActorError(f"channel {self._channel.name!r} has taken this publisher for dead; attach it again.")
        version = checked(self._version + 1 if version is None else version)
        body, buffers = message
        sizes = [len(body), *map(len, buffers)]
        try:
            block = self._arena.place([bytes(entry_bytes(len(sizes))), body, *buffers])
        except ObjectMemoryFull as error:
            error.add_note(
                f"while publishing version {version} on channel {self._channel.name!r}, whose size must hold two "
                f"versions and one more for each older one that a reader keeps"
            )
            raise
        self._count, self._version = self._count + 1, version
        place = block.offset + 1
        entry = pack_entry(place, self._count, version, time.monotonic_ns(), sizes)
        self._arena.data.data[block.offset : block.offset + len(entry)] = entry
        # The order matters to readers, and to a KeyboardInterrupt between any two lines: a block that the header
        # names, or has named and somebody may read, is always in _kept or with its readers.
        self._kept.append(block)
        fence()
        self._words[NEWEST] = place
        fence()
        self._words[COUNT], self._words[VERSION] = self._count, version
        for old in self._kept[:-1]:
            self._leave_to_readers(old)
        del self._kept[:-1]
        return version

    def _leave_to_readers(self, block: Block) -> None:
        """Let the block live as long as it stays in the cells that name it now; there will be no new ones."""
        place = block.offset + 1
        for row in np.flatnonzero((self._cells == place).any(axis=1)).tolist():
            with self._arena.lock:
                if row not in self._readers:
                    self._readers[row] = _Reader(self._channel, row)
                    self._arena.lenders.append(self._readers[row])
                self._readers[row].lent[place] = block

    def _succeed(self) -> None:
        """Take over the newest version of a publisher that has died, and what readers keep of others."""
        newest = self._words[NEWEST]
        data = self._arena.data.data
        entries = {newest: self._channel.read_entry(data, newest)}
        for place in set(np.unique(self._cells).tolist()) - {0, newest}:
            entry = self._entry_or_none(data, place)
            if entry is not None:
                entries[place] = entry
        self._count, self._version = entries[newest].count, entries[newest].version
        blocks = self._arena.adopt((place - 1, entry.end - (place - 1)) for place, entry in entries.items())
        self._kept = [block for block in blocks[:1] if block is not None]
        for block in blocks[1:]:
            if block is not None:
                self._leave_to_readers(block)

    def _entry_or_none(self, data: memoryview, place: int) -> Entry | None:
        try:
            return self._channel.read_entry(data, place)
        except ActorError:
            return None  # a reader died just after it had claimed too late: nothing is behind that cell


class _Reader:
    """A reader, as a holder of the arena's blocks."""

    def __init__(self, channel: ChannelMemory, row: int) -> None:
        self._channel, self._row = channel, row
        self._cells = channel.row(row)[:CELLS]
        self.lent: dict[int, Block] = {}  # by place

    @property
    def holder(self) -> str:
        return self._channel.reader_name(self._row) or "a removed reader"

    def collect(self) -> None:
        if self.lent:
            cells = self._cells.tolist()
            for place in [place for place in self.lent if place not in cells]:
                del self.lent[place]


def checked(version: int) -> int:
    """Return the version; ValueError if it cannot be one."""
    if not 0 <= version <= MAX_VERSION:
        raise ValueError(f"version {version} is not within 0 to 2**63 - 1; count versions up from 0.")
    return version


def _refuse_another(channel: ChannelMemory) -> None:
    identity = channel.words[PUBLISHER]
    pid = identity >> 32
    if identity in _alive or (pid not in (0, os.getpid()) and _runs(pid)):
        raise ActorError(
            f"channel {channel.name!r} is published by process {pid}; a channel has one publisher: open another one."
        )


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
