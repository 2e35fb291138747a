"""Rows that begin alike, as the samples of one prompt do, in one row that holds their common beginning once."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from rlx.nets.ragged import parts_by_length

SOFTMAX_COST = 4
"""Multiply-adds that a pair of query and key costs, in units of its products: the softmax, forwards and backwards."""


class SharedRows(NamedTuple):
    """G rows of W places: the beginning that some rows have in common, then the rest of one after the other."""

    tokens: Tensor
    """[G, W] int64."""
    position: Tensor
    """[G, W] int64: where a token stood in its own row."""
    segment: Tensor
    """[G, W] int64: 0 of the common beginning, 1, 2, ... of the rests, -1 where there is nothing."""
    place: Tensor
    """[S, L] int64: where a position of the rows went, in the flattened [G * W]."""


def groups_of(obs: Tensor, prefix: Tensor) -> list[list[int]]:
    """Return the row numbers of obs [S, L] in groups whose first prefix [S] tokens are the same."""
    tokens, lengths = obs.cpu().numpy(), prefix.tolist()
    groups: dict[bytes, list[int]] = {}
    for row, length in enumerate(lengths):
        groups.setdefault(tokens[row, :length].tobytes(), []).append(row)
    return list(groups.values())


def widths(groups: list[list[int]], prefix: Tensor, length: Tensor) -> list[int]:
    """Return how many places each group takes with its beginning held once."""
    begins, ends = prefix.tolist(), length.tolist()
    return [begins[rows[0]] + sum(max(0, ends[row] - begins[row]) for row in rows) for rows in groups]


def sharing_pays(width: list[int], length: Tensor, hidden: int, inner: int) -> bool:
    """Return whether the shared rows cost less: fewer tokens in the layers, but attention over all of a group.

    A token takes 4 hidden^2 + 3 hidden * inner multiply-adds a layer, a pair of query and key 2 hidden, of which
    causal rows without a mask need half.
    """
    a_token, a_pair = 4 * hidden * hidden + 3 * hidden * inner, 2 * hidden * SOFTMAX_COST
    longest = int(length.max()) if len(length) else 0
    padded = len(length) * longest * (a_token + longest * a_pair / 2)
    shared = sum(wide * (a_token + wide * a_pair) for wide in width)
    return shared < 0.9 * padded


def parts_by_group(groups: list[list[int]], width: list[int], max_tokens: int) -> list[Tensor]:
    """Return row numbers in parts of whole groups, of at most `max_tokens` places with padding."""
    parts = parts_by_length(torch.tensor(width), max_tokens)
    return [torch.tensor([row for number in part.tolist() for row in groups[number]]) for part in parts]


def share(obs: Tensor, prefix: Tensor, length: Tensor, groups: list[list[int]]) -> SharedRows:
    """Return obs [S, L], of which the first length [S] count, with the first prefix [S] of each group held once."""
    count, longest = obs.shape
    begins = np.minimum(prefix.cpu().numpy(), length.cpu().numpy())
    ends = length.cpu().numpy()
    row_of, start, segment_of = (np.zeros(count, dtype=np.int64) for _ in range(3))
    width = 1
    for number, rows in enumerate(groups):
        end = begins[rows[0]]
        for segment, row in enumerate(rows, 1):
            row_of[row], start[row], segment_of[row] = number, end, segment
            end += ends[row] - begins[row]
        width = max(width, int(end))
    step = np.arange(longest)
    begin = begins[:, None]
    place = np.where(step < begin, step, start[:, None] + step - begin) + width * row_of[:, None]
    segment = np.where(step < begin, 0, segment_of[:, None])
    within = step < ends[:, None]
    place[~within] = 0
    filled = torch.from_numpy(place[within])

    def spread(values: Tensor, nothing: int) -> Tensor:
        flat = torch.full((len(groups) * width,), nothing)
        flat[filled] = values
        return flat.view(len(groups), width).to(obs.device)

    counted = torch.from_numpy(within)
    return SharedRows(
        spread(obs.cpu()[counted], 0),
        spread(torch.from_numpy(np.broadcast_to(step, place.shape)[within]), 0),
        spread(torch.from_numpy(segment[within]), -1),
        torch.from_numpy(place).to(obs.device),
    )
