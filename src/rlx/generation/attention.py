"""Attention over the slots: by torch's varlen_attn where it serves, by two batched products on CPUs, else by sdpa.

varlen_attn reads the used part of each slot, and no padding of prompts (ragged.py). On a CPU, sdpa's kernel visits
every head of every row by itself; with one query in each, two batched products took less time where they were measured
alone (docs/design.md). What neither knows goes to sdpa with the mask that always comes along.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from rlx.generation.ragged import note_of

NAME = "rlx_slots"
"""How a config asks for it. Registering adds a name to a table of the process and changes nobody else's choice."""
IN_THE_MASK = {"position_ids", "use_cache", "sliding_window", "is_causal"}
"""Options of layers that change nothing here: positions and windows are in the mask, and in the note on the keys."""


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """Return the attention's output [B, Q, heads, size], and no weights.

    query: [B, heads, Q, size]; key and value: [B, key heads, K, size]; attention_mask: additive [B, 1, Q, K] or None.
    """
    mixed = None
    # A soft cap, a bias of positions, sinks: what is not known to be in the mask is left to sdpa to take or refuse.
    if all(option is None or option is False or name in IN_THE_MASK for name, option in options.items()):
        note = note_of(key)
        if note is not None:
            mixed = note.attend(query, scaling)
        if mixed is None and query.device.type == "cpu" and query.shape[2] == 1 and attention_mask is not None:
            mixed = _by_two_products(query, key, value, attention_mask, scaling)
    if mixed is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **options
        )
    return mixed, None


def _by_two_products(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float | None) -> Tensor:
    rows, heads, _, size = query.shape
    key_heads, extent = key.shape[1:3]
    group = heads // key_heads
    mask = mask.expand(rows, key_heads, 1, extent).reshape(rows * key_heads, 1, extent)
    scores = torch.baddbmm(
        mask.expand(-1, group, -1) if group > 1 else mask,
        query.reshape(rows * key_heads, group, size),
        key.reshape(rows * key_heads, extent, size).transpose(1, 2),
        alpha=size**-0.5 if scaling is None else scaling,
    )
    mixed = torch.bmm(scores.softmax(-1), value.reshape(rows * key_heads, extent, value.shape[-1]))
    return mixed.view(rows, 1, heads, value.shape[-1])


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, sdpa_mask)
