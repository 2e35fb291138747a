"""The order in which rows are used: a function of the position alone, so a position is all that a resume needs."""

from __future__ import annotations

from functools import lru_cache

import numpy as np


def order(num_rows: int, position: int, count: int, seed: int, shuffle: bool = True) -> np.ndarray:
    """Return the rows [count] int64 that stand at `position` and after it.

    Position p is in epoch p // num_rows. Every epoch holds every row once, shuffled by (seed, epoch); without
    `shuffle` in the order of the file. Whoever used `count` of them goes on at position + count, in this process or
    in another one, and gets what an undisturbed run gets.
    """
    if num_rows < 1 or position < 0 or count < 0:
        raise ValueError(f"no {count} rows from position {position} of {num_rows}: there must be rows to go round.")
    epoch_N, place_N = np.divmod(np.arange(position, position + count, dtype=np.int64), num_rows)
    if not shuffle:
        return place_N
    rows_N = np.empty(count, np.int64)
    for epoch in np.unique(epoch_N):
        here_N = epoch_N == epoch
        rows_N[here_N] = _permutation(num_rows, seed, int(epoch))[place_N[here_N]]
    return rows_N


@lru_cache(maxsize=4)  # a batch crosses an epoch at most now and then, and training and evaluation take turns
def _permutation(num_rows: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(num_rows)
