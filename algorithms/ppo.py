"""PPO with a clipped surrogate (Schulman et al. 2017, arXiv:1707.06347) on gymnasium environments.

One iteration: every env runner collects a fragment with the current weights, advantages are estimated once
(GAE) and standardised over the whole batch, and the learners make several epochs of minibatch steps on it.

Defaults follow the reference implementations (Huang et al. 2022, "The 37 implementation details of PPO"):
Adam with eps 1e-5, orthogonal init, global gradient norm 0.5. Advantages are standardised over the batch and
not over each minibatch, so that the result does not depend on how a batch is split. The value loss is the
plain squared error, without a factor 1/2.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor

from rlx.algorithm import Algorithm
from rlx.config import AlgorithmConfig
from rlx.errors import ConfigError
from rlx.functional.advantages import gae
from rlx.functional.kl import k3
from rlx.functional.losses import clipped_squared_error, clipped_surrogate, squared_error
from rlx.functional.masking import explained_variance, standardize, weighted_sum
from rlx.learner.gradient import with_derivatives
from rlx.metrics import Metrics
from rlx.settings import Schedule, Settings, TrainingSection
from rlx.trajectory import Batch


class PPOTraining(TrainingSection):
    """Hyper-parameters of PPO."""

    lambda_: float = Field(0.95, ge=0, le=1)
    """GAE's lambda: 0 trusts the value function alone, 1 the observed returns alone."""
    epochs: PositiveInt = 4
    """Passes over each batch."""
    minibatch_size: PositiveInt = 256
    """Samples in one gradient step; at most num_env_runners (auto: 1) x num_envs x rollout_fragment_length."""
    clip_range: Annotated[Schedule, Field(ge=0)] = Schedule.constant(0.2)
    """The ratio new / old probability stays within [1 - clip_range, 1 + clip_range]; a number or a schedule."""
    value_coef: NonNegativeFloat = 0.5
    """Weight of the squared value error in the loss."""
    value_clip: PositiveFloat | None = None
    """Largest change of a value that the value loss rewards; null turns value clipping off."""
    entropy_coef: NonNegativeFloat = 0.0
    """Weight of the entropy bonus."""
    normalize_advantage: bool = True
    """Standardise advantages over the batch."""
    max_age: int = Field(default=0, ge=0, le=1)
    """1: the env runners collect the next batch with the last weights while the learners are at work, which on two
    cores takes the time of the slower only; 0: they take turns."""
    target_kl: PositiveFloat | None = None
    """End an iteration's update before the first step whose minibatch has a KL above this, in nats; null never does."""


class PPOConfig(AlgorithmConfig, training=PPOTraining):
    """Settings of a PPO run: `PPOConfig().environment("CartPole-v1").training(lr=1e-3).build()`."""

    @staticmethod
    def check(settings: Settings) -> None:
        """Raise ConfigError where sizes do not fit."""
        training: Any = settings.training
        r, minibatch_size = settings.env_runners, training.minibatch_size
        batch = r.fewest * r.num_envs_per_env_runner * r.rollout_fragment_length
        if minibatch_size > batch:
            raise ConfigError(
                f"training.minibatch_size={minibatch_size} is larger than the batch of {batch} = "
                f"{r.fewest} env runners x {r.num_envs_per_env_runner} envs x "
                f"{r.rollout_fragment_length} steps; set it to {batch} or less."
            )
        if training.max_age and not r.num_env_runners:
            raise ConfigError(
                "training.max_age=1 collects while the learners are at work, which the driver alone cannot do; set "
                "env_runners.num_env_runners to 1 or more."
            )
        row, length = "sample", 1
        if settings.model.memory != "none":
            length = min(settings.model.sequence_length, r.rollout_fragment_length)
            row = f"sequence of {length} steps"
        if minibatch_size < length:
            raise ConfigError(
                f"training.minibatch_size={minibatch_size} is less than a {row}; set it to {length} or more, or "
                f"model.sequence_length to {minibatch_size} or less."
            )
        if settings.learners.num_learners > minibatch_size // length:
            raise ConfigError(
                f"learners.num_learners={settings.learners.num_learners} leaves some learners without a {row} of a "
                f"minibatch of {minibatch_size}; set it to {minibatch_size // length} or less."
            )


