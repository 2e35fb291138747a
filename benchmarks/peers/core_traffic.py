"""What both libraries of benchmarks/core.py do: the actor, the traffic, and a loop that measures what it is told to.

Runs in the environment of each library, and both import numpy and torch late: a start without them is measured too.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any, Protocol, TextIO

ACTORS = 8
MIB = 1 << 20
ECHO_MIB = 10
BROADCAST_MIB = 25
PIPELINE = 1000
"""Calls that are on their way together."""
WARM_UP = 0.2
"""Part of a window that goes before it: the other library ran a moment ago, and this one's memory is cold."""
NAP_S = 30.0
DEADLINE_S = 60.0


class Target:
    """The actor that is called."""

    def __init__(self, with_torch: bool = False) -> None:
        if with_torch:
            import torch  # noqa: F401
        self.weights: Any = None

    def ping(self) -> int:
        """Do nothing; return the process id, which shows that it was here."""
        return os.getpid()

    def echo(self, value: Any) -> Any:
        """Return the argument."""
        return value

    def hold(self, weights: list[Any]) -> float:
        """Keep the arrays; return a number that changes with every broadcast, from the last of them."""
        self.weights = weights
        return float(weights[-1][0])

    def newest(self, channel: Any) -> float:
        """Like `hold`, of the newest version in a channel of rlx."""
        return self.hold(channel.latest().value)

    def nap(self, seconds: float) -> None:
        """Sleep."""
        time.sleep(seconds)


class Library(Protocol):
    """What a library does with actors of the class Target."""

    version: str

    def start(self, count: int) -> list[Any]:
        """Return new actors, all of which have answered."""
        ...

    def stop(self, actors: list[Any]) -> None:
        """End them."""
        ...

    def ping(self, actors: list[Any], calls: int) -> list[int]:
        """Call `ping` so often, all actors in turn, before the first answer is looked at; return the answers."""
        ...

    def echo(self, actor: Any, value: Any) -> Any:
        """Send a value and return what comes back."""
        ...

    def broadcast(self, actors: list[Any], weights: list[Any]) -> list[float]:
        """Put the arrays once, and call `hold` of all actors with them."""
        ...

    def publish(self, actors: list[Any], weights: list[Any]) -> list[float]:
        """Do the same through a channel, where there is one."""
        ...

    def kill(self, actor: Any, asleep_s: float) -> tuple[float, str]:
        """Kill the process within a call that is `asleep_s` old; return the seconds until its error, and the error."""
        ...

    def close(self) -> None:
        """End everything."""
        ...


def serve(open_library: Callable[[dict[str, Any]], Library]) -> None:
    """Start actors, say when they have answered, and measure a row for each line on stdin, until that ends."""
    job = json.loads(sys.argv[1])
    with os.fdopen(os.dup(1), "w") as answers:
        os.dup2(2, 1)  # what a library prints is no answer
        library = open_library(job)
        try:
            actors = library.start(ACTORS)
            _say(answers, ready_at=time.time(), version=library.version)
            traffic = Traffic(library, actors)
            for line in sys.stdin:
                order = json.loads(line)
                _say(answers, **traffic.measure(order["row"], order["seconds"]))
        finally:
            library.close()


class Traffic:
    """The rows: each measures one kind of traffic for some seconds."""

    def __init__(self, library: Library, actors: list[Any]) -> None:
        self._library, self._actors = library, actors
        self._broadcasts = 0

    def measure(self, row: str, seconds: float) -> dict[str, Any]:
        """Return the value of one row, and what belongs to it."""
        return getattr(self, row)(seconds)

    def sync(self, seconds: float) -> dict[str, Any]:
        """Calls a second, each after the answer to the last."""
        return {"value": rate(lambda: self._library.ping(self._actors[:1], 1), seconds)}

    def pipelined(self, seconds: float) -> dict[str, Any]:
        """Calls a second to one actor, many on their way."""
        return {"value": PIPELINE * rate(lambda: self._library.ping(self._actors[:1], PIPELINE), seconds)}

    def pipelined_to_all(self, seconds: float) -> dict[str, Any]:
        """Calls a second to all actors in turn, many on their way."""
        return {"value": PIPELINE * rate(lambda: self._library.ping(self._actors, PIPELINE), seconds)}

    def echo_numpy(self, seconds: float) -> dict[str, Any]:
        """Arrays a second, there and back."""
        import numpy as np

        return self._echo(np.random.default_rng(0).random(ECHO_MIB * MIB // 8), seconds)

    def echo_torch(self, seconds: float) -> dict[str, Any]:
        """Tensors a second, there and back."""
        import torch

        return self._echo(torch.rand(ECHO_MIB * MIB // 4), seconds)

    def broadcast(self, seconds: float) -> dict[str, Any]:
        """Sets of weights a second that all actors have, each set put once."""
        return self._broadcast(self._library.broadcast, seconds)

    def publish(self, seconds: float) -> dict[str, Any]:
        """The same through a channel."""
        return self._broadcast(self._library.publish, seconds)

    def start(self, _: float) -> dict[str, Any]:
        """Seconds until as many new actors have answered; those of the other rows live on, and have nothing to do."""
        began = time.perf_counter()
        actors = self._library.start(ACTORS)
        value = time.perf_counter() - began
        self._library.stop(actors)
        return {"value": value}

    def kill(self, seconds: float) -> dict[str, Any]:
        """Seconds from `kill -9` to the error of the call that ran."""
        (actor,) = self._library.start(1)
        value, error = self._library.kill(actor, min(0.3, seconds))
        return {"value": value, "error": error}

    def _echo(self, value: Any, seconds: float) -> dict[str, Any]:
        actor = self._actors[0]
        back = self._library.echo(actor, value)
        if type(back) is not type(value) or not bool((back == value).all()):
            raise SystemExit("what came back from echo() is not what was sent.")
        del back
        return {"value": rate(lambda: self._library.echo(actor, value), seconds)}

    def _broadcast(self, send: Callable[[list[Any], list[Any]], list[float]], seconds: float) -> dict[str, Any]:
        import numpy as np

        weights = [np.random.default_rng(0).random(MIB // 8) for _ in range(BROADCAST_MIB)]

        def once() -> None:
            self._broadcasts += 1
            weights[-1][0] = self._broadcasts
            arrived = send(self._actors, weights)
            if arrived != [self._broadcasts] * len(self._actors):
                raise SystemExit(f"broadcast {self._broadcasts} arrived as {arrived}.")

        return {"value": rate(once, seconds)}


def rate(work: Callable[[], object], seconds: float) -> float:
    """Return how often a second `work` is done, over `seconds` after a warm-up."""
    warm_at = time.perf_counter() + WARM_UP * seconds
    work()
    while time.perf_counter() < warm_at:
        work()
    count, began = 0, time.perf_counter()
    while (passed := time.perf_counter() - began) < seconds:
        work()
        count += 1
    return count / passed


def _say(stream: TextIO, **answer: Any) -> None:
    stream.write(json.dumps(answer) + "\n")
    stream.flush()
