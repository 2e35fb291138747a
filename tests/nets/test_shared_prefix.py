"""Rows that begin alike become one row, by hand."""

import torch

from rlx.nets.shared_prefix import groups_of, parts_by_group, share, sharing_pays, widths

OBS = torch.tensor([[7, 8, 1, 2], [5, 6, 3, 0], [7, 8, 4, 0], [7, 9, 4, 0]])
PREFIX, LENGTH = torch.tensor([2, 2, 2, 2]), torch.tensor([4, 3, 3, 2])


def test_rows_are_grouped_by_all_tokens_of_their_prefix():
    assert groups_of(OBS, PREFIX) == [[0, 2], [1], [3]]
    assert groups_of(OBS, torch.tensor([1, 2, 2, 1])) == [[0, 3], [1], [2]]
    assert widths([[0, 2], [1], [3]], PREFIX, LENGTH) == [2 + 2 + 1, 3, 2]


def test_a_group_holds_its_prefix_once_and_then_the_rest_of_each_row():
    rows = share(OBS, PREFIX, LENGTH, [[0, 2], [1], [3]])
    assert rows.tokens.tolist() == [[7, 8, 1, 2, 4], [5, 6, 3, 0, 0], [7, 9, 0, 0, 0]]
    assert rows.position.tolist() == [[0, 1, 2, 3, 2], [0, 1, 2, 0, 0], [0, 1, 0, 0, 0]]
    assert rows.segment.tolist() == [[0, 0, 1, 1, 2], [0, 0, 1, -1, -1], [0, 0, -1, -1, -1]]
    place = rows.place.tolist()
    assert place[0] == [0, 1, 2, 3] and place[2][:3] == [0, 1, 4]
    assert place[1][:3] == [5, 6, 7] and place[3][:2] == [10, 11]


def test_groups_stay_together_when_rows_are_cut_into_parts():
    parts = parts_by_group([[0, 2], [1], [3]], [5, 3, 2], 6)
    assert [part.tolist() for part in parts] == [[3, 1], [0, 2]]


def test_sharing_pays_for_short_completions_alone():
    """8 samples of a prompt of 6 tokens at hidden size 128: with 5 more tokens each, and with 63."""
    for rest, pays in ((5, True), (63, False)):
        length = torch.full((8,), 6 + rest)
        assert sharing_pays([6 + 8 * rest], length, hidden=128, inner=384) is pays
    assert not sharing_pays([11] * 8, torch.full((8,), 11), hidden=128, inner=384)
