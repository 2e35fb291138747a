"""Which rows samples share, by hand, and that no row is lost, doubled or overwritten."""

import numpy as np

from rlx.generation.rows import regroup


def test_by_hand():
    """Row 0 parts into tokens 5 and 6, row 1 stays one, row 2 has ended, row 3 moves down into its place."""
    row_A, source, target = regroup(np.array([0, 0, 0, 1, 1, 3]), np.array([5, 6, 5, 9, 9, 5]), 10)
    assert row_A.tolist() == [0, 2, 0, 1, 1, 3]
    assert source.tolist() == [0] and target.tolist() == [2]
    row_A, source, target = regroup(np.array([3, 1, 1]), np.array([5, 9, 9]), 10)
    assert row_A.tolist() == [0, 1, 1]
    assert source.tolist() == [3] and target.tolist() == [0]


def test_nobody_is_left():
    assert [part.tolist() for part in regroup(*[np.zeros(0, np.int64)] * 2, 10)] == [[], [], []]


def test_rows_hold_what_their_samples_have_drawn():
    """100 samples of 12 prompts over 40 steps; a row is the text of its samples, and there is one row for each text."""
    rng = np.random.default_rng(0)
    row_A = np.sort(rng.integers(12, size=100))
    _, row_A = np.unique(row_A, return_inverse=True)
    text_A = [f"{row}:" for row in row_A]
    rows = [f"{row}:" for row in range(int(row_A.max()) + 1)] + [""] * 100
    for _ in range(40):
        token_A = rng.integers(3, size=len(row_A))
        going = rng.random(len(row_A)) > 0.05
        row_A, token_A = row_A[going], token_A[going]
        text_A = [text for text, goes in zip(text_A, going, strict=True) if goes]
        row_A, source, target = regroup(row_A, token_A, 3)
        assert set(source).isdisjoint(target)
        for old, new in zip(source, target, strict=True):
            rows[new] = rows[old]
        for row, token in {(int(row), int(token)) for row, token in zip(row_A, token_A, strict=True)}:
            rows[row] += str(token)
        text_A = [text + str(token) for text, token in zip(text_A, token_A, strict=True)]
        assert [rows[row] for row in row_A] == text_A
        assert len(set(text_A)) == len(set(row_A)) == (row_A.max() + 1 if len(row_A) else 0)
