"""A channel: one publisher, many readers, and only the newest version counts.

A version is copied once into shared memory, and read there by all. No message travels: the header names the block of
the newest version, and a reader claims a block in a cell of its own row before it looks into it (a hazard pointer).
The publisher uses a block again when it is not the newest and in nobody's cell.
"""

from __future__ import annotations

import os
import pickle
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self, TypeVar

import numpy as np

from rlx.actors.engines import pickling
from rlx.actors.engines.channel_memory import (
    CELLS,
    COUNT,
    MAX_NAME_BYTES,
    NAME,
    NAME_BYTES,
    NEWEST,
    PUBLISHER,
    ROW_WORDS,
    TAKEN_AT,
    TAKEN_COUNT,
    TAKEN_VERSION,
    ChannelMemory,
    Entry,
    fence,
)
from rlx.actors.engines.publisher import Publisher, checked
from rlx.actors.engines.shared_memory import Borrowed, SharedMemory, Span, cut
from rlx.errors import ActorError, NotSupported

PUBLISH_WAIT_S = 10.0  # for readers to let go of older versions

T = TypeVar("T")
FOR_OTHERS = "other machines"
"""The reader that passes versions on."""


@dataclass(frozen=True)
class Published:
    """One version of a channel's value."""

    version: int
    value: Any
    """Its arrays are read-only views of shared memory; the version stays there as long as any of them lives."""
    published_at: float
    """On the clock of time.monotonic(), which all processes of a machine share."""

    def age_s(self) -> float:
        """Return how many seconds ago it was published."""
        return time.monotonic() - self.published_at


@dataclass(frozen=True)
class Staleness:
    """How far behind a reader is."""

    version: int | None
    """The one that its last latest() returned, None if there was none."""
    versions_behind: int
    """How many have been published since that one."""
    seconds: float | None
    """Since its last latest() that returned a version."""


