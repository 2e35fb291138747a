"""Conversations: models and environments take turns, a turn of all conversations at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from rlx.generation.request import Completion, Request
from rlx.rollout.text_env_host import Answer, Key
from rlx.rollout.text_envs import TextEnvs
from rlx.rollout.token_runner import Completions

LIMITLESS = 2**62
SeedOf = Callable[[Key, int], int]
"""(conversation, turn) -> seed; all that is drawn or chosen in a conversation depends on it, whenever that is."""
Asked = list[tuple[Request, list[Key]]]
"""What the model is asked for, and by which conversations, the first one for its first sample."""


@dataclass(frozen=True)
class Terms:
    """What every conversation of a run keeps to."""

    max_turns: int
    max_new_tokens: int
    """Of a turn."""
    context: int | None
    """Tokens that the model can read at most; None: as many as there are."""
    vocabulary: int
    """How many tokens there are, which an environment has to keep to."""
    stops: frozenset[int]
    """Tokens that end a turn."""


@dataclass
class Conversation:
    """What was said so far: by the model, and by the environment to it."""

    start: list[int]
    """The tokens that the model read first."""
    tokens: list[int] = field(default_factory=list)
    """What followed them."""
    drawn: list[bool] = field(default_factory=list)
    """Which of these are the model's."""
    logp: list[float] = field(default_factory=list)
    version: list[int] = field(default_factory=list)
    reward: list[float] = field(default_factory=list)
    """At the last token of each turn what it was worth, else 0."""
    turns: int = 0
    """Of the model."""
    terminated: bool = False
    failure: str = ""
    is_over: bool = False

    @staticmethod
    def begun(start: Answer, terms: Terms) -> Conversation:
        """Return what begins with an environment's first words; it has failed where nobody can read these."""
        start, limit = known(start, terms.vocabulary), terms.context or LIMITLESS
        tokens, failure = start.tokens.tolist(), start.failure
        if not failure and not 0 < len(tokens) < limit:
            failure = f"reset() returned {len(tokens)} tokens; the model reads 1 to {limit - 1}"
        return Conversation([0] if failure else tokens, failure=failure, is_over=bool(failure))

    def add(self, turn: Completion, answer: Answer, terms: Terms) -> None:
        """Put a turn of the model behind it, and what the environment said to that."""
        self.turns += 1
        self.tokens += turn.tokens.tolist()
        self.drawn += [True] * len(turn.tokens)
        self.logp += turn.logp.tolist()
        self.version += turn.version.tolist()
        self.reward += [0.0] * len(turn.tokens)
        answer = known(answer, terms.vocabulary)
        self.reward[-1] += answer.reward
        self.terminated, self.failure = answer.terminated, answer.failure
        is_last = self.turns == terms.max_turns or not turn.stopped  # so that nobody would read the answer
        room = LIMITLESS if terms.context is None else terms.context - len(self.start) - len(self.tokens)
        self.is_over = answer.ends or is_last or len(answer.tokens) >= room
        if self.is_over:
            return
        self.tokens += answer.tokens.tolist()
        for column, value in ((self.drawn, False), (self.logp, 0.0), (self.version, 0), (self.reward, 0.0)):
            column += [value] * len(answer.tokens)  # type: ignore[list-item]


def converse(
    generate: Callable[[list[Request]], Completions],
    envs: TextEnvs,
    begun: Mapping[int, Mapping[str, Any]],
    terms: Terms,
    *,
    samples: int,
    seed_of: SeedOf,
    stream: int = 0,
) -> list[Conversation]:
    """Return `samples` conversations about each of `begun` (number -> options of reset), which have ended.

    generate: completes requests.
    """
    keys = [Key(stream, number, sample) for number in begun for sample in range(samples)]
    found: dict[Key, Conversation] = {}
    try:
        starts = envs.reset({key: (seed_of_start(key, seed_of), begun[key.number]) for key in keys})
        found |= {key: Conversation.begun(starts[key], terms) for key in keys}
        while live := [key for key in keys if not found[key].is_over]:
            asked = requests_of({key: found[key] for key in live}, seed_of, terms)
            made = turns_of(generate([request for request, _ in asked]))
            turns = dict(zip([key for _, of_request in asked for key in of_request], made, strict=True))
            answers = envs.step({key: turns[key].tokens for key in live})
            for key in live:
                found[key].add(turns[key], answers[key], terms)
    finally:
        envs.leave(key for key in keys if key not in found or not found[key].terminated)
    return list(found.values())


def known(answer: Answer, vocabulary: int) -> Answer:
    """Return the answer; one with tokens that the model does not know is a failure."""
    if not ((answer.tokens < 0) | (answer.tokens >= vocabulary)).any():
        return answer
    return replace(answer, failure=f"the observation has token ids outside of 0 to {vocabulary - 1}")


def seed_of_start(key: Key, seed_of: SeedOf) -> int:
    """Return the seed of a conversation's environment; all of a prompt are alike."""
    return seed_of(key._replace(sample=0), 0)


def requests_of(found: Mapping[Key, Conversation], seed_of: SeedOf, terms: Terms) -> Asked:
    """Return what the model is asked for next; samples of a prompt that were begun alike ask together."""
    groups: dict[Any, list[Key]] = {}
    for key, one in found.items():
        groups.setdefault(key if one.tokens else (key.number, tuple(one.start)), []).append(key)
    asked: Asked = []
    for keys in groups.values():
        one = found[keys[0]]
        read, seed = [*one.start, *one.tokens], seed_of(keys[0], one.turns)
        asked.append((Request(read, len(keys), terms.max_new_tokens, seed, terms.stops), keys))
    return asked


def turns_of(made: Completions) -> list[Completion]:
    """Return the turns of the model one by one."""
    columns = [made.split(column) for column in (made.tokens, made.logp, made.version)]
    return [Completion(*of_one, bool(stopped)) for *of_one, stopped in zip(*columns, made.stopped, strict=True)]  # type: ignore[misc]


def transcripts(conversations: Sequence[Conversation]) -> Completions:
    """Return all that followed what was read first, with marks on what the model has drawn."""
    kinds = {"tokens": np.int64, "logp": np.float32, "version": np.int64, "drawn": np.bool_, "reward": np.float32}
    columns: dict[str, Any] = {
        name: np.array([value for one in conversations for value in getattr(one, name)], kind)
        for name, kind in kinds.items()
    }
    return Completions(
        **columns,
        length=np.array([len(one.tokens) for one in conversations], np.int64),
        stopped=np.array([one.terminated for one in conversations], bool),
    )
