"""Trunk: a Hugging Face decoder run over ragged rows of tokens, padded or packed."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from rlx.errors import ConfigError
from rlx.nets.chunked_head import LogitTransform
from rlx.nets.ragged import positions_within

Layout = Literal["padded", "packed"]
"""padded: rows on the right, no mask but the causal one. packed: one row of all tokens that count, no padding."""


class Trunk:
    """Runs everything of a causal language model but its head. Holds no parameters: the model does."""

    def __init__(self, model: nn.Module) -> None:
        """`model`: a Hugging Face causal language model, or a peft model around one."""
        self.causal_lm: Any = unwrapped(model)
        self.decoder: Any = self.causal_lm.base_model
        self.config: Any = self.causal_lm.config.get_text_config(decoder=True)
        self.transform = _logit_transform(self.config)
        self.hidden_size = int(self.config.hidden_size)
        self._windows = _attention_windows(self.config)

    def hidden(self, obs: Tensor, length: Tensor, index: Tensor, layout: Layout) -> Tensor:
        """Return the last hidden states [M, H] of the positions `index` [M] of the flattened rows.

        obs [S, L] int64, of which the first length [S] positions of a row count: no other can have an influence.
        """
        if layout == "padded":
            states = self._run(obs, None, None)
            return states.flatten(0, 1).index_select(0, index)
        counted = positions_within(obs, length)
        places = counted.flatten().nonzero().squeeze(1)
        position = torch.arange(obs.shape[1], device=obs.device).expand_as(obs).flatten()[places]
        row = torch.arange(len(obs), device=obs.device).repeat_interleave(length.clamp(max=obs.shape[1]))
        states = self._run(obs.flatten()[places][None], position[None], self._block_masks(row, position))
        packed_place = counted.flatten().cumsum(0) - 1  # of every position that counts, where it went
        return states[0].index_select(0, packed_place[index])

    def _run(self, tokens: Tensor, position: Tensor | None, mask: Any) -> Tensor:
        extra = {} if position is None else {"position_ids": position}
        return self.decoder(input_ids=tokens, attention_mask=mask, use_cache=False, **extra).last_hidden_state

    def _block_masks(self, row: Tensor, position: Tensor) -> Any:
        """Return additive masks [1, 1, T, T] that let a token see itself and what stands before it in its own row."""
        distance = position[:, None] - position[None, :]
        seen = (row[:, None] == row[None, :]) & (distance >= 0)
        dtype = next(self.decoder.parameters()).dtype
        masks = {}
        for kind, window in self._windows.items():
            allowed = seen if window is None else seen & (distance < window)
            mask = torch.zeros(allowed.shape, dtype=dtype, device=row.device)
            # Additive: the eager attention adds what it is given, so that a mask of bool would be silently wrong.
            masks[kind] = mask.masked_fill_(~allowed, torch.finfo(dtype).min)[None, None]
        return masks if len(masks) > 1 else next(iter(masks.values()))


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the Hugging Face model inside a peft model, its layers with adapters; any other as it is."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator, union-attr]


def _logit_transform(config: Any) -> LogitTransform:
    """Return what a model of this configuration does with its logits."""
    scale = getattr(config, "logit_scale", None) or 1.0
    divisor = getattr(config, "logits_scaling", None) or 1.0
    return LogitTransform(float(scale) / float(divisor), getattr(config, "final_logit_softcapping", None))


def _attention_windows(config: Any) -> dict[str, int | None]:
    """Return the kinds of attention that a decoder's layers have, each with its window or None."""
    from transformers.cache_utils import get_layer_types_and_kwargs

    kinds, options = get_layer_types_and_kwargs(config)
    windows: dict[str, int | None] = {}
    for kind, option in zip(kinds, options, strict=True):
        if kind not in ("full_attention", "sliding_attention"):
            raise ConfigError(
                f"a {config.model_type} model has layers of the kind {kind!r}; rlx trains decoders with full_attention "
                "and sliding_attention. Choose another model."
            )
        windows[kind] = option.get("sliding_window")
    return windows
