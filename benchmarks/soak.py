"""Kills actors for ten minutes under the traffic of a training run, and looks for what does not come back.

    python benchmarks/soak.py                    # --minutes 10 --actors 4 --kill-every 3
    python benchmarks/soak.py --minutes 0.5      # a quick look

A fifth of the time is clean, then a random actor is killed every few seconds, and the last fifth is clean again. In the
first and the last fifth a twin has its turn after every quarter of a second: the same traffic in a process of its own,
of which nothing is ever killed, so that a machine that itself becomes slower or faster changes nothing.
Ends with code 1 if the speed, as a share of the twin's, is below 95 % of what it was at the beginning, if memory or
descriptors grow, or if anything is left when the runtime is closed. Linux only.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import NamedTuple

import numpy as np
import psutil
from memory import tree
from traffic import WINDOW_S, Traffic, Twin

from rlx import actors
from rlx.actors import Runtime

CLEAN_PART = 0.2
"""Of the time, at the beginning and once more at the end."""
LOOK_EVERY_S = 1.0
GONE_WITHIN_S = 10.0

LEAST_SPEED = 0.95
MEMORY_GROWTH = 0.05
"""Of the median, over the time since the first kill; what is restarted fills its memory again, a few MB come and go."""
LEAST_GROWTH_MB, LEAST_GROWTH_FDS = 10.0, 2.0


class Killer:
    """A thread that kills a random actor every few seconds, whatever it does."""

    def __init__(self, runtime: Runtime, every_s: float, seed: int) -> None:
        self._runtime, self._every_s, self._random = runtime, every_s, random.Random(seed)
        self._stop, self._thread = threading.Event(), threading.Thread(target=self._run, name="killer")
        self.kills = 0

    def __enter__(self) -> Killer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(self._every_s * self._random.uniform(0.5, 1.5)):
            living = [state.pid for state in self._runtime.state().values() if state.status == "alive" and state.pid]
            if living:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(self._random.choice(living), signal.SIGKILL)
                    self.kills += 1


class Sample(NamedTuple):
    """What driver, forkserver and actors hold at one moment."""

    at_s: float
    memory_mb: float
    """Proportional set size of all."""
    shared_mb: float
    """The part of it that is shared memory: objects, and the warm room for the next ones."""
    descriptors: int
    """Of driver and forkserver; an actor's go with it."""


@dataclass
class Left:
    """What there is before a runtime is opened, to compare with what there is after its end."""

    descriptors: set[str]
    threads: set[threading.Thread]
    processes: set[psutil.Process]
    """All that have been seen meanwhile."""

    @classmethod
    def before(cls) -> Left:
        """Look now."""
        return cls(_descriptors(), set(threading.enumerate()), set())

    def over(self) -> list[str]:
        """Return what the runtime has left, in words."""
        gc.collect()
        _, running = psutil.wait_procs(self.processes, timeout=GONE_WITHIN_S)
        folders = Path(tempfile.gettempdir()).glob(f"rlx-{os.getuid()}/{os.getpid()}-*")
        maps = Path("/proc/self/maps").read_text().splitlines()
        return [
            *(f"process {process.pid} ({process.name()})" for process in running),
            *(f"thread {thread.name}" for thread in set(threading.enumerate()) - self.threads),
            *(f"descriptor {name}" for name in sorted(_descriptors() - self.descriptors)),
            *(f"folder {folder}" for folder in folders),
            *(f"mapping {line}" for line in maps if "/memfd:rlx" in line),
        ]


class Rates(NamedTuple):
    """Rounds a second in each window."""

    own: list[float]
    twin: list[float]

    @property
    def share(self) -> float:
        """The speed as a share of the twin's; the median of neighbouring windows."""
        return median(own / twin for own, twin in zip(self.own, self.twin, strict=True))


class Soak:
    """The run: its clock, its live table, and what it has seen."""

    def __init__(self, runtime: Runtime, traffic: Traffic, twin: Twin, left: Left, line_every_s: float) -> None:
        self._runtime, self._traffic, self._twin, self._left = runtime, traffic, twin, left
        self._started = time.monotonic()
        self._line_every_s, self._next_line_s = line_every_s, 0.0
        print(f"{'time s':>7} {'phase':<9}{'rounds/s':>9}{'MB':>7}{'shared':>8}{'fds':>5}{'restarts':>10}{'lost':>6}")

    def phase(self, name: str, seconds: float, beside_twin: bool = True) -> tuple[Rates, list[Sample]]:
        """Play rounds for so long; return for each window how many a second, and what was held at its end."""
        rates = Rates([], [])
        samples: list[Sample] = []
        ends = time.monotonic() + seconds
        next_look = 0.0
        while (left_s := ends - time.monotonic()) > 0:
            rates.own.append(self._traffic.window(min(WINDOW_S, left_s)))
            if beside_twin:
                rates.twin.append(self._twin.window())
            if time.monotonic() >= next_look:
                next_look = time.monotonic() + LOOK_EVERY_S
                samples.append(self._look())
                self._show(name, rates.own[-1], samples[-1])
        return rates, samples

    def restarts(self) -> int:
        """Return how many there have been, of all actors."""
        return sum(state.restarts for state in self._runtime.state().values())

    def _look(self) -> Sample:
        twins = self._twin.members()
        members = [member for member in tree(psutil.Process()) if member not in twins]
        self._left.processes.update(members[1:])
        held = [_proportional_mb(member.pid) for member in members]
        count = sum(len(os.listdir(f"/proc/{member.pid}/fd")) for member in members[:2])  # driver, forkserver
        at_s = time.monotonic() - self._started
        return Sample(at_s, sum(total for total, _ in held), sum(shared for _, shared in held), count)

    def _show(self, phase: str, rate: float, sample: Sample) -> None:
        if sample.at_s < self._next_line_s:
            return
        self._next_line_s = sample.at_s + self._line_every_s
        print(
            f"{sample.at_s:7.0f} {phase:<9}{rate:9.1f}{sample.memory_mb:7.0f}{sample.shared_mb:8.0f}"
            f"{sample.descriptors:5}{self.restarts():10}{self._traffic.lost:6}",
            flush=True,
        )


