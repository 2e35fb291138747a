"""The least time in which a device can decode a workload: what each step has to read and to multiply, at its best."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Costs:
    """What a model costs, counted from its shape."""

    weight_bytes: int
    """Read by every pass; of an embedding that is not the head's as well only rows are, and it is left out."""
    token_bytes: int
    """Keys and values of one token, all layers."""
    token_flops: int
    """Of all matrices but the head, for one token."""
    head_flops: int
    """Of the head, for one token."""
    pair_flops: int
    """Of attention, for one query and one key, all layers."""

    @classmethod
    def of(cls, model: Any) -> Costs:
        """Count a transformer's costs; a multiplication and an addition are two operations."""
        config, head = model.config, model.get_output_embeddings().weight
        embedding = model.get_input_embeddings().weight
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        parameters = {id(one): one for one in model.parameters() if one is not embedding or one is head}.values()
        inner = sum(one.numel() for one in parameters if one.ndim == 2 and one is not head)
        return cls(
            weight_bytes=sum(one.nbytes for one in parameters),
            token_bytes=2 * config.num_hidden_layers * config.num_key_value_heads * size * head.itemsize,
            token_flops=2 * inner,
            head_flops=2 * head.numel(),
            pair_flops=4 * config.num_hidden_layers * config.num_attention_heads * size,
        )


@dataclass(frozen=True)
class Bound:
    """What a workload needs at least, with all requests at a time."""

    prefill_s: float
    decode_s: float
    steps: int
    step_bytes: float
    """Mean over the steps of decoding: weights, and the keys and values of all tokens so far."""

    @property
    def seconds(self) -> float:
        """Return the least time for all of it."""
        return self.prefill_s + self.decode_s


def bound_of(costs: Costs, prompts: Sequence[int], limits: Sequence[int], bandwidth: float, rate: float) -> Bound:
    """Return the bound of requests with prompts and completions of so many tokens.

    bandwidth: bytes/s; rate: FLOP/s. A pass takes what is longer, its reading or its multiplying.
    """
    length = np.array(prompts, np.float64)
    flops = costs.token_flops * length.sum() + costs.head_flops * len(prompts)
    flops += costs.pair_flops * (length * (length + 1) / 2).sum()
    prefill_s = max(flops / rate, costs.weight_bytes / bandwidth)
    steps = list(_steps(costs, prompts, limits))
    return Bound(
        prefill_s,
        sum(max(read / bandwidth, multiplied / rate) for read, multiplied in steps),
        len(steps),
        float(np.mean([read for read, _ in steps])) if steps else 0.0,
    )


def _steps(costs: Costs, prompts: Sequence[int], limits: Sequence[int]) -> Iterator[tuple[float, float]]:
    """Yield (bytes, FLOP) of every step of decoding; the first token comes from prefill, the last one is not read."""
    length, limit = np.array(prompts), np.array(limits)
    for step in range(1, int(limit.max())):
        keys = length[limit > step] + step
        read = costs.weight_bytes + costs.token_bytes * float(keys.sum())
        multiplied = (costs.token_flops + costs.head_flops) * len(keys) + costs.pair_flops * float(keys.sum())
        yield read, multiplied
