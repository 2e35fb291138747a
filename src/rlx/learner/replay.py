"""CircularReplay: the newest batches, to be learned from again (Luo et al. 2020, arXiv:1912.00167)."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

import numpy as np

from rlx.trajectory import Batch


class CircularReplay:
    """Keeps the `capacity` newest batches."""

    def __init__(self, capacity: int) -> None:
        self._batches: deque[Batch] = deque(maxlen=capacity)

    def draws(self, new: Batch, count: int, rng: np.random.Generator) -> Iterator[Batch]:
        """Take a new batch, in the place of the oldest; yield it, and then `count` - 1 times any of those kept."""
        self._batches.append(new)
        yield new
        for _ in range(count - 1):
            yield self._batches[rng.integers(len(self._batches))]

    def drop_before(self, version: int) -> None:
        """Drop the batches that were collected by weights older than `version` altogether."""
        kept = [batch for batch in self._batches if int(batch.weights_version.max()) >= version]
        self._batches = deque(kept, self._batches.maxlen)
