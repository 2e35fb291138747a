"""Compares the actor core of rlx with Ray's on one machine: the traffic of a training run, starts, memory and deaths.

    python benchmarks/core.py                                         # everything, into docs/benchmarks.md
    python benchmarks/core.py --rounds 1 --seconds 0.2 --out /tmp     # a quick look

Both stay up through all rounds, in processes of their own, and take turns row by row (A B A B); the one that waits
is stopped. A ratio compares two windows of one round that follow each other, and a bound was measured just before.
Linux only.
"""

from __future__ import annotations

import argparse
import contextlib
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from core_page import TRAFFIC, page
from memory import strangers
from peer import Peer
from peers.core_traffic import BROADCAST_MIB, ECHO_MIB, MIB, rate
from processes import output_of
from report import DOCS, busy_cores, machine, publish

FRAME_BYTES = 64
SETTLE_S = 1.0
PROBE_TIMEOUT_S = 60.0
PONG = """
import socket, sys
with socket.socket(fileno=int(sys.argv[1])) as line:
    while data := line.recv(4096):
        line.sendall(data)
"""
TORCH = "import time; began = time.perf_counter(); import torch; print(time.perf_counter() - began)"


def main() -> None:
    """Run the benchmark."""
    options = _parse()
    pythons = {"rlx": sys.executable}
    if (python := find_ray(options.ray, options.envs)) is not None:
        pythons["ray"] = python
    command = f"python benchmarks/core.py --rounds {options.rounds} --seconds {options.seconds:g}"
    record: dict[str, Any] = {"command": command, "machine": machine(), "seconds": options.seconds}
    record["versions"], record["rounds"] = {}, [{} for _ in range(options.rounds)]
    record["busy_cores_before"] = busy_cores()
    starts(pythons, record)
    traffic(pythons, options.seconds, record)
    publish(options.out, "core", record, page(record))
    print(page(record))


def find_ray(given: str | None, envs: Path) -> str | None:
    """Return an interpreter that has Ray: the given one, or that of the environment which benchmarks/ppo.py makes."""
    python = given or str(envs.resolve() / "rllib" / "bin" / "python")
    probe = "import importlib.util, sys; sys.exit(importlib.util.find_spec('ray') is None)"
    if Path(python).is_file() and subprocess.run([python, "-c", probe], timeout=PROBE_TIMEOUT_S).returncode == 0:
        return python
    print(f"{python} has no Ray, so rlx is measured alone; give an interpreter that has it with --ray PATH.")
    return None


def starts(pythons: dict[str, str], record: dict[str, Any]) -> None:
    """Measure fresh interpreters until their first results, and the memory of what they have started."""
    for number, results in enumerate(record["rounds"], 1):
        imported = float(output_of([pythons["rlx"], "-c", TORCH], PROBE_TIMEOUT_S, Path.cwd()))
        for row, memory, torch in (("first_torch", "memory_torch", True), ("first", "memory", False)):
            results[row], results[memory] = {}, {}
            if torch:
                results[row]["bound"] = imported
            for name, python in pythons.items():
                began = time.time()
                with Peer.opened(name, python, torch=torch) as peer:
                    results[row][name] = peer.ready_at - began
                    record["versions"][name] = peer.version
                    time.sleep(SETTLE_S)
                    results[memory][name], results[memory][f"{name} driver"] = peer.memory_mb()
                    results[memory][f"{name} strangers"] = strangers(peer.root)
                print(
                    f"round {number}, {row}, {name}: {results[row][name]:.2f} s, {results[memory][name]:.0f} MB",
                    flush=True,
                )


def traffic(pythons: dict[str, str], seconds: float, record: dict[str, Any]) -> None:
    """Measure the other rows, all libraries in turn, each beside its bound."""
    with contextlib.ExitStack() as stack:
        peers = {
            name: stack.enter_context(Peer.opened(name, python, torch=name == "rlx"))
            for name, python in pythons.items()
        }
        for number, results in enumerate(record["rounds"], 1):
            for row in TRAFFIC:
                results[row.key] = found = {}
                if row.bound is not None:
                    with paused([*peers.values()]):
                        found["bound"] = bound(row.bound, seconds)
                for name, peer in peers.items():
                    with paused([other for other in peers.values() if other is not peer]):
                        answer = peer.measure(row.key, seconds)
                    found[name] = answer["value"]
                    if "error" in answer:
                        found[f"{name} error"] = answer["error"]
                    print(f"round {number}, {row.key}, {name}: {answer['value']:,.3f}", flush=True)


@contextlib.contextmanager
def paused(peers: list[Peer]) -> Iterator[None]:
    """Stop all processes of these libraries meanwhile."""
    with contextlib.ExitStack() as stack:
        for peer in peers:
            stack.enter_context(peer.paused())
        yield


def bound(kind: str, seconds: float) -> float:
    """Return how often a second the machine does what nobody can do without."""
    if kind == "ping-pong":
        return ping_pong(seconds)
    size, copies = {"two copies": (ECHO_MIB * MIB, 2), "one copy": (BROADCAST_MIB * MIB, 1)}[kind]
    source = np.random.default_rng(0).integers(0, 256, size, dtype=np.uint8)
    target = np.empty_like(source)
    return rate(lambda: np.copyto(target, source), seconds / 2) / copies


def ping_pong(seconds: float) -> float:
    """Return how often a second a frame goes to another process and back, over a pair of sockets."""
    ours, theirs = socket.socketpair()
    with ours, theirs, subprocess.Popen([sys.executable, "-c", PONG, str(theirs.fileno())], pass_fds=[theirs.fileno()]):
        theirs.close()  # so that the end of the other process ends a wait here
        frame = bytes(FRAME_BYTES)

        def once() -> None:
            ours.sendall(frame)
            ours.recv(FRAME_BYTES, socket.MSG_WAITALL)

        found = rate(once, seconds)
        ours.shutdown(socket.SHUT_WR)
    return found


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5, help="windows of each row and library (default: 5)")
    parser.add_argument("--seconds", type=float, default=2.0, help="length of a window (default: 2)")
    parser.add_argument("--ray", metavar="PATH", help="an interpreter that has Ray and torch (default: that in --envs)")
    parser.add_argument("--envs", type=Path, default=Path(".benchmark-envs"), help="folder of the peers' environments")
    parser.add_argument("--out", type=Path, default=DOCS, help="folder of benchmarks.md and .json (default: docs)")
    return parser.parse_args()


if __name__ == "__main__":
    main()
