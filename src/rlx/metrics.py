"""Metrics: their frozen names, the window over episodes, the clock of an iteration, and the writers.

Every metric's x axis is `env_steps` unless said otherwise. Names do not change between releases; an algorithm of
your own may add learner/ stats to them.
"""

from __future__ import annotations

import errno
import json
import os
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean
from typing import Any

from rlx.errors import CheckpointError, MissingExtra

Metrics = dict[str, float | int | None]

METRICS: dict[str, str] = {
    "iteration": "Number of finished training iterations.",
    "env_steps": "Environment steps trained on so far; reset steps of vector environments are not counted.",
    "frames": "Frames of the emulator trained on so far, env_steps times atari.frame_skip; in Atari runs only.",
    "dropped_env_steps": "Environment steps collected and not learned from so far: older than training.max_age, or "
    "dropped from a full queue.",
    "episodes": "Episodes finished during training so far.",
    "env_failures": "Failures of training environments so far: exceptions and hangs after which one was built anew, "
    "and on text conversations that were lost by them.",
    "runner_restarts": "Restarts of env runners, token runners and reward models so far: deaths and hangs after which "
    "the same was asked again.",
    "learner_restarts": "Restarts of the learners so far, after each of which the run went back to a checkpoint.",
    "num_env_runners": "Env runners in processes of their own at the end of this iteration; 0: the driver collects.",
    "gradient_steps": "Optimizer steps so far.",
    "weights_version": "Number of updates whose weights were published to the env runners.",
    "env_steps_per_s": "Environment steps of this iteration over its wall time.",
    "episode_return_mean": "Mean undiscounted, unscaled return of the last reporting.window_episodes episodes; "
    "null until one has finished.",
    "episode_return_min": "Smallest return in the same window; null until an episode has finished.",
    "episode_return_max": "Largest return in the same window; null until an episode has finished.",
    "episode_length_mean": "Mean length in steps over the same window; null until an episode has finished.",
    "age_mean": "Mean age of this iteration's samples: updates between the weights that acted and those that learn.",
    "age_max": "Largest age of this iteration's samples, in updates.",
    "learner/loss": "Total loss, mean over this iteration's gradient steps.",
    "learner/policy_loss": "Policy part of the loss.",
    "learner/value_loss": "Mean squared error of the value function, before its coefficient.",
    "learner/entropy": "Mean entropy of the policy, in nats.",
    "learner/kl": "Estimated KL(old || new) in nats (k3), mean over the gradient steps.",
    "learner/clip_fraction": "Share of samples whose ratio left the clip range.",
    "learner/explained_variance": "1 - var(return - value) / var(return) before the update; 1 is a perfect critic.",
    "learner/rho_clip_fraction": "Share of samples whose importance weight V-trace cuts at 1.",
    "learner/grad_norm": "Global gradient norm before clipping, mean over the gradient steps.",
    "learner/lr": "Learning rate of this iteration.",
    "learner/clip_range": "Clip range of this iteration.",
    "learner/stopped_early": "1 if the KL limit ended this iteration's update early, else 0.",
    "evaluation/episode_return_mean": "Mean return of the evaluation episodes; only in iterations that evaluate.",
    "evaluation/episode_return_std": "Standard deviation of the evaluation returns.",
    "evaluation/episode_return_min": "Smallest evaluation return.",
    "evaluation/episode_return_max": "Largest evaluation return.",
    "evaluation/episode_length_mean": "Mean length of the evaluation episodes, in steps.",
    "evaluation/episodes": "Number of evaluation episodes.",
    "time/total_s": "Wall time of all training iterations so far, in seconds, earlier sessions of the run included.",
    "time/iteration_s": "Wall time of this iteration, in seconds; the next six add up to it.",
    "time/env_s": "Stepping environments; the mean of the env runners.",
    "time/inference_s": "Choosing actions and values during the rollout; the mean of the env runners.",
    "time/learn_s": "Computing gradients and stepping the optimizer.",
    "time/transfer_s": "Moving trajectories, batches and weights between processes.",
    "time/wait_s": "Waiting for the slowest env runner beyond the mean of all.",
    "time/other_s": "The rest: advantages, statistics, bookkeeping.",
    "time/evaluation_s": "Evaluation after this iteration, not part of time/iteration_s.",
}

