"""The actor core of rlx on the job of benchmarks/core.py; answers lines on stdin."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

from core_traffic import DEADLINE_S, NAP_S, Target, serve

import rlx
from rlx import actors


class Rlx:
    """A runtime of rlx."""

    version = rlx.__version__

    def __init__(self, job: dict[str, Any]) -> None:
        self._torch = job["torch"]
        self._runtime = actors.runtime("local", preload=("numpy", "torch") if self._torch else ("numpy",))
        self._channel = self._runtime.channel("weights")

    def start(self, count: int) -> list[Any]:
        """Return new actors, all of which have answered."""
        handles = [self._runtime.spawn(Target, self._torch) for _ in range(count)]
        self._runtime.group(handles).ping.call().values(DEADLINE_S)
        return handles

    def stop(self, handles: list[Any]) -> None:
        """End them."""
        for handle in handles:
            self._runtime.kill(handle)

    def ping(self, handles: list[Any], calls: int) -> list[int]:
        """Call all actors in turn; return the answers."""
        futures = [handles[number % len(handles)].ping.call() for number in range(calls)]
        return [future.result(DEADLINE_S) for future in futures]

    def echo(self, handle: Any, value: Any) -> Any:
        """Send a value and return what comes back."""
        return handle.echo.call(value).result(DEADLINE_S)

    def broadcast(self, handles: list[Any], weights: list[Any]) -> list[float]:
        """Put the arrays once, and call all actors with them."""
        return self._runtime.group(handles).hold.call(self._runtime.put(weights)).values(DEADLINE_S)

    def publish(self, handles: list[Any], weights: list[Any]) -> list[float]:
        """Publish the arrays, and have all actors take them."""
        self._channel.publish(weights)
        return self._runtime.group(handles).newest.call(self._channel).values(DEADLINE_S)

    def kill(self, handle: Any, asleep_s: float) -> tuple[float, str]:
        """Kill the process within a call; return the seconds until its error, and the error."""
        pid = handle.ping.call().result(DEADLINE_S)
        nap = handle.nap.call(NAP_S)
        time.sleep(asleep_s)
        killed = time.perf_counter()
        os.kill(pid, signal.SIGKILL)
        error = nap.exception(DEADLINE_S)
        return time.perf_counter() - killed, f"{type(error).__name__}: {error}"

    def close(self) -> None:
        """End everything."""
        self._runtime.close()


if __name__ == "__main__":
    serve(Rlx)
