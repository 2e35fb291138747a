"""What limits a cluster of 10, 100 and 1,000 nodes: unit costs measured here, and a simulation made of them.

    python benchmarks/scale.py --out docs/scale.md

Nothing of a network is in it: where one is slower than a core with TLS, its rate takes the place of the one here.
"""

from __future__ import annotations

import argparse
import dataclasses
import heapq
import json
import queue
import random
import socket
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from learning import write_section
from report import describe, machine, markdown_table

from rlx.actors.cluster.credentials import ClusterKey
from rlx.actors.cluster.handshake import Doorman, Role, connect
from rlx.actors.cluster.membership import NodeInfo
from rlx.actors.engines import wire
from rlx.actors.engines.link import Link
from rlx.actors.engines.reactor import Reactor

SIZES = (10, 100, 1000)
WEIGHTS = {"2 MiB (a policy for Atari)": 2 * 2**20, "25 MiB": 25 * 2**20, "1.2 GB (0.6 billion in bf16)": 1_200_000_000}
BEAT_S = 1.0
SIMULATED_S = 60.0
T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Costs:
    """Seconds of one core."""

    beat: float
    """A heartbeat, read and dealt with by the reactor; writing one costs the other end about the same."""
    member: float
    """One node in the list that the head sends to a driver at each change: made, sent and read."""
    byte: float
    """A byte over TLS, both ends together."""
    handshake: float
    """A connection, both ends together."""


def main() -> None:
    """Measure, simulate, and write both."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("scale.md"), help="markdown file")
    options = parser.parse_args()
    costs = Costs(heartbeat_s(), member_s(), *connection_s())
    write_section(f"{of_costs(costs)}\n\n{of_sizes(costs)}\n\n{describe(machine())}", options.out, "scale")
    print(options.out.read_text())


def heartbeat_s(count: int = 5_000) -> float:
    """Return what one heartbeat costs the reactor's thread to which it comes, alone, as they do."""
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    reactor, came = Reactor(), threading.Semaphore(0)
    link = Link(reactor, ours, lambda frame: came.release(), lambda how: None)
    beat = b"".join(map(bytes, wire.encode(wire.PING)))
    _do(reactor, link.open)
    began = _do(reactor, time.thread_time)
    for _ in range(count):
        theirs.sendall(beat)
        came.acquire(timeout=10)
    cost = (_do(reactor, time.thread_time) - began) / count
    _do(reactor, lambda: link.finish(link.close))
    reactor.close(5.0)
    theirs.close()
    return cost


def _do(reactor: Reactor, what: Callable[[], T]) -> T:
    """Return what `what()` returns in the reactor's thread."""
    answer: queue.SimpleQueue[T] = queue.SimpleQueue()
    reactor.post(lambda: answer.put(what()))
    return answer.get(timeout=10)


def member_s(count: int = 1000) -> float:
    """Return what one node costs in a list of them, written and read as JSON."""
    nodes = [
        NodeInfo(f"node-{n}", f"10.0.{n // 250}.{n % 250}:40000", 64, 8, 2**39, {"kind": "h200"}) for n in range(count)
    ]
    began = time.process_time()
    text = json.dumps([dataclasses.asdict(node) for node in nodes])
    assert [NodeInfo(**node) for node in json.loads(text)] == nodes
    return (time.process_time() - began) / count


