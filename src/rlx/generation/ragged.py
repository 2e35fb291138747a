"""Attention over sequences of many lengths by torch's varlen_attn, which reads nothing but tokens that are there."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rlx.nets import varlen
from rlx.nets.varlen import Kernel

NEEDED = varlen.NEEDED | {"seqused_k"}
"""What varlen_attn has to take for a cache of which only a part is used."""


@dataclass(frozen=True)
class Ragged:
    """Where the sequences of a batch are, in tensors whose first dimension is the tokens of all of them."""

    kernel: Kernel
    dtype: torch.dtype
    query_bounds: Tensor
    """int32 [N + 1]: sequence i has the queries from element i on, to that before element i + 1."""
    key_bounds: Tensor
    """int32 [N + 1]: its keys, likewise."""
    longest_query: int
    longest_key: int
    used: Tensor | None
    """int32 [N]: how many of its keys count, from the first one on; None: all of them."""


@dataclass(frozen=True)
class Note:
    """The keys and values of one layer for `Ragged`; it goes with the key tensor that a layer is given.

    A layer that changes the keys on their way to attention loses the note, and is served by its mask.
    """

    ragged: Ragged
    keys: Tensor
    """[tokens, key heads, size of a head]"""
    values: Tensor
    window: int | None
    """How many positions a query sees, its own one included; None: all before it."""

    def on(self, key: Tensor) -> Tensor:
        """Return the key tensor with this note on it."""
        key._rlx_note = self  # type: ignore[attr-defined]
        return key

    def attend(self, query: Tensor, scaling: float | None) -> Tensor | None:
        """Return the output [B, Q, heads, size] for a query [B, heads, Q, size]; None where the kernel cannot."""
        where, size = self.ragged, query.shape[-1]
        of_its_kind = query.dtype == self.keys.dtype == self.values.dtype == where.dtype
        if not of_its_kind or not varlen.takes_heads(size, self.values.shape[-1]):
            return None
        rows, heads, queries, _ = query.shape
        # One query alone is the last of its sequence: nothing is after it, and without a window the kernel is faster.
        causal = where.longest_query > 1 or self.window is not None
        mixed = where.kernel(
            query.transpose(1, 2).reshape(rows * queries, heads, size),
            self.keys,
            self.values,
            where.query_bounds,
            where.key_bounds,
            where.longest_query,
            where.longest_key,
            scale=scaling,
            window_size=varlen.window(self.window, causal),
            enable_gqa=heads != self.keys.shape[1],
            seqused_k=where.used,
        )
        return mixed.view(rows, queries, heads, size)


def note_of(key: Tensor) -> Note | None:
    """Return the note that is on a key tensor, if there is one."""
    return getattr(key, "_rlx_note", None)
