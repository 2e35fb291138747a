"""Forward passes of a model over slots: prompts into fresh ones, one more token into live ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from rlx.generation.architecture import FULL, SLIDING, Architecture
from rlx.generation.cache import SlotCache

ROUND = 16
"""Slots, and in exact mode all lengths, are rounded up to this: kernels sum remainders in another order."""
EXTENT_ROUND = 8
"""Without exact mode decoding reads this much, rounded up, of the keys and values."""
EXACT_DECODE_ROWS = 32
EXACT_PREFILL_ROWS = 8
PREFILL_ROWS = 64
PREFILL_TOKENS = 4096
"""Prompts are prefilled this many rows, or this many tokens with padding, at a time: more fall out of the caches."""


Lengths = TypeVar("Lengths", int, np.ndarray)


def round_up(number: Lengths, multiple: int = ROUND) -> Lengths:
    """Return the smallest multiple that is at least this number."""
    return -(-number // multiple) * multiple


def reserved(slots: int, length: int, exact: bool) -> tuple[int, int]:
    """Return the slots and the length that are made for so many rows of so many tokens; if exact, one slot is spare."""
    return slots + exact, round_up(length)


class Slots:
    """A model and the keys and values of its live rows, which are slots 0 to R - 1.

    exact: a row meets shapes that depend on itself, never on what else is in the batch: EXACT_DECODE_ROWS rows of its
    own length in decoding, EXACT_PREFILL_ROWS rows as wide as its own prompt in prefill; lengths are rounded up.
    """

    def __init__(self, architecture: Architecture, model: Any, exact: bool) -> None:
        self.architecture = architecture
        self._model = model
        self._exact = exact
        self._cache: SlotCache | None = None
        parameter = next(model.parameters())
        self.device = parameter.device
        self._last: Tensor | None = None
        model.get_output_embeddings().register_forward_pre_hook(self._keep_last)

    def reserve(self, slots: int, length: int) -> None:
        """Make room for so many rows of so many tokens."""
        slots, length = reserved(slots, length, self._exact)
        cache = self._cache
        if cache is None or cache.slots < slots or cache.length < length:
            self._cache = None  # before the new one is made
            self._cache = SlotCache(len(self.architecture.layer_types), slots, length)

    def forget(self) -> None:
        """Give the memory back, and with it whatever stands in it."""
        self._cache = None

    def prefill(self, prompts: Sequence[Sequence[int]], first: int) -> Tensor:
        """Put prompts into slots first, first + 1, ...; return the logits of the tokens that follow, [P, V].

        Prompts of like lengths should stand side by side.
        """
        chunks = _chunks([len(prompt) for prompt in prompts], self._exact)
        return torch.cat([self._prefill(prompts[begin:end], first + begin) for begin, end in chunks])

    def decode(self, token_R: np.ndarray, position_R: np.ndarray) -> Tensor:
        """Put one token at the given position of each of slots 0 to R - 1; return the logits after it, [R, V]."""
        if not self._exact:
            return self._decode(token_R, position_R, round_up(int(position_R.max()) + 1, EXTENT_ROUND), None)
        extent_R = round_up(position_R + 1)
        blocks, order = [], []
        for extent in np.unique(extent_R):
            rows = np.flatnonzero(extent_R == extent)
            for block in np.split(rows, range(EXACT_DECODE_ROWS, len(rows), EXACT_DECODE_ROWS)):
                blocks.append(self._decode_block(token_R[block], position_R[block], int(extent), block))
                order.append(block)
        logits = torch.cat(blocks)
        return torch.empty_like(logits).index_copy_(0, self._tensor(np.concatenate(order)), logits)

    def copy(self, source: np.ndarray, target: np.ndarray, extent: int) -> None:
        """Copy the first `extent` positions of slots `source` to slots `target`; no slot is in both."""
        assert self._cache is not None
        self._cache.copy(self._tensor(source), self._tensor(target), extent)

    def _prefill(self, prompts: Sequence[Sequence[int]], first: int) -> Tensor:
        longest = max(len(prompt) for prompt in prompts)
        rows, width = len(prompts), longest
        if self._exact:
            rows, width = EXACT_PREFILL_ROWS, min(round_up(longest), self.architecture.context or round_up(longest))
        ids = np.zeros((rows, width), np.int64)
        last = np.zeros(rows, np.int64)
        for row, prompt in enumerate(prompts):
            ids[row, : len(prompt)] = prompt
            last[row] = len(prompt) - 1
        position = torch.arange(width, device=self.device).expand(rows, width)
        assert self._cache is not None
        plan = self._cache.plan
        plan.first, plan.rows, plan.slot, plan.position = first, len(prompts), None, None
        return self._forward(ids, position, None, self._tensor(last))[: len(prompts)]

    def _decode_block(self, token_B: np.ndarray, position_B: np.ndarray, extent: int, slot_B: np.ndarray) -> Tensor:
        """Decode rows of one extent in a block of fixed size; what is missing is played by the spare slot."""
        assert self._cache is not None
        missing = (0, EXACT_DECODE_ROWS - len(slot_B))
        spare = np.pad(slot_B, missing, constant_values=self._cache.slots - 1)
        return self._decode(np.pad(token_B, missing), np.pad(position_B, missing), extent, spare)[: len(slot_B)]

    def _decode(self, token_B: np.ndarray, position_B: np.ndarray, extent: int, slot_B: np.ndarray | None) -> Tensor:
        assert self._cache is not None
        plan = self._cache.plan
        plan.first, plan.rows, plan.position = 0, len(token_B), self._tensor(position_B)
        plan.slot = None if slot_B is None else self._tensor(slot_B)
        plan.extent = extent
        masks = self._masks(plan.position, extent)
        return self._forward(token_B[:, None], plan.position[:, None], masks, None)

    def _masks(self, position: Tensor, extent: int) -> Tensor | dict[str, Tensor]:
        """Return the additive masks [R, 1, 1, extent] of all kinds of layers.

        Floating point, as eager attention adds what it gets, a boolean one too. A dict where there are two kinds:
        such models would take a single mask for both.
        """
        column, position = torch.arange(extent, device=self.device), position[:, None]
        hidden = {FULL: column > position}
        if self.architecture.window is not None:
            hidden[SLIDING] = hidden[FULL] | (column <= position - self.architecture.window)
        dtype = self._model.dtype
        masks = {
            kind: torch.zeros(hidden[kind].shape, dtype=dtype, device=self.device).masked_fill_(
                hidden[kind], torch.finfo(dtype).min
            )[:, None, None]
            for kind in set(self.architecture.layer_types)
        }
        return masks if len(masks) > 1 else masks.popitem()[1]

    def _forward(self, ids: np.ndarray, position: Tensor, masks: Any, last: Tensor | None) -> Tensor:
        self._last = last
        try:
            output = self._model(
                input_ids=self._tensor(ids),
                position_ids=position,
                attention_mask=masks,
                past_key_values=self._cache,
                use_cache=True,
            )
        finally:
            self._last = None
        return output.logits[:, 0]

    def _keep_last(self, _head: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Before the head: keep each row's last position only; logits of all others would be made for nothing."""
        if self._last is None:
            return inputs
        hidden = inputs[0]
        return (hidden[torch.arange(len(hidden), device=hidden.device), self._last][:, None], *inputs[1:])

    def _tensor(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self.device)


def _chunks(lengths: Sequence[int], exact: bool) -> list[tuple[int, int]]:
    """Return (begin, end) of runs of prompts that are prefilled together."""
    chunks, begin = [], 0
    for index in range(1, len(lengths) + 1):
        if index < len(lengths):
            rows, longest = index + 1 - begin, max(lengths[begin : index + 1])
            if exact:
                fits = rows <= EXACT_PREFILL_ROWS and round_up(lengths[index]) == round_up(lengths[begin])
            else:
                fits = rows <= PREFILL_ROWS and rows * longest <= PREFILL_TOKENS
            if fits:
                continue
        chunks.append((begin, index))
        begin = index
    return chunks
