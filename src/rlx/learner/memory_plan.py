"""What an update on rows of tokens does and how much memory a run on text needs, worked out before it starts."""

from __future__ import annotations

from dataclasses import dataclass

from rlx.errors import ConfigError
from rlx.learner.sizes import ADAM_BYTES, LEARNED_BYTES, Generators, NetSize, TrunkSize, UpdateSize
from rlx.nets.chunked_head import CHUNK_NUMBERS, KEPT_NUMBERS


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


TO_TAKE = "to take, by learners.max_memory_gb or what is free"


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
        if self.net.host is not None:
            _, weights, gradient, moments = map(float, self.net.host)
            parts = {"weights": weights, "gradient": gradient, "Adam": moments}
            lines.append(f"host memory a learner: {_sum(parts)} ({_figures(parts)})")
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
            f"{in_words(self.available)} {TO_TAKE} ({figures}): {'; or '.join(cures)}."
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
            f"{who} {in_words(g.total(self.trunk))} on a device with {in_words(g.available)} {TO_TAKE} "
            f"({_figures(g.parts(self.trunk))}, each): {'; or '.join(cures)}."
        )

    def less_in_updates(self, microbatch: str, slots: str) -> list[str]:
        """Return what makes a learner smaller, beginning with what to do about microbatches and slots."""
        net = self.net
        cures = {
            microbatch: bool(microbatch),
            "set learners.activation_checkpointing=true": not self.update.activation_checkpointing,
            slots: bool(slots) and self.beside > 0,
            "set learners.optimizer_offload=true": net.has_host and net.host is None and net.shares == 1,
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


def _parts(net: NetSize, update: UpdateSize, tokens: int) -> dict[str, float]:
    """Return bytes by purpose, for microbatches of `tokens` tokens."""
    kept = sum(trunk.kept_bytes(update.activation_checkpointing, net.number_bytes) for trunk in net.trunks)
    logits = tokens * net.vocabulary
    # The head sums its gradient up in float32, and hands it on in the dtype of the weights.
    largest = net.largest * (LEARNED_BYTES + net.number_bytes % LEARNED_BYTES) if net.shares == 1 else 0
    return {
        "weights": (0 if net.host else LEARNED_BYTES * net.learned / net.shares) + net.copied,
        "frozen weights": net.frozen_bytes * net.frozen / net.shares,
        "gradient": LEARNED_BYTES * net.learned / net.shares + largest,
        "Adam": 0 if net.host else ADAM_BYTES * net.learned / net.shares,
        **({"gathered layers": float(net.gathered)} if net.gathered else {}),
        "activations": float(tokens * kept),
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
