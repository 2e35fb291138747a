"""Assignments: what token runners are asked to advance, while they come and go."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rlx.generation.request import Request, Sampling
from rlx.rollout.runner_actors import Call, RunnerActors
from rlx.rollout.token_runner import Completions

ASKED_PER_RUNNER = 2  # one that it works at, and one to go on with while the answer is on its way


class Assignments:
    """Who was given what, by number, and who was told of what. What a lost runner had not finished is asked again."""

    def __init__(self, actors: RunnerActors, sampling: Sampling) -> None:
        self.actors, self._sampling = actors, sampling
        self.runners = len(actors)
        self._given: list[dict[int, Request]] = [{} for _ in range(self.runners)]  # what has not been answered whole
        self._missing: dict[int, set[int]] = {}  # samples of each that were not answered
        self._unsent: list[list[int]] = [[] for _ in range(self.runners)]  # what a runner has not been told of
        self._told = [0] * self.runners  # which incarnation of each was told of the rest

    def given(self, runner: int) -> int:
        """Return how many requests a runner has."""
        return len(self._given[runner])

    def give(self, runner: int, number: int, request: Request) -> None:
        """Have a runner complete this, too."""
        self._given[runner][number] = request
        self._missing[number] = set(range(request.n))
        self._unsent[runner].append(number)

    def ask(self, calls: Sequence[Call]) -> list[Call]:
        """Ask everybody who has something to do, and too little to go on with in these calls."""
        asked = []
        for runner, given in enumerate(self._given):
            count = sum(call.actors is self.actors and call.runner == runner for call in calls)
            if given and (not count or (self._unsent[runner] and count < ASKED_PER_RUNNER)):
                asked.append(self._call(runner))
        return asked

    def hear(self, call: Call) -> list[tuple[int, int, Completions]]:
        """Return what a runner has answered and nobody has heard before: number, first sample, samples."""
        if not call.value:  # it knows of nothing that it could do
            self._unsent[call.runner] = list(self._given[call.runner])
        heard = []
        for number, first, completions in call.value:
            missing = self._missing.get(number, set())
            if first not in missing:
                continue
            missing.difference_update(range(first, first + len(completions.length)))
            if not missing:
                del self._given[call.runner][number], self._missing[number]
            heard.append((number, first, completions))
        return heard

    def forget(self) -> None:
        """Take everything back; a runner forgets when it has ended what it is at, and nobody waits for it."""
        self._given, self._unsent = ([{} for _ in self._given], [[] for _ in self._unsent])
        self._missing = {}
        for runner in range(self.runners):
            self.actors.ask(runner, "forget", tuple).forget()

    def _call(self, runner: int) -> Call:
        fresh, self._unsent[runner] = self._unsent[runner], []
        asked: list[bool] = []

        def arguments() -> tuple[Mapping[int, Request], Sampling]:
            """A runner that was started again knows nothing of what the one before was told of."""
            given, incarnation = self._given[runner], self.actors.incarnation(runner)
            is_new = bool(asked) or incarnation != self._told[runner]
            asked.append(True)
            self._told[runner] = incarnation
            unsent = set(self._unsent[runner])
            numbers = [number for number in given if number not in unsent] if is_new else fresh
            return {number: given[number] for number in numbers if number in given}, self._sampling

        return self.actors.ask(runner, "advance", arguments)
