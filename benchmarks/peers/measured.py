"""What every measured system shares: its job, and a clock over whole iterations.

Runs in the environment of each system, so it imports nothing but the standard library.
"""

import json
import platform
import sys
import time
from importlib import metadata
from types import SimpleNamespace
from typing import Any

PACKAGES = ("torch", "gymnasium", "numpy", "mujoco")


def read_job() -> SimpleNamespace:
    """Return the workload and the system's options, which the benchmark wrote as JSON into the first argument."""
    return SimpleNamespace(**json.loads(sys.argv[1]))


class Clock:
    """Measures `job.iterations` whole iterations, sampling and learning, after the first one.

    The first iteration is every system's warm-up: lazy imports, first allocations and compilation fall into it.
    """

    def __init__(self, job: SimpleNamespace) -> None:
        self._job = job
        self._iterations = 0

    @property
    def is_over(self) -> bool:
        """Whether enough has been measured."""
        return self._iterations > self._job.iterations

    def end_iteration(self, env_steps: int) -> bool:
        """Note that an iteration ended, with `env_steps` real transitions so far; return whether it was the last."""
        now = time.perf_counter()
        if self._iterations == 0:
            self._ready_at, self._started, self._steps_before = time.time(), now, env_steps
        self._iterations += 1
        self._seconds, self._env_steps = now - self._started, env_steps - self._steps_before
        return self.is_over

    def report(self, system: str, version: str, threads: int, returns: float | None, **more: Any) -> None:
        """Print the result as one line of JSON; `returns` is the mean return of the newest episodes."""
        if not self.is_over:
            raise SystemExit(f"{system} ended after {self._iterations} iterations, before {self._end}.")
        line = {
            "system": system,
            "version": version,
            "work": self._job.work,
            "env_steps": self._env_steps,
            "seconds": self._seconds,
            "steps_per_s": self._env_steps / self._seconds,
            "threads": threads,
            "returns": returns,
            "ready_at": self._ready_at,
            "packages": {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES},
        }
        print(json.dumps(line | more), flush=True)

    @property
    def _end(self) -> str:
        return f"{self._job.iterations} were measured"


class Countdown(Clock):
    """Measures whole iterations until `job.seconds` have passed since the end of the first one."""

    @property
    def is_over(self) -> bool:
        """Whether the time is up."""
        return self._iterations > 0 and self._seconds >= self._job.seconds

    @property
    def _end(self) -> str:
        return f"{self._job.seconds} s had passed"


def clock_of(job: SimpleNamespace) -> Clock:
    """Return the clock that ends where the job says, by its iterations or its seconds."""
    return Clock(job) if hasattr(job, "iterations") else Countdown(job)


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "-"
