"""Around every test of this folder: a census, and a watchdog that makes a hang a failure with stacks."""

import contextlib
import gc
import os
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

import psutil
import pytest

from rlx import actors
from rlx.actors import board
from tests.polling import until

SETTLE_S = 5.0  # for processes that are being killed to be gone
MEMORY_SLACK_BYTES = 48 * 2**20  # modules imported by the test, and the retained pages of malloc


def pytest_collection_modifyitems(items):
    for item in items:
        if Path(__file__).parent in item.path.parents and item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(150 if item.get_closest_marker("slow") else 60))


@pytest.fixture
def own_tmp(tmp_path_factory, monkeypatch):
    """A temporary directory of the test's own, so that what others leave in /tmp is not counted."""
    folder = tmp_path_factory.mktemp("t")
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


@pytest.fixture
def watchdog(request, own_tmp):
    """Shortly before pytest-timeout ends a test that hangs: abort its actors, whose logs then show all their stacks."""
    limit_s = request.node.get_closest_marker("timeout").args[0]
    timer = threading.Timer(limit_s - 10, _show_actor_stacks, [own_tmp])
    timer.daemon = True
    timer.start()
    yield
    timer.cancel()
    timer.join()


def _show_actor_stacks(folder):
    for info in board.list_runtimes():
        for entry in board.read_board(info.folder):
            if entry.pid is not None and entry.status not in board.ENDED:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(entry.pid, signal.SIGABRT)  # faulthandler writes the stacks into the log
    time.sleep(1.0)
    for log in folder.rglob("*.log"):
        sys.__stderr__.write(f"--- {log}\n{log.read_text(errors='replace')[-5000:]}\n")


@pytest.fixture(autouse=True)
def census(request, watchdog, own_tmp):
    """Whatever a test has done: no process, descriptor, thread, file or memory more than before."""
    before, bytes_before = _count(own_tmp), _memory_bytes()
    yield
    deadline = time.monotonic() + SETTLE_S
    while _more(before, after := _count(own_tmp)) and time.monotonic() < deadline:
        gc.collect()
        time.sleep(0.02)
    left = _more(before, after)
    for pid in after["processes"] - before["processes"]:
        with contextlib.suppress(psutil.NoSuchProcess):
            psutil.Process(pid).kill()
    assert not left, f"more than before: {left}"
    request.node.funcargs.clear()  # pytest keeps the runtime, and so its object memory, to the end of the test
    gc.collect()
    grown = _memory_bytes() - bytes_before
    assert grown < MEMORY_SLACK_BYTES, f"{grown / 2**20:.0f} MiB more than before"


def _count(folder):
    return {
        "processes": {child.pid for child in psutil.Process().children(recursive=True)},
        "descriptors": _descriptors(),
        "threads": sorted(thread.name for thread in threading.enumerate()),
        "shared memory": set(os.listdir("/dev/shm")),
        "runtime folders": [str(path) for path in folder.glob("rlx-*/*")],
    }


def _more(before, after):
    """Return by kind what there is now and was not; an earlier test's may have gone meanwhile."""
    more = {kind: Counter(after[kind]) - Counter(before[kind]) for kind in before}
    return {kind: sorted(map(str, found.elements())) for kind, found in more.items() if found}


def _descriptors():
    """Return what the open descriptors are, without pytest's files, which come and go."""
    kinds = []
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):
            target = os.readlink(f"/proc/self/fd/{fd}")
            if not target.startswith(("/proc/", "/dev/pts")):
                kinds.append(target if target.startswith("/") else target.split(":")[0])
    return sorted(kinds)


def _memory_bytes():
    return psutil.Process().memory_info().rss


@pytest.fixture
def rt(census):
    """A runtime of the test's own."""
    with actors.runtime("local", preload=("numpy",)) as runtime:
        yield runtime


def lent_bytes(runtime):
    """Return the bytes of the driver's object memory that somebody holds."""
    return runtime._engine.memory.arena.reclaim()


@pytest.fixture
def lent():
    return lent_bytes


@pytest.fixture
def gone():
    """Wait until none of the processes runs."""

    def runs(pid):
        with contextlib.suppress(psutil.NoSuchProcess):
            return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
        return False

    return lambda pids, timeout_s=3.0: until(lambda: not any(map(runs, pids)), timeout_s)
