"""A library of benchmarks/core.py: a process that measures what it is told to, with all the processes it starts."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
from memory import tree

SCRIPTS = Path(__file__).resolve().parent / "peers"
START_TIMEOUT_S = 120.0
ROW_TIMEOUT_S = 120.0  # beside the seconds that it measures for
CLOSE_TIMEOUT_S = 30.0


class Peer:
    """One library in a process of its own; `opened` starts it and leaves nothing of it behind."""

    def __init__(self, name: str, process: subprocess.Popen[str], errors: Path) -> None:
        self.name = name
        self._process, self._errors = process, errors
        self._root = psutil.Process(process.pid)
        hello = self._answer(START_TIMEOUT_S)
        self.version: str = hello["version"]
        self.ready_at: float = hello["ready_at"]
        """When its first actors had answered, on the clock of time.time()."""

    @classmethod
    @contextlib.contextmanager
    def opened(cls, name: str, python: str, *, torch: bool) -> Iterator[Peer]:
        """Yield the library with its actors started."""
        with tempfile.TemporaryDirectory(prefix="c") as scratch:  # a short path: Ray puts sockets there
            # Ray would give its workers a lower priority.
            environment = os.environ | {"RAY_TMPDIR": scratch, "RAY_worker_niceness": "0"}
            errors = Path(scratch) / "errors"
            with errors.open("w") as sink:
                process = subprocess.Popen(
                    [python, str(SCRIPTS / f"{name}_core.py"), json.dumps({"torch": torch})],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=sink,
                    text=True,
                    env=environment,
                    start_new_session=True,
                )
            try:
                with process:
                    try:
                        yield cls(name, process, errors)
                        assert process.stdin is not None
                        process.stdin.close()
                        process.wait(CLOSE_TIMEOUT_S)
                    finally:
                        process.kill()
            finally:
                _kill_all_with(f"RAY_TMPDIR={scratch}")

    def measure(self, row: str, seconds: float) -> dict[str, Any]:
        """Return what the library says of one row after measuring it for so long."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"row": row, "seconds": seconds}) + "\n")
        self._process.stdin.flush()
        return self._answer(ROW_TIMEOUT_S + 2 * seconds)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Stop all its processes meanwhile: the daemons of an idle library take time from the one that is measured."""
        members = tree(self._root)
        for member in members:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.suspend()
        try:
            yield
        finally:
            for member in members:
                with contextlib.suppress(psutil.NoSuchProcess):
                    member.resume()

    def memory_mb(self) -> tuple[float, float]:
        """Return the proportional set size of all that the library has started, and of its driver."""
        driver, *started = [member.memory_full_info().pss / 1e6 for member in tree(self._root)]
        return sum(started), driver

    @property
    def root(self) -> psutil.Process:
        """The process of the driver."""
        return self._root

    def _answer(self, timeout_s: float) -> dict[str, Any]:
        assert self._process.stdout is not None
        late = threading.Timer(timeout_s, self._process.kill)
        late.start()
        began = time.monotonic()
        line = self._process.stdout.readline()
        late.cancel()
        if not line:
            waited_s = time.monotonic() - began
            raise SystemExit(
                f"{self.name} gave no answer and ended after {waited_s:.0f} s (the limit is {timeout_s:.0f} s); "
                f"its last words:\n{self._errors.read_text()[-3000:]}"
            )
        return json.loads(line)


def _kill_all_with(setting: str) -> None:
    """Kill what was started with this setting in its environment: a daemon may have lost its parent."""
    for member in psutil.process_iter():
        with contextlib.suppress(OSError, psutil.Error):
            if setting in Path(f"/proc/{member.pid}/environ").read_text(errors="replace").split("\0"):
                member.kill()
