"""CircularReplay: the newest batches, each of which is learned from a few times (Luo et al. 2020, arXiv:1912.00167)."""

from __future__ import annotations

import numpy as np

from rlx.trajectory import Batch


class CircularReplay:
    """Keeps the `capacity` newest batches and gives each of them away at most `uses` times."""

    def __init__(self, capacity: int, uses: int) -> None:
        self._capacity, self._uses = capacity, uses
        self._entries: list[tuple[Batch, int]] = []  # and how often it has been used; oldest first

    def add(self, batch: Batch) -> None:
        """Take a new batch in the place of the oldest, where there is no room for both."""
        self._entries = [*self._entries, (batch, 0)][-self._capacity :]

    def drop_before(self, version: int) -> None:
        """Drop the batches whose newest sample was collected by weights older than `version`."""
        self._entries = [entry for entry in self._entries if int(entry[0].weights_version.max()) >= version]

    def draw(self, rng: np.random.Generator) -> Batch | None:
        """Return one of the batches, each as likely; None where none is left."""
        if not self._entries:
            return None
        index = int(rng.integers(len(self._entries)))
        batch, used = self._entries.pop(index)
        if used + 1 < self._uses:
            self._entries.insert(index, (batch, used + 1))
        return batch
