"""Torch's varlen_attn, attention over sequences of unlike length one after another: where it is, what it takes."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Set
from typing import Any

import torch

Kernel = Callable[..., Any]
"""What is called as torch.nn.attention.varlen.varlen_attn is."""
NEEDED = {"scale", "window_size", "enable_gqa"}
"""Arguments of varlen_attn that it did not have from the start."""
LARGEST_HEAD, HEAD_MULTIPLE = 256, 8
"""Sizes of a head that flash attention, which is behind it, takes."""


def kernel_for(device: torch.device, dtype: torch.dtype, needed: Set[str] = NEEDED) -> Kernel | None:
    """Return varlen_attn where this torch has it with these arguments, and for this device and dtype; else None."""
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return None
    if torch.cuda.get_device_capability(device) < (8, 0) or not installed(needed):
        return None
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn


def installed(needed: Set[str]) -> bool:
    """Return whether this torch has varlen_attn with these arguments."""
    return _parameters() >= needed


@functools.cache
def _parameters() -> frozenset[str]:
    """Return the names of its arguments, none where there is none; each layer of each pass asks."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return frozenset()
    return frozenset(inspect.signature(varlen_attn).parameters)


def takes_heads(key_size: int, value_size: int) -> bool:
    """Return whether it attends with heads of these sizes."""
    return key_size == value_size <= LARGEST_HEAD and key_size % HEAD_MULTIPLE == 0


def window(positions: int | None, causal: bool = True) -> tuple[int, int]:
    """Return its window_size for queries that see so many positions, their own one included; None: all before them.

    It counts the positions to the left of a query, without its own one, and -1 is all of them.
    """
    return (-1 if positions is None else positions - 1, 0 if causal else -1)
