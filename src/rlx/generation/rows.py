"""Which slot each sample reads. Samples of a prompt share one for as long as they have drawn the same tokens."""

import numpy as np


def regroup(row_A: np.ndarray, token_A: np.ndarray, vocabulary: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Give samples that drew different tokens different rows, with no row in between unused.

    row_A: the row that each sample drew from, int64 [A]. token_A: what it drew, int64 [A], below `vocabulary`.
    Samples that ended are left out, so that rows which nobody continues are used again.
    Returns the new row of each sample [A]; and the rows that must be copied, their sources and targets: no row is in
    both. Rows are moved only where they must be.
    """
    branch, branch_A = np.unique(row_A * vocabulary + token_A, return_inverse=True)
    source = branch // vocabulary
    count = len(source)
    first_of_its_row = np.ones(count, bool)
    first_of_its_row[1:] = source[1:] != source[:-1]
    stays = first_of_its_row & (source < count)
    taken = np.zeros(count, bool)
    taken[source[stays]] = True
    target = source.copy()
    target[~stays] = np.flatnonzero(~taken)
    return target[branch_A], source[~stays], target[~stays]