def loss_derivatives(
    new_logp: np.ndarray,
    entropy: np.ndarray,
    value: np.ndarray,
    minibatch: Any,
    coefficients: Mapping[str, float],
    training: PPOTraining,
) -> tuple[tuple[np.ndarray, np.ndarray, np.ndarray], dict[str, float]]:
    """Return the derivatives of `PPO.loss` by new_logp, entropy and value, each in its shape, and its stats.

    The same formulas, differentiated by hand for small networks, whose updates take half the time with it. Whoever
    changes the loss may simply delete the decorator that names this function; forgetting it is an error at the start.
    """
    clip_range, weight = coefficients["clip_range"], minibatch.weight
    log_ratio = new_logp - minibatch.logp
    ratio = np.exp(log_ratio)
    surrogate = ratio * minibatch.advantage
    bound = minibatch.advantage + clip_range * np.abs(minibatch.advantage)
    error = value - minibatch.return_
    value_error, d_value_error = error * error, 2 * error
    if training.value_clip is not None:
        change = value - minibatch.value
        near = minibatch.value + np.clip(change, -training.value_clip, training.value_clip) - minibatch.return_
        moves = np.abs(change) < training.value_clip
        d_value_error = np.where(near * near > value_error, 2 * near * moves, d_value_error)
        value_error = np.maximum(value_error, near * near)
    stats = {
        "policy_loss": -float(np.vdot(np.minimum(surrogate, bound), weight)),
        "value_loss": float(np.vdot(value_error, weight)),
        "entropy": float(np.vdot(entropy, weight)),
        "kl": float(np.vdot(ratio - 1 - log_ratio, weight)),
        "clip_fraction": float(np.vdot(np.abs(ratio - 1) > clip_range, weight)),
    }
    loss = stats["policy_loss"] + training.value_coef * stats["value_loss"] - training.entropy_coef * stats["entropy"]
    by_new_logp = -(surrogate * (surrogate <= bound)) * weight  # d ratio / d new_logp = ratio
    by_entropy = -training.entropy_coef * weight
    by_value = training.value_coef * d_value_error * weight
    return (by_new_logp, by_entropy, by_value), {"loss": loss} | stats


class PPO(Algorithm, config=PPOConfig):
    """Sample, estimate advantages, update, publish."""

    def training_step(self) -> Metrics:
        """Make one iteration; return the learner's stats."""
        training: PPOTraining = self.training
        lr, clip_range = training.lr.at(self.env_steps), training.clip_range.at(self.env_steps)

        t = self.sample().tensors()
        advantage, return_ = gae(
            t.reward, t.value, t.next_value, t.terminated, t.truncated, training.gamma, training.lambda_
        )
        if training.normalize_advantage:
            advantage = standardize(advantage, t.mask)
        batch = t.rows(
            "obs", "action", "logp", "value", "mask", "weights_version", advantage=advantage, return_=return_
        )
        stats = self.update(
            batch,
            epochs=training.epochs,
            minibatch_size=training.minibatch_size,
            lr=lr,
            coefficients={"clip_range": clip_range},
            target_kl=training.target_kl,
        )
        self.publish()
        return stats | {
            "explained_variance": explained_variance(t.value, return_, t.mask).item(),
            "lr": lr,
            "clip_range": clip_range,
        }

    @staticmethod
    @with_derivatives(loss_derivatives)
    def loss(
        policy: Any, minibatch: Batch, coefficients: Mapping[str, Any], training: PPOTraining
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return PPO's loss (eq. 9) and stats; every mean is a sum weighted by `minibatch.weight`."""
        clip_range = coefficients["clip_range"]
        new_logp, entropy, value = policy.evaluate(minibatch)
        ratio = (new_logp - minibatch.logp).exp()
        policy_loss = weighted_sum(clipped_surrogate(ratio, minibatch.advantage, clip_range), minibatch.weight)
        if training.value_clip is None:
            value_error = squared_error(value, minibatch.return_)
        else:
            value_error = clipped_squared_error(value, minibatch.return_, minibatch.value, training.value_clip)
        value_loss = weighted_sum(value_error, minibatch.weight)
        entropy = weighted_sum(entropy, minibatch.weight)
        total = policy_loss.add(value_loss, alpha=training.value_coef).sub(entropy, alpha=training.entropy_coef)
        with torch.no_grad():
            stats = {
                "policy_loss": policy_loss.detach(),
                "value_loss": value_loss.detach(),
                "entropy": entropy.detach(),
                "kl": weighted_sum(k3(minibatch.logp, new_logp), minibatch.weight),
                "clip_fraction": weighted_sum(((ratio - 1).abs() > clip_range).float(), minibatch.weight),
            }
        return total, stats