TEXT_METRICS: dict[str, str] = {
    "score_mean": "Mean score of this iteration's completions.",
    "truncated_fraction": "Share of this iteration's completions that reached generation.max_new_tokens; of "
    "conversations those that the environment did not end.",
    "flat_groups_fraction": "Share of prompts whose completions all scored alike, from which GRPO learns nothing.",
    "sync_bytes": "Bytes of weights that an update brings to the token runners, once for all of them; 0 where they "
    "generate with the learner's own.",
    "reward_failures": "Completions so far whose reward raised, was late or no number, and that were masked.",
    "ref_kl_k1": "Mean over tokens of log(policy / reference), in nats: k1, unbiased; where there is a reference.",
    "ref_kl_k3": "The same KL by k3, on the same tokens: never negative, less noise.",
    "ref_kl_sequence": "The same KL summed over a completion, in nats: ref_kl_k1 times the tokens of one.",
    "learner/mismatch_kl": "KL (k3) from who drew the completions to the learner's policy of the same weights, "
    "in nats, mean over tokens; where vLLM generates, in updates of one step, in others with max_age above 0.",
    "learner/accuracy": "Share of this iteration's pairs in which the chosen answer wins.",
    "learner/kl_coef": "Weight of the KL penalty in this iteration's rewards.",
    "time/generate_s": "Drawing completions.",
    "time/score_s": "Scoring completions.",
    "time/logp_s": "Log-probabilities of the policy and the reference, and values, before the update.",
    "time/train_s": "Computing gradients and stepping the optimizer.",
    "time/sync_s": "Bringing weights to the token runners, or to the vLLM server.",
    "evaluation/truncated_fraction": "The same share of the evaluation's completions.",
    "evaluation/loss": "Loss on the evaluation's examples, in supervised training.",
    "evaluation/accuracy": "Share of the evaluation's pairs in which the chosen answer wins.",
}
"""Metrics of runs on text, beside those above that they have, too."""


SUPERVISED_FIGURES = {
    "loss": "learner/loss",
    "accuracy": "learner/accuracy",
    "eval return": "evaluation/episode_return_mean",
    "eval accuracy": "evaluation/accuracy",
    "eval loss": "evaluation/loss",
}
"""What tells how well a run learns from rows, which has no episodes; word -> metric."""


def supervised_figures(metrics: Metrics) -> dict[str, str]:
    """Return those of SUPERVISED_FIGURES that these metrics have, word -> number as it is shown."""
    found = {word: metrics.get(name) for word, name in SUPERVISED_FIGURES.items()}
    return {word: significant(value) for word, value in found.items() if value is not None}


def significant(value: float) -> str:
    """Return a number with three digits or more: 0.00713, 9.50, 1,234.5."""
    return format(value, ",.1f" if abs(value) >= 10 else "#.3g")


def mean_metrics(rows: Sequence[Metrics]) -> Metrics:
    """Return the mean of every metric over the rows that have it."""
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: fmean(value for row in rows if (value := row.get(name)) is not None) for name in names}


COUNTERS = (
    "iteration",
    "env_steps",
    "dropped_env_steps",
    "episodes",
    "env_failures",
    "runner_restarts",
    "learner_restarts",
)
"""Attributes of an Algorithm that every row of metrics and every checkpoint holds."""