@dataclass(frozen=True)
class Seen:
    """What a run has shown."""

    clean: Rates
    kills: Rates
    recovered: Rates
    samples: list[Sample]
    """Since the first kill."""
    killed: int
    restarts: int


def main() -> None:
    """Run the soak; end with code 1 if it found a fault."""
    options, left = _parse(), Left.before()
    seen = run(options, left)
    found = faults(seen, left.over())
    print(
        f"{seen.killed} actors killed, {seen.restarts} restarts; rounds/s: {median(seen.clean.own):.1f} clean, "
        f"{median(seen.kills.own):.1f} under kills, {median(seen.recovered.own):.1f} recovered; of the twin's speed "
        f"{seen.clean.share:.1%} before and {seen.recovered.share:.1%} after."
    )
    print(
        "\n".join(f"FAULT: {fault}" for fault in found) or "No fault: as fast as before, nothing grew, nothing is left."
    )
    sys.exit(1 if found else 0)


def run(options: argparse.Namespace, left: Left) -> Seen:
    """Return what happened; on return nothing here refers to the runtime any more."""
    total_s = 60 * options.minutes
    with Twin(options.actors) as twin, actors.runtime("local") as runtime:
        traffic = Traffic(runtime, options.actors)
        traffic.wait_until_ready()
        twin.window()  # its first, in which its memory is made
        soak = Soak(runtime, traffic, twin, left, total_s / options.lines)
        clean, _ = soak.phase("clean", CLEAN_PART * total_s)
        with Killer(runtime, options.kill_every, options.seed) as killer:
            kills, samples = soak.phase("kills", (1 - 2 * CLEAN_PART) * total_s, beside_twin=False)
        traffic.wait_until_ready()
        recovered, more = soak.phase("recovered", CLEAN_PART * total_s)
        return Seen(clean, kills, recovered, samples + more, killer.kills, soak.restarts())


def faults(seen: Seen, left_over: Sequence[str]) -> list[str]:
    """Return what is wrong, in words: slower than before, a growth since the first kill, a death, or something left."""
    found = []
    before, after = seen.clean.share, seen.recovered.share
    if after < LEAST_SPEED * before:
        found.append(f"the speed after the kills is {after:.1%} of the twin's, before it was {before:.1%}.")
    if seen.restarts != seen.killed:
        found.append(f"{seen.killed} actors were killed, and {seen.restarts} restarted.")
    times = [sample.at_s for sample in seen.samples]
    for name in ("memory_mb", "shared_mb", "descriptors"):
        values = [float(getattr(sample, name)) for sample in seen.samples]
        least = LEAST_GROWTH_FDS if name == "descriptors" else LEAST_GROWTH_MB
        limit = max(least, MEMORY_GROWTH * median(values))
        if (grown := growth(times, values)) > limit:
            found.append(f"{name} grew by {grown:.1f} to about {values[-1]:.0f}; {limit:.1f} may come and go.")
    return [*found, *(f"{name} is left." for name in left_over)]


def growth(times: Sequence[float], values: Sequence[float]) -> float:
    """Return by how much the values rise over all the time: the median slope of all pairs (Theil-Sen) times the span.

    A value that is far off, as while an actor is away, moves it little.
    """
    if len(times) < 2:
        return 0.0
    first, second = np.triu_indices(len(times), k=1)
    at, value = np.asarray(times), np.asarray(values)
    slopes = (value[second] - value[first]) / (at[second] - at[first])
    return float(np.median(slopes)) * (times[-1] - times[0])


def _proportional_mb(pid: int) -> tuple[float, float]:
    """Return the proportional set size of a process and of its shared memory; zeros if it has just ended."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    except (FileNotFoundError, ProcessLookupError):
        return 0.0, 0.0
    fields = {line.split()[0]: int(line.split()[1]) * 1024 / 1e6 for line in lines}
    return fields.get("Pss:", 0.0), fields.get("Pss_Shmem:", 0.0)


def _descriptors() -> set[str]:
    """Return number and target of every open descriptor of this process."""
    found: set[str] = set()
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # the one that lists them
            found.add(f"{name} -> {os.readlink(f'/proc/self/fd/{name}')}")
    return found


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=10.0, help="length of the run (default: 10)")
    parser.add_argument("--actors", type=int, default=4, help="env runners (default: 4)")
    parser.add_argument("--kill-every", type=float, default=3.0, help="seconds between kills, on average (default: 3)")
    parser.add_argument("--lines", type=int, default=40, help="of the live table (default: 40)")
    parser.add_argument("--seed", type=int, default=0, help="of who is killed when (default: 0)")
    return parser.parse_args()


if __name__ == "__main__":
    main()
