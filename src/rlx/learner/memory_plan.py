"""What an update on rows of tokens does and how much memory a run on text needs, worked out before it starts."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import nn

from rlx.errors import ConfigError
from rlx.generation.slots import reserved
from rlx.nets.chunked_head import CHUNK_NUMBERS, KEPT_NUMBERS
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
    def of(parameters: Iterable[nn.Parameter], *, learns: bool = False) -> Cost:
        """Return the cost of these; learns: where they are trained, and not only read."""
        parameters = list(parameters)
        learned = sum(p.numel() for p in parameters if p.requires_grad)
        return Cost(
            parameters=sum(p.numel() for p in parameters),
            weights=sum(p.numel() * (LEARNED_BYTES if p.requires_grad else p.element_size()) for p in parameters),
            gradient=LEARNED_BYTES * learned * learns,
            optimizer=ADAM_BYTES * learned * learns,
        )

    def shared_by(self, count: int) -> Cost:
        """Return the cost in each of `count` processes that hold a share of every parameter."""
        parameters, *sizes = self
        return Cost(parameters, *(-(-size // count) for size in sizes))


class TrunkSize(NamedTuple):
    """The sizes of a language model's layers."""

    layers: int
    hidden: int
    keys: int
    """Width of a layer's keys, and of its values: heads times head size; few heads may serve all queries."""
    inner: int
    """Width inside a layer's feed-forward part."""

    @staticmethod
    def of(trunk: Trunk) -> TrunkSize:
        """Return the sizes that a trunk's configuration names."""
        config = trunk.config
        heads = config.num_attention_heads
        head_size = getattr(config, "head_dim", None) or config.hidden_size // heads
        key_heads = getattr(config, "num_key_value_heads", None) or heads
        return TrunkSize(config.num_hidden_layers, config.hidden_size, key_heads * head_size, trunk.inner)

    def kept(self, activation_checkpointing: bool) -> int:
        """Return how many numbers are kept of every token for the backward pass.

        Of a layer: inputs and outputs of two norms, queries before and after their rotation, attention's result (8
        hidden sizes, with the sums), keys and values (4 key widths), and gate, its activation, the other branch and
        their product (4 inner widths).
        """
        layer = 8 * self.hidden + 4 * self.keys + 4 * self.inner
        ends = 3 * self.hidden
        return ends + (self.layers * self.hidden + layer if activation_checkpointing else self.layers * layer)


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

    @staticmethod
    def of(policy: nn.Module, shares: int = 1) -> NetSize:
        """Return the size of a TransformerPolicy or a RewardModel."""
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


@dataclass(frozen=True)
class Plan:
    """The memory of one learner and one generator, by what it is for; the plan in words, and what makes it less."""

    bytes: dict[str, float]
    generator_bytes: dict[str, float]
    """Empty where nobody generates."""
    updates: str
    memory: str
    less_in_updates: tuple[str, ...]
    less_in_generation: tuple[str, ...]

    @property
    def total(self) -> float:
        """Return all bytes of a learner."""
        return sum(self.bytes.values())

    def __str__(self) -> str:
        return f"{self.updates}\n{self.memory}"