def connection_s(size: int = 25 * 2**20, rounds: int = 12, connections: int = 50) -> tuple[float, float]:
    """Return what a byte over TLS, and a connection, cost both ends together."""
    with tempfile.TemporaryDirectory() as folder:
        key = ClusterKey.create(Path(folder) / "cluster.key")
        admitted: list[socket.socket] = []
        came = threading.Semaphore(0)
        listener = socket.create_server(("127.0.0.1", 0))
        doorman = Doorman(key, listener, lambda sock, *_: (admitted.append(sock), came.release()), tls_only=True)  # type: ignore
        address = listener.getsockname()
        began = time.process_time()
        made = [connect(address, key, Role.VIEWER, tls=True) for _ in range(connections)]
        for _ in made:
            came.acquire(timeout=10)
        handshake = (time.process_time() - began) / connections
        reactor, there = Reactor(), threading.Semaphore(0)
        reading = Link(reactor, made[-1], lambda frame: there.release(), lambda how: None)
        writing = Link(reactor, admitted[-1], lambda frame: None, lambda how: None)
        for link in (reading, writing):
            _do(reactor, link.open)
        data, times = bytes(size), []
        for _ in range(rounds):
            began = time.process_time()
            writing.write(wire.encode(wire.PUBLISH, 0, "", (b"", [data])))
            there.acquire(timeout=60)
            times.append(time.process_time() - began)
        byte = min(times) / size
        for link in (reading, writing):
            _do(reactor, lambda link=link: link.finish(link.close))
        reactor.close(5.0)
        for sock in [*made[:-1], *admitted[:-1]]:
            sock.close()
        doorman.close()
        return byte, handshake


def head_delays_s(nodes: int, costs: Costs, seed: int = 0) -> tuple[float, float]:
    """Return (share of a core, longest wait of a heartbeat) of the head's one thread, by simulating a minute.

    Every node's heartbeats come once a second at a phase of its own, with a jitter of a tenth; each is answered.
    """
    rng = random.Random(seed)
    events = [(rng.random() * BEAT_S, number) for number in range(nodes)]
    heapq.heapify(events)
    free_at = busy = longest = 0.0
    while events[0][0] < SIMULATED_S:
        at, number = heapq.heappop(events)
        start = max(at, free_at)
        longest = max(longest, start - at)
        free_at = start + 2 * costs.beat
        busy += 2 * costs.beat
        heapq.heappush(events, (at + BEAT_S * rng.uniform(0.9, 1.1), number))
    return busy / SIMULATED_S, longest


def of_costs(costs: Costs) -> str:
    """Return the unit costs in words."""
    return markdown_table(
        ["unit cost, of one core", ""],
        [
            ["a heartbeat, to whom it comes", f"{costs.beat * 1e6:.1f} µs"],
            ["one node in the head's list, made and read", f"{costs.member * 1e6:.1f} µs"],
            ["a connection with TLS and proof, both ends", f"{costs.handshake * 1e3:.1f} ms"],
            ["bytes over TLS, both ends on that core", f"{1 / costs.byte / 1e9:.2f} GB/s"],
        ],
    )


def of_sizes(costs: Costs) -> str:
    """Return the table by number of nodes."""
    rows = []
    delays = [head_delays_s(nodes, costs) for nodes in SIZES]
    rows.append(["head: heartbeats a second, in and out", *(f"{2 * nodes / BEAT_S:,.0f}" for nodes in SIZES)])
    rows.append(["head: share of a core for them", *(f"{100 * share:.1f} %" for share, _ in delays)])
    rows.append(["head: longest wait of one (lost at 15 s)", *(f"{1e3 * longest:.1f} ms" for _, longest in delays)])
    rows.append(
        [
            "all join at once: lists to one driver, one a join, s",
            *(f"{n * (n + 1) / 2 * costs.member:.2f}" for n in SIZES),
        ]
    )
    rows.append(["a driver's connections, made one after another, s", *(f"{n * costs.handshake:.2f}" for n in SIZES)])
    rows.append(
        ["a driver: share of a core for heartbeats", *(f"{100 * 2 * n * costs.beat / BEAT_S:.1f} %" for n in SIZES)]
    )
    for name, size in WEIGHTS.items():
        rows.append([f"{name} to all nodes, star: s a version", *(f"{n * size * costs.byte:,.2f}" for n in SIZES)])
        depth = [(n - 1).bit_length() for n in SIZES]
        rows.append(["the same by a binary tree, not built", *(f"{2 * d * size * costs.byte:,.2f}" for d in depth)])
    return markdown_table(["nodes", *(f"{nodes:,}" for nodes in SIZES)], rows)


if __name__ == "__main__":
    main()
