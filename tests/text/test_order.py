"""The order of rows is a function of the position."""

import numpy as np
import pytest

from rlx.text.order import order


def test_every_epoch_holds_every_row_once_in_another_order():
    first, second = order(7, 0, 14, seed=3).reshape(2, 7)
    assert sorted(first) == sorted(second) == list(range(7))
    assert first.tolist() != second.tolist()


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("at", range(23))
def test_going_on_at_any_position_gives_what_an_undisturbed_run_gets(at, shuffle):
    whole = order(5, 0, 23, seed=1, shuffle=shuffle)
    parts = [order(5, 0, at, 1, shuffle), order(5, at, 23 - at, 1, shuffle)]
    assert np.concatenate(parts).tolist() == whole.tolist()


def test_without_shuffling_the_rows_come_as_they_stand():
    assert order(3, 2, 5, seed=9, shuffle=False).tolist() == [2, 0, 1, 2, 0]


def test_the_seed_decides_the_order():
    assert order(100, 0, 100, seed=1).tolist() != order(100, 0, 100, seed=2).tolist()
    assert order(100, 0, 100, seed=1).tolist() == order(100, 0, 100, seed=1).tolist()


def test_writing_into_an_order_does_not_change_the_next_one():
    rows = order(4, 0, 4, seed=0)
    expected = rows.tolist()
    rows[:] = 0
    assert order(4, 0, 4, seed=0).tolist() == expected


def test_without_rows_there_is_no_order():
    with pytest.raises(ValueError, match="no 1 rows from position 0 of 0"):
        order(0, 0, 1, seed=0)
