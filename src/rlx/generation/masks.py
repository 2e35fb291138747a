"""Which keys are hidden from which queries, and the masks of it that transformers' layers take."""

from __future__ import annotations

import torch
from torch import Tensor

from rlx.generation.architecture import FULL, SLIDING, Architecture


def masks_of(
    architecture: Architecture, dtype: torch.dtype, query: Tensor, key: Tensor, hidden: Tensor | None = None
) -> Tensor | dict[str, Tensor]:
    """Return the additive masks [B, 1, Q, K] of all kinds of layers.

    query, key: int64 [B, Q, 1] and [K], their positions. hidden: [B, Q, K], what is hidden whatever the positions.
    Floating point, as eager attention adds what it gets, a boolean one too. A dict where there are two kinds: such
    models would take a single mask for both.
    """
    of_kind = {FULL: key > query if hidden is None else (key > query) | hidden}
    if architecture.window is not None:
        of_kind[SLIDING] = of_kind[FULL] | (key <= query - architecture.window)
    masks = {kind: _additive(of_kind[kind], dtype)[:, None] for kind in set(architecture.layer_types)}
    return masks if len(masks) > 1 else masks.popitem()[1]


def _additive(hidden: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, torch.finfo(dtype).min)
