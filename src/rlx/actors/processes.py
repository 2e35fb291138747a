"""What /proc says about a process. Every function returns None or nothing where the process is gone or foreign."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from typing import NamedTuple

TICKS_PER_S = os.sysconf("SC_CLK_TCK")
STATES = {
    "R": "on the CPU",
    "S": "sleeping",
    "D": "waiting for the disk",
    "T": "stopped (SIGSTOP)",
    "t": "stopped by a debugger",
    "I": "idle",
    "Z": "ended",
    "X": "ended",
}


class Stat(NamedTuple):
    """One line of /proc/<pid>/stat, as far as it is needed."""

    state: str
    """A letter, see STATES; of the main thread, but T stands for all."""
    cpu_ticks: int
    """CPU time of all threads so far, 1 / TICKS_PER_S seconds."""
    start_ticks: int
    """When it started, in ticks since boot: tells a process from a later one with the same id."""


def stat(pid: int) -> Stat | None:
    """Return the state of a process; None if there is no such process."""
    text = _read(f"/proc/{pid}/stat")
    if text is None:
        return None
    fields = text.rpartition(")")[2].split()  # a name may hold blanks and brackets, and stands before all this
    return Stat(fields[0], int(fields[11]) + int(fields[12]), int(fields[19]))


def is_running(pid: int, start_ticks: int) -> bool:
    """True if the process with this start time has not ended."""
    now = stat(pid)
    return now is not None and now.start_ticks == start_ticks and now.state not in "ZX"


def memory(pid: int) -> tuple[int, str] | None:
    """Return (bytes, "PSS"); (bytes, "RSS") of another user's process, which tells only that."""
    for file, key, kind in (("smaps_rollup", "Pss:", "PSS"), ("status", "VmRSS:", "RSS")):
        if (value := _field(pid, file, key)) is not None:
            return int(value.split()[0]) * 1024, kind
    return None


def handles(pid: int, signal: int) -> bool:
    """True if the process has a handler for the signal."""
    caught = _field(pid, "status", "SigCgt:")
    return caught is not None and bool(int(caught, 16) >> (signal - 1) & 1)


def pid_namespace() -> str:
    """Return a name for the set of processes among which a process id means the same: a container has its own."""
    return os.readlink("/proc/self/ns/pid")


class CpuMeter:
    """CPU use of processes between two looks."""

    def __init__(self, pids: Iterable[int]) -> None:
        self._before = self._look(pids)

    def percent(self, pids: Iterable[int]) -> dict[int, float]:
        """Return the percentage of one CPU that each process used since the last look, of those seen at both."""
        before, self._before = self._before, self._look(pids)
        return {
            pid: 100 * (ticks - before[pid][1]) / TICKS_PER_S / max(at - before[pid][0], 1 / TICKS_PER_S)
            for pid, (at, ticks) in self._before.items()
            if pid in before
        }

    def _look(self, pids: Iterable[int]) -> dict[int, tuple[float, int]]:
        return {pid: (time.monotonic(), now.cpu_ticks) for pid in pids if (now := stat(pid)) is not None}


def _field(pid: int, file: str, key: str) -> str | None:
    text = _read(f"/proc/{pid}/{file}") or ""
    return next((line[len(key) :].strip() for line in text.splitlines() if line.startswith(key)), None)


def _read(path: str) -> str | None:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read()
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return None
