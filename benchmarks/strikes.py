"""Strikes against the actors of a run, and what was seen of it meanwhile: iterations, log lines, prompts taken."""

from __future__ import annotations

import itertools
import logging
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from rlx.callbacks import Callback
from rlx.metrics import Metrics
from rlx.trajectory import Trajectory

LOOK_EVERY_S = 0.01
COMES_BACK = "started again"
"""What the one line about a death says."""


class Strike(NamedTuple):
    """One signal to one actor."""

    name: str
    pid: int
    number: signal.Signals
    at_s: float
    """On the clock of time.monotonic()."""
    iteration: int
    """How many the run had made."""


class Line(NamedTuple):
    """What was logged, a warning or worse."""

    at_s: float
    text: str


class Taken(NamedTuple):
    """What an iteration has learned from."""

    prompts: tuple[int, ...]
    """Rows of the source, one a group."""
    tokens: int
    samples: int


class Watch(Callback):
    """When iterations ended, and what they took; one that is made again takes the place of the first."""

    def __init__(self) -> None:
        self.ends_s: list[float] = []
        self.taken: dict[int, Taken] = {}

    def on_sample_end(self, algo: Any, sample: Trajectory) -> None:
        """Note the prompts of this iteration."""
        rollout, samples = algo.rollout, algo.settings.prompts.samples_per_prompt
        prompts = tuple(prompt.index for prompt in rollout.prompts[::samples])
        length = rollout.completions.drawn_length
        self.taken[algo.iteration + 1] = Taken(prompts, int(length.sum()), len(length))

    def on_train_result(self, algo: Any, metrics: Metrics) -> None:
        """Note that it has ended."""
        self.ends_s.append(time.monotonic())

    def longest_wait_s(self, after_s: float, until_s: float) -> float:
        """Return the longest time between the ends of two iterations, as far as it lies between the two times."""
        ends = [after_s, *(end for end in self.ends_s if after_s < end < until_s), until_s]
        return max(end - start for start, end in itertools.pairwise(ends))


class Lines(logging.Handler):
    """The warnings of a run."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.seen: list[Line] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep the line."""
        self.seen.append(Line(time.monotonic(), record.getMessage()))

    def __enter__(self) -> Lines:
        logging.getLogger("rlx").addHandler(self)
        return self

    def __exit__(self, *_: object) -> None:
        logging.getLogger("rlx").removeHandler(self)


@dataclass
class Striker:
    """A thread that sends signals to actors, one whenever `is_due` says so, in rounds over the kinds.

    is_due: called with this one, whose last signal's victim is back. stops: the rounds in which it is SIGSTOP, which
    nobody undoes, in place of SIGKILL. Actors of a kind take turns.
    """

    algorithm: Any
    kinds: Sequence[str]
    is_due: Callable[[Striker], bool]
    stops: Sequence[int]
    strikes: list[Strike] = field(default_factory=list)

    def __enter__(self) -> Striker:
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="striker")
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._ended.wait(LOOK_EVERY_S):
            if self._is_back() and self.is_due(self):
                self._strike()

    def _is_back(self) -> bool:
        states = self.algorithm._runtime().state()
        return all(states[one.name].status == "alive" and states[one.name].pid != one.pid for one in self.strikes[-1:])

    def _strike(self) -> None:
        """Send the next signal if whoever is due is alive."""
        turn, kind = divmod(len(self.strikes), len(self.kinds))
        states = self.algorithm._runtime().state()
        names = sorted(name for name in states if name.startswith(f"{self.kinds[kind]}/"))
        state = states[names[turn % len(names)]]
        if state.status == "alive" and state.pid is not None:
            number = signal.SIGSTOP if turn in self.stops else signal.SIGKILL
            os.kill(state.pid, number)
            self.strikes.append(Strike(state.name, state.pid, number, time.monotonic(), self.algorithm.iteration))


def told(strikes: Sequence[Strike], lines: Sequence[Line]) -> list[list[Line]]:
    """Return what was told of each death: the lines that name the actor, up to the next signal to its kind."""
    found = []
    for index, strike in enumerate(strikes):
        kind = strike.name.partition("/")[0]
        until_s = min((one.at_s for one in strikes[index + 1 :] if one.name.startswith(kind)), default=float("inf"))
        of_time = [line for line in lines if strike.at_s <= line.at_s < until_s and COMES_BACK in line.text]
        found.append([line for line in of_time if strike.name in line.text])
    return found


def faults_of_lines(strikes: Sequence[Strike], lines: Sequence[Line], noticed_s: float) -> list[str]:
    """Return which deaths were not told by one line of their own in time, and what else was told."""
    found = []
    of_each = told(strikes, lines)
    for strike, own in zip(strikes, of_each, strict=True):
        what = f"{strike.number.name} to {strike.name} after iteration {strike.iteration}"
        if len(own) != 1:
            found.append(f"{what} was told by {len(own)} lines: {[line.text for line in own]}")
        elif own[0].at_s - strike.at_s > noticed_s:
            found.append(f"{what} was told {own[0].at_s - strike.at_s:.1f} s later; {noticed_s:g} s are allowed.")
        found += [f"{what} was told by more than a line: {line.text}" for line in own if "\n" in line.text]
    # That a process does not run is not the same news as that it has ended.
    known = [line for own in of_each for line in own]
    others = [line for line in lines if line not in known and "stopped by a signal" not in line.text]
    return [*found, *(f"this was logged as well: {line.text}" for line in others)]


def faults_of_counts(algorithm: Any, watch: Watch, rows: Sequence[Metrics]) -> list[str]:
    """Return what was counted twice or not at all, by the metrics that are left and by what is still to be taken."""
    found = []
    iterations = list(range(1, algorithm.iteration + 1))
    if [row["iteration"] for row in rows] != iterations:
        return [f"metrics.jsonl has the iterations {[row['iteration'] for row in rows]}."]
    tokens = samples = 0
    for row in rows:
        taken = watch.taken[int(row["iteration"] or 0)]
        tokens, samples = tokens + taken.tokens, samples + taken.samples
        counted = {"env_steps": tokens, "episodes": samples, "weights_version": row["iteration"]}
        for name, value in counted.items():
            if row[name] != value:
                found.append(f"{name} of iteration {row['iteration']} is {row[name]}; {value} were seen.")
    rollouts, ahead = algorithm.rollouts, algorithm.rollouts.get_state()["ahead"]
    asked = Counter(rollouts._prompt(number).index for number in range(ahead["next"]))
    used = Counter(prompt for iteration in iterations for prompt in watch.taken[iteration].prompts)
    used += Counter(rollouts._prompt(number).index for number in ahead["open"])
    found += [f"prompt {one} was learned from too often." for one in (used - asked)]
    found += [f"prompt {one} was lost." for one in (asked - used)]
    return found
