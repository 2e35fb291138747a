"""Why a process ended, or what one does that does not answer, in words."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from pathlib import Path

from rlx.actors import processes

_STATES = {
    "R": "running on the CPU",
    "S": "sleeping or waiting",
    "D": "waiting for the disk or another device",
    "T": "stopped by a signal (SIGSTOP); SIGCONT lets it go on",
    "t": "stopped by a debugger",
    "Z": "ended and not yet buried",
}


def describe(
    name: str,
    pid: int | None,
    how: str,
    method: str | None,
    waiting: int,
    oom_kills: int,
    log: Sequence[str],
    where: str,
) -> str:
    """Return one sentence on what ended the actor `name` and when, and below it the last lines that it wrote.

    where: " on" and the machine, where it is not the reader's.
    """
    sentence = f"{name} (pid {pid or 'unknown: not started'}{where}) {how}"
    if method is not None:
        sentence += f" in {method}()"
    if waiting > 0:
        sentence += f" with {waiting} more call{'s' * (waiting > 1)} waiting"
    if oom_kills:
        sentence += f", cgroup oom_kill +{oom_kills}: memory ran out; use fewer or smaller actors"
    elif how.endswith("SIGSEGV"):
        sentence += "; arrays and tensors that an actor receives are read-only memory: clone a tensor to write into it"
    tail = "".join(f"\n  {line}" for line in log)
    return f"{sentence}." + (f" The last lines that it wrote:{tail}" if tail else "")


def describe_exit(exitcode: int) -> str:
    """Return "was killed by SIGSEGV" or "ended with exit code 3"; negative codes are signals."""
    if exitcode >= 0:
        return f"ended with exit code {exitcode}"
    try:
        return f"was killed by {signal.Signals(-exitcode).name}"
    except ValueError:
        return f"was killed by signal {-exitcode}"


def activity(pid: int) -> tuple[str, bool]:
    """Return what the kernel says that the process does, and whether it cannot run."""
    now = processes.stat(pid)
    if now is None:
        return "gone", True
    return _STATES.get(now.state, f"in state {now.state}"), now.state in "TtD"


def count_oom_kills() -> int:
    """Return how many processes of this control group (of the machine, where groups do not count) lacked memory."""
    for file in (*_memory_events(), Path("/proc/vmstat")):
        try:
            counters = dict(line.split() for line in file.read_text().splitlines())
            return int(counters["oom_kill"])
        except (OSError, KeyError, ValueError):
            continue
    return 0


def _memory_events() -> list[Path]:
    """Return the files in which the memory controller of this process counts, of either version of the interface."""
    files, root = [], Path("/sys/fs/cgroup")
    try:
        groups = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
    except OSError:
        return []
    for _, controllers, path in groups:
        if "memory" in controllers.split(","):
            files += [root / "memory" / path.lstrip("/") / "memory.oom_control", root / "memory" / "memory.oom_control"]
        elif controllers == "":
            files += [root / path.lstrip("/") / "memory.events", root / "memory.events"]
    return files
