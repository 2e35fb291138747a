"""A reward model from preferences (Ouyang et al. 2022, arXiv:2203.02155, eq. 1): the chosen answer shall score higher.

One iteration: the next pairs of `data`, one pass of steps on -log sigmoid(score of chosen - score of rejected). A score
is read at the last token of a sequence, which its length tells and no padding moves. What others see of it is
normalised to mean 0 and standard deviation 1 over the first rows of `data`, and so saved with every checkpoint.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from rlx.functional.masking import weighted_sum
from rlx.functional.preference import pairwise_loss
from rlx.preference_algorithm import PreferenceAlgorithm
from rlx.reward_models import build_reward_model
from rlx.text_sections import TextTrainingSection
from rlx.text_settings import TextConfig, TextSettings
from rlx.trajectory import Batch

REFERENCE_PAIRS = 256
"""Scores are normalised over so many pairs."""


class RewardModelTraining(TextTrainingSection):
    """Hyper-parameters of a reward model."""

    use_margin: bool = True
    """Where a row has a margin, the chosen answer shall win by that much."""


class RewardModelConfig(TextConfig, training=RewardModelTraining):
    """Settings of a reward model's run: `RewardModelConfig().model("runs/sft").data("pairs.jsonl").build()`."""

    reads = "data"


class RewardModelTrainer(PreferenceAlgorithm, config=RewardModelConfig):
    """Take the next pairs, update."""

    @classmethod
    def policy_builder(cls, s: TextSettings, vocabulary: int) -> Callable[[], Any]:
        """Return what makes the model that learners train."""
        return functools.partial(
            build_reward_model,
            s.model,
            vocabulary=vocabulary,
            seed=s.runtime.seed,
            layout=s.learners.layout,
            activation_checkpointing=s.learners.activation_checkpointing,
            compile=s.learners.compile,
        )

    @staticmethod
    def loss(
        model: Any, minibatch: Batch, coefficients: Mapping[str, Any], training: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss and stats; every mean is a sum over pairs, weighted by `minibatch.weight` [P]."""
        chosen, rejected = model.evaluate(minibatch).unbind(1)
        margin = minibatch.margin if training.use_margin else 0.0
        loss = weighted_sum(pairwise_loss(chosen, rejected, margin), minibatch.weight)
        with torch.no_grad():
            stats = {
                "accuracy": weighted_sum((chosen > rejected).to(minibatch.weight), minibatch.weight),
                "score_margin": weighted_sum(chosen - rejected, minibatch.weight),
            }
        return loss, stats

    def finish(self) -> None:
        """A reward model is read from its checkpoints, by reward.model: there is nothing to export."""

    def _parts_state(self) -> dict[str, Any]:
        scores = self.learners.evaluate(self.collate(self.rows[:REFERENCE_PAIRS]), "score").score
        self.numbers = {"score_mean": scores.mean().item(), "score_std": max(scores.std().item(), 1e-6)}
        return super()._parts_state()
