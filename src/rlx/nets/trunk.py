"""Trunk: a Hugging Face decoder run over ragged rows of tokens, padded or packed."""

from __future__ import annotations

import inspect
from typing import Any, Literal

import torch
from torch import Tensor, nn

from rlx.errors import ConfigError
from rlx.nets.chunked_head import LogitTransform
from rlx.nets.ragged import positions_within
from rlx.nets.shared_prefix import SharedRows

Layout = Literal["padded", "packed", "shared"]
"""padded: rows on the right, no mask but the causal one. packed: one row of all tokens that count, no padding.
shared: what rows have in common at their beginning, as the samples of one prompt do, is run once."""


class Trunk:
    """Runs everything of a causal language model but its head. Holds no parameters: the model does."""

    def __init__(self, model: nn.Module) -> None:
        """`model`: a Hugging Face causal language model, or a peft model around one."""
        self.causal_lm: Any = unwrapped(model)
        self.decoder: Any = self.causal_lm.base_model
        self.config: Any = self.causal_lm.config.get_text_config(decoder=True)
        self.transform = _logit_transform(self.config)
        self.hidden_size = int(self.config.hidden_size)
        inner = getattr(self.config, "intermediate_size", None) or getattr(self.config, "n_inner", None)
        self.inner = int(inner or 4 * self.hidden_size)
        """Width inside a layer's feed-forward part."""
        self._windows, self._layer_windows = _attention_windows(self.config)
        self._by_segments = self._takes_segments()
        self.always_runs = False
        """Whether the layers run for no position, too: those that several processes share out have to run in all."""

    def hidden(self, obs: Tensor, length: Tensor, index: Tensor, layout: Layout, shared: SharedRows | None) -> Tensor:
        """Return the last hidden states [M, H] of the positions `index` [M] of the flattened rows.

        obs [S, L] int64, of which the first length [S] positions of a row count: no other can have an influence.
        shared: the same rows as `share` has put them together, for the layout of that name.
        """
        if not len(index):
            if not self.always_runs:
                return next(self.decoder.parameters()).new_zeros(0, self.hidden_size)
            obs, layout = obs[:1, :1], "padded"
        if layout == "padded":
            states = self._run(obs, None, None)
        elif shared is not None:
            masks = self._block_masks(shared.segment, shared.position)
            states = self._run(shared.tokens, shared.position, masks)
            index = shared.place.flatten()[index]
        else:
            counted = positions_within(obs, length)
            places = counted.flatten().nonzero().squeeze(1)
            position = torch.arange(obs.shape[1], device=obs.device).expand_as(obs).flatten()[places][None]
            tokens, lengths = obs.flatten()[places][None], length.clamp(max=obs.shape[1])
            states = self._packed(tokens, position, lengths, self._by_segments)
            index = (counted.flatten().cumsum(0) - 1)[index]  # of every position that counts, where it went
        return states.flatten(0, 1).index_select(0, index)

    def _run(self, tokens: Tensor, position: Tensor | None, mask: Any, **extra: Any) -> Tensor:
        extra |= {} if position is None else {"position_ids": position}
        return self.decoder(input_ids=tokens, attention_mask=mask, use_cache=False, **extra).last_hidden_state

    def _packed(self, tokens: Tensor, position: Tensor, length: Tensor, by_segments: bool) -> Tensor:
        """Return the hidden states [1, T, H] of rows of these lengths [S], one after the other in tokens [1, T]."""
        if by_segments:
            return self._segmented(tokens, position, length)
        # No row has the number 0, which stands for what all have in common.
        row = torch.arange(1, len(length) + 1, device=length.device).repeat_interleave(length)
        return self._run(tokens, position, self._block_masks(row[None], position))

    def _segmented(self, tokens: Tensor, position: Tensor, length: Tensor) -> Tensor:
        from rlx.nets.segments import NAME, Segments

        segments = Segments(length.tolist(), self._layer_windows, tokens.device)
        # With a mask of four axes transformers makes none of its own; an attention that reads it must not go unseen.
        unread = torch.full((1, 1, 1, 1), torch.nan, dtype=next(self.decoder.parameters()).dtype, device=tokens.device)
        masks = dict.fromkeys(self._windows, unread) if len(self._windows) > 1 else unread
        return self._run(tokens, position, masks, **{NAME: segments})

    @torch.no_grad()
    def _takes_segments(self) -> bool:
        """Return whether the layers attend by segments, as a few tokens show: not every model hands them on."""
        from rlx.nets.segments import attend_by_segments

        parameters = inspect.signature(self.decoder.forward).parameters.values()
        takes_more = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
        if not attend_by_segments(self.decoder, takes_more):
            return False
        table = self.causal_lm.get_input_embeddings().weight
        if table.device.type == "meta":
            return True
        self.causal_lm.eval()
        position, length = (torch.tensor(v, device=table.device) for v in ([0, 1, 2, 0, 0, 1, 2, 3], [3, 1, 4]))
        tokens = torch.arange(8, device=table.device)[None] % len(table)
        one, other = (self._packed(tokens, position[None], length, by_segments) for by_segments in (True, False))
        bound = tolerance(table.dtype)
        agree = torch.allclose(one, other, rtol=bound, atol=bound)
        return attend_by_segments(self.decoder, agree)

    def _block_masks(self, segment: Tensor, position: Tensor) -> Any:
        """Return additive masks [R, 1, T, T]: a token of [R, T] sees itself and what stands before it in its own row.

        That is what has its own segment, or the segment 0.
        """
        distance = position[:, :, None] - position[:, None, :]
        own = segment[:, :, None] == segment[:, None, :]
        seen = (own | (segment[:, None, :] == 0)) & (distance >= 0)
        dtype = next(self.decoder.parameters()).dtype
        masks = {}
        for kind, window in self._windows.items():
            allowed = seen if window is None else seen & (distance < window)
            mask = torch.zeros(allowed.shape, dtype=dtype, device=segment.device)
            # Additive: the eager attention adds what it is given, so that a mask of bool would be silently wrong.
            masks[kind] = mask.masked_fill_(~allowed, torch.finfo(dtype).min)[:, None]
        return masks if len(masks) > 1 else next(iter(masks.values()))


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the Hugging Face model inside a peft model, its layers with adapters; any other as it is."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator, union-attr]


def _logit_transform(config: Any) -> LogitTransform:
    """Return what a model of this configuration does with its logits."""
    scale = getattr(config, "logit_scale", None) or 1.0
    divisor = getattr(config, "logits_scaling", None) or 1.0
    return LogitTransform(float(scale) / float(divisor), getattr(config, "final_logit_softcapping", None))


def _attention_windows(config: Any) -> tuple[dict[str, int | None], list[int | None]]:
    """Return the kinds of attention that a decoder's layers have, each with its window or None; and that of each."""
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
    return windows, [windows[kind] for kind in kinds]


def tolerance(dtype: torch.dtype) -> float:
    """Return how far two ways to one result may be apart, relatively and absolutely."""
    return 1e-3 if dtype in (torch.float32, torch.float64) else 0.1
