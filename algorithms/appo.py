"""APPO (Petrenko et al. 2020, arXiv:2006.11751) on gymnasium environments: PPO's clipped loss on what has arrived.

Fragments arrive as in impala.py, and V-trace corrects advantages and targets, once for every update, by the policy that
learns. What it may then change is clipped as in ppo.py: around the policy that acted, or with `target_update_interval`
around a target policy, a copy of the learners' own that is some updates old and also gives V-trace its values (Luo et
al. 2020, "IMPACT", arXiv:1912.00167). Each batch may be learned from again, out of a circular replay.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor

from rlx.algorithm import Algorithm
from rlx.algorithms.impala import FIELDS, fragments_per_batch  # pyright: ignore[reportMissingImports]
from rlx.config import AlgorithmConfig
from rlx.errors import ConfigError
from rlx.functional.advantages import next_values, vtrace
from rlx.functional.kl import k3
from rlx.functional.losses import clipped_surrogate, squared_error
from rlx.functional.masking import standardize, weighted_sum
from rlx.learner.gradient import with_derivatives
from rlx.learner.replay import CircularReplay
from rlx.metrics import Metrics, mean_metrics
from rlx.settings import Schedule, Settings, TrainingSection
from rlx.trajectory import Batch


class APPOTraining(TrainingSection):
    """Hyper-parameters of APPO."""

    batch_size: PositiveInt | None = None
    """Samples in one update: a multiple of a fragment's num_envs_per_env_runner x rollout_fragment_length; null: one
    fragment for every env runner."""
    updates_per_iteration: PositiveInt = 20
    """Updates between two rows of metrics, each with the newest weights published after it."""
    updates_per_batch: PositiveInt = 1
    """Updates for each batch that arrives: the first on it, the others on any of the newest replay_size ones."""
    replay_size: PositiveInt = 4
    """Batches kept for it; the oldest makes room for the next, and what is older than max_age is dropped."""
    epochs: PositiveInt = 1
    """Passes over the batch in one update."""
    minibatch_size: PositiveInt | None = None
    """Samples in one gradient step; null: the whole batch."""
    lambda_: float = Field(0.95, ge=0, le=1)
    """V-trace's lambda: 0 trusts the value function alone, 1 the corrected returns alone."""
    rho_clip: PositiveFloat = 1.0
    """Largest importance weight of a step's error; which value function is learned depends on it."""
    c_clip: PositiveFloat = 1.0
    """Largest importance weight with which later errors reach back; the speed of convergence depends on it."""
    clip_range: Annotated[Schedule, Field(ge=0)] = Schedule.constant(0.2)
    """The ratio new / old probability stays within [1 - clip_range, 1 + clip_range]; a number or a schedule."""
    target_update_interval: PositiveInt | None = None
    """Updates between copies of the policy to the target, which is then the old one in ratio and KL; null: the policy
    that acted is."""
    kl_coef: NonNegativeFloat = 0.0
    """Weight in the loss of KL(old || new), old as in the ratio."""
    value_coef: NonNegativeFloat = 0.5
    """Weight of the squared value error in the loss."""
    entropy_coef: NonNegativeFloat = 0.01
    """Weight of the entropy bonus."""
    normalize_advantage: bool = True
    """Standardise advantages over the batch."""
    max_age: int = Field(default=8, ge=0)
    """How many updates a sample may be old when it is learned from; runners are held back for it, and what is older
    all the same is dropped. 1: runners and learners at the same time, in step and reproducible; 0, and without
    env_runners.num_env_runners: they take turns."""


class APPOConfig(AlgorithmConfig, training=APPOTraining):
    """Settings of an APPO run: `APPOConfig().environment("CartPole-v1").env_runners(num_env_runners=2).build()`."""

    @staticmethod
    def check(settings: Settings) -> None:
        """Raise ConfigError where sizes do not fit."""
        fragments_per_batch(settings)
        training: Any = settings.training
        if training.updates_per_batch > max(1, training.max_age):
            raise ConfigError(
                f"training.updates_per_batch={training.updates_per_batch} has batches wait for longer than "
                f"training.max_age={training.max_age} allows; set max_age to {training.updates_per_batch} or more."
            )