def memory_plan(
    net: NetSize,
    update: UpdateSize,
    *,
    available: float,
    num_learners: int,
    num_devices: int = 1,
    generators: Generators | None = None,
) -> Plan:
    """Return the plan of a run; ConfigError, with figures and cures, where a device has too little memory.

    available: bytes that are free on each device. num_learners: at least 1, on `num_devices` devices in equal shares.
    """
    run = _Run(net, update, available, num_learners, -(-num_learners // num_devices), generators)
    run.check_learners()
    run.check_generators()
    return Plan(
        run.parts,
        {} if generators is None else generators.parts(run.trunk),
        _batches(update, num_learners),
        run.memory(),
        tuple(run.less_in_updates(_lower_microbatch(update), _lower_slots(generators))),
        tuple(run.less_in_generation(_lower_slots(generators))),
    )


@dataclass(frozen=True)
class _Run:
    """A run's sizes, put beside the memory that there is."""

    net: NetSize
    update: UpdateSize
    available: float
    num_learners: int
    on_device: int
    """Learners on one device."""
    generators: Generators | None

    @property
    def trunk(self) -> TrunkSize:
        return self.net.trunks[0]

    @property
    def parts(self) -> dict[str, float]:
        return _parts(self.net, self.update, max(self.update.max_tokens_per_microbatch, self.update.longest))

    @property
    def beside(self) -> float:
        """Bytes of the generators on the learners' device."""
        g = self.generators
        return 0.0 if g is None or g.available is not None else g.total(self.trunk)

    @property
    def each(self) -> float:
        """Bytes that a learner may take."""
        return (self.available - self.beside) / self.on_device

    def memory(self) -> str:
        lines = [f"memory a learner: {_sum(self.parts)} of {in_words(self.each)} ({_figures(self.parts)})"]
        if (g := self.generators) is not None:
            parts = g.parts(self.trunk)
            of = "" if g.available is None else f" of {in_words(g.available / g.count)}"
            lines.append(f"memory a generator: {_sum(parts)}{of} ({_figures(parts)}; {g.slots} slots of {g.longest} "
                         "tokens)")  # fmt: skip
        return "\n".join(lines)

    def check_learners(self) -> None:
        """Raise ConfigError where learners, and generators on their device, do not fit."""
        learners = self.on_device * sum(self.parts.values())
        if learners + self.beside <= self.available:
            return
        who = ["the learner" if self.num_learners == 1 else f"{self.on_device} learners"]
        figures = f"{_figures(self.parts)}, each"
        if self.beside and (g := self.generators) is not None:
            who.append("the generator" if g.count == 1 else f"{g.count} generators")
            figures += f"; of a generator {_figures(g.parts(self.trunk))}"
        verb = "needs" if who == ["the learner"] else "need"
        fits = _largest_that_fits(self.net, self.update, self.each)
        slots = self._slots_that_fit(self.available - learners) if self.beside else 0
        cures = self.less_in_updates(
            f"set learners.max_tokens_per_microbatch={fits}" if fits else "",
            f"set generation.max_slots={slots}" if slots else "",
        )
        raise ConfigError(
            f"{' and '.join(who)} {verb} {in_words(learners + self.beside)} on a device with "
            f"{in_words(self.available)} free ({figures}): {'; or '.join(cures)}."
        )

    def check_generators(self) -> None:
        """Raise ConfigError where generators do not fit on a device of their own."""
        g = self.generators
        if g is None or g.available is None or g.total(self.trunk) <= g.available:
            return
        who = "the generator needs" if g.count == 1 else f"{g.count} generators need"
        slots = self._slots_that_fit(g.available)
        cures = self.less_in_generation(f"set generation.max_slots={slots}" if slots else "")
        raise ConfigError(
            f"{who} {in_words(g.total(self.trunk))} on a device with {in_words(g.available)} free "
            f"({_figures(g.parts(self.trunk))}, each): {'; or '.join(cures)}."
        )

    def less_in_updates(self, microbatch: str, slots: str) -> list[str]:
        """Return what makes a learner smaller, beginning with what to do about microbatches and slots."""
        net = self.net
        cures = {
            microbatch: bool(microbatch),
            "set learners.activation_checkpointing=true": not self.update.activation_checkpointing,
            slots: bool(slots) and self.beside > 0,
            "set learners.sharding=full": self.num_learners > 1 and net.shares == 1,
            "take fewer learners on a device": self.on_device > 1,
            "learn an adapter (model.lora_rank) in place of all weights": net.learned > net.frozen,
        }
        return [cure for cure, helps in cures.items() if helps] + ["shorten the sequences", "take a smaller model"]

    def less_in_generation(self, slots: str) -> list[str]:
        """Return what makes a generator smaller, beginning with what to do about slots."""
        several = self.generators is not None and self.generators.count > 1
        cures = {
            slots: bool(slots),
            "lower token_runners.num_token_runners": several,
            "lower generation.max_new_tokens": True,
        }
        return [cure for cure, helps in cures.items() if helps] + ["take a smaller model"]

    def _slots_that_fit(self, available: float) -> int:
        return 0 if self.generators is None else self.generators.most_slots(self.trunk, available)


def in_words(size: float) -> str:
    """Return bytes in a unit that suits them."""
    if size >= 1e10:
        return f"{size / 1e9:.1f} GB"
    if size >= 1e6:
        return f"{size / 1e6:.0f} MB"
    return f"{size / 1e3:.0f} kB" if size >= 1e3 else f"{size:.0f} B"


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


def _parts(net: NetSize, update: UpdateSize, tokens: int) -> dict[str, float]:
    """Return bytes by purpose, for microbatches of `tokens` tokens."""
    kept = sum(trunk.kept(update.activation_checkpointing) for trunk in net.trunks)
    logits = tokens * net.vocabulary
    return {
        "weights": LEARNED_BYTES * net.learned / net.shares,
        "frozen weights": net.frozen_bytes * net.frozen / net.shares,
        "gradient": LEARNED_BYTES * (net.learned / net.shares + (net.largest if net.shares == 1 else 0)),
        "Adam": ADAM_BYTES * net.learned / net.shares,
        **({"gathered layers": float(net.gathered)} if net.gathered else {}),
        "activations": 4.0 * tokens * kept,
        "head": 4.0 * (2 * min(logits, CHUNK_NUMBERS) + (logits if logits <= KEPT_NUMBERS else 0)),
    }


def _lower_microbatch(update: UpdateSize) -> str:
    """Return the advice to lower it; none where a row that is longer fills it alone, as rows are not cut."""
    tokens = update.max_tokens_per_microbatch
    return f"lower learners.max_tokens_per_microbatch={tokens}" if tokens > update.longest else ""


def _lower_slots(generators: Generators | None) -> str:
    """Return the advice to lower them, below what is in use: there may be fewer samples than slots."""
    if generators is None:
        return "lower generation.max_slots"
    return f"lower generation.max_slots below {generators.slots}" if generators.slots > 1 else ""


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


def _figures(parts: dict[str, float]) -> str:
    return ", ".join(f"{name} {in_words(size)}" for name, size in parts.items() if size)


def _sum(parts: dict[str, float]) -> str:
    return in_words(sum(parts.values()))
