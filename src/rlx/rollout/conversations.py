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
SeedOf = Callable[[int, int, int], int]
"""(number of the prompt, sample, turn) -> seed."""


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
    terminated: bool = False
    failure: str = ""
    is_over: bool = False

    def add_turn(self, tokens: np.ndarray, logp: np.ndarray, version: np.ndarray) -> None:
        """Put a turn of the model behind it."""
        self.tokens += tokens.tolist()
        self.drawn += [True] * len(tokens)
        self.logp += logp.tolist()
        self.version += version.tolist()
        self.reward += [0.0] * len(tokens)

    def add_answer(self, answer: Answer, room: int, is_last: bool) -> None:
        """Put the environment's answer behind a turn; room: tokens that the model can still read, the next one's too.

        is_last: no turn may follow, so that the answer is not read by anybody.
        """
        self.reward[-1] += answer.reward
        self.terminated, self.failure = answer.terminated, answer.failure
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
    *,
    samples: int,
    seed_of: SeedOf,
    max_turns: int,
    max_new_tokens: int,
    context: int | None,
    vocabulary: int,
    stops: frozenset[int],
) -> list[Conversation]:
    """Return `samples` conversations about each of `begun` (number -> options of reset), which have ended.

    generate: completes requests. max_new_tokens: of a turn. context: tokens that the model can read at most.
    """
    keys: list[Key] = [(number, sample) for number in begun for sample in range(samples)]
    of_each = {key: (seed_of(key[0], 0, 0), begun[key[0]]) for key in keys}  # all of a prompt are alike
    starts = _known(vocabulary, envs.reset(of_each))
    found = {key: _begun(starts[key], context) for key in keys}
    turn, live = 0, [key for key in keys if not found[key].failure]
    while live:
        requests = _requests(found, live, lambda key, turn=turn: seed_of(*key, turn), max_new_tokens, stops)
        turns = dict(zip([key for _, asked in requests for key in asked], _turns(generate, requests), strict=True))
        answers = _known(vocabulary, envs.step({key: turns[key].tokens for key in live}))
        turn += 1
        for key in live:
            found[key].add_turn(turns[key].tokens, turns[key].logp, turns[key].version)
            room = LIMITLESS if context is None else context - len(found[key].start) - len(found[key].tokens)
            found[key].add_answer(answers[key], room, is_last=turn == max_turns or not turns[key].stopped)
        live = [key for key in live if not found[key].is_over]
    return list(found.values())


def _known(vocabulary: int, answers: dict[Key, Answer]) -> dict[Key, Answer]:
    """Return the answers; those with tokens that the model does not know are failures."""
    failure = f"the observation has token ids outside of 0 to {vocabulary - 1}"
    return {
        key: replace(one, failure=failure) if (one.tokens < 0).any() or (one.tokens >= vocabulary).any() else one
        for key, one in answers.items()
    }


def _begun(start: Answer, context: int | None) -> Conversation:
    tokens, failure = start.tokens.tolist(), start.failure
    if not failure and not 0 < len(tokens) < (context or LIMITLESS):
        failure = f"reset() returned {len(tokens)} tokens; the model reads 1 to {(context or LIMITLESS) - 1}"
    return Conversation([0] if failure else tokens, failure=failure)


def _requests(
    found: Mapping[Key, Conversation],
    live: Sequence[Key],
    seed_of: Callable[[Key], int],
    max_new_tokens: int,
    stops: frozenset[int],
) -> list[tuple[Request, list[Key]]]:
    """Return what the model is asked for, and by which conversations: samples that were begun alike ask together."""
    groups: dict[Any, list[Key]] = {}
    for key in live:
        one = found[key]
        groups.setdefault(key if one.tokens else (key[0], tuple(one.start)), []).append(key)
    requests = []
    for keys in groups.values():
        read = [*found[keys[0]].start, *found[keys[0]].tokens]
        requests.append((Request(read, len(keys), max_new_tokens, seed_of(keys[0]), stops), keys))
    return requests


def _turns(
    generate: Callable[[list[Request]], Completions], requests: Sequence[tuple[Request, list[Key]]]
) -> list[Completion]:
    """Return the turns of all conversations, in the order of the requests."""
    made = generate([request for request, _ in requests])
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
