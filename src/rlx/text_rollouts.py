"""Rollouts: prompts are asked, completed by the token runners, scored, and come back as rows to learn from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from rlx.generation.request import Request, Sampling
from rlx.metrics import Clock, Metrics
from rlx.rollout.token_rows import token_batch, token_trajectory
from rlx.rollout.token_runner import Completions
from rlx.rollout.token_runners import TokenRunners
from rlx.text.order import order
from rlx.text.prompts import Prompt
from rlx.text.rewards import RewardFunction, Scores
from rlx.text.tokenizers import decode
from rlx.trajectory import Batch, Trajectory

TRAINING, EVALUATION = 0, 1  # what seeds are of, so that no evaluation repeats a draw of the training


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


@dataclass
class Rollout:
    """S completions of prompts, group by group: what was asked, what came back, and what it is worth."""

    prompts: list[Prompt]
    """The prompt of each completion."""
    texts: list[str]
    """The completions in words, without their stop tokens."""
    completions: Completions
    score: np.ndarray
    """float32 [S]."""
    counts: np.ndarray
    """bool [S]: False where the reward failed, so that there is nothing to learn from it."""
    trajectory: Trajectory
    batch: Batch
    """The rows that learners take, with `score`, `group` and `counts` of each."""

    def metrics(self) -> Metrics:
        """Return evaluation/ metrics, as of episodes."""
        score, length = self.score[self.counts], self.completions.length
        reductions = {"mean": np.mean, "std": np.std, "min": np.min, "max": np.max}
        return {
            **{
                f"evaluation/episode_return_{name}": float(reduce(score)) if len(score) else None
                for name, reduce in reductions.items()
            },
            "evaluation/episode_length_mean": float(length.mean()),
            "evaluation/episodes": len(length),
            "evaluation/truncated_fraction": float((~self.completions.stopped).mean()),
        }


class Rollouts:
    """Owns the prompts and how far they are used; runners generate, the scorer scores.

    `position` counts prompts over the whole run and decides, with the run's seed, which prompt is asked next and what
    is drawn for it: it is all that exact resume needs.
    """

    def __init__(
        self,
        prompts: Sequence[Prompt],
        runners: TokenRunners,
        scorer: Scorer,
        tokenizer: Any,
        *,
        stops: frozenset[int],
        max_new_tokens: int,
        sampling: Sampling,
        truncated_score: float | None,
        shuffle: bool,
        seed: int,
    ) -> None:
        self.prompts, self.runners, self.scorer, self.tokenizer = prompts, runners, scorer, tokenizer
        self.stops, self.sampling = stops, sampling
        self.position = 0
        self.reward_failures = 0
        self._max_new_tokens, self._truncated_score = max_new_tokens, truncated_score
        self._shuffle, self._seed = shuffle, seed

    def sample(self, num_prompts: int, samples_per_prompt: int, clock: Clock) -> Rollout:
        """Return completions of the next prompts."""
        rows = order(len(self.prompts), self.position, num_prompts, self._seed, self._shuffle)
        numbers = range(self.position, self.position + num_prompts)
        chosen = [self.prompts[row] for row in rows]
        rollout = self.complete(chosen, samples_per_prompt, numbers, TRAINING, self.sampling, clock)
        self.position += num_prompts
        self.reward_failures += int((~rollout.counts).sum())
        return rollout

    def complete(
        self,
        prompts: Sequence[Prompt],
        samples_per_prompt: int,
        numbers: Sequence[int],
        stream: int,
        sampling: Sampling,
        clock: Clock,
    ) -> Rollout:
        """Return scored completions of `prompts`; what is drawn depends on each one's number and the stream."""
        limit, seeds = self._max_new_tokens, [self._draw_seed(stream, number) for number in numbers]
        requests = [
            Request(prompt.tokens, samples_per_prompt, limit, seed, self.stops)
            for prompt, seed in zip(prompts, seeds, strict=True)
        ]
        with clock.measure("generate_s"):
            completions = self.runners.generate(requests, sampling)
        asked = [prompt for prompt in prompts for _ in range(samples_per_prompt)]
        with clock.measure("score_s"):
            texts = [decode(self.tokenizer, tokens, self.stops) for tokens in completions.split(completions.tokens)]
            scores = self.scorer.score(asked, texts, completions)
            score = scores.score
            if self._truncated_score is not None:
                score = np.where(completions.stopped, score, np.float32(self._truncated_score))
            group = np.arange(len(asked), dtype=np.int64) // samples_per_prompt
            trajectory = token_trajectory([prompt.tokens for prompt in asked], completions, score)
            trajectory.mask = trajectory.mask & scores.mask
            steps = np.array([len(prompt.tokens) - 1 for prompt in asked], np.int64) + completions.length
            batch = token_batch(trajectory, steps)
            of_samples = {"score": score, "group": group, "counts": scores.mask}
            batch.tensors |= {name: torch.from_numpy(column) for name, column in of_samples.items()}
        return Rollout(asked, texts, completions, score, scores.mask, trajectory, batch)

    def _draw_seed(self, stream: int, number: int) -> int:
        return int(np.random.SeedSequence([self._seed, stream, number]).generate_state(1, np.uint64)[0] >> np.uint64(1))

    def take_restarts(self) -> int:
        """Return how many runners, and actors of reward models, were started again since the last call."""
        return self.runners.take_restarts() + self.scorer.take_restarts()

    def close(self) -> None:
        """End the processes of runners and scorers."""
        self.runners.close()
        self.scorer.close()

    def get_state(self) -> dict[str, Any]:
        """Return how far the prompts are used."""
        return {"position": self.position, "reward_failures": self.reward_failures}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Continue from `get_state`."""
        self.position, self.reward_failures = int(state["position"]), int(state["reward_failures"])


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
