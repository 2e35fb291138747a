"""Fixtures for tests of more than one folder."""

import contextlib
import gc
import json
import os
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell starts its background jobs so, and what they start; Ctrl-C is tested here.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish() -> None:
    """Have gc.collect(), which many tests call, skip what was there before: with torch's modules it takes 0.1 s."""
    gc.collect()
    gc.freeze()


TOY_RUNTIME = Path(__file__).parent / "toy_runtime.py"


@dataclass
class Toy:
    """A running toy_runtime.py."""

    driver: subprocess.Popen[str]
    folder: Path
    pids: dict[str, int]

    def update(self, actor: str, **update: Any) -> None:
        """Have the driver tell something about an actor."""
        assert self.driver.stdin is not None and self.driver.stdout is not None
        print(json.dumps({"actor": actor, "update": update}), file=self.driver.stdin, flush=True)
        assert self.driver.stdout.readline() == "ok\n"

    def log(self, actor: str) -> str:
        return (self.folder / "logs" / f"{actor}.log").read_text()


@pytest.fixture
def gate(tmp_path):
    """A path an actor can wait on, and the function that lets one of those who wait go on."""
    path = str(tmp_path / "gate")
    os.mkfifo(path)

    def open_gate():
        with open(path, "w") as fifo:
            fifo.write("open")

    return path, open_gate


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """Start drivers with actors: toy(name=method, ...); their folders are in a temporary directory of this test."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.delenv("PYTHONBREAKPOINT", raising=False)
    with contextlib.ExitStack() as drivers:

        def start(**methods: str) -> Toy:
            driver = subprocess.Popen(
                [sys.executable, str(TOY_RUNTIME), json.dumps(methods)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            drivers.callback(_end, driver)
            assert driver.stdout is not None
            found = json.loads(driver.stdout.readline())
            drivers.callback(_kill, found["pids"].values())
            return Toy(driver, Path(found["folder"]), found["pids"])

        yield start


def _end(driver: subprocess.Popen[str]) -> None:
    with contextlib.suppress(ProcessLookupError):
        driver.send_signal(signal.SIGCONT)
    driver.communicate(timeout=20)


def _kill(pids: Any) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