class Channel:
    """One process' end of a channel. A process has one for each row, and may use it from all its threads."""

    def __init__(self, memory: ChannelMemory, row: int | None, created: bool) -> None:
        """Use `create` or `attach`."""
        self.name = memory.name
        self._memory, self._row, self._created = memory, row, created
        self._pid = os.getpid()
        self._data = memory.memory.map(memory.start)
        self._publishing, self._reading = threading.Lock(), threading.Lock()
        self._publisher: Publisher | None = None
        self._row_for_others: int | None = None
        self._last: weakref.ref[Published] | None = None
        self._last_count = 0

    @classmethod
    def create(cls, name: str, size: int, max_readers: int = 1024) -> Self:
        """Return a new channel whose versions in memory have up to `size` bytes together.

        These are the newest version, the one being published, and the older ones that readers keep.
        """
        return cls(ChannelMemory.create(name, size, max_readers), None, created=True)

    @classmethod
    def attach(cls, name: str, fd: int, row: int | None = None) -> Channel:
        """Return this process' end of the channel behind `fd`, which it takes over.

        `row` comes from the creator's `add_reader`; without one the channel can be published to, not read.
        """
        return cls(ChannelMemory(name, SharedMemory(fd)), row, created=False)

    @property
    def fd(self) -> int:
        """The descriptor to send to another process, for `attach` there."""
        return self._memory.memory.fd

    def publish(self, value: Any, version: int | None = None) -> int:
        """Make `value` the newest version, and return its number: `version`, or one more than the last, from 1 on.

        One copy; readers take it when they ask next. ActorError if another process publishes on this channel.
        ObjectMemoryFull when readers have kept too much for too long.
        """
        return self.publish_message(pickling.dumps(value, f"the value of channel {self.name!r}"), version)

    def publish_message(
        self, message: pickling.Message, version: int | None = None, wait_s: float = PUBLISH_WAIT_S
    ) -> int:
        """Like `publish`, of a value that has been pickled already."""
        with self._publishing:
            if self._publisher is None:
                self._publisher = Publisher(self._memory)
            return self._publisher.publish(message, version, wait_s)

    def latest(self) -> Published | None:
        """Return the newest version, the same object while there is no newer one and it lives; None before the first.

        A reader that keeps arrays of more versions than it has cells gets a copy.
        """
        with self._reading:
            if self._row is None:
                self._row = self._row_for_creator()
        return self._newest(self._row, self._unpickled)

    def latest_message(self) -> tuple[int, pickling.Message] | None:
        """Return the newest version's number, and its value as it was pickled: views, as in `latest`.

        For who passes it on; among the readers it is FOR_OTHERS. Only in the process that created the channel.
        """
        with self._reading:
            if self._row_for_others is None:
                self._row_for_others = self._add_row(FOR_OTHERS)
        return self._newest(self._row_for_others, lambda entry, views: (entry.version, (views[0], views[1:])))

    @property
    def count(self) -> int:
        """How many versions have been published; a look at one number."""
        return self._memory.words[COUNT]

    def readers(self) -> dict[str, Staleness]:
        """Return how far behind each reader is, by its name."""
        count, now = self._memory.words[COUNT], time.monotonic()
        found = {}
        for index in range(self._memory.row_count):
            if name := self._memory.reader_name(index):
                row = self._memory.row(index)
                taken, version, seconds = row[TAKEN_COUNT], row[TAKEN_VERSION], now - row[TAKEN_AT] / 1e9
                behind = max(0, count - taken)  # a version is there for readers a moment before it is counted
                found[name] = Staleness(version, behind, seconds) if taken else Staleness(None, count, None)
        return found

    def add_reader(self, name: str) -> int:
        """Return a free row for a reader called `name`, which no other is; the creator gives rows out."""
        if not self._created:
            raise ActorError(f"only the process that created channel {self.name!r} adds readers; ask for it there.")
        with self._reading:
            return self._add_row(name)

    def remove_reader(self, row: int) -> None:
        """Forget a reader and what it kept. Only when its process has ended, for that memory is used again."""
        self._memory.row(row)[:] = memoryview(bytes(8 * ROW_WORDS)).cast("Q")

    def remove_publisher(self) -> None:
        """Let another process publish. Needed only if the last one seems to run: a zombie, or its id is used again."""
        self._memory.words[PUBLISHER] = 0

    def close(self) -> None:
        """Close the descriptor. What was read stays."""
        self._memory.memory.close()

    def __reduce__(self) -> tuple[Any, ...]:
        try:
            pickling.met_channels.get()[self.name] = self
        except LookupError:
            raise NotSupported(
                f"channel {self.name!r} can be sent to an actor only, as an argument, and not come back as a result."
            ) from None
        return arrive, (self.name,)

    def _newest(self, row_index: int, read: Callable[[Entry, list[memoryview]], T]) -> T | None:
        """Return what `read` makes of the newest version, read in that row; None before the first."""
        if os.getpid() != self._pid:
            raise ActorError(f"channel {self.name!r} was attached by process {self._pid}; a fork of it cannot read.")
        with self._reading:
            row = self._memory.row(row_index)
            while place := self._memory.words[NEWEST]:
                # The first cell is kept for a moment: when all others are taken, the version is copied under it.
                cell = next((index for index in range(1, CELLS) if not row[index]), 0)
                base = Borrowed.of(self._data, row, cell, 0)
                row[cell] = place
                fence()
                if self._memory.words[NEWEST] == place:  # else it ceased to be the newest before it was claimed
                    entry = self._memory.read_entry(base.data, place)
                    found = read(entry, cut(base, entry.parts) if cell else _copy(base, entry.parts))
                    row[TAKEN_COUNT], row[TAKEN_VERSION], row[TAKEN_AT] = (
                        entry.count,
                        entry.version,
                        time.monotonic_ns(),
                    )
                    return found
            return None

    def _unpickled(self, entry: Entry, views: list[memoryview]) -> Published:
        published = self._last() if self._last is not None else None
        if published is None or entry.count != self._last_count:
            published = Published(entry.version, pickle.loads(views[0], buffers=views[1:]), entry.published_ns / 1e9)
            self._last, self._last_count = weakref.ref(published), entry.count
        return published

    def _row_for_creator(self) -> int:
        if not self._created:
            raise ActorError(f"channel {self.name!r} was attached to publish only; attach it with a row to read.")
        return self._add_row("the creator")

    def _add_row(self, name: str) -> int:
        if not name:
            raise ValueError(f"a reader of channel {self.name!r} needs a name; give it that of its actor.")
        encoded = name.encode()[:MAX_NAME_BYTES]
        for index in range(self._memory.row_count):
            row = self._memory.row(index)
            if not row[NAME_BYTES]:
                row[NAME:] = memoryview(encoded.ljust(MAX_NAME_BYTES, b"\0")).cast("Q")
                row[NAME_BYTES] = len(encoded)
                return index
        raise ActorError(f"channel {self.name!r} has {self._memory.row_count} readers, its maximum; raise max_readers.")


