"""Forward passes of a model over slots: prompts into fresh ones, one more token into live ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from rlx.generation.architecture import Architecture
from rlx.generation.attention import NAME
from rlx.generation.cache import SlotCache
from rlx.generation.masks import masks_of
from rlx.generation.ragged import NEEDED, Ragged
from rlx.generation.request import Sampling
from rlx.generation.sampler import sample
from rlx.generation.static_step import SHORTEST_EXTENT, NewCapture, StaticStep, doubled
from rlx.nets.varlen import Kernel, kernel_for

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
    new_capture: of static steps (static_step.py); None, as exact needs it: no step is static, no attention is ragged.
    """

    def __init__(
        self, architecture: Architecture, model: Any, exact: bool, new_capture: NewCapture | None = None
    ) -> None:
        self.architecture = architecture
        self._model = model
        self._exact = exact
        self._cache: SlotCache | None = None
        self._new_capture = new_capture
        self._static_step: StaticStep | None = None
        parameter = next(model.parameters())
        self.device = parameter.device
        by_note = new_capture is not None and model.config._attn_implementation == NAME
        self._kernel = kernel_for(self.device, model.dtype, NEEDED) if by_note else None
        self._last: tuple[Tensor, Tensor] | None = None
        model.get_output_embeddings().register_forward_pre_hook(self._keep_last)

    def reserve(self, slots: int, length: int, keep: bool = False) -> None:
        """Make room for so many rows of so many tokens; keep: what stands in the slots stays there."""
        slots, length = reserved(slots, length, self._exact)
        cache = self._cache
        if cache is None or cache.slots < slots or cache.length < length:
            self.forget()  # before the new one is made
            self._cache = SlotCache(self.architecture.windows, slots, length, by_token=self._kernel is not None)
            if keep and cache is not None:
                self._cache.take_over(cache)

    def forget(self) -> None:
        """Give the memory back, and with it whatever stands in it."""
        self._cache = self._static_step = None

    def step(
        self, token_R: np.ndarray, position_R: np.ndarray, row_A: np.ndarray, u_A: np.ndarray, sampling: Sampling
    ) -> Tensor:
        """Put one token at the given position of each of slots 0 to R - 1; return what is drawn after it.

        row_A, u_A: see `sample`, whose result it is; it is to be read before the next step.
        """
        if self._new_capture is None:
            return sample(self.decode(token_R, position_R), sampling, self._tensor(row_A), self._tensor(u_A))
        if self._static_step is None:
            self._static_step = self._new_static_step(self._new_capture)
        return self._static_step(token_R, position_R, row_A, u_A, sampling)

    def prefill(self, prompts: Sequence[Sequence[int]], first: int) -> Tensor:
        """Put prompts into slots first, first + 1, ...; return the logits of the tokens that follow, [P, V].

        Prompts of like lengths should stand side by side.
        """
        lengths = [len(prompt) for prompt in prompts]
        chunks = _packs(lengths) if self._kernel is not None else _chunks(lengths, self._exact)
        return torch.cat([self._prefill(prompts[begin:end], first + begin) for begin, end in chunks])

    def decode(self, token_R: np.ndarray, position_R: np.ndarray) -> Tensor:
        """Put one token at the given position of each of slots 0 to R - 1; return the logits after it, [R, V]."""
        if not self._exact:
            extent = round_up(int(position_R.max()) + 1, EXTENT_ROUND)
            return self._decode(self._tensor(token_R), self._tensor(position_R), extent)
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

    def _new_static_step(self, new_capture: NewCapture) -> StaticStep:
        cache = self._cache
        assert cache is not None
        # Ragged attention reads what is used, whatever the extent; masks are of all of it.
        extents = [cache.length] if self._kernel is not None else doubled(SHORTEST_EXTENT, cache.length)
        return StaticStep(
            self._decode,
            slots=cache.slots,
            extents=extents,
            device=self.device,
            new_capture=new_capture,
            watched=[*self._model.parameters(), *self._model.buffers()],
        )

    def _prefill(self, prompts: Sequence[Sequence[int]], first: int) -> Tensor:
        if self._kernel is not None and len(prompts) > 1:
            return self._prefill_packed(self._kernel, prompts, first)
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
        plan.packed, plan.ragged = False, None
        last_token = torch.arange(rows, device=self.device), self._tensor(last)
        return self._forward(self._tensor(ids), position, None, last_token)[: len(prompts)]

    def _prefill_packed(self, kernel: Kernel, prompts: Sequence[Sequence[int]], first: int) -> Tensor:
        """Prefill prompts that stand in one row of tokens, one after another: none is padded."""
        lengths = np.array([len(prompt) for prompt in prompts])
        ends = lengths.cumsum()
        number_T = np.repeat(np.arange(len(prompts)), lengths)
        number, position = self._tensor(number_T), self._tensor(np.arange(ends[-1]) - (ends - lengths)[number_T])
        bounds, longest = self._tensor(np.concatenate([[0], ends])).int(), int(lengths.max())
        assert self._cache is not None
        plan = self._cache.plan
        plan.slot, plan.position, plan.packed = number + first, position, True
        plan.ragged = Ragged(kernel, self._model.dtype, bounds, bounds, longest, longest, None)
        others = (number[:, None] != number)[None]
        masks = masks_of(self.architecture, self._model.dtype, position[None, :, None], position, others)
        ids = self._tensor(np.concatenate([np.asarray(prompt, np.int64) for prompt in prompts]))
        last = torch.zeros(len(prompts), dtype=torch.int64, device=self.device), self._tensor(ends - 1)
        return self._forward(ids[None], position[None], masks, last)

    def _decode_block(self, token_B: np.ndarray, position_B: np.ndarray, extent: int, slot_B: np.ndarray) -> Tensor:
        """Decode rows of one extent in a block of fixed size; what is missing is played by the spare slot."""
        assert self._cache is not None
        missing = (0, EXACT_DECODE_ROWS - len(slot_B))
        spare = np.pad(slot_B, missing, constant_values=self._cache.slots - 1)
        token, position = (self._tensor(np.pad(one, missing)) for one in (token_B, position_B))
        return self._decode(token, position, extent, self._tensor(spare))[: len(slot_B)]

    def _decode(self, token_B: Tensor, position_B: Tensor, extent: int, slot_B: Tensor | None = None) -> Tensor:
        assert self._cache is not None
        plan, rows = self._cache.plan, len(token_B)
        plan.first, plan.rows, plan.slot, plan.position, plan.extent = 0, rows, slot_B, position_B, extent
        plan.packed, plan.ragged = False, self._used_part(position_B, extent)
        column = torch.arange(extent, device=self.device)
        masks = masks_of(self.architecture, self._model.dtype, position_B[:, None, None], column)
        return self._forward(token_B[:, None], position_B[:, None], masks, None)

    def _used_part(self, position_B: Tensor, extent: int) -> Ragged | None:
        """Return where each row's keys are, which is in its slot up to its position; None without ragged attention."""
        if self._kernel is None:
            return None
        assert self._cache is not None
        bounds = torch.arange(len(position_B) + 1, dtype=torch.int32, device=self.device)
        used = (position_B + 1).int()
        return Ragged(self._kernel, self._model.dtype, bounds, bounds * self._cache.length, 1, extent, used)

    def _forward(self, ids: Tensor, position: Tensor, masks: Any, last: tuple[Tensor, Tensor] | None) -> Tensor:
        """Return the logits [N, V] of the first token of each row, or of the tokens at (rows [N], positions [N])."""
        self._last = last
        try:
            output = self._model(
                input_ids=ids,
                position_ids=position,
                attention_mask=masks,
                past_key_values=self._cache,
                use_cache=True,
            )
        finally:
            self._last = None
        return output.logits[:, 0]

    def _keep_last(self, _head: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Before the head: keep each prompt's last token only; logits of all others would be made for nothing."""
        if self._last is None:
            return inputs
        return (inputs[0][self._last][:, None], *inputs[1:])

    def _tensor(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self.device)


def _packs(lengths: Sequence[int]) -> list[tuple[int, int]]:
    """Return (begin, end) of runs of prompts that are prefilled in one row: PREFILL_TOKENS, or one that is longer."""
    packs, begin, total = [], 0, 0
    for index, length in enumerate(lengths):
        if index > begin and total + length > PREFILL_TOKENS:
            packs.append((begin, index))
            begin, total = index, 0
        total += length
    return [*packs, (begin, len(lengths))]


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
