"""PPO on language models, the R of RLHF (Ziegler et al. 2019, arXiv:1909.08593; Ouyang et al. 2022, arXiv:2203.02155).

One iteration: the token runners complete the prompts, the reward scores each completion at its last token, every token
pays for leaving the reference, advantages are estimated per token (GAE) and standardised over all of them, and the
learners make several epochs of clipped steps on policy and value function. `diff algorithms/grpo.py
algorithms/rlhf_ppo.py` shows what a value function is for.

A completion that was cut at generation.max_new_tokens ends there like any other: nobody knows what would have followed
(`bootstrap_truncated` takes the value function's word for it).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor

from rlx.errors import ConfigError
from rlx.functional import kl
from rlx.functional.advantages import token_gae
from rlx.functional.losses import clipped_squared_error, clipped_surrogate, squared_error
from rlx.functional.masking import explained_variance, standardize, weighted_sum
from rlx.metrics import Metrics
from rlx.policy_distance import old_policy
from rlx.settings import Schedule
from rlx.text_algorithm import TextAlgorithm
from rlx.text_sections import RolloutTrainingSection
from rlx.text_settings import TextConfig
from rlx.trajectory import Batch


class RLHFPPOTraining(RolloutTrainingSection):
    """Hyper-parameters of PPO on language models."""

    gamma: float = Field(1.0, ge=0, le=1)
    """Discount of a reward one token later."""
    lambda_: float = Field(0.95, ge=0, le=1)
    """GAE's lambda: 0 trusts the value function alone, 1 the observed scores alone."""
    epochs: PositiveInt = 2
    """Passes over each iteration's sequences."""
    clip_range: Annotated[Schedule, Field(ge=0)] = Schedule.constant(0.2)
    """The ratio new / old probability stays within [1 - clip_range, 1 + clip_range]; a number or a schedule."""
    value_coef: NonNegativeFloat = 0.5
    """Weight of the squared value error in the loss."""
    value_clip: PositiveFloat | None = None
    """Largest change of a value that the value loss rewards; null turns value clipping off."""
    value_lr: Annotated[Schedule, Field(ge=0)] | None = None
    """Step size of what only the value function has: with model.value=separate its whole net, else its head. null: lr.
    A value function that begins as a language model has more to learn than the policy does."""
    value_warmup_iterations: NonNegativeInt = 0
    """First iterations, in which only the value function learns; with model.value=shared it moves the trunk, which the
    policy shares."""
    entropy_coef: NonNegativeFloat = 0.0
    """Weight of the entropy bonus."""
    normalize_advantage: bool = True
    """Standardise advantages over all tokens of an iteration."""
    bootstrap_truncated: bool = False
    """Where a completion was cut, go on with the value of its last token; false: count it as the end."""
    kl_coef: NonNegativeFloat = 0.05
    """Weight of KL(policy || reference); where it adapts, its value at the start. 0 without kl_target: no reference."""
    kl_target: PositiveFloat | None = None
    """KL of a completion, in nats, that kl_coef is adapted to reach; null: it stays as it is."""
    kl_horizon: PositiveInt = 10_000
    """Completions over which the adaptive kl_coef may change by a fifth."""
    kl_in: Literal["reward", "loss"] = "reward"
    """Where the penalty is paid: by each token's reward, or as a term of the loss."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k1"
    """How it is estimated: see rlx.functional.kl. In the reward k1 is exact; in the loss k2 has the right gradient."""


class RLHFPPOConfig(TextConfig, training=RLHFPPOTraining):
    """Settings of a PPO run on text: `RLHFPPOConfig().model("runs/sft").prompts(...).reward(...).build()`."""

    @staticmethod
    def check(settings: Any) -> None:
        """Raise ConfigError where the KL term would do nothing."""
        if settings.training.kl_target is not None and not settings.training.kl_coef:
            raise ConfigError(
                f"training.kl_target={settings.training.kl_target} cannot be reached from training.kl_coef=0, which is "
                "adapted by factors; begin with a small one, such as 0.05, or set kl_target to null."
            )
        if settings.training.kl_in == "loss" and settings.training.kl_estimator == "k1":
            raise ConfigError(
                "training.kl_estimator=k1 has no gradient in the loss, on average; set it to k2 or k3, or "
                "training.kl_in=reward."
            )


class RLHFPPO(TextAlgorithm, config=RLHFPPOConfig):
    """Sample, pay for KL, estimate advantages, update, publish."""

    with_value: ClassVar[bool] = True

    def training_step(self) -> Metrics:
        """Make one iteration; return the learner's stats."""
        training: RLHFPPOTraining = self.training
        kl_coef = self.numbers.setdefault("kl_coef", training.kl_coef)
        names = ("ref_logp", "value") if self.needs_reference(training) else ("value",)
        batch = self.with_old_logp(self.with_columns(self.sample(), *names))

        reward = batch.reward
        if "ref_logp" in names and training.kl_in == "reward":
            penalty = getattr(kl, training.kl_estimator)(batch.logp, batch.ref_logp)
            reward = reward - kl_coef * penalty.masked_fill(~batch.mask, 0)
        advantage, return_ = self.advantages(batch, reward)
        variance = explained_variance(batch.value, return_, batch.mask).item()
        if training.normalize_advantage:
            advantage = standardize(advantage, batch.mask).masked_fill(~batch.mask, 0)

        is_warm = self.iteration >= training.value_warmup_iterations
        clip_range = training.clip_range.at(self.env_steps)
        lr = self.lr(training.lr)
        stats = self.update(
            Batch(**batch.tensors | {"advantage": advantage, "return_": return_}),
            lr=lr if is_warm or self.settings.model.value == "shared" else 0.0,
            value_lr=lr if training.value_lr is None else self.lr(training.value_lr),
            coefficients={"clip_range": clip_range, "kl_coef": kl_coef, "policy_coef": float(is_warm)},
        )
        self.publish()
        if training.kl_target is not None:
            self.numbers["kl_coef"] = self.next_kl_coef(batch, kl_coef)
        return stats | {"explained_variance": variance, "clip_range": clip_range, "kl_coef": kl_coef}

    def advantages(self, batch: Batch, reward: Tensor) -> tuple[Tensor, Tensor]:
        """Return advantages and value targets [S, L], 0 off the mask."""
        training: RLHFPPOTraining = self.training
        if training.bootstrap_truncated:  # by the value before the last token: that after it was never computed
            reward = reward + training.gamma * batch.value * batch.truncated
        return token_gae(reward, batch.value, batch.mask, training.gamma, training.lambda_)

    def next_kl_coef(self, batch: Batch, kl_coef: float) -> float:
        """Return the coefficient that brings the KL of a completion nearer to kl_target."""
        training: RLHFPPOTraining = self.training
        sequences = int(batch.mask.any(1).sum())
        total = kl.k1(batch.logp, batch.ref_logp).masked_fill(~batch.mask, 0).sum().item()
        mean = total / max(1, sequences)
        return kl.next_kl_coef(kl_coef, mean, training.kl_target or 1.0, sequences, training.kl_horizon)

    @staticmethod
    def needs_reference(training: Any) -> bool:
        """Return whether there is a KL to measure."""
        return training.kl_coef > 0 or training.kl_target is not None

    @staticmethod
    def loss(
        policy: Any, minibatch: Batch, coefficients: Mapping[str, Any], training: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return PPO's loss and stats; every mean is a sum weighted by `minibatch.weight`."""
        clip_range, weight = coefficients["clip_range"], minibatch.weight
        new_logp, entropy, value = policy.evaluate(minibatch)
        old_logp, importance = old_policy(new_logp, minibatch, training)
        ratio = (new_logp - old_logp).exp()
        policy_loss = weighted_sum(importance * clipped_surrogate(ratio, minibatch.advantage, clip_range), weight)
        if training.value_clip is None:
            value_error = squared_error(value, minibatch.return_)
        else:
            value_error = clipped_squared_error(value, minibatch.return_, minibatch.value, training.value_clip)
        value_loss = weighted_sum(value_error, weight)
        of_policy = policy_loss
        mean_entropy = weighted_sum(entropy, weight)
        stats = {
            "policy_loss": policy_loss.detach(),
            "value_loss": value_loss.detach(),
            "entropy": mean_entropy.detach(),
        }
        if training.kl_in == "loss" and "ref_logp" in minibatch.tensors:
            penalty = getattr(kl, training.kl_estimator)(new_logp, minibatch.ref_logp)
            of_policy = of_policy + coefficients["kl_coef"] * weighted_sum(penalty, weight)
        if training.entropy_coef:
            of_policy = of_policy - training.entropy_coef * mean_entropy
        with torch.no_grad():
            stats["kl"] = weighted_sum(kl.k3(minibatch.logp, new_logp), weight)
            stats["clip_fraction"] = weighted_sum(((ratio - 1).abs() > clip_range).to(weight), weight)
        return coefficients["policy_coef"] * of_policy + training.value_coef * value_loss, stats