receive_descriptor: Callable[[], tuple[dict[str, Any], int]] | None = None
"""Set in an actor: the next channel that its driver has given it, and its descriptor."""
_arrived: dict[str, Channel] = {}
"""In an actor: by name, its ends of channels."""
_arriving = threading.Lock()  # one thread may receive the descriptor that another waits for

_inline: weakref.WeakValueDictionary[int, InlineChannel] = weakref.WeakValueDictionary()
"""By id: what a strict engine's pickles refer to."""


def arrive(name: str) -> Channel:
    """Return this process' end of a channel that has come in a message."""
    with _arriving:
        while name not in _arrived:
            if receive_descriptor is None:
                raise ActorError(f"channel {name!r} has come to a process that is no actor.")
            label, fd = receive_descriptor()
            _arrived[label["channel"]] = Channel.attach(label["channel"], fd, label["row"])
        return _arrived[name]


class InlineChannel:
    """The same for actors in one process: nothing is shared with another, so nothing has to be claimed."""

    def __init__(self, name: str, strict: bool = False) -> None:
        """`strict` sends values through pickle, so that what could not be sent elsewhere cannot be sent here."""
        self.name = name
        self._strict = strict
        _inline[id(self)] = self
        self._count = self._taken = 0
        self._taken_at = 0.0
        self._newest: Published | None = None
        self._last: Published | None = None

    def publish(self, value: Any, version: int | None = None) -> int:
        """Make `value` the newest version, and return its number."""
        if self._strict:
            body, buffers = pickling.dumps(value, f"the value of channel {self.name!r}")
            value = pickle.loads(body, buffers=[bytes(buffer) for buffer in buffers])
        before = self._newest.version if self._newest is not None else 0
        version = checked(before + 1 if version is None else version)
        self._newest = Published(version, value, time.monotonic())
        self._count += 1
        return version

    def latest(self) -> Published | None:
        """Return the newest version; None before the first."""
        if self._newest is not None:
            self._last, self._taken, self._taken_at = self._newest, self._count, time.monotonic()
        return self._newest

    def readers(self) -> dict[str, Staleness]:
        """Return how far behind the one reader is, this process."""
        if self._last is None:
            return {"this process": Staleness(None, self._count, None)}
        seconds = time.monotonic() - self._taken_at
        return {"this process": Staleness(self._last.version, self._count - self._taken, seconds)}

    def __reduce__(self) -> tuple[Any, ...]:
        return _find_inline, (id(self),)

    def close(self) -> None:
        """Let go of the newest version."""
        self._newest = self._last = None


def _find_inline(identity: int) -> InlineChannel:
    return _inline[identity]


def _copy(base: np.ndarray, spans: list[Span]) -> list[memoryview]:
    """Return what `cut` does, in memory of its own."""
    return [memoryview(bytes(view)) for view in cut(base, spans)]
