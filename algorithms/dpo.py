"""DPO (Rafailov et al. 2023, arXiv:2305.18290) and IPO (Azar et al. 2023, arXiv:2310.12036): preferences without RL.

One iteration: the next pairs of `data`, the reference's log-probabilities of both answers, one pass of steps that widen
the gap between chosen and rejected, measured against the reference.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from pydantic import Field, PositiveFloat
from torch import Tensor

from rlx.functional.masking import weighted_sum
from rlx.functional.preference import dpo, ipo, log_ratio_margin, sequence_logp
from rlx.preference_algorithm import PreferenceAlgorithm
from rlx.text.examples import Pair
from rlx.text_sections import TextTrainingSection
from rlx.text_settings import TextConfig
from rlx.trajectory import Batch


class DPOTraining(TextTrainingSection):
    """Hyper-parameters of DPO and IPO."""

    objective: Literal["dpo", "ipo"] = "dpo"
    """dpo: a logistic loss of the margin; ipo: its squared distance from 1 / (2 beta), of mean log-probabilities a
    token, which overfits less."""
    beta: PositiveFloat = 0.1
    """How much leaving the reference costs: the KL coefficient of the equivalent reward maximisation."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """Share of pairs that are believed to be the wrong way round; with dpo."""


class DPOConfig(TextConfig, training=DPOTraining):
    """Settings of a DPO run: `DPOConfig().model("runs/sft").data("pairs.jsonl").build()`."""

    reads = "data"


class DPO(PreferenceAlgorithm, config=DPOConfig):
    """Take the next pairs, ask the reference, update."""

    def batch_of(self, rows: Sequence[Pair]) -> Batch:
        """Return the batch of these pairs, with the reference's log-probabilities."""
        return self.with_columns(self.collate(rows), "ref_logp")

    @staticmethod
    def needs_reference(training: Any) -> bool:
        """It always does."""
        return True

    @staticmethod
    def loss(
        policy: Any, minibatch: Batch, coefficients: Mapping[str, Any], training: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss and stats; every mean is a sum over pairs, weighted by `minibatch.weight` [P]."""
        new_logp, _, _ = policy.evaluate(minibatch, entropy=False)
        is_ipo = training.objective == "ipo"
        chosen, rejected = sequence_logp(new_logp, minibatch.mask, mean=is_ipo).unbind(1)
        ref_chosen, ref_rejected = sequence_logp(minibatch.ref_logp, minibatch.mask, mean=is_ipo).unbind(1)
        if is_ipo:
            losses = ipo(chosen, rejected, ref_chosen, ref_rejected, training.beta)
        else:
            losses = dpo(chosen, rejected, ref_chosen, ref_rejected, training.beta, training.label_smoothing)
        with torch.no_grad():
            margin = training.beta * log_ratio_margin(chosen, rejected, ref_chosen, ref_rejected)
            stats = {
                "accuracy": weighted_sum((margin > 0).to(minibatch.weight), minibatch.weight),
                "reward_margin": weighted_sum(margin, minibatch.weight),
                "chosen_logp": weighted_sum(chosen, minibatch.weight),
                "rejected_logp": weighted_sum(rejected, minibatch.weight),
            }
        return weighted_sum(losses, minibatch.weight), stats
