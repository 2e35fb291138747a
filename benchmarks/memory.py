"""Measures the memory of a run with two env runners: proportional set size (PSS) of the whole process tree.

    python benchmarks/memory.py                                # into docs/benchmarks.md

PSS divides a page among the processes that map it, so that the sum over a tree is what the tree costs, as long as
nobody else maps its libraries: strangers take a share of them, so the page says how many there were. Linux only.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import psutil
from report import DOCS, describe, machine, markdown_table, publish

RUNNERS = 2
INTERVAL_S = 0.2
START_TIMEOUT_S = 120.0
RUN = """
import sys, threading
from rlx import load_config
stop = threading.Event()
with load_config("ppo", ["env_runners.num_env_runners={runners}"]).build() as algorithm:
    algorithm.train()
    print("ready", flush=True)
    sys.stdin.readline()
    threading.Thread(target=lambda: (sys.stdin.readline(), stop.set())).start()
    while not stop.is_set():
        algorithm.train()
"""


def main() -> None:
    """Run the benchmark."""
    options = _parse()
    conditions = machine()
    with trained_run() as process:
        idle = watch(process, options.seconds)
        process.stdin.write("train\n")
        process.stdin.flush()
        training = watch(process, options.seconds)
    states = {"idle": idle, "training": training}
    publish(options.out, "memory", {"machine": conditions, "states": states}, page(conditions, states))
    print(page(conditions, states))


@contextmanager
def trained_run() -> Iterator[Any]:
    """Yield the process of a run that has made one iteration and idles; a line on its stdin makes it train."""
    command = [sys.executable, "-c", RUN.format(runners=RUNNERS)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None and process.stdout is not None
        deadline = threading.Timer(START_TIMEOUT_S, process.kill)
        deadline.start()
        try:
            if process.stdout.readline() != "ready\n":
                raise SystemExit(f"the run ended with code {process.wait(START_TIMEOUT_S)} before it was ready.")
            deadline.cancel()
            yield process
            process.stdin.write("stop\n")
            process.stdin.close()
            process.wait(START_TIMEOUT_S)
        finally:
            deadline.cancel()
            process.kill()


def watch(process: Any, seconds: float) -> dict[str, Any]:
    """Return the memory of a process tree while it runs for `seconds`, and the cores it keeps busy."""
    root = psutil.Process(process.pid)
    samples, started, busy_before = [], time.perf_counter(), _processor_s(root)
    while time.perf_counter() - started < seconds:
        samples.append([member.memory_full_info().pss / 1e6 for member in tree(root)])
        time.sleep(INTERVAL_S)
    busy = (_processor_s(root) - busy_before) / (time.perf_counter() - started)
    totals = [sum(sample) for sample in samples]
    return {
        "peak_mb": max(totals),
        "median_mb": median(totals),
        "by_process_mb": samples[-1],
        "busy_cores": busy,
        "strangers": strangers(root),
    }


def page(conditions: dict[str, Any], states: dict[str, Any]) -> str:
    """Return the table of both states and what it was measured with, as markdown."""
    rows = [
        [
            name,
            f"{state['peak_mb']:,.0f}",
            f"{state['median_mb']:,.0f}",
            " + ".join(f"{value:,.0f}" for value in state["by_process_mb"]),
            f"{state['busy_cores']:.2f}",
            str(state["strangers"]),
        ]
        for name, state in states.items()
    ]
    header = ["state", "highest MB", "median MB", "MB by process", "busy cores", "strangers that map torch"]
    return f"{markdown_table(header, rows)}\n\n{RUNNERS} env runners, config `ppo`. {describe(conditions)}"


def tree(root: psutil.Process) -> list[psutil.Process]:
    """Return a process and all its descendants."""
    return [root, *root.children(recursive=True)]


def strangers(root: psutil.Process) -> int:
    """Return how many processes outside of the tree have torch loaded."""
    own = {member.pid for member in tree(root)}
    maps = [process / "maps" for process in Path("/proc").glob("[0-9]*") if int(process.name) not in own]
    return sum("libtorch_cpu.so" in _text(file) for file in maps)


def _text(file: Path) -> str:
    """Return a file of /proc, empty where its process has ended or belongs to somebody else."""
    try:
        return file.read_text()
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return ""


def _processor_s(root: psutil.Process) -> float:
    return sum(sum(member.cpu_times()[:2]) for member in tree(root))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=10.0, help="length of each state (default: 10)")
    parser.add_argument("--out", type=Path, default=DOCS, help="folder of benchmarks.md and .json (default: docs)")
    return parser.parse_args()


if __name__ == "__main__":
    main()