class EpisodeWindow:
    """Returns and lengths of the last `size` episodes."""

    def __init__(self, size: int) -> None:
        self.returns: deque[float] = deque(maxlen=size)
        self.lengths: deque[int] = deque(maxlen=size)

    def add(self, episodes: list[tuple[float, int]]) -> None:
        """Append finished episodes as (return, length), oldest first."""
        for return_, length in episodes:
            self.returns.append(float(return_))
            self.lengths.append(int(length))

    @property
    def is_full(self) -> bool:
        """Whether the window holds as many episodes as it can."""
        return len(self.returns) == self.returns.maxlen

    def summary(self) -> Metrics:
        """Return the episode metrics of the window."""
        count = len(self.returns)
        return {
            "episode_return_mean": sum(self.returns) / count if count else None,
            "episode_return_min": min(self.returns) if count else None,
            "episode_return_max": max(self.returns) if count else None,
            "episode_length_mean": sum(self.lengths) / count if count else None,
        }

    def get_state(self) -> dict[str, list[float]]:
        """Return the window's contents."""
        return {"returns": list(self.returns), "lengths": list(self.lengths)}

    def set_state(self, state: Mapping[str, list[float]]) -> None:
        """Continue from `get_state`."""
        self.returns.clear()
        self.lengths.clear()
        self.add([(return_, int(length)) for return_, length in zip(state["returns"], state["lengths"], strict=True)])


class Clock:
    """Adds up where the seconds of one iteration went."""

    PARTS = ("env_s", "inference_s", "learn_s", "transfer_s", "wait_s")

    def __init__(self, parts: Sequence[str] = PARTS) -> None:
        self.started = time.perf_counter()
        self.seconds: dict[str, float] = dict.fromkeys(parts, 0.0)

    def add(self, **seconds: float) -> None:
        """Add seconds to parts, e.g. `add(env_s=0.2)`."""
        for part, value in seconds.items():
            self.seconds[part] += value

    @contextmanager
    def measure(self, part: str) -> Iterator[None]:
        """Add the wall time of the block to `part`."""
        started = time.perf_counter()
        yield
        self.seconds[part] += time.perf_counter() - started

    def summary(self) -> Metrics:
        """Return the time metrics of the iteration that began with this clock."""
        total = time.perf_counter() - self.started
        parts = {f"time/{part}": seconds for part, seconds in self.seconds.items()}
        return {"time/iteration_s": total, **parts, "time/other_s": max(0.0, total - sum(self.seconds.values()))}


class JsonlWriter:
    """Appends one JSON object a line to a file; every line reaches the file as one write."""

    def __init__(self, file: Path) -> None:
        # Without a buffer: on a full disk it would keep the line and fail once more in close().
        self.stream = open(file, "ab", buffering=0)  # noqa: SIM115 - lives as long as the run

    def write(self, metrics: Mapping[str, Any]) -> None:
        """Append one row."""
        line = json.dumps(metrics).encode() + b"\n"
        if self.stream.write(line) != len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), self.stream.name)

    def close(self) -> None:
        """Close the file."""
        self.stream.close()


class TensorBoardWriter:
    """Writes the same metrics as TensorBoard scalars over env_steps."""

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise MissingExtra(
                "reporting.tensorboard needs the tensorboard package: pip install 'rlx[tensorboard]'."
            ) from error
        self.writer = SummaryWriter(str(folder))

    def write(self, metrics: Metrics) -> None:
        """Write every metric that has a value."""
        for name, value in metrics.items():
            if value is not None:
                self.writer.add_scalar(name, value, metrics["env_steps"])

    def close(self) -> None:
        """Flush and close the event file."""
        self.writer.close()


def read_metrics(file: Path) -> list[dict[str, Any]]:
    """Return the rows of a metrics.jsonl; a last line torn by a crash is left out."""
    rows = []
    lines = file.read_text(errors="replace").splitlines()
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
        except ValueError:
            if number < len(lines):
                raise CheckpointError(
                    f"{file}:{number} is no JSON; delete that line, or move the file away to go on without its history."
                ) from None
    return rows