def loss_derivatives(
    new_logp: np.ndarray,
    entropy: np.ndarray,
    value: np.ndarray,
    minibatch: Any,
    coefficients: Mapping[str, float],
    training: APPOTraining,
) -> tuple[tuple[np.ndarray, np.ndarray, np.ndarray], dict[str, float]]:
    """Return the derivatives of `APPO.loss` by new_logp, entropy and value, all [N], and its stats; see ppo.py."""
    clip_range, weight = coefficients["clip_range"], minibatch.weight
    log_ratio = new_logp - minibatch.old_logp
    ratio = np.exp(log_ratio)
    surrogate = ratio * minibatch.advantage
    bound = minibatch.advantage + clip_range * np.abs(minibatch.advantage)
    error = value - minibatch.return_
    stats = {
        "policy_loss": -float(np.vdot(np.minimum(surrogate, bound), weight)),
        "value_loss": float(np.vdot(error * error, weight)),
        "entropy": float(np.vdot(entropy, weight)),
        "kl": float(np.vdot(ratio - 1 - log_ratio, weight)),
        "clip_fraction": float(np.vdot(np.abs(ratio - 1) > clip_range, weight)),
    }
    loss = stats["policy_loss"] + training.value_coef * stats["value_loss"] - training.entropy_coef * stats["entropy"]
    by_new_logp = (training.kl_coef * (ratio - 1) - surrogate * (surrogate <= bound)) * weight
    derivatives = by_new_logp, -training.entropy_coef * weight, 2 * training.value_coef * error * weight
    return derivatives, {"loss": loss + training.kl_coef * stats["kl"]} | stats


class APPO(Algorithm, config=APPOConfig):
    """Take what has arrived, update with it and with what is left of the last ones, publish."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._replay = CircularReplay(self.training.replay_size)

    def training_step(self) -> Metrics:
        """Make `updates_per_iteration` updates; return the learner's stats."""
        training: APPOTraining = self.training
        each = training.updates_per_batch
        history = []
        for t in self.arrivals(-(-training.updates_per_iteration // each), fragments_per_batch(self.settings), each):
            # The last of these updates sees the replay at its oldest.
            self._replay.drop_before(self.learners.version + each - 1 - training.max_age)
            rng = np.random.default_rng(self.seed("replay"))
            for batch in self._replay.draws(t.fragments(*FIELDS), each, rng):
                lr, clip_range = training.lr.at(self.env_steps), training.clip_range.at(self.env_steps)
                stats = self.update(
                    batch,
                    epochs=training.epochs,
                    minibatch_size=training.minibatch_size or t.mask.numel(),
                    lr=lr,
                    coefficients={"clip_range": clip_range},
                )
                self.publish()
                history.append(stats | {"lr": lr, "clip_range": clip_range})
        return mean_metrics(history)

    @staticmethod
    def prepare(policy: Any, batch: Batch, training: APPOTraining) -> Batch:
        """Return the batch with V-trace's advantages and targets by `policy`, and `old_logp` for the ratio."""
        new_logp, _, value = policy.evaluate(batch)
        has_target = training.target_update_interval is not None
        t = batch.map(lambda field: field.transpose(0, 1))  # time-major, as V-trace takes it
        vs, advantage = vtrace(
            *(t.logp, new_logp.T, t.reward, value.T),
            next_values(value.T, t.next_value, t.terminated | t.truncated),
            *(t.terminated, t.truncated, training.gamma),
            lambda_=training.lambda_,
            rho_clip=training.rho_clip,
            c_clip=training.c_clip,
            pg_rho_clip=1.0 if has_target else None,  # the ratio new / acting has the whole weight in it
        )
        if training.normalize_advantage:
            advantage = standardize(advantage, t.mask)
        old_logp = new_logp if has_target else batch.logp
        return batch.evaluable("obs", "action", "mask", old_logp=old_logp, advantage=advantage.T, return_=vs.T)

    @staticmethod
    @with_derivatives(loss_derivatives)
    def loss(
        policy: Any, minibatch: Batch, coefficients: Mapping[str, Any], training: APPOTraining
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return APPO's loss and stats; every mean is a sum weighted by `minibatch.weight`."""
        clip_range = coefficients["clip_range"]
        new_logp, entropy, value = policy.evaluate(minibatch)
        ratio = (new_logp - minibatch.old_logp).exp()
        policy_loss = weighted_sum(clipped_surrogate(ratio, minibatch.advantage, clip_range), minibatch.weight)
        value_loss = weighted_sum(squared_error(value, minibatch.return_), minibatch.weight)
        entropy = weighted_sum(entropy, minibatch.weight)
        kl = weighted_sum(k3(minibatch.old_logp, new_logp), minibatch.weight)
        loss = policy_loss + training.value_coef * value_loss - training.entropy_coef * entropy + training.kl_coef * kl
        with torch.no_grad():
            stats = {
                "policy_loss": policy_loss.detach(),
                "value_loss": value_loss.detach(),
                "entropy": entropy.detach(),
                "kl": kl.detach(),
                "clip_fraction": weighted_sum(((ratio - 1).abs() > clip_range).float(), minibatch.weight),
            }
        return loss, stats
