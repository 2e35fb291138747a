"""ConversationGroups: conversations that go on while others learn, each at its own pace."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rlx.generation.request import Completion, Sampling
from rlx.rollout.assignments import Assignments
from rlx.rollout.conversations import Conversation, SeedOf, Terms, requests_of, seed_of_start, transcripts, turns_of
from rlx.rollout.env_turns import EnvTurns
from rlx.rollout.group_arrivals import Made
from rlx.rollout.runner_actors import Call, RunnerActors
from rlx.rollout.text_env_host import Answer, Key
from rlx.rollout.text_envs import TextEnvs
from rlx.rollout.token_runner import Completions


@dataclass
class _Group:
    """All conversations about one prompt."""

    runner: int
    keys: list[Key]
    found: dict[Key, Conversation] = field(default_factory=dict)
    """Those that were begun."""


class ConversationGroups:
    """Passes turns on, between runners that draw them `singly` and environments: a turn as soon as it has ended.

    Nobody waits for the turns of others, but for the first words of all samples of a prompt: those that were begun
    alike draw their first turn together. What is drawn depends on the conversation and the turn, not on when that is.
    All turns of a prompt's samples are drawn by one runner.
    """

    def __init__(
        self,
        actors: RunnerActors,
        sampling: Sampling,
        *,
        envs: TextEnvs,
        terms: Terms,
        samples: int,
        options_of: Callable[[int], Mapping[str, Any]],
        seed_of: SeedOf,
        stream: int = 0,
    ) -> None:
        """options_of: returns the options of reset by the prompt's number; stream: that of the keys."""
        self._assignments, self._envs = Assignments(actors, sampling), EnvTurns(envs)
        self._terms, self._samples, self._stream = terms, samples, stream
        self._options_of, self._seed_of = options_of, seed_of
        self._groups: dict[int, _Group] = {}
        self._tickets = itertools.count()  # no answer to a request that was forgotten is one to another
        self._asking: dict[int, dict[int, Key]] = {}  # by ticket and sample, who waits for a turn
        self._turns: dict[Key, Completion] = {}  # drawn, and not answered

    def begin(self, number: int) -> None:
        """Have the environments of a prompt say their first words; it goes to the runner that has the fewest."""
        of_runners = [group.runner for group in self._groups.values()]
        runner = min(range(self._assignments.runners), key=of_runners.count)
        keys = [Key(self._stream, number, sample) for sample in range(self._samples)]
        self._groups[number] = _Group(runner, keys)
        options = self._options_of(number)
        for key in keys:
            self._envs.reset(key, seed_of_start(key, self._seed_of), options)

    def ask(self, calls: Sequence[Call]) -> list[Call]:
        """Have runners draw turns, and environments answer them."""
        return [*self._assignments.ask(calls), *self._envs.ask(calls)]

    def hear(self, call: Call) -> list[Made]:
        """Pass on what was said; return the groups all of whose conversations are over with it."""
        if call.actors is self._assignments.actors:
            for ticket, first, completions in self._assignments.hear(call):
                self._hear_turns(ticket, first, completions)
            return []
        answers = self._envs.hear(call)
        for key, answer in answers.items():
            self._hear_answer(key, answer)
        made = []
        for number in dict.fromkeys(key.number for key in answers):
            group = self._groups[number]
            if len(group.found) == len(group.keys) and all(one.is_over for one in group.found.values()):
                conversations = [group.found[key] for key in group.keys]
                made.append((number, transcripts(conversations), conversations))
                del self._groups[number]
        return made

    def forget(self) -> None:
        """Leave all conversations."""
        self._envs.leave([key for group in self._groups.values() for key in group.keys])
        self._groups, self._asking, self._turns = {}, {}, {}
        self._assignments.forget()

    def _hear_turns(self, ticket: int, first: int, completions: Completions) -> None:
        """Have environments answer the turns that were drawn for a request, from this sample on."""
        asking = self._asking[ticket]
        for sample, turn in enumerate(turns_of(completions), first):
            key = asking.pop(sample)
            self._turns[key] = turn
            self._envs.step(key, turn.tokens)
        if not asking:
            del self._asking[ticket]

    def _hear_answer(self, key: Key, answer: Answer) -> None:
        """Have the model take its next turn, if there is one; where all begin, when the last one has begun."""
        group = self._groups[key.number]
        is_first = key not in group.found
        if is_first:
            group.found[key] = Conversation.begun(answer, self._terms)
        else:
            group.found[key].add(self._turns.pop(key), answer, self._terms)
        if group.found[key].is_over:
            self._envs.leave([key])
        if not is_first:
            self._ask_for_turns(group, [key])
        elif len(group.found) == len(group.keys):
            self._ask_for_turns(group, group.keys)

    def _ask_for_turns(self, group: _Group, keys: Sequence[Key]) -> None:
        """Have the model take its turn in those of these conversations that are not over."""
        live = {key: group.found[key] for key in keys if not group.found[key].is_over}
        for request, asking in requests_of(live, self._seed_of, self._terms):
            ticket = next(self._tickets)
            self._asking[ticket] = dict(enumerate(asking))
            self._assignments.give(group.runner, ticket, request)
