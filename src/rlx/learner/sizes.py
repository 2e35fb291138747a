"""The sizes that decide how much memory a run on text takes: of models, of an update, of those who generate."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import nn

from rlx.generation.slots import reserved
from rlx.nets.transformer import decoder_layers
from rlx.nets.trunk import Trunk, unwrapped

LEARNED_BYTES = 4
"""Of each learned parameter, as FlatParameters keeps it, and of its gradient."""
ADAM_BYTES = 8
"""Of the two moments of each."""


class Cost(NamedTuple):
    """What a model takes in a process: a count of numbers, and bytes."""

    parameters: int
    weights: int
    gradient: int = 0
    optimizer: int = 0

    @staticmethod
    def of(
        parameters: Iterable[nn.Parameter], *, learns: bool = False, shares: int = 1, offloads: bool = False
    ) -> Cost:
        """Return the cost of these; learns: where they are trained, and not only read.

        shares: processes that hold a share of every parameter, of which this is the cost in each. offloads: the
        optimizer keeps a buffer of its own, on the same device: see `offloaded`.
        """
        parameters = list(parameters)
        learned = [p for p in parameters if p.requires_grad]
        count = sum(p.numel() for p in learned)
        if learns:
            weights = LEARNED_BYTES * count + (copied_bytes(learned, offloads) if shares == 1 else 0)
            weights += sum(p.numel() * p.element_size() for p in parameters if not p.requires_grad)
        else:
            weights = sum(p.numel() * p.element_size() for p in parameters)
        sizes = (weights, LEARNED_BYTES * count * learns, ADAM_BYTES * count * learns)
        return Cost(sum(p.numel() for p in parameters), *(-(-size // shares) for size in sizes))

    @staticmethod
    def offloaded(parameters: Iterable[nn.Parameter]) -> tuple[Cost, Cost]:
        """Return the cost on a device, and in host memory, of parameters that are stepped there.

        The host has the float32 buffer, what it is rounded in for the device, the gradient that comes, and the moments.
        """
        parameters = list(parameters)
        learned = [p for p in parameters if p.requires_grad]
        count = sum(p.numel() for p in learned)
        read = sum(p.numel() * p.element_size() for p in parameters)
        on_device = Cost(sum(p.numel() for p in parameters), read, LEARNED_BYTES * count)
        weights = LEARNED_BYTES * count + copied_bytes(learned)
        return on_device, Cost(count, weights, LEARNED_BYTES * count, ADAM_BYTES * count)


class TrunkSize(NamedTuple):
    """The sizes of a language model's layers."""

    layers: int
    hidden: int
    keys: int
    """Width of a layer's keys, and of its values: heads times head size; few heads may serve all queries."""
    inner: int
    """Width inside a layer's feed-forward part."""
    queries: int = 0
    """Width of a layer's queries, and of what attention makes of them: heads times head size; 0: the hidden size."""
    head_norms: bool = False
    """Whether queries and keys are normalised, each head by itself."""

    @staticmethod
    def of(trunk: Trunk) -> TrunkSize:
        """Return the sizes that a trunk's configuration names."""
        config = trunk.config
        heads = config.num_attention_heads
        head_size = getattr(config, "head_dim", None) or config.hidden_size // heads
        key_heads = getattr(config, "num_key_value_heads", None) or heads
        head_norms = any(name.endswith("q_norm") for name, _ in trunk.decoder.named_modules())
        widths = (config.hidden_size, key_heads * head_size, trunk.inner, heads * head_size)
        return TrunkSize(config.num_hidden_layers, *widths, head_norms)

    def kept_bytes(self, activation_checkpointing: bool, number_bytes: int = 4) -> int:
        """Return how many bytes are kept of every token for the backward pass, of numbers of `number_bytes`.

        Of a layer: inputs and outputs of two norms with the sums (5 hidden sizes), queries before and after their
        rotation and attention's result (3 query widths), keys and values (4 key widths), and gate, its activation, the
        other branch and their product (4 inner widths). What a norm reads it keeps in float32.
        """
        queries = self.queries or self.hidden
        in_heads = queries + self.keys if self.head_norms else 0
        layer = 5 * self.hidden + 3 * queries + 4 * self.keys + 4 * self.inner + 2 * in_heads
        normed = (4 - number_bytes) * (2 * self.hidden + in_heads)
        of_layer = number_bytes * layer + normed
        ends = (3 * number_bytes + 4 - number_bytes) * self.hidden
        if activation_checkpointing:
            return ends + number_bytes * self.layers * self.hidden + of_layer
        return ends + self.layers * of_layer


