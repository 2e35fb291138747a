"""IMPALA (Espeholt et al. 2018, arXiv:1802.01561) on gymnasium environments: nobody waits.

Env runners collect fragments one after another, with whatever weights are the newest when they begin. The learners
take the next few that are finished, make one step on them, and publish. What is learned from is therefore some updates
old; V-trace corrects for that in the targets of the value function and in the advantages.

Compare with ppo.py: `arrivals` in place of `sample`, and advantages that are estimated in the loss, where the policy
that learns is known, because they depend on how far it has moved from the one that acted.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor

from rlx.algorithm import Algorithm
from rlx.config import AlgorithmConfig
from rlx.errors import ConfigError
from rlx.functional.advantages import next_values, vtrace
from rlx.functional.kl import k3
from rlx.functional.losses import squared_error
from rlx.functional.masking import weighted_sum
from rlx.learner.gradient import with_derivatives
from rlx.metrics import Metrics, mean_metrics
from rlx.settings import Settings, TrainingSection
from rlx.trajectory import Batch

FIELDS = ("obs", "action", "logp", "next_value", "reward", "terminated", "truncated", "mask", "weights_version")
"""What V-trace needs of a fragment."""


class IMPALATraining(TrainingSection):
    """Hyper-parameters of IMPALA."""

    batch_size: PositiveInt | None = None
    """Samples in one update: a multiple of a fragment's num_envs_per_env_runner x rollout_fragment_length; null: one
    fragment for every env runner."""
    updates_per_iteration: PositiveInt = 20
    """Updates between two rows of metrics, each with the newest weights published after it."""
    lambda_: float = Field(1.0, ge=0, le=1)
    """V-trace's lambda: 0 trusts the value function alone, 1 the corrected returns alone."""
    rho_clip: PositiveFloat = 1.0
    """Largest importance weight of a step's error; which value function is learned depends on it."""
    c_clip: PositiveFloat = 1.0
    """Largest importance weight with which later errors reach back; the speed of convergence depends on it."""
    pg_rho_clip: PositiveFloat = 1.0
    """Largest importance weight in the policy gradient."""
    value_coef: NonNegativeFloat = 0.5
    """Weight of the squared value error in the loss."""
    entropy_coef: NonNegativeFloat = 0.01
    """Weight of the entropy bonus."""
    max_age: int = Field(default=8, ge=0)
    """How many updates a sample may be old when it is learned from; runners are held back for it, and what is older
    all the same is dropped. 1: runners and learners at the same time, in step and reproducible; 0, and without
    env_runners.num_env_runners: they take turns."""


class IMPALAConfig(AlgorithmConfig, training=IMPALATraining):
    """Settings of an IMPALA run: `IMPALAConfig().environment("CartPole-v1").env_runners(num_env_runners=2).build()`."""

    @staticmethod
    def check(settings: Settings) -> None:
        """Raise ConfigError where sizes do not fit."""
        fragments_per_batch(settings)


def fragments_per_batch(settings: Settings) -> int | None:
    """Return how many fragments make a batch, None: one for every runner; ConfigError where that is no whole number."""
    r, max_age = settings.env_runners, settings.training.max_age
    batch_size: int | None = settings.training.batch_size  # type: ignore[attr-defined]
    if batch_size is None:
        return None
    fragment = r.num_envs_per_env_runner * r.rollout_fragment_length
    if batch_size % fragment:
        raise ConfigError(
            f"training.batch_size={batch_size} is no multiple of a fragment's {fragment} samples = "
            f"{r.num_envs_per_env_runner} envs x {r.rollout_fragment_length} steps; set it to "
            f"{max(1, round(batch_size / fragment)) * fragment}."
        )
    in_step, varies = max_age <= 1 or r.num_env_runners == 0, r.num_env_runners == "auto"
    if in_step and (varies or batch_size != r.fewest * fragment):
        size = "null" if varies else f"{r.fewest} x {fragment} samples"
        raise ConfigError(
            f"training.batch_size={batch_size} has to be {size}, one fragment for every env runner, where they take "
            f"turns with the learners or keep in step: training.max_age is {max_age} and env_runners.num_env_runners "
            f"is {r.num_env_runners}."
        )
    return batch_size // fragment


