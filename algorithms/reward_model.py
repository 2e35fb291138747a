"""A reward model from preferences (Ouyang et al. 2022, arXiv:2203.02155, eq. 1): the chosen answer shall score higher.

One iteration: the next pairs of `data`, one pass of steps on -log sigmoid(score of chosen - score of rejected). A score
is read at the last token of a sequence, which its length tells and no padding moves. What others see of it is
normalised to mean 0 and standard deviation 1 over the first rows of `data`, and so saved with every checkpoint.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from rlx.functional.aggregation import pair_weight
from rlx.functional.masking import weighted_sum
from rlx.functional.preference import pairwise_loss
from rlx.metrics import Metrics
from rlx.reward_models import build_reward_model
from rlx.text.examples import Pair, collate_pairs, load_pairs
from rlx.text_algorithm import TextAlgorithm
from rlx.text_settings import TextConfig, TextTrainingSection
from rlx.trajectory import Batch

REFERENCE_PAIRS = 256
"""Scores are normalised over so many pairs."""


class RewardModelTraining(TextTrainingSection):
    """Hyper-parameters of a reward model."""

    use_margin: bool = True
    """Where a row has a margin, the chosen answer shall win by that much."""


class RewardModelConfig(TextConfig, training=RewardModelTraining):
    """Settings of a reward model's run: `RewardModelConfig().model("runs/sft").data("pairs.jsonl").build()`."""

    reads: ClassVar[Literal["prompts", "data"]] = "data"


class RewardModelTrainer(TextAlgorithm, config=RewardModelConfig):
    """Take the next pairs, update."""

    def training_step(self) -> Metrics:
        """Make one iteration; return the learner's stats."""
        return self.update(self.examples())

    def policy_builder(self, vocabulary: int) -> Callable[[], Any]:
        """Return what makes the model that learners train."""
        s = self.settings
        return functools.partial(
            build_reward_model,
            s.model,
            vocabulary=vocabulary,
            seed=s.runtime.seed,
            layout=s.learners.layout,
            activation_checkpointing=s.learners.activation_checkpointing,
        )

    @staticmethod
    def weigh(mask: Tensor, training: Any, max_new_tokens: int) -> Tensor:
        """Return the weights [P] of a minibatch's pairs: of their mean."""
        return pair_weight(mask)

    @classmethod
    def load_rows(cls, source: Any, kwargs: Mapping[str, Any], settings: Any, tokenizer: Any) -> Sequence[Pair]:
        """Return the pairs of a source."""
        d = settings.data
        return load_pairs(source, tokenizer, max_tokens=d.max_tokens, too_long=d.when_too_long, kwargs=kwargs)

    @staticmethod
    def collate(rows: Sequence[Pair]) -> Batch:
        """Return the batch [P, 2, L] of these pairs."""
        return collate_pairs(rows)

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
                "accuracy": weighted_sum((chosen > rejected).float(), minibatch.weight),
                "score_margin": weighted_sum(chosen - rejected, minibatch.weight),
            }
        return loss, stats

    def finish(self) -> None:
        """A reward model is read from its checkpoints, by reward.model: there is nothing to export."""

    def _parts_state(self) -> dict[str, Any]:
        scores = self.learners.evaluate(self.collate(self.rows[:REFERENCE_PAIRS]), "score").score
        self.numbers = {"score_mean": scores.mean().item(), "score_std": max(scores.std().item(), 1e-6)}
        return super()._parts_state()
