"""Why a process ended, in words."""

from __future__ import annotations

import signal
from collections.abc import Sequence


def describe(name: str, pid: int | None, how: str, method: str | None, waiting: int, stderr: Sequence[str]) -> str:
    """Return one sentence on what ended the actor `name` and when, and below it the last lines of its stderr."""
    sentence = f"actor {name} (process {pid or 'not started'}) {how}"
    if method is not None:
        sentence += f" in {method}()"
    if waiting > 0:
        sentence += f" with {waiting} more call{'s' * (waiting > 1)} waiting"
    if how.startswith("was killed by SIGKILL"):
        sentence += "; if nobody sent that signal the machine was out of memory: use fewer or smaller actors"
    tail = "".join(f"\n  {line}" for line in stderr)
    return f"{sentence}." + (f" Its last lines on stderr:{tail}" if tail else "")


def describe_exit(exitcode: int) -> str:
    """Return "was killed by SIGSEGV" or "ended with exit code 3"; negative codes are signals."""
    if exitcode >= 0:
        return f"ended with exit code {exitcode}"
    try:
        return f"was killed by {signal.Signals(-exitcode).name}"
    except ValueError:
        return f"was killed by signal {-exitcode}"