def corrected(new_logp: Tensor, value: Tensor, minibatch: Batch, training: IMPALATraining) -> tuple[Tensor, Tensor]:
    """Return V-trace's targets and advantages by the policy of `new_logp` and `value`, all of sequences [S, T]."""
    value = value.detach()
    t = minibatch.map(lambda field: field.transpose(0, 1))  # time-major, as V-trace takes it
    vs, advantage = vtrace(
        *(t.logp, new_logp.T, t.reward, value.T),
        next_values(value.T, t.next_value, t.terminated | t.truncated),
        *(t.terminated, t.truncated, training.gamma),
        lambda_=training.lambda_,
        rho_clip=training.rho_clip,
        c_clip=training.c_clip,
        pg_rho_clip=training.pg_rho_clip,
    )
    return vs.T, advantage.T


def loss_derivatives(
    new_logp: np.ndarray,
    entropy: np.ndarray,
    value: np.ndarray,
    minibatch: Any,
    coefficients: Mapping[str, float],
    training: IMPALATraining,
) -> tuple[tuple[np.ndarray, np.ndarray, np.ndarray], dict[str, float]]:
    """Return the derivatives of `IMPALA.loss` by new_logp, entropy and value, all [S, T], and its stats; see ppo.py."""
    weight, log_ratio = minibatch.weight, new_logp - minibatch.logp
    tensors = torch.from_numpy(new_logp), torch.from_numpy(value), minibatch.map(torch.from_numpy)
    vs, advantage = (target.numpy() for target in corrected(*tensors, training))
    error = value - vs
    stats = {
        "policy_loss": -float(np.vdot(new_logp * advantage, weight)),
        "value_loss": float(np.vdot(error * error, weight)),
        "entropy": float(np.vdot(entropy, weight)),
        "kl": float(np.vdot(np.exp(log_ratio) - 1 - log_ratio, weight)),
        "rho_clip_fraction": float(np.vdot(log_ratio > 0, weight)),
    }
    loss = stats["policy_loss"] + training.value_coef * stats["value_loss"] - training.entropy_coef * stats["entropy"]
    derivatives = -advantage * weight, -training.entropy_coef * weight, 2 * training.value_coef * error * weight
    return derivatives, {"loss": loss} | stats


class IMPALA(Algorithm, config=IMPALAConfig):
    """Take what has arrived, update, publish."""

    def training_step(self) -> Metrics:
        """Make `updates_per_iteration` updates; return the learner's stats."""
        training: IMPALATraining = self.training
        history = []
        for t in self.arrivals(training.updates_per_iteration, fragments_per_batch(self.settings)):
            lr = training.lr.at(self.env_steps)
            batch = t.fragments(*FIELDS)
            stats = self.update(batch, epochs=1, minibatch_size=t.mask.numel(), lr=lr)
            self.publish()
            history.append(stats | {"lr": lr})
        return mean_metrics(history)

    @staticmethod
    @with_derivatives(loss_derivatives)
    def loss(
        policy: Any, minibatch: Batch, coefficients: Mapping[str, Any], training: IMPALATraining
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return IMPALA's loss and stats, of sequences [S, T]; every mean is a sum weighted by `minibatch.weight`."""
        new_logp, entropy, value = policy.evaluate(minibatch)
        vs, advantage = corrected(new_logp, value, minibatch, training)
        policy_loss = -weighted_sum(new_logp * advantage, minibatch.weight)
        value_loss = weighted_sum(squared_error(value, vs), minibatch.weight)
        entropy = weighted_sum(entropy, minibatch.weight)
        with torch.no_grad():
            stats = {
                "policy_loss": policy_loss.detach(),
                "value_loss": value_loss.detach(),
                "entropy": entropy.detach(),
                "kl": weighted_sum(k3(minibatch.logp, new_logp), minibatch.weight),
                "rho_clip_fraction": weighted_sum((new_logp - minibatch.logp > 0).float(), minibatch.weight),
            }
        return policy_loss + training.value_coef * value_loss - training.entropy_coef * entropy, stats
