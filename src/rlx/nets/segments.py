"""Attention within segments: rows of tokens one after the other in one row, each of which sees itself alone.

On GPUs torch's kernel for sequences of unlike length does it in half precision; elsewhere, and for what that kernel
does not know, sdpa runs over one segment after the other. Either way there is no mask of all tokens by all tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from rlx.nets import varlen
from rlx.nets.varlen import Kernel

NAME = "rlx_segments"
"""How a config asks for it, and the keyword by which its layers get the segments. Registering adds a name to a table
of the process and changes nobody else's choice."""


class Segments:
    """How long the segments of a row are, and how far back each layer sees within one."""

    def __init__(self, lengths: Sequence[int], windows: Sequence[int | None], device: torch.device) -> None:
        """`windows`: of each layer, the position itself included; None: all of the segment so far."""
        self.windows = windows
        counted = [length for length in lengths if length]
        self.longest = max(counted)
        self.starts = torch.tensor([0, *counted]).cumsum(0).to(device, torch.int32, non_blocking=True)
        """int32 [N + 1]: where each segment begins, and where the last one ends."""
        self.runs = [(len(list(alike)), length) for length, alike in groupby(counted)]
        """(count, length) of neighbours that are equally long."""
        self._masks: dict[tuple[int, int], Tensor] = {}

    def window_of(self, module: nn.Module) -> int | None:
        """Return how far back a layer's attention sees; None where no segment is as long as that."""
        window = self.windows[module.layer_idx]  # type: ignore[index]
        return None if window is None or window >= self.longest else window

    def window_mask(self, length: int, window: int) -> Tensor:
        """Return bool [1, 1, length, length]: which position sees which."""
        if (length, window) not in self._masks:
            position = torch.arange(length, device=self.starts.device)
            distance = position[:, None] - position
            self._masks[length, window] = ((distance >= 0) & (distance < window))[None, None]
        return self._masks[length, window]


@torch.compiler.disable  # a compiled layer breaks here: the segments of every batch have lengths of their own
def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    rlx_segments: Segments | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """Return the attention's output [B, Q, heads, size], and no weights; without segments it is that of sdpa.

    query: [B, heads, Q, size]; key and value: [B, key heads, Q, size]; B is 1 where there are segments.
    """
    if rlx_segments is None or options.get("position_bias") is not None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **options
        )
    fits = not dropout and varlen.takes_heads(query.shape[-1], value.shape[-1])
    kernel = varlen.kernel_for(query.device, query.dtype) if fits else None
    if kernel is not None:
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        return _by_kernel(kernel, rlx_segments, rlx_segments.window_of(module), query, key, value, scale), None
    return _one_by_one(module, rlx_segments, query, key, value, {**options, "dropout": dropout, "scaling": scaling})


def _one_by_one(
    module: nn.Module, segments: Segments, query: Tensor, key: Tensor, value: Tensor, options: dict[str, Any]
) -> tuple[Tensor, None]:
    """Have sdpa run over the segments, neighbours that are equally long at once."""
    window = segments.window_of(module)
    sizes = [count * length for count, length in segments.runs]
    mixed = []
    # Split, and not sliced: the gradient of a slice is as long as the whole row.
    cut = zip(*(whole.split(sizes, 2) for whole in (query, key, value)), strict=True)
    for (count, length), parts in zip(segments.runs, cut, strict=True):
        q, k, v = (
            part[0].unflatten(1, (count, length)).transpose(0, 1) for part in parts
        )  # [count, heads, length, size]
        mask = None if window is None or window >= length else segments.window_mask(length, window)
        options["is_causal"] = mask is None and length > 1
        mixed.append(sdpa_attention_forward(module, q, k, v, mask, **options)[0].flatten(0, 1))
    return torch.cat(mixed)[None], None


def _by_kernel(
    kernel: Kernel, segments: Segments, window: int | None, query: Tensor, key: Tensor, value: Tensor, scale: float
) -> Tensor:
    """Have the kernel run over all segments at once."""
    rows = [part[0].transpose(0, 1) for part in (query, key, value)]  # [T, heads, size]
    edges = (segments.starts, segments.starts, segments.longest, segments.longest)
    shares = query.shape[1] != key.shape[1]
    return kernel(*rows, *edges, scale=scale, window_size=varlen.window(window), enable_gqa=shares)[None]


def attend_by_segments(model: PreTrainedModel, wanted: bool = True) -> bool:
    """Have this model's layers take segments where it attends by sdpa, or no longer; return whether they do so now."""
    configs = [module.config for module in model.modules() if isinstance(module, PreTrainedModel)]
    if any(config._attn_implementation not in ("sdpa", NAME) for config in configs):
        return False
    for config in configs:
        config._attn_implementation = NAME if wanted else "sdpa"
    return wanted


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, sdpa_mask)