class NetSize(NamedTuple):
    """What of a network decides how much memory it takes; all but `frozen_bytes` are counts of numbers."""

    learned: int
    """Parameters that are learned."""
    frozen: int
    """Those that are not: what an adapter stands on, a reference."""
    largest: int
    """Of the largest learned parameter."""
    vocabulary: int
    trunks: tuple[TrunkSize, ...]
    """That of the policy, and that of a value net which has its own."""
    frozen_bytes: int = 4
    """Bytes of each frozen parameter."""
    shares: int = 1
    """Learners that share out every parameter, its gradient and its moments; 1: each has them whole."""
    gathered: int = 0
    """Bytes of what is whole for a while where they do: parameters, and their gradient before it is shared out."""
    copied: int = 0
    """Bytes of what is computed with where that is not the float32 buffer itself: in bfloat16, say."""
    number_bytes: int = 4
    """Bytes of a number that is kept for the backward pass."""
    has_host: bool = False
    """Whether the host's memory is another than the device's."""
    host: Cost | None = None
    """What is there in the device's place: the float32 buffer and the moments."""

    @staticmethod
    def of(policy: nn.Module, shares: int = 1, *, offloads: bool = False, has_host: bool = False) -> NetSize:
        """Return the size of a TransformerPolicy or a RewardModel.

        offloads: its optimizer works in host memory; has_host: that is another memory than the device's.
        """
        trunk: Any = policy.trunk
        trunks = [one for one in (trunk, getattr(policy, "value_trunk", None)) if one is not None]
        learned = [p for p in policy.parameters() if p.requires_grad]
        frozen = [p for p in policy.parameters() if not p.requires_grad]
        return NetSize(
            learned=sum(p.numel() for p in learned),
            frozen=sum(p.numel() for p in frozen),
            largest=max((p.numel() for p in learned), default=0),
            vocabulary=unwrapped(trunk.causal_lm).get_input_embeddings().weight.shape[0],  # type: ignore[operator, union-attr]
            trunks=tuple(map(TrunkSize.of, trunks)),
            frozen_bytes=max((p.element_size() for p in frozen), default=4),
            shares=shares,
            gathered=_gathered(policy) if shares > 1 else 0,
            copied=copied_bytes(learned, offloads) if shares == 1 else 0,
            number_bytes=number_bytes(policy.model),  # type: ignore[arg-type]
            has_host=has_host,
            host=Cost.offloaded(learned)[1] if offloads and has_host else None,
        )


class UpdateSize(NamedTuple):
    """The batch of an update and how it is cut."""

    sequences: int
    longest: int
    """Tokens of the longest sequence there can be: prompt and completion."""
    minibatch_sequences: int
    max_tokens_per_microbatch: int
    activation_checkpointing: bool = False


class Generators(NamedTuple):
    """Those who generate at one time, and what each of them keeps."""

    slots: int
    """Sequences that one works at together."""
    longest: int
    """Tokens of the longest: prompt and completion."""
    number_bytes: int = 4
    """Bytes of a number of keys and values."""
    exact: bool = False
    count: int = 1
    weights: int = 0
    """Bytes of each one's own copy of the model; 0 where it reads the learner's."""
    available: float | None = None
    """Bytes that are free on a device of their own; None: they are on that of the learners."""

    def parts(self, trunk: TrunkSize) -> dict[str, float]:
        """Return the bytes of one by purpose, for a model with this trunk."""
        slots, length = reserved(self.slots, self.longest, self.exact)
        cache = slots * length * 2 * trunk.layers * trunk.keys * self.number_bytes
        return {"weights": float(self.weights), "keys and values": float(cache)}

    def total(self, trunk: TrunkSize) -> float:
        """Return the bytes of all of them."""
        return self.count * sum(self.parts(trunk).values())

    def most_slots(self, trunk: TrunkSize, available: float) -> int:
        """Return the most slots for which all of them fit, less than there are; 0 where even one is too much."""
        low, high = 0, self.slots
        while low + 1 < high:
            middle = (low + high) // 2
            fits = self._replace(slots=middle).total(trunk) <= available
            low, high = (middle, high) if fits else (low, middle)
        return low


def _gathered(policy: nn.Module) -> int:
    """Return the bytes of what is whole at once: all outside of the layers, a layer, and the one that comes next."""
    layers = {layer: list(layer.parameters()) for layer in decoder_layers(policy)}
    reference = getattr(policy, "reference", None)
    apart = {id(p) for parameters in layers.values() for p in parameters}
    apart |= set() if reference is None else {id(p) for p in reference.parameters()}
    outside = [p for p in policy.parameters() if id(p) not in apart]
    layer = max(layers.values(), key=lambda parameters: sum(p.numel() for p in parameters), default=[])

    def weights(parameters: Iterable[nn.Parameter]) -> int:
        return sum(p.numel() * p.element_size() for p in parameters)

    learned_outside, learned_layer = ([p for p in parameters if p.requires_grad] for parameters in (outside, layer))
    gradients = weights(learned_outside) + weights(learned_layer)
    summed = LEARNED_BYTES * max(sum(p.numel() for p in learned) for learned in (learned_outside, learned_layer))
    return weights(outside) + 2 * weights(layer) + gradients + summed


def copied_bytes(learned: Iterable[nn.Parameter], offloads: bool = False) -> int:
    """Return the bytes of the copy that FlatParameters makes of these: of those in bfloat16, or of all."""
    return sum(p.numel() * p.element_size() for p in learned if offloads or p.dtype == torch.bfloat16)


def number_bytes(model: nn.Module) -> int:
    """Return the bytes of a number that a language model computes with, whatever its adapter does."""
    embeddings: Any = unwrapped(model).get_input_embeddings()  # type: ignore[operator, union-attr]
    return embeddings.weight.element_size()
