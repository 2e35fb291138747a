"""The traffic of a training run between a driver and its actors, and a twin of it: for soak.py."""

from __future__ import annotations

import subprocess
import sys
import time
from typing import Any

import numpy as np
import psutil
from memory import tree

from rlx import actors
from rlx.actors import Err, Restart, Runtime
from rlx.actors.future import Outcome
from rlx.errors import ActorDied

SAMPLE_FLOATS = 5_000_000 // 4
WEIGHT_FLOATS, WEIGHT_ARRAYS = 100_000, 10
CALLS, ITEMS = 20, 10
"""To each actor, and of each stream, in a round."""
DEADLINE_S, WINDOW_S = 60.0, 0.25


class Runner:
    """An actor that reads weights and returns arrays."""

    def sample(self, channel: Any) -> tuple[int, np.ndarray]:
        """Return the version of the newest weights, and 5 MB full of it."""
        published = channel.latest()
        if float(published.value[-1][0]) != published.version:
            raise ValueError(f"version {published.version} holds the weights of {published.value[-1][0]}.")
        return published.version, np.full(SAMPLE_FLOATS, published.version, np.float32)

    def ping(self) -> None:
        """Do nothing."""

    def items(self, count: int) -> Any:
        """Yield 0, 1, ..., each with an array full of it."""
        for number in range(count):
            yield number, np.full(1000, number)


class Traffic:
    """One round after another of what a training run asks of its actors."""

    def __init__(self, runtime: Runtime, count: int) -> None:
        restart = Restart(max=1_000_000, per_s=5.0, max_backoff_s=1.0)
        self.runners = [runtime.spawn(Runner, name=f"runner/{number}", restart=restart) for number in range(count)]
        self._group, self._channel = runtime.group(self.runners), runtime.channel("weights")
        self._weights = [np.zeros(WEIGHT_FLOATS, np.float32) for _ in range(WEIGHT_ARRAYS)]
        self.rounds = self.lost = 0
        """Rounds played; calls and streams that ended with their actor."""

    def wait_until_ready(self) -> None:
        """Return when every actor takes calls."""
        for runner in self.runners:
            runner.ready(DEADLINE_S)

    def play(self) -> None:
        """Publish weights, take samples, calls and a stream from all that live, and check what comes."""
        self.rounds += 1
        self._weights[-1][:] = self.rounds
        self._channel.publish(self._weights, self.rounds)
        samples = self._group.sample.call(self._channel)
        pings = [runner.ping.call() for runner in self.runners for _ in range(CALLS)]
        self._read_stream(self.runners[self.rounds % len(self.runners)])
        for outcome in samples.result(DEADLINE_S):
            if not self._is_lost(outcome):
                version, array = outcome.value
                if version != self.rounds or array[0] != version or array[-1] != version:
                    raise SystemExit(f"round {self.rounds} got a sample of version {version} full of {array[0]}.")
        for ping in pings:
            self._is_lost(ping.outcome(DEADLINE_S))

    def window(self, seconds: float) -> float:
        """Play for so long; return how many rounds a second."""
        began, before = time.monotonic(), self.rounds
        while time.monotonic() < began + seconds:
            self.play()
        return (self.rounds - before) / (time.monotonic() - began)

    def _read_stream(self, runner: Any) -> None:
        """Read all items, or leave the stream half-way in every other round."""
        count = ITEMS if self.rounds % 2 else ITEMS // 2
        with runner.items.stream(ITEMS) as stream:
            for expected in range(count):
                try:
                    number, array = stream.next(DEADLINE_S)
                except ActorDied:
                    self.lost += 1
                    return
                if number != expected or array[-1] != expected:
                    raise SystemExit(f"a stream gave item {number} full of {array[-1]} in place of {expected}.")

    def _is_lost(self, outcome: Outcome[Any]) -> bool:
        """Return whether the call ended with its actor; raise any other error."""
        if isinstance(outcome, Err) and not isinstance(outcome.error, ActorDied):
            raise outcome.error
        self.lost += isinstance(outcome, Err)
        return isinstance(outcome, Err)


class Twin:
    """The same traffic in a process of its own, which plays only when it is told to."""

    def __init__(self, count: int) -> None:
        command = [sys.executable, __file__, str(count)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __enter__(self) -> Twin:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate(timeout=DEADLINE_S)  # the end of its input is its end

    def window(self) -> float:
        """Have it play for WINDOW_S; return its rounds a second."""
        assert self._process.stdin and self._process.stdout
        print(file=self._process.stdin, flush=True)
        return float(self._process.stdout.readline())

    def members(self) -> set[psutil.Process]:
        """Return its processes."""
        return set(tree(psutil.Process(self._process.pid)))


def be_a_twin(count: int) -> None:
    """Play a window for each line of the input, and print how fast."""
    with actors.runtime("local") as runtime:
        traffic = Traffic(runtime, count)
        traffic.wait_until_ready()
        for _ in sys.stdin:
            print(traffic.window(WINDOW_S), flush=True)


if __name__ == "__main__":
    be_a_twin(int(sys.argv[1]))
