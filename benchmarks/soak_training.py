"""Trains IMPALA on large images for half an hour, and looks for memory, queues, descriptors or threads that grow.

    python benchmarks/soak_training.py                  # --minutes 30, into docs/benchmarks.md
    python benchmarks/soak_training.py --minutes 1      # a quick look, into no page

Observations are uint8 images of 210 x 160 x 3, 100 KB each. The environments are far faster than the learner, so every
queue is full all the time. Every five seconds all processes are looked at; the first fifth fills caches and is left
out. Ends with code 1 where a process grows, a queue is longer than `training.max_age` allows, anything was restarted,
or anything is left at the end. Mapped files are left out: they cannot grow, and their share is the less the more other
programs map them. Linux only.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import gymnasium
import numpy as np
import psutil
from gymnasium import spaces
from memory import tree
from report import DOCS, describe, machine, markdown_table, publish
from soak import growth

from rlx.algorithms.impala import IMPALAConfig
from rlx.rollout.runner_group import RunnerGroup

SHAPE = (210, 160, 3)
RUNNERS, ENVS, STEPS, MAX_AGE = 2, 4, 8, 4
NAMES = ["driver", "forkserver", *(f"env_runner/{index}" for index in range(RUNNERS)), "learner/0"]
"""In the order in which they start."""
FRAGMENT_MB = ENVS * STEPS * int(np.prod(SHAPE)) / 1e6
INTERVAL_S = 5.0
SETTLING_PART = 0.2
TIMEOUT_S = 900.0
"""The processes may be held back for long: a soak runs beside other work."""
ITERATIONS_PER_SAVE = 20

MEMORY_GROWTH, LEAST_GROWTH_MB = 0.03, 10.0
"""Of the median, over the time that counts; a few MB come and go."""
LEAST_GROWTH_COUNT = 1.0
"""Of descriptors and threads."""


class Dial(gymnasium.Env[np.ndarray, np.int64]):
    """A bright bar in one of four quarters of a noisy image: the action that names the quarter is worth 1."""

    observation_space = spaces.Box(0, 255, SHAPE, np.uint8)
    action_space = spaces.Discrete(4)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict[str, Any]]:
        """Begin an episode of 64 to 191 steps."""
        super().reset(seed=seed)
        self._noise = self.np_random.integers(0, 128, SHAPE, np.uint8)
        self._left = int(self.np_random.integers(64, 192))
        return self._look(), {}

    def step(self, action: np.int64) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Return the next image; an episode ends by its length."""
        reward, self._left = float(action == self._quarter), self._left - 1
        return self._look(), reward, False, self._left == 0, {}

    def _look(self) -> np.ndarray:
        image = np.roll(self._noise, int(self.np_random.integers(SHAPE[0])), 0)
        self._quarter = int(self.np_random.integers(4))
        image[:, self._quarter * SHAPE[1] // 4 : (self._quarter + 1) * SHAPE[1] // 4] |= 128
        return image


class Held(NamedTuple):
    """What one process holds."""

    anonymous_mb: float
    """Proportional set size of its own memory."""
    shared_mb: float
    """The same of memory that processes share to exchange messages."""
    descriptors: int
    threads: int


@dataclass
class Watch:
    """A thread that looks at every process and at the queue, until it has done so `count` times."""

    runners: RunnerGroup
    count: int
    at_s: list[float] = field(default_factory=list)
    """Time under way: a pause of the whole machine, or of this program, counts for one interval."""
    held: list[list[Held]] = field(default_factory=list)
    """By look, then in the order of NAMES."""
    ahead: list[int] = field(default_factory=list)
    """Fragments that are being collected, or wait."""
    processes: list[psutil.Process] = field(default_factory=list)
    error: BaseException | None = None

    def __enter__(self) -> Watch:
        root = psutil.Process()
        self.processes = sorted(tree(root), key=lambda one: (one != root, one.create_time(), one.pid))
        if len(self.processes) != len(NAMES):
            raise SystemExit(f"{len(self.processes)} processes run in place of {len(NAMES)}: {self.processes}.")
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch")
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    @property
    def is_done(self) -> bool:
        """Whether it has seen enough; raises what went wrong in the thread."""
        if self.error is not None:
            raise self.error
        return len(self.held) >= self.count

    def _run(self) -> None:
        try:
            while not self.is_done and not self._stop.wait(INTERVAL_S):
                self.held.append([look(process) for process in self.processes])
                self.ahead.append(self.runners.ahead)
                self.at_s.append(INTERVAL_S * len(self.held))
        except BaseException as error:
            self.error = error


def look(process: psutil.Process) -> Held:
    """Return what a process holds now."""
    lines = Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()[1:]
    kilobytes = {line.split()[0]: int(line.split()[1]) for line in lines}
    shared, anonymous = (kilobytes[name] * 1024 / 1e6 for name in ("Pss_Shmem:", "Pss_Anon:"))
    return Held(anonymous, shared, process.num_fds(), process.num_threads())


def main() -> None:
    """Run the soak; end with code 1 if it found a fault."""
    options, conditions = _parse(), machine()
    watch, rows = run(max(10, round(options.minutes * 60 / INTERVAL_S)))
    found = [*faults(watch, rows), *(f"{one} is left." for one in left_over(watch.processes))]
    text = page(watch, rows, found)
    print(text)
    if options.minutes >= 30:
        record = {"machine": conditions, "names": NAMES, "at_s": watch.at_s, "held": watch.held, "last": rows[-1]}
        publish(options.out, "soak training", record, f"{text}\n\n{describe(conditions)}")
    sys.exit(1 if found else 0)


def run(count: int) -> tuple[Watch, list[dict[str, Any]]]:
    """Train until everything was looked at `count` times; return that, and a row of metrics for each iteration."""
    config = (
        IMPALAConfig()
        .environment(Dial)
        .env_runners(num_env_runners=RUNNERS, num_envs_per_env_runner=ENVS, rollout_fragment_length=STEPS)
        .model(precision="bfloat16")
        .training(max_age=MAX_AGE, updates_per_iteration=10)
        .learners(num_learners=1)
        .fault_tolerance(sample_timeout_s=TIMEOUT_S, update_timeout_s=TIMEOUT_S)
    )
    with tempfile.TemporaryDirectory() as folder, config.build() as algorithm:
        rows = [algorithm.train()]
        with Watch(algorithm.runners, count) as watch:
            while not watch.is_done:
                rows.append(algorithm.train())
                if len(rows) % ITERATIONS_PER_SAVE == 0:
                    algorithm.save(Path(folder) / "checkpoint")
                if len(rows) % 10 == 0:
                    _show(watch, rows[-1])
    return watch, rows


def faults(watch: Watch, rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return what is wrong, in words."""
    found = []
    times, looks = settled(watch)
    for index, name in enumerate(NAMES):
        for what in Held._fields:
            values = [float(getattr(one[index], what)) for one in looks]
            limit = LEAST_GROWTH_COUNT
            if what.endswith("_mb"):
                limit = max(LEAST_GROWTH_MB, MEMORY_GROWTH * median(values))
            if (grown := growth(times, values)) > limit:
                found.append(f"{what} of {name} grew by {grown:.1f} to {values[-1]:.1f}; {limit:.1f} may come and go.")
    # No batch is collected that could only be learned from when it is older than max_age, see `Arrivals`.
    if (most := max(watch.ahead)) > (MAX_AGE + 1) * RUNNERS:
        found.append(f"{most} fragments were under way; max_age={MAX_AGE} allows {(MAX_AGE + 1) * RUNNERS}.")
    if (oldest := max(row["age_max"] for row in rows)) > MAX_AGE:
        found.append(f"a sample was {oldest} updates old; max_age is {MAX_AGE}.")
    found += [f"{name} is {rows[-1][name]}." for name in ("runner_restarts", "learner_restarts") if rows[-1][name]]
    return found


def settled(watch: Watch) -> tuple[list[float], list[list[Held]]]:
    """Return the looks that count, and their times."""
    first = int(SETTLING_PART * len(watch.held))
    return watch.at_s[first:], watch.held[first:]


def left_over(processes: Sequence[psutil.Process]) -> list[str]:
    """Return which of the processes, but the driver, are still there a moment after the end."""
    _, alive = psutil.wait_procs([one for one in processes if one.pid != os.getpid()], timeout=10)
    return [f"{one.name()} (process {one.pid})" for one in alive]


def page(watch: Watch, rows: Sequence[dict[str, Any]], found: Sequence[str]) -> str:
    """Return the table of all processes and the verdict, as markdown."""
    times, looks = settled(watch)
    table = []
    for index, name in enumerate(NAMES):
        cells = [name]
        for what in ("anonymous_mb", "shared_mb"):
            values = [getattr(one[index], what) for one in looks]
            cells += [f"{values[0]:,.0f}", f"{values[-1]:,.0f}", f"{max(values):,.0f}", f"{growth(times, values):+.1f}"]
        for what in ("descriptors", "threads"):
            values = [getattr(one[index], what) for one in looks]
            cells.append(f"{min(values)} to {max(values)}")
        table.append(cells)
    of = ["first MB", "last MB", "highest MB", "trend MB"]
    header = ["process", *(f"own: {one}" for one in of), *(f"shared: {one}" for one in of), "descriptors", "threads"]
    last = rows[-1]
    verdict = "No fault: nothing grew, no queue was longer than allowed, nothing was restarted, nothing is left."
    return (
        f"{markdown_table(header, table)}\n\n"
        f"{times[-1] / 60:.0f} minutes, the first {times[0] / 60:.0f} of them left out; {last['weights_version']:,} "
        f"updates on {last['env_steps']:,} env steps, {last['dropped_env_steps']:,} more dropped. At most "
        f"{max(watch.ahead)} fragments of {FRAGMENT_MB:.1f} MB were under way and {(MAX_AGE + 1) * RUNNERS} may be; "
        f"the oldest sample was {max(row['age_max'] for row in rows)} updates old and may be {MAX_AGE}. *Trend* is the "
        f"median slope of all pairs times the time.\n\n" + ("\n".join(f"FAULT: {fault}" for fault in found) or verdict)
    )


def _show(watch: Watch, row: dict[str, Any]) -> None:
    held = watch.held[-1] if watch.held else []
    memory = "  ".join(f"{one.anonymous_mb:.0f}+{one.shared_mb:.0f}" for one in held)
    print(
        f"{INTERVAL_S * len(watch.held):6.0f} s  update {row['weights_version']:6}  return "
        f"{row['episode_return_mean'] or 0:6.1f}  age {row['age_max']}  MB own+shared {memory}",
        flush=True,
    )


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=30.0, help="length of the run (default: 30)")
    parser.add_argument("--out", type=Path, default=DOCS, help="folder of benchmarks.md and .json (default: docs)")
    return parser.parse_args()


if __name__ == "__main__":
    main()
