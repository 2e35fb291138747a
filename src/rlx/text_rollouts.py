"""Rollouts: prompts are asked, completed by the token runners, scored, and come back as rows to learn from."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from rlx.errors import EnvError, RewardError
from rlx.functional.groups import has_spread
from rlx.generation.request import Request, Sampling
from rlx.metrics import Clock, Metrics
from rlx.rollout.age import WhenOld
from rlx.rollout.conversations import Conversation, Terms, converse, transcripts
from rlx.rollout.group_arrivals import GroupArrivals
from rlx.rollout.served_runners import ServedRunners
from rlx.rollout.text_env_host import Key
from rlx.rollout.text_envs import TextEnvs
from rlx.rollout.token_rows import token_batch, token_trajectory
from rlx.rollout.token_runner import Completions
from rlx.rollout.token_runners import TokenRunners
from rlx.text.order import order
from rlx.text.prompts import Prompt
from rlx.text.rewards import Scores
from rlx.text.tokenizers import decode
from rlx.text_scorers import Scorer
from rlx.trajectory import Batch, Trajectory

log = logging.getLogger("rlx")

MOST_LOST = 3
"""Iterations in a row of which every sample is lost, and a run ends: what never works is not to be waited for."""
TRAINING, EVALUATION = 0, 1  # what seeds are of, so that no evaluation repeats a draw of the training


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
    reward_failures: int = 0
    """Completions whose reward failed."""
    env_failures: int = 0
    """Conversations whose environment failed."""
    last_failure: str = ""
    """What was wrong with the last of them, or of the rewards that failed."""

    def row(self, samples: int) -> Metrics:
        """Return an iteration's metrics, for groups of so many samples."""
        spread = has_spread(self.batch.score, samples, self.batch.counts).view(-1, samples).any(1)
        return {
            "score_mean": float(self.score[self.counts].mean()) if self.counts.any() else None,
            "truncated_fraction": float((~self.completions.stopped).mean()),
            "flat_groups_fraction": float((~spread).float().mean()),
        }

    def metrics(self) -> Metrics:
        """Return evaluation/ metrics, as of episodes."""
        score, length = self.score[self.counts], self.completions.drawn_length
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
        runners: TokenRunners | ServedRunners,
        scorer: Scorer,
        tokenizer: Any,
        *,
        stops: frozenset[int],
        max_new_tokens: int,
        sampling: Sampling,
        truncated_score: float | None,
        shuffle: bool,
        seed: int,
        num_prompts: int,
        samples_per_prompt: int,
        max_age: int = 0,
        when_old: WhenOld = "wait",
        conversations: tuple[TextEnvs, Terms] | None = None,
    ) -> None:
        """num_prompts, samples_per_prompt: what `sample` returns. max_age: 0 has the runners work in `sample` only.

        conversations: what completions are turns of, if they are: with which environments, and on which terms.
        """
        self.prompts, self.runners, self.scorer, self.tokenizer = prompts, runners, scorer, tokenizer
        self.stops, self.sampling = stops, sampling
        self.position = 0
        self.reward_failures = 0
        self._lost_in_a_row = 0
        self._max_new_tokens, self._truncated_score = max_new_tokens, truncated_score
        self._shuffle, self._seed = shuffle, seed
        self._num_prompts, self._samples_per_prompt = num_prompts, samples_per_prompt
        self._conversations = conversations
        self._arrivals: GroupArrivals | None = None
        if max_age:
            self._arrivals = self._arrive({"per_batch": num_prompts, "max_age": max_age, "when_old": when_old})

    def sample(self, clock: Clock) -> Rollout:
        """Return completions of the next prompts; where runners work ahead, of those that were completed next."""
        if self._arrivals is None:
            numbers = range(self.position, self.position + self._num_prompts)
            prompts, samples = [self._prompt(number) for number in numbers], self._samples_per_prompt
            rollout = self.complete(prompts, samples, numbers, TRAINING, self.sampling, clock)
            self.position += self._num_prompts
        else:
            with clock.measure("generate_s"):
                groups = self._arrivals.take()
            completions = Completions.concatenate([group.completions for group in groups])
            prompts = [self._prompt(group.number) for group in groups]
            conversations = [one for group in groups for one in group.conversations]
            rollout = self._scored(prompts, self._samples_per_prompt, completions, clock, conversations or None)
            for group in self._arrivals.take_dropped_failed():
                rollout.env_failures += _tell_failures([self._prompt(group.number)], group.conversations)
        self.reward_failures += rollout.reward_failures
        self._lost_in_a_row = 0 if rollout.counts.any() else self._lost_in_a_row + 1
        if self._lost_in_a_row == MOST_LOST:
            kind = EnvError if rollout.env_failures else RewardError
            raise kind(
                f"all {len(rollout.counts)} samples of each of {MOST_LOST} iterations in a row were lost, so nothing "
                f"is learned; the last one: {rollout.last_failure.rstrip('.')}."
            )
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
        if self._arrivals is not None:
            self._arrivals.pause()
        if self._conversations is not None:
            return self._converse(prompts, samples_per_prompt, numbers, stream, sampling, clock)
        requests = [
            self._request_of(prompt, samples_per_prompt, stream, number)
            for prompt, number in zip(prompts, numbers, strict=True)
        ]
        with clock.measure("generate_s"):
            completions = self.runners.generate(requests, sampling)
        return self._scored(prompts, samples_per_prompt, completions, clock)

    def _converse(
        self,
        prompts: Sequence[Prompt],
        samples_per_prompt: int,
        numbers: Sequence[int],
        stream: int,
        sampling: Sampling,
        clock: Clock,
    ) -> Rollout:
        """Return scored conversations about `prompts`."""
        assert self._conversations is not None
        envs, terms = self._conversations
        with clock.measure("generate_s"):
            conversations = converse(
                lambda requests: self.runners.generate(requests, sampling),
                envs,
                {number: _options(prompt) for number, prompt in zip(numbers, prompts, strict=True)},
                terms,
                samples=samples_per_prompt,
                seed_of=self._turn_seed,
                stream=stream,
            )
        return self._scored(prompts, samples_per_prompt, transcripts(conversations), clock, conversations)

    def _scored(
        self,
        prompts: Sequence[Prompt],
        samples_per_prompt: int,
        completions: Completions,
        clock: Clock,
        conversations: Sequence[Conversation] | None = None,
    ) -> Rollout:
        """Return the rollout of these completions of each prompt, or of these conversations about it."""
        asked = [prompt for prompt in prompts for _ in range(samples_per_prompt)]
        if conversations is not None:
            _tell_failures(prompts, conversations)
            asked = [self._begun(prompt, one.start) for prompt, one in zip(asked, conversations, strict=True)]
        with clock.measure("score_s"):
            texts = [decode(self.tokenizer, tokens, self.stops) for tokens in completions.split(completions.tokens)]
            if conversations is None:
                scores, lost = self.scorer.score(asked, texts, completions), np.zeros(len(asked), bool)
            else:
                scores, lost = _of_conversations(self.scorer, asked, texts, conversations)
            score = scores.score
            if self._truncated_score is not None:
                score = np.where(completions.stopped, score, np.float32(self._truncated_score))
            group = np.arange(len(asked), dtype=np.int64) // samples_per_prompt
            counts = scores.mask & ~lost
            trajectory = token_trajectory([prompt.tokens for prompt in asked], completions, score)
            trajectory.mask = trajectory.mask & counts
            steps = np.array([len(prompt.tokens) - 1 for prompt in asked], np.int64) + completions.length
            batch = token_batch(trajectory, steps)
            of_samples = {"score": score, "group": group, "counts": counts}
            batch.tensors |= {name: torch.from_numpy(column) for name, column in of_samples.items()}
        failures = int((~scores.mask).sum()), int(lost.sum())
        said = [one.failure for one in conversations or () if one.failure] + [*map(str, scores.failures.values())]
        return Rollout(asked, texts, completions, score, counts, trajectory, batch, *failures, *said[-1:])

    def _begun(self, prompt: Prompt, start: Sequence[int]) -> Prompt:
        """Return what a conversation about a prompt began with."""
        if tuple(start) == tuple(prompt.tokens):
            return prompt
        return replace(prompt, tokens=tuple(start), text=decode(self.tokenizer, start))

    def _prompt(self, number: int) -> Prompt:
        """Return the prompt of this number, counted over the whole run."""
        return self.prompts[order(len(self.prompts), number, 1, self._seed, self._shuffle)[0]]

    def _arrive(self, limits: Mapping[str, Any]) -> GroupArrivals:
        """Return what keeps the runners at work while others learn."""
        if self._conversations is None:
            return self.runners.arrive(self._request, self.sampling, **limits)
        envs, terms = self._conversations
        return self.runners.arrive_in_turns(
            self.sampling,
            limits,
            envs=envs,
            terms=terms,
            samples=self._samples_per_prompt,
            options_of=lambda number: _options(self._prompt(number)),
            seed_of=self._turn_seed,
            stream=TRAINING,
        )

    def _request(self, number: int) -> Request:
        return self._request_of(self._prompt(number), self._samples_per_prompt, TRAINING, number)

    def _request_of(self, prompt: Prompt, samples: int, stream: int, number: int) -> Request:
        """Return what is asked for; what is drawn depends on the number and the stream."""
        return Request(prompt.tokens, samples, self._max_new_tokens, self._draw_seed(stream, number), self.stops)

    def _turn_seed(self, key: Key, turn: int) -> int:
        return self._draw_seed(key.stream, key.number, *((key.sample, turn) if key.sample or turn else ()))

    def _draw_seed(self, stream: int, number: int, *of_turn: int) -> int:
        return int(
            np.random.SeedSequence([self._seed, stream, number, *of_turn]).generate_state(1, np.uint64)[0]
            >> np.uint64(1)
        )

    def take_restarts(self) -> int:
        """Return how many runners, and actors of rewards or environments, were started again since the last call."""
        restarts = 0 if self._conversations is None else self._conversations[0].take_restarts()
        return restarts + self.runners.take_restarts() + self.scorer.take_restarts()

    def take_dropped(self) -> int:
        """Return how many tokens were dropped, as they were too old, since the last call."""
        return 0 if self._arrivals is None else self._arrivals.take_dropped()

    def close(self) -> None:
        """End the processes of runners and scorers."""
        if self._arrivals is not None:
            self._arrivals.pause()
        if self._conversations is not None:
            self._conversations[0].close()
        self.runners.close()
        self.scorer.close()

    def get_state(self) -> dict[str, Any]:
        """Return how far the prompts are used; of runners that work ahead, which ones were not learned from yet."""
        ahead = None if self._arrivals is None else self._arrivals.get_state()
        position = self.position if ahead is None else ahead["next"]
        return {"position": position, "reward_failures": self.reward_failures, "ahead": ahead}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Continue from `get_state`."""
        self.position, self.reward_failures = int(state["position"]), int(state["reward_failures"])
        self._lost_in_a_row = 0
        if self._arrivals is not None:
            self._arrivals.set_state(state.get("ahead") or {"next": self.position, "open": []})


def _options(prompt: Prompt) -> dict[str, Any]:
    """Return what an environment is told of the prompt that a conversation is about."""
    return {"prompt": prompt.tokens, "record": prompt.record}


def _tell_failures(prompts: Sequence[Prompt], conversations: Sequence[Conversation]) -> int:
    """Return how many conversations, as many about each prompt, have an environment that failed; name the first."""
    samples, lost = len(conversations) // len(prompts), [i for i, one in enumerate(conversations) if one.failure]
    if lost:
        log.warning(
            "%d of %d conversations were lost and are not learned from; the first, prompt %d, sample %d: %s",
            *(len(lost), len(conversations), prompts[lost[0] // samples].index, lost[0] % samples),
            conversations[lost[0]].failure,
        )
    return len(lost)


def _of_conversations(
    scorer: Scorer, prompts: Sequence[Prompt], texts: Sequence[str], conversations: Sequence[Conversation]
) -> tuple[Scores, np.ndarray]:
    """Return what environments and scorer gave together, and which conversations were lost: nobody scores these."""
    lost = np.array([bool(one.failure) for one in conversations])
    kept = np.flatnonzero(~lost).tolist()
    score, mask = np.array([sum(one.reward) for one in conversations], np.float32), np.ones(len(lost), bool)
    failures: dict[int, Any] = {}
    if len(kept):
        of_kept = transcripts([conversations[index] for index in kept])
        scores = scorer.score([prompts[index] for index in kept], [texts[index] for index in kept], of_kept)
        score[kept] += scores.score
        mask[kept] = scores.mask
        failures = {kept[index]: error for index, error in scores.failures.items()}
    return Scores(score, mask, failures), lost
