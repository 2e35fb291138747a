"""Rows of unlike length in parts of like length."""

from __future__ import annotations

import torch
from torch import Tensor


def parts_by_length(length: Tensor, max_tokens: int, packs: bool = False) -> list[Tensor]:
    """Return row numbers in parts of at most `max_tokens` tokens, rows sorted by length; a longer row is alone.

    length [S], or [P, 2] of pairs, which stay together. Tokens are counted with the padding up to the longest row of
    a part, or where rows are packed without it.
    """
    if not len(length):
        return []
    of_rows = length.reshape(len(length), -1)
    order = of_rows.amax(1).argsort(stable=True)
    padded = (of_rows.amax(1) * of_rows.shape[1])[order].tolist()
    packed = of_rows.sum(1)[order].tolist()
    sizes, count, tokens = [], 0, 0
    for with_padding, without in zip(padded, packed, strict=True):
        tokens = tokens + without if packs else (count + 1) * with_padding
        if count and tokens > max_tokens:
            sizes.append(count)
            count, tokens = 0, without if packs else with_padding
        count += 1
    return list(order.split([*sizes, count]))


def positions_within(rows: Tensor, length: Tensor) -> Tensor:
    """Return which positions of rows [..., L] are within `length` [...]: bool [..., L]."""
    return torch.arange(rows.shape[-1], device=rows.device) < length[..., None]
