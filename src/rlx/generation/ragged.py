"""Attention over sequences of many lengths by torch's varlen_attn, which reads nothing but tokens that are there."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Kernel = Callable[..., Any]
"""What is called as torch.nn.attention.varlen.varlen_attn is."""
NEEDED = {"scale", "window_size", "enable_gqa", "seqused_k"}
"""Arguments of varlen_attn that it did not have from the start."""
LARGEST_HEAD, HEAD_MULTIPLE = 256, 8
"""Sizes of a head that flash attention takes."""


def kernel_for(device: torch.device, dtype: torch.dtype) -> Kernel | None:
    """Return varlen_attn where this torch has it as it is needed, and for this device and dtype; else None."""
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return None
    if torch.cuda.get_device_capability(device) < (8, 0):
        return None
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn if inspect.signature(varlen_attn).parameters.keys() >= NEEDED else None


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
        if not of_its_kind or size > LARGEST_HEAD or size % HEAD_MULTIPLE or self.values.shape[-1] != size:
            return None
        rows, heads, queries, _ = query.shape
        # One query alone is the last of its sequence: nothing is after it, and without a window the kernel is faster.
        right = -1 if where.longest_query == 1 and self.window is None else 0
        mixed = where.kernel(
            query.transpose(1, 2).reshape(rows * queries, heads, size),
            self.keys,
            self.values,
            where.query_bounds,
            where.key_bounds,
            where.longest_query,
            where.longest_key,
            scale=scaling,
            # Flash attention counts the positions to the left of a query, without its own one.
            window_size=(-1 if self.window is None else self.window - 1, right),
            enable_gqa=heads != self.keys.shape[1],
            seqused_k=where.used,
        )
        return mixed.view(rows, queries, heads, size)


def note_of(key: Tensor) -> Note | None:
    """Return the note that is on a key tensor, if there is one."""
    return getattr(key, "_rlx_note", None)
