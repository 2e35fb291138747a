"""GRPO (Shao et al. 2024, arXiv:2402.03300) and its kin: completions of one prompt are compared with each other.

One iteration: the token runners complete every prompt several times, the reward scores the completions, each one's
advantage is by how much it beats its group, and the learners make clipped steps on all of its tokens. There is no value
function. Every variant is a setting:

    GRPO          aggregation: sequence_mean
    Dr. GRPO      aggregation: constant, scale: none                                            (arXiv:2503.20783)
    DAPO          aggregation: token_mean, clip_range_high: 0.28, mask_truncated: true          (arXiv:2503.14476)
    RLOO          aggregation: sequence_sum, baseline: leave_one_out, scale: none               (arXiv:2402.14740)
    REINFORCE++   aggregation: token_mean, baseline: batch_mean, scale: batch_std               (arXiv:2501.03262)
    GSPO          aggregation: sequence_mean, ratio: sequence, clip_range: 3e-4, clip_range_high: 4e-4   (2507.18071)
    CISPO         aggregation: token_mean, objective: cispo, max_ratio: 5                       (arXiv:2506.13585)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat
from torch import Tensor

from rlx.errors import ConfigError
from rlx.functional import kl
from rlx.functional.aggregation import sequence_mean, sequence_sum, token_mean
from rlx.functional.groups import group_advantage, has_spread
from rlx.functional.losses import cispo, clipped_surrogate, sequence_ratio
from rlx.functional.masking import weighted_sum
from rlx.metrics import Metrics
from rlx.policy_distance import old_policy
from rlx.settings import Schedule
from rlx.text_algorithm import TextAlgorithm
from rlx.text_sections import RolloutTrainingSection
from rlx.text_settings import TextConfig
from rlx.trajectory import Batch


class GRPOTraining(RolloutTrainingSection):
    """Hyper-parameters of GRPO and its kin."""

    baseline: Literal["mean", "leave_one_out", "batch_mean", "none"] = "mean"
    """What a score is compared with: the group's mean, that of the others in it, the whole batch's, or nothing."""
    scale: Literal["group_std", "batch_std", "none"] = "group_std"
    """What the difference is divided by: the standard deviation of the group or of the batch, or nothing."""
    objective: Literal["clip", "cispo"] = "clip"
    """clip: PPO's clipped surrogate; cispo: the log-probability, weighted by the ratio, which max_ratio bounds."""
    ratio: Literal["token", "sequence"] = "token"
    """What is clipped: every token's ratio new / old, or the geometric mean over a completion (GSPO)."""
    clip_range: Annotated[Schedule, Field(ge=0)] = Schedule.constant(0.2)
    """The ratio stays within [1 - clip_range, 1 + clip_range]; a number or a schedule."""
    clip_range_high: PositiveFloat | None = None
    """The upper half of that range, where it differs: clip-higher; null: as clip_range."""
    max_ratio: PositiveFloat = 5.0
    """Largest weight of a token with objective cispo."""
    aggregation: Literal["token_mean", "sequence_mean", "sequence_sum", "constant"] = "token_mean"
    """How losses of tokens become one: the mean over all tokens; over each completion's and then over completions; the
    sum over each completion's; or that sum divided by generation.max_new_tokens."""
    mask_truncated: bool = False
    """Do not learn from completions that were cut at generation.max_new_tokens, or conversations that were."""
    drop_flat_groups: bool = False
    """Do not learn from groups whose completions all score alike: their advantages are 0, and so they count in no mean
    over tokens or completions either (DAPO)."""
    kl_coef: NonNegativeFloat = 0.0
    """Weight of KL(policy || reference); 0 needs no reference."""
    kl_in: Literal["loss", "score"] = "loss"
    """Where the penalty is paid: as a term of the loss, or by each completion's score, with its whole KL (RLOO)."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    """How that KL is estimated, see rlx.functional.kl: in the loss k3 is GRPO's, k2 has the right gradient, k1 none; in
    the score k1 is exact."""
    entropy_coef: NonNegativeFloat = 0.0
    """Weight of the entropy bonus."""


class GRPOConfig(TextConfig, training=GRPOTraining):
    """Settings of a GRPO run: `GRPOConfig().model("runs/sft").prompts("prompts.jsonl").reward(my_reward).build()`."""

    @staticmethod
    def check(settings: Any) -> None:
        """Raise ConfigError where groups are too small to be compared."""
        training, samples = settings.training, settings.prompts.samples_per_prompt
        if samples < 2 and (training.baseline in ("mean", "leave_one_out") or training.scale == "group_std"):
            raise ConfigError(
                f"prompts.samples_per_prompt={samples} leaves nothing to compare a completion with; set it to 2 or "
                "more, or training.baseline=batch_mean and training.scale=batch_std."
            )
        if training.kl_coef and training.kl_in == "loss" and training.kl_estimator == "k1":
            raise ConfigError(
                "training.kl_estimator=k1 has no gradient in the loss, on average; set it to k2 or k3, or "
                "training.kl_in=score."
            )


class GRPO(TextAlgorithm, config=GRPOConfig):
    """Sample, compare within groups, update, publish."""

    def training_step(self) -> Metrics:
        """Make one iteration; return the learner's stats."""
        training: GRPOTraining = self.training
        batch = self.with_old_logp(self.sample())
        if self.needs_reference(training):
            batch = self.with_columns(batch, "ref_logp")
        counts = batch.counts
        if training.mask_truncated:
            counts = counts & ~(batch.truncated & batch.mask).any(1)
        samples, score = self.settings.prompts.samples_per_prompt, batch.score
        if training.drop_flat_groups:
            counts = counts & has_spread(score, samples, counts)
        if self.needs_reference(training) and training.kl_in == "score":
            penalty = getattr(kl, training.kl_estimator)(batch.logp, batch.ref_logp)
            score = score - training.kl_coef * penalty.masked_fill(~batch.mask, 0).sum(1)
        advantage_S = group_advantage(
            score,
            samples,
            baseline=training.baseline,
            scale=training.scale,
            mask_S=counts,
        )
        rows = {"mask": batch.mask & counts[:, None], "advantage": advantage_S[:, None].expand(batch.mask.shape)}
        clip_range = training.clip_range.at(self.env_steps)
        stats = self.update(Batch(**batch.tensors | rows), coefficients={"clip_range": clip_range})
        self.publish()
        return stats | {"clip_range": clip_range}

    @staticmethod
    def needs_reference(training: Any) -> bool:
        """Return whether there is a KL to measure."""
        return training.kl_coef > 0

    @staticmethod
    def weigh(mask: Tensor, training: Any, max_new_tokens: int) -> Tensor:
        """Return the weights of a minibatch's tokens, as training.aggregation says."""
        if training.aggregation in ("token_mean", "sequence_mean"):
            return token_mean(mask) if training.aggregation == "token_mean" else sequence_mean(mask)
        return sequence_sum(mask, max_new_tokens if training.aggregation == "constant" else 1)

    @staticmethod
    def loss(
        policy: Any, minibatch: Batch, coefficients: Mapping[str, Any], training: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss and stats; every mean is a sum weighted by `minibatch.weight`."""
        low, weight = coefficients["clip_range"], minibatch.weight
        new_logp, entropy, _ = policy.evaluate(minibatch)
        old_logp, importance = old_policy(new_logp, minibatch, training)
        if training.ratio == "sequence":
            ratio = sequence_ratio(new_logp, old_logp, minibatch.mask)
        else:
            ratio = (new_logp - old_logp).exp()
        high = low if training.clip_range_high is None else training.clip_range_high
        if training.objective == "cispo":
            objective = cispo(new_logp, ratio, minibatch.advantage, training.max_ratio)
            outside = ratio > training.max_ratio
        else:
            objective = clipped_surrogate(ratio, minibatch.advantage, low, training.clip_range_high)
            outside = (ratio < 1 - low) | (ratio > 1 + high)
        policy_loss = weighted_sum(importance * objective, weight)
        total = policy_loss
        mean_entropy = weighted_sum(entropy, weight)
        stats = {"policy_loss": policy_loss.detach(), "entropy": mean_entropy.detach()}
        if training.kl_coef and training.kl_in == "loss":
            penalty = getattr(kl, training.kl_estimator)(new_logp, minibatch.ref_logp)
            total = total + training.kl_coef * weighted_sum(penalty, weight)
        if training.entropy_coef:
            total = total - training.entropy_coef * mean_entropy
        with torch.no_grad():
            stats["kl"] = weighted_sum(kl.k3(minibatch.logp, new_logp), weight)
            stats["clip_fraction"] = weighted_sum(outside.to(weight), weight)
        return total, stats
