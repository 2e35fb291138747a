"""Attention of one query over the slots, for CPUs: two batched products and a softmax.

On a CPU, sdpa's kernel visits every head of every row by itself; with one query in each, two batched products took less
time where they were measured alone (docs/design.md). Prefill, other devices and what this
function does not know go to sdpa.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "rlx_slots"
"""How a config asks for it. Registering adds a name to a table of the process and changes nobody else's choice."""


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

    query: [B, heads, Q, size]; key and value: [B, key heads, K, size]; attention_mask: additive [B, 1, 1, K] or None.
    """
    rows, heads, queries, size = query.shape
    if queries != 1 or attention_mask is None or query.device.type != "cpu" or options.get("position_bias") is not None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **options
        )
    key_heads, extent = key.shape[1:3]
    group = heads // key_heads
    mask = attention_mask.expand(rows, key_heads, 1, extent).reshape(rows * key_heads, 1, extent)
    scores = torch.baddbmm(
        mask.expand(-1, group, -1) if group > 1 else mask,
        query.reshape(rows * key_heads, group, size),
        key.reshape(rows * key_heads, extent, size).transpose(1, 2),
        alpha=size**-0.5 if scaling is None else scaling,
    )
    mixed = torch.bmm(scores.softmax(-1), value.reshape(rows * key_heads, extent, value.shape[-1]))
    return mixed.view(rows, 1, heads, value.shape[-1]), None


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, sdpa_mask)
