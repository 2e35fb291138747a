"""Keys and values of many sequences in slots, behind the interface that transformers' attention layers call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from rlx.generation.ragged import Note, Ragged


@dataclass
class Plan:
    """Where the keys and values of the forward pass at hand belong; all layers look here."""

    first: int = 0
    """In prefill of padded prompts: slot of the batch's first row; the others follow it. In decoding it is 0."""
    rows: int = 0
    """Rows that are stored; those after them in the batch are padding."""
    slot: Tensor | None = None
    """int64: the slot of each row where they do not follow each other (exact decoding), of each token if packed."""
    position: Tensor | None = None
    """int64: the position of each row's one token, of each token if packed. None where rows begin at position 0."""
    extent: int = 0
    """Decoding reads keys and values of positions below this."""
    packed: bool = False
    """Whether the batch is one row of prompts, one after another."""
    ragged: Ragged | None = None
    """Which keys count, where attention goes by that; None where it goes by masks alone."""


class SlotLayer(CacheLayerMixin):
    """Keys and values of one layer, [slots, heads, length, size of a head] each.

    Sliding layers are full-length slots as well, and their window is in the mask and in the notes.
    by_token: the memory is laid out as [slots, length, heads, size], as kernels for ragged sequences want it.
    """

    is_sliding = False

    def __init__(self, plan: Plan, slots: int, length: int, window: int | None, by_token: bool) -> None:
        super().__init__()
        self.plan, self.slots, self.length = plan, slots, length
        self.window, self.by_token = window, by_token

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Make the slots; zeros, as what is masked is still multiplied, and 0 * NaN is NaN."""
        self.keys = self._slots_like(key_states)
        self.values = self._slots_like(value_states)
        self.row_index = torch.arange(self.slots, device=key_states.device)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object):
        """Store keys and values [B, heads, Q, size]; return those that the queries look at."""
        plan = self.plan
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None and self.values is not None
        if plan.packed:
            return self._update_packed(key_states, value_states)
        if plan.position is None:
            stored = slice(plan.first, plan.first + plan.rows), slice(None), slice(key_states.shape[2])
            self.keys[stored] = key_states[: plan.rows]
            self.values[stored] = value_states[: plan.rows]
            return key_states, value_states
        where = self.row_index[: plan.rows] if plan.slot is None else plan.slot, slice(None), plan.position
        self.keys[where] = key_states[:, :, 0]
        self.values[where] = value_states[:, :, 0]
        keys, values = self.keys[:, :, : plan.extent], self.values[:, :, : plan.extent]
        if plan.slot is not None:
            return keys.index_select(0, plan.slot), values.index_select(0, plan.slot)
        keys, values = keys[: plan.rows], values[: plan.rows]
        if plan.ragged is not None:
            # The slots, one after another: sequence i begins at token i * length.
            all_keys, all_values = (stored.transpose(1, 2).flatten(0, 1) for stored in (self.keys, self.values))
            keys = Note(plan.ragged, all_keys, all_values, self.window).on(keys)
        return keys, values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return how many keys there are and where they begin; asked in prefill only, as decoding brings its mask."""
        return query_length, 0

    def get_seq_length(self) -> int:
        """Return 0: whoever asks is in prefill."""
        return 0

    def get_max_length(self) -> int:
        """Return how many positions a slot has."""
        return self.length

    def _update_packed(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        plan = self.plan
        assert self.keys is not None and self.values is not None and plan.slot is not None and plan.ragged is not None
        keys, values = key_states[0].transpose(0, 1), value_states[0].transpose(0, 1)
        self.keys[plan.slot, :, plan.position] = keys
        self.values[plan.slot, :, plan.position] = values
        return Note(plan.ragged, keys, values, self.window).on(key_states), value_states

    def _slots_like(self, states: Tensor) -> Tensor:
        _, heads, _, size = states.shape
        shape = (self.slots, self.length, heads, size) if self.by_token else (self.slots, heads, self.length, size)
        made = torch.zeros(shape, dtype=states.dtype, device=states.device)
        return made.transpose(1, 2) if self.by_token else made


class SlotCache(Cache):
    """All layers' slots, and the plan they share. windows: of each layer; by_token: see SlotLayer."""

    def __init__(self, windows: Sequence[int | None], slots: int, length: int, *, by_token: bool = False) -> None:
        self.plan = Plan()
        self.slots, self.length = slots, length
        self.slot_layers = [SlotLayer(self.plan, slots, length, window, by_token) for window in windows]
        super().__init__(layers=[*self.slot_layers])

    @torch.inference_mode()
    def take_over(self, smaller: SlotCache) -> None:
        """Put what stands in the slots of a smaller cache into these, and empty it: no two are there at once."""
        for layer, old in zip(self.slot_layers, smaller.slot_layers, strict=True):
            if old.is_initialized:
                assert old.keys is not None and old.values is not None
                layer.lazy_initialization(old.keys, old.values)
                assert layer.keys is not None and layer.values is not None
                layer.keys[: old.slots, :, : old.length] = old.keys
                layer.values[: old.slots, :, : old.length] = old.values
                old.keys = old.values = None

    def copy(self, source: Tensor, target: Tensor, extent: int) -> None:
        """Copy the first `extent` positions of slots `source` [N] to slots `target` [N]; no slot is in both."""
        for layer in self.slot_layers:
            for stored in (layer.keys, layer.values):
                assert stored is not None
                stored[target, :, :extent] = stored[source, :, :extent]
