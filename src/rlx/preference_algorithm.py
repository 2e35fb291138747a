"""PreferenceAlgorithm: a run of a language model that learns from pairs of answers, one chosen and one rejected."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from rlx.functional.aggregation import pair_weight
from rlx.metrics import Metrics
from rlx.text.examples import Pair, collate_pairs, load_pairs
from rlx.text_algorithm import TextAlgorithm
from rlx.trajectory import Batch


class PreferenceAlgorithm(TextAlgorithm):
    """Take the next pairs of `data`, update. Subclass it and write `loss`; batches are [P, 2, L], chosen first."""

    def training_step(self) -> Metrics:
        """Make one iteration; return the learner's stats."""
        return self.update(self.examples())

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
