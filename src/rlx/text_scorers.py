"""Scorers: what completions are worth, by a function, by a model, by both, or by nobody."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from rlx.rollout.token_runner import Completions
from rlx.text.prompts import Prompt
from rlx.text.rewards import RewardFunction, Scores


class Scorer(Protocol):
    """Says what completions are worth: a reward function, a reward model, or both together."""

    def score(self, prompts: Sequence[Prompt], texts: Sequence[str], completions: Completions) -> Scores:
        """Return a score for each of S completions, given the prompt of each, its text and its tokens."""
        ...

    def take_restarts(self) -> int:
        """Return how many of its processes were started again since the last call."""
        ...

    def close(self) -> None:
        """End its processes."""
        ...


class NoScorer:
    """Scores nothing: all that counts is what the environments give."""

    def score(self, prompts: Sequence[Prompt], texts: Sequence[str], completions: Completions) -> Scores:
        """Return zeros."""
        return Scores(np.zeros(len(texts), np.float32), np.ones(len(texts), bool))

    def take_restarts(self) -> int:
        """Return 0: it has no process."""
        return 0

    def close(self) -> None:
        """Nothing to close."""


class FunctionScorer:
    """Scores with a reward function of texts."""

    def __init__(self, function: RewardFunction) -> None:
        self._function = function

    def score(self, prompts: Sequence[Prompt], texts: Sequence[str], completions: Completions) -> Scores:
        """Return what the function says."""
        asked, records = [prompt.text for prompt in prompts], [prompt.record for prompt in prompts]
        return self._function.score(asked, texts, records, [prompt.index for prompt in prompts])

    def take_restarts(self) -> int:
        """Return 0: it has no process."""
        return 0

    def close(self) -> None:
        """Nothing to close."""


class SumScorer:
    """The sum of several scores; a sample counts where all of them are there."""

    def __init__(self, parts: Sequence[Scorer]) -> None:
        self._parts = parts

    def score(self, prompts: Sequence[Prompt], texts: Sequence[str], completions: Completions) -> Scores:
        """Return the sums."""
        scores = [part.score(prompts, texts, completions) for part in self._parts]
        failures = {index: error for one in scores for index, error in one.failures.items()}
        mask = np.logical_and.reduce([one.mask for one in scores])
        return Scores(np.sum([one.score for one in scores], axis=0), mask, failures)

    def take_restarts(self) -> int:
        """Return the restarts of all parts."""
        return sum(part.take_restarts() for part in self._parts)

    def close(self) -> None:
        """Close every part."""
        for part in self._parts:
            part.close()
