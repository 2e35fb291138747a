"""Supervised fine-tuning: the mean log-probability of the examples' tokens is raised.

One iteration: the next rows of `data`, one pass of minibatch steps on them. What is learned of a row, its completion
and the EOS behind it, or all of it, is said in docs/language_models.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from rlx.functional.masking import weighted_sum
from rlx.metrics import Metrics
from rlx.text.examples import Example, collate, load_examples
from rlx.text_algorithm import TextAlgorithm
from rlx.text_sections import TextTrainingSection
from rlx.text_settings import TextConfig
from rlx.trajectory import Batch


class SFTConfig(TextConfig, training=TextTrainingSection):
    """Settings of a supervised run: `SFTConfig().model(config=...).data("examples.jsonl").build()`."""

    reads = "data"


class SFT(TextAlgorithm, config=SFTConfig):
    """Take the next examples, update."""

    def training_step(self) -> Metrics:
        """Make one iteration; return the learner's stats."""
        return self.update(self.examples())

    @classmethod
    def load_rows(cls, source: Any, kwargs: Mapping[str, Any], settings: Any, tokenizer: Any) -> Sequence[Example]:
        """Return the examples of a source."""
        d = settings.data
        return load_examples(
            source,
            tokenizer,
            train_prompt=d.train_on_prompt,
            max_tokens=d.max_tokens,
            too_long=d.when_too_long,
            kwargs=kwargs,
        )

    @staticmethod
    def collate(rows: Sequence[Example]) -> Batch:
        """Return the batch [S, L] of these examples."""
        return collate(rows)

    @staticmethod
    def loss(
        policy: Any, minibatch: Batch, coefficients: Mapping[str, Any], training: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the mean negative log-probability of a token, in nats."""
        new_logp, _, _ = policy.evaluate(minibatch, entropy=False)
        return -weighted_sum(new_logp, minibatch.weight), {}
