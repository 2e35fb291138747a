"""Ray's actors on the job of benchmarks/core.py; answers lines on stdin."""

from __future__ import annotations

import logging
import os
import signal
import time
from typing import Any

import ray
from core_traffic import ACTORS, DEADLINE_S, NAP_S, Target, serve


class Ray:
    """A Ray of its own, on this machine."""

    version = ray.__version__

    def __init__(self, job: dict[str, Any]) -> None:
        self._torch = job["torch"]
        # As many CPUs as actors: with 2, or with 16, Ray took longer to start them on 2 cores.
        quiet = {"include_dashboard": False, "log_to_driver": False, "logging_level": logging.ERROR}
        ray.init(address="local", num_cpus=ACTORS, **quiet)
        self._target = ray.remote(num_cpus=0)(Target)

    def start(self, count: int) -> list[Any]:
        """Return new actors, all of which have answered."""
        handles = [self._target.remote(self._torch) for _ in range(count)]
        self.ping(handles, count)
        return handles

    def stop(self, handles: list[Any]) -> None:
        """End them."""
        for handle in handles:
            ray.kill(handle)

    def ping(self, handles: list[Any], calls: int) -> list[int]:
        """Call all actors in turn; return the answers."""
        return ray.get([handles[number % len(handles)].ping.remote() for number in range(calls)], timeout=DEADLINE_S)

    def echo(self, handle: Any, value: Any) -> Any:
        """Send a value and return what comes back."""
        return ray.get(handle.echo.remote(value), timeout=DEADLINE_S)

    def broadcast(self, handles: list[Any], weights: list[Any]) -> list[float]:
        """Put the arrays once, and call all actors with them."""
        ref = ray.put(weights)
        return ray.get([handle.hold.remote(ref) for handle in handles], timeout=DEADLINE_S)

    def publish(self, handles: list[Any], weights: list[Any]) -> list[float]:
        """Do the same as `broadcast`: there are no channels."""
        return self.broadcast(handles, weights)

    def kill(self, handle: Any, asleep_s: float) -> tuple[float, str]:
        """Kill the process within a call; return the seconds until its error, and the error."""
        (pid,) = self.ping([handle], 1)
        nap = handle.nap.remote(NAP_S)
        time.sleep(asleep_s)
        killed = time.perf_counter()
        os.kill(pid, signal.SIGKILL)
        try:
            ray.get(nap, timeout=DEADLINE_S)
        except ray.exceptions.RayActorError as error:
            return time.perf_counter() - killed, type(error).__name__
        raise SystemExit("a call outlived the process that it ran in.")

    def close(self) -> None:
        """End everything."""
        ray.shutdown()


if __name__ == "__main__":
    serve(Ray)
