"""Arrivals: fragments in the order in which the runners finish them; whoever is slow is waited for by nobody."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter

from rlx.rollout.call_loop import PATIENCE_S, CallLoop
from rlx.rollout.runner_actors import Call, RunnerActors
from rlx.rollout.sample import Sample
from rlx.trajectory import Trajectory

ASKED_PER_RUNNER = 2  # one that it works at, and one to go on with while the first is being looked at


@dataclass
class Arrival:
    """What is learned from at a time."""

    samples: Sequence[Sample]
    """In the order of their arrival."""
    trajectory: Trajectory
    """Of all of them, joined along B, in memory of this process."""
    waited_s: float = 0.0
    """Seconds that `take` waited for it."""


class Arrivals(CallLoop):
    """Keeps every runner at work in a thread, and joins the next few fragments into one Arrival.

    At most `max_ahead` batches are being collected or wait, counted from the one being learned from (`used` says that
    it has been): the older ones push back. `queue_size` bounds those that are complete; when that many wait,
    `when_full` "wait" has the runners wait as well, and "drop_oldest" makes room. What a runner raises, `take` raises.
    """

    def __init__(
        self,
        actors: RunnerActors,
        num_steps: int,
        *,
        max_ahead: int,
        queue_size: int = 1,
        when_full: str = "wait",
    ) -> None:
        super().__init__(actors)
        self._num_steps = num_steps
        self._max_ahead, self._per_batch = max_ahead, 1
        self._queue_size, self._drops = queue_size, when_full == "drop_oldest"
        self._samples: list[Sample] = []  # of the next batch
        self._queue: deque[Arrival] = deque()
        self._ahead = 0  # fragments asked for, of batches that are not used yet
        self._taken = 0  # of these: those of the batch that was taken last
        self._dropped_steps = 0

    def take(self, per_batch: int) -> Arrival | None:
        """Return the oldest batch that waits, or the next `per_batch` fragments; None where no runner is left.

        The thread below has a deadline for each runner.
        """
        started = perf_counter()
        with self._changed:
            if per_batch != self._per_batch:
                self._per_batch = per_batch
                self._ring()
            self._start()
            while not self._queue:
                self._raise_error()
                if not len(self._actors):
                    return None
                self._changed.wait(PATIENCE_S)
            arrival = self._queue.popleft()
            self._taken = len(arrival.samples)
            self._changed.notify_all()
        arrival.waited_s = perf_counter() - started
        return arrival

    def used(self) -> None:
        """Say that the batch taken last has been learned from: one more may be collected."""
        with self._changed:
            self._ahead -= self._taken
            self._taken = 0
            self._ring()

    @property
    def ahead(self) -> int:
        """Fragments being collected, or waiting, of batches that were not learned from yet."""
        return self._ahead

    def take_dropped(self) -> int:
        """Return how many environment steps were dropped from a full queue since the last call."""
        with self._changed:
            dropped, self._dropped_steps = self._dropped_steps, 0
        return dropped

    def forget(self) -> None:
        """Begin anew, with nothing asked for and nothing waiting."""
        self.pause()
        self._actors.forget(self._calls)
        self._calls, self._samples, self._error = [], [], None
        self._queue.clear()
        self._ahead = self._taken = 0

    def _settle(self) -> None:
        if len(self._samples) >= self._per_batch:
            self._deliver()

    def _hear(self, call: Call) -> None:
        self._samples.append(call.value)

    def _give_up(self, calls: list[Call]) -> None:
        self._ahead -= len(calls)
        self._changed.notify_all()

    def _ask(self) -> None:
        """Ask for as many fragments as are allowed, whoever has the fewest to do first."""
        while self._ahead < self._max_ahead * self._per_batch:
            asked = {runner: sum(call.runner == runner for call in self._calls) for runner in self._actors.numbers}
            runner = min(asked, key=asked.__getitem__, default=None)
            if runner is None or asked[runner] >= ASKED_PER_RUNNER:
                return
            self._calls.append(self._actors.ask_to_sample(runner, self._num_steps))
            self._ahead += 1

    def _deliver(self) -> None:
        parts = [sample.trajectory for sample in self._samples]
        arrival = Arrival(self._samples, parts[0].copy() if len(parts) == 1 else Trajectory.concatenate(parts))
        with self._changed:
            while len(self._queue) >= self._queue_size:
                if self._drops:
                    dropped = self._queue.popleft().samples
                    self._dropped_steps += sum(sample.env_steps for sample in dropped)
                    self._ahead -= len(dropped)
                elif self._stopping:
                    return  # it is delivered when the thread goes on
                else:
                    self._changed.wait(PATIENCE_S)
            self._samples = []
            self._queue.append(arrival)
            self._changed.notify_all()
