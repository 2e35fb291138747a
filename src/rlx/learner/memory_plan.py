"""What an update on rows of tokens does and how much memory a learner needs for it, worked out before it starts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import nn

from rlx.errors import ConfigError
from rlx.nets.chunked_head import CHUNK_NUMBERS, KEPT_NUMBERS
from rlx.nets.trunk import Trunk, unwrapped


class NetSize(NamedTuple):
    """What of a network decides how much memory it takes; all but `frozen_bytes` are counts of numbers."""

    learned: int
    """Parameters that are learned; they are kept in float32."""
    frozen: int
    """Those that are not: what an adapter stands on, a reference."""
    largest: int
    """Of the largest learned parameter."""
    layers: int
    hidden: int
    keys: int
    """Width of a layer's keys, and of its values: heads times head size; few heads may serve all queries."""
    inner: int
    """Width inside a layer's feed-forward part."""
    vocabulary: int
    frozen_bytes: int = 4
    """Bytes of each frozen parameter."""
    trunks: int = 1
    """2 where the value net has a trunk of its own."""

    @staticmethod
    def of(policy: nn.Module) -> NetSize:
        """Return the size of a TransformerPolicy or a RewardModel."""
        trunk: Trunk = policy.trunk  # type: ignore[assignment]
        config: Any = trunk.config
        learned = [p for p in policy.parameters() if p.requires_grad]
        frozen = [p for p in policy.parameters() if not p.requires_grad]
        heads = config.num_attention_heads
        head_size = getattr(config, "head_dim", None) or config.hidden_size // heads
        return NetSize(
            learned=sum(p.numel() for p in learned),
            frozen=sum(p.numel() for p in frozen),
            largest=max((p.numel() for p in learned), default=0),
            layers=config.num_hidden_layers,
            hidden=config.hidden_size,
            keys=(getattr(config, "num_key_value_heads", None) or heads) * head_size,
            inner=trunk.inner,
            vocabulary=unwrapped(trunk.causal_lm).get_input_embeddings().weight.shape[0],  # type: ignore[operator, union-attr]
            frozen_bytes=max((p.element_size() for p in frozen), default=4),
            trunks=1 if getattr(policy, "value_trunk", None) is None else 2,
        )


class UpdateSize(NamedTuple):
    """The batch of an update and how it is cut."""

    sequences: int
    longest: int
    """Tokens of the longest sequence there can be: prompt and completion."""
    minibatch_sequences: int
    max_tokens_per_microbatch: int
    activation_checkpointing: bool = False


@dataclass(frozen=True)
class Plan:
    """The memory of one learner, by what it is for, and the plan in words."""

    bytes: dict[str, float]
    text: str

    @property
    def total(self) -> float:
        """Return all bytes."""
        return sum(self.bytes.values())

    def __str__(self) -> str:
        return self.text


def memory_plan(net: NetSize, update: UpdateSize, *, available: float, num_learners: int, num_devices: int = 1) -> Plan:
    """Return the plan of every update; ConfigError, with figures and cures, where a device has too little memory.

    available: bytes that are free on each device. num_learners: at least 1, on `num_devices` devices in equal shares.
    """
    parts = _parts(net, update, max(update.max_tokens_per_microbatch, update.longest))
    on_device = -(-num_learners // num_devices)
    total = sum(parts.values())
    figures = ", ".join(f"{name} {_mb(size)}" for name, size in parts.items() if size)
    if total * on_device > available:
        who = "the learner needs" if num_learners == 1 else f"{on_device} learners need"
        raise ConfigError(
            f"{who} {_mb(total * on_device)} on a device with {_mb(available)} free ({figures}, each): "
            + "; or ".join(_cures(net, update, available / on_device, on_device))
            + "."
        )
    return Plan(parts, f"{_batches(update, num_learners)}\nmemory a learner: {_mb(total)} of "
                f"{_mb(available / on_device)} ({figures})")  # fmt: skip


def _parts(net: NetSize, update: UpdateSize, tokens: int) -> dict[str, float]:
    """Return bytes by purpose, for microbatches of `tokens` tokens.

    A layer keeps for its backward pass, of every token: inputs and outputs of two norms, queries before and after
    their rotation, attention's result (8 hidden sizes, with the sums), keys and values (4 key widths), and gate, its
    activation, the other branch and their product (4 inner widths).
    """
    layer = 8 * net.hidden + 4 * net.keys + 4 * net.inner
    ends = 3 * net.hidden
    kept = net.layers * net.hidden + layer if update.activation_checkpointing else net.layers * layer
    logits = tokens * net.vocabulary
    return {
        "weights": 4.0 * net.learned,
        "frozen weights": float(net.frozen_bytes * net.frozen),
        "gradient": 4.0 * (net.learned + net.largest),
        "Adam": 8.0 * net.learned,
        "activations": 4.0 * tokens * (kept + ends) * net.trunks,
        "head": 4.0 * (2 * min(logits, CHUNK_NUMBERS) + (logits if logits <= KEPT_NUMBERS else 0)),
    }


def _cures(net: NetSize, update: UpdateSize, available: float, on_device: int) -> list[str]:
    cures = []
    fits = _largest_that_fits(net, update, available)
    if fits:
        cures.append(f"set learners.max_tokens_per_microbatch={fits}")
    if not update.activation_checkpointing:
        cures.append("set learners.activation_checkpointing=true")
    if on_device > 1:
        cures.append("take fewer learners on a device")
    if net.learned > net.frozen:
        cures.append("learn an adapter (model.lora_rank) in place of all weights")
    return [*cures, "shorten the sequences", "take a smaller model"]


def _largest_that_fits(net: NetSize, update: UpdateSize, available: float) -> int:
    """Return the most tokens a microbatch may have, at least the longest sequence's; 0 where even that is too much."""
    low, high = update.longest - 1, update.max_tokens_per_microbatch
    while low + 1 < high:
        middle = (low + high) // 2
        fits = sum(_parts(net, update, middle).values()) <= available
        low, high = (middle, high) if fits else (low, middle)
    return low if low >= update.longest else 0


def _batches(update: UpdateSize, num_learners: int) -> str:
    each = -(-update.minibatch_sequences // num_learners)
    minibatches = -(-update.sequences // update.minibatch_sequences)
    rows = min(each, max(1, update.max_tokens_per_microbatch // update.longest))
    microbatches = -(-each // rows)
    of_learners = "" if num_learners == 1 else f" on {num_learners} learners, {each} sequences a minibatch each"
    return (
        f"an update: {update.sequences} sequences in {minibatches} minibatches of {update.minibatch_sequences}"
        f"{of_learners}, in microbatches of at most {update.max_tokens_per_microbatch} tokens: {microbatches} "
        f"microbatch{'es' * (microbatches > 1)} of {rows} rows at the longest ({update.longest} tokens)"
    )


def _mb(size: float) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e10 else f"{size / 1e6:.0f} MB"
