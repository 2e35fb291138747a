"""Timesheet: which calls an actor runs, since when, and which it ran: written by the actor, read by anybody.

The file is mapped into memory, so telling costs less than a microsecond and no system call; a reader needs nobody's
help, whatever the actor is stuck in. A reader may see a record half written: its numbers are then wrong for a moment.

file    = header, `lanes` records of the calls that run now (start 0: none), RING records of the latest ended calls
header  = 512 bytes: numbers (see the constants), and from byte 64 on the place of a breakpoint that waits
record  = 64 bytes: start, end (time.monotonic(), which all processes of a machine share), method, whether it returned,
          whether it waits for the reader of its stream
"""

from __future__ import annotations

import contextlib
import mmap
import os
import struct
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import NamedTuple

from rlx.actors import processes

RING = 4096
RECORD = struct.Struct("=dd40s??6x")
WAITS = 57  # byte of a record
HEADER_BYTES, TEXT_START = 512, 64
VERSION, PID, START_TICKS, DONE, LANES, DEBUGGING = range(6)  # 64-bit numbers at the start of the header
LAYOUT = 0x726C7802  # at VERSION: "rlx", layout 2

Running = tuple[int, float, bytes]
"""A call between `begin` and `end`."""


class Timesheet:
    """The actor's own sheet. Calls may begin and end in any thread."""

    def __init__(self, folder: Path, serial: int, name: str, lanes: int = 1) -> None:
        """Open the sheet of actor number `serial`, afresh for this process; what ended before stays in the ring.

        lanes: how many calls may run at once; more are counted, but not all of them shown.
        """
        self.folder, self.serial, self.name = folder, serial, name
        lanes += 1  # the last one is shared by those that are too many
        size = HEADER_BYTES + (lanes + RING) * RECORD.size
        fd = os.open(sheet_file(folder, serial), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.posix_fallocate(fd, 0, size)  # in a hole of a full disk a write through the map would be a SIGBUS
            self._memory = mmap.mmap(fd, size)
        except OSError as error:
            with contextlib.suppress(OSError):  # the log is on the same disk, mostly
                print(f"what {name} does cannot be seen from outside ({error})", file=sys.stderr)
            self._memory = mmap.mmap(-1, size)  # it works all the same
        finally:
            os.close(fd)
        self._ring = HEADER_BYTES + lanes * RECORD.size
        self._memory[: self._ring] = bytes(self._ring)
        self._words = memoryview(self._memory).cast("Q")
        own = processes.stat(os.getpid())
        assert own is not None
        for place, number in ((VERSION, LAYOUT), (PID, os.getpid()), (START_TICKS, own.start_ticks), (LANES, lanes)):
            self._words[place] = number
        self._spare = self._ring - RECORD.size
        self._free = list(range(HEADER_BYTES, self._spare, RECORD.size))
        self._lock = threading.Lock()
        self._done = 0

    def begin(self, method: str) -> Running:
        """Note that a call runs from now on; return what `end` needs."""
        start, name = monotonic(), method.encode()
        try:
            lane = self._free.pop()
        except IndexError:
            lane = self._spare
        RECORD.pack_into(self._memory, lane, start, 0.0, name, False, False)
        return lane, start, name

    def end(self, running: Running, ok: bool = True) -> None:
        """Note that the call has ended; ok: it returned, and raised nothing."""
        end = monotonic()
        lane, start, name = running
        with self._lock:
            self._done = done = self._done + 1
            RECORD.pack_into(self._memory, self._ring + done % RING * 64, start, end, name, ok, False)
            self._words[DONE] = done
        self._words[lane >> 3] = 0
        if lane != self._spare:
            self._free.append(lane)

    def wait_for_reader(self, running: Running, waits: bool) -> None:
        """Note that a stream waits until its reader takes what it has yielded, or no longer does."""
        self._memory[running[0] + WAITS] = waits

    def skip(self) -> None:
        """Note a call that was sent and will not run: it was cancelled."""
        with self._lock:
            self._done += 1
            self._words[DONE] = self._done

    def debugging(self, place: str | None) -> None:
        """Note that a breakpoint waits or is being debugged at `place` (file:line); None: no longer."""
        text = (place or "").encode()[: HEADER_BYTES - TEXT_START]
        self._memory[TEXT_START:HEADER_BYTES] = text.ljust(HEADER_BYTES - TEXT_START, b"\0")
        self._words[DEBUGGING] = place is not None

    def running(self) -> list[Span]:
        """Return the calls that run now, oldest first."""
        return _spans(self._memory[HEADER_BYTES : self._ring])


class Span(NamedTuple):
    """One call, in seconds of time.monotonic()."""

    method: str
    start: float
    end: float
    """0.0 while it runs."""
    ok: bool
    """Whether it returned; False while it runs."""
    waits_for_reader: bool = False
    """Whether it is a stream that waits until its reader takes what it has yielded."""


@dataclass(frozen=True)
class Calls:
    """What a timesheet says."""

    pid: int
    """The process that wrote it: an earlier one's sheet says nothing about a restarted actor."""
    start_ticks: int
    """When that process started, see processes.Stat."""
    done: int
    """Calls that have ended, cancelled ones too."""
    running: list[Span]
    """The calls that run now, oldest first."""
    ended: list[Span]
    """The latest 4,096 or fewer that ran, oldest first."""
    breakpoint: str | None
    """file:line of the breakpoint that waits."""


def read_calls(folder: Path, serial: int, ended: bool = False) -> Calls | None:
    """Read the sheet of actor number `serial`, with its ended calls if asked; None if it has not begun one."""
    try:
        with open(sheet_file(folder, serial), "rb") as file:
            header = file.read(HEADER_BYTES)
            if len(header) < HEADER_BYTES:
                return None
            words = struct.unpack_from("=6Q", header)
            if words[VERSION] != LAYOUT:
                return None
            lanes = file.read(words[LANES] * RECORD.size)
            ring = file.read() if ended else b""
    except FileNotFoundError:
        return None
    place = header[TEXT_START:].rstrip(b"\0").decode("utf-8", "replace") if words[DEBUGGING] else None
    return Calls(words[PID], words[START_TICKS], words[DONE], _spans(lanes), _spans(ring), place)


def sheet_file(folder: Path, serial: int) -> Path:
    """Return the file of actor number `serial` in a runtime folder."""
    return folder / f"{serial}.calls"


def _spans(records: bytes) -> list[Span]:
    """Return the records that are in use, oldest first."""
    whole = len(records) // RECORD.size * RECORD.size
    return sorted(
        (
            Span(method.rstrip(b"\0").decode("utf-8", "replace"), start, end, ok, waits)
            for start, end, method, ok, waits in RECORD.iter_unpack(records[:whole])
            if start
        ),
        key=lambda span: span.start,
    )
