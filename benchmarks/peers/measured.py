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
    """Return the workload and the system's options, which benchmarks/ppo.py wrote as JSON into the first argument."""
    return SimpleNamespace(**json.loads(sys.argv[1]))


class Clock:
    """Measures `job.iterations` whole iterations, sampling and learning, after the first one.

    The first iteration is every system's warm-up: lazy imports, first allocations and compilation fall into it.
    """

    def __init__(self, job: SimpleNamespace) -> None:
        self._job = job
        self._iterations = 0

    def end_iteration(self, env_steps: int) -> bool:
        """Note that an iteration ended, with `env_steps` real transitions so far; return whether it was the last."""
        now = time.perf_counter()
        if self._iterations == 0:
            self._ready_at, self._started, self._steps_before = time.time(), now, env_steps
        self._iterations += 1
        self._seconds, self._env_steps = now - self._started, env_steps - self._steps_before
        return self._iterations > self._job.iterations

    def report(self, system: str, version: str, threads: int, returns: float | None, **more: Any) -> None:
        """Print the result as one line of JSON; `returns` is the mean return of the newest episodes."""
        if self._iterations != self._job.iterations + 1:
            raise SystemExit(f"{system} ended after {self._iterations} iterations, not {self._job.iterations + 1}.")
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
            "packages": {"python": platform.python_version()} | {name: metadata.version(name) for name in PACKAGES},
        }
        print(json.dumps(line | more), flush=True)
