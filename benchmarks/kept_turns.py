"""What keys and values kept from turn to turn could give: the time in which conversations are read anew.

    python benchmarks/kept_turns.py                           # into docs/benchmarks.md
    python benchmarks/kept_turns.py --rounds 1 --out /tmp     # a quick look

Before each turn the generator reads the whole conversation. Were its keys and values kept, it would read only what was
said since. Both are timed with the small Llama of generation.py, each turn of all conversations together; what is new
is read as a prompt of its own, without what stands before it, so the gain is what there could be at most. For large
models it is counted: what a device of so many FLOP/s and bytes/s needs at least.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers
from decode_bound import Costs, bound_of
from generation import ALPHABET, SIZES
from report import DOCS, busy_cores, describe, machine, markdown_table, publish
from transformers import LlamaConfig, LlamaForCausalLM

from rlx.generation.generator import Generator
from rlx.generation.request import Request
from rlx.generation.slots import Slots

CONVERSATIONS, SAMPLES = 128, 8
"""Conversations that go on together, and how many of them are about one prompt, which is read once."""
LARGE = {
    "0.6 billion": (1024, 3072, 28, 16, 8, 151936),
    "8 billion": (4096, 14336, 32, 32, 8, 128256),
}
"""Shapes: hidden and intermediate size, layers, heads, heads of keys, vocabulary; 128 numbers a head."""
BANDWIDTH, RATE = 4.8e12, 989e12
"""Bytes/s and FLOP/s in bfloat16 of an H200, by its data sheet."""


class Case(NamedTuple):
    """A kind of conversation, in tokens."""

    name: str
    prompt: int
    turns: int
    drawn: int
    """Of a turn of the model."""
    said: int
    """Of an answer of the environment."""

    def read(self, turn: int) -> int:
        """Return what is read before a turn."""
        return self.prompt + turn * (self.drawn + self.said)

    def new(self, turn: int) -> int:
        """Return what of it has no keys and values yet: the answer, and the token before it, which was only drawn."""
        return self.said + 1 if turn else self.prompt


def readers(turn: int) -> int:
    """Return how many rows are read before a turn: the samples of a prompt read it together."""
    return CONVERSATIONS if turn else CONVERSATIONS // SAMPLES


CASES = (
    Case("a game, 4 turns of 1", 1, 4, 1, 1),
    Case("a tool, 2 turns of 16", 32, 2, 16, 16),
    Case("tools, 4 turns of 32", 64, 4, 32, 32),
    Case("long answers, 4 turns of 16", 64, 4, 16, 96),
)
LARGE_CASES = (
    Case("tools, 4 turns of 256", 512, 4, 256, 256),
    Case("long answers, 4 turns of 128", 512, 4, 128, 1024),
    Case("an agent, 16 turns of 128", 1024, 16, 128, 512),
)


def timed(work: Callable[[], object]) -> tuple[float, float]:
    """Return the processor time of some work, and the part of it that went into reading prompts."""
    spent, prefill = Counter[str](), Slots.prefill

    def watched(slots: Slots, prompts: Any, first: int) -> torch.Tensor:
        began = time.process_time()
        logits = prefill(slots, prompts, first)
        spent["prefill"] += time.process_time() - began  # type: ignore[assignment]
        return logits

    Slots.prefill = watched  # type: ignore[method-assign]
    began = time.process_time()
    try:
        work()
    finally:
        Slots.prefill = prefill
    return time.process_time() - began, float(spent["prefill"])


def requests_of(case: Case, turn: int, lengths: Callable[[int], int]) -> list[Request]:
    """Return what a turn of all conversations asks for."""
    rows = readers(turn)
    prompts = np.random.default_rng(turn).integers(0, len(ALPHABET), (rows, lengths(turn)))
    return [Request(prompt.tolist(), CONVERSATIONS // rows, case.drawn, seed) for seed, prompt in enumerate(prompts)]


def measure(generator: Generator, case: Case) -> tuple[float, float, float]:
    """Return the seconds of all turns, those of reading in them, and those of reading only what is new."""
    total = read = new = 0.0
    for turn in range(case.turns):
        seconds, reading = timed(lambda turn=turn: generator.generate(requests_of(case, turn, case.read)))
        total, read = total + seconds, read + reading
        new += timed(lambda turn=turn: generator.generate(requests_of(case, turn, case.new)))[1]
    return total, read, new


def counted(costs: Costs, case: Case) -> tuple[float, float, float]:
    """Return what `measure` does, at the least that the device takes."""
    total = read = new = 0.0
    for turn in range(case.turns):
        rows, fresh, past = readers(turn), case.new(turn), case.read(turn) - case.new(turn)
        lengths, limits = [case.read(turn)] * CONVERSATIONS, [case.drawn] * CONVERSATIONS
        reading = bound_of(costs, lengths[:rows], limits[:rows], BANDWIDTH, RATE).prefill_s
        pairs = fresh * past + fresh * (fresh + 1) / 2
        flops = rows * (costs.token_flops * fresh + costs.head_flops + costs.pair_flops * pairs)
        total += reading + bound_of(costs, lengths, limits, BANDWIDTH, RATE).decode_s
        read += reading
        new += max(flops / RATE, (costs.weight_bytes + rows * past * costs.token_bytes) / BANDWIDTH)
    return total, read, new


def large_model(shape: tuple[int, ...]) -> LlamaForCausalLM:
    """Return a model without numbers."""
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    config = LlamaConfig(**dict(zip(names, shape, strict=False)), vocab_size=shape[-1], head_dim=128)
    with torch.device("meta"):
        return LlamaForCausalLM(config).to(torch.bfloat16)


def page(record: dict[str, Any]) -> str:
    """Return the table."""
    rows = []
    for model, name, times in record["found"]:
        case = next(one for one in (*CASES, *LARGE_CASES) if one.name == name)
        read, new = (sum(readers(turn) * of(turn) for turn in range(case.turns)) for of in (case.read, case.new))
        shares = sorted(read_s / total for total, read_s, _ in times)
        gains = sorted(total / (total - read_s + new_s) for total, read_s, new_s in times)
        drawn = CONVERSATIONS * case.turns * case.drawn
        figures = f"{read / drawn:.1f}", f"{new / drawn:.1f}", f"{median(shares):.2f}", f"{median(gains):.2f}"
        rows.append([model, name, *figures, f"{gains[0]:.2f} to {gains[-1]:.2f}"])
    header = [
        "model",
        "conversations",
        "read a drawn token",
        "of it new",
        "share of the time",
        "speed if kept",
        "range",
    ]
    return (
        f"{markdown_table(header, rows)}\n\n`{record['command']}`: {CONVERSATIONS} conversations at a time, {SAMPLES} "
        f"about each prompt; processor time, 1 torch thread, median of {record['rounds']} rounds; torch "
        f"{torch.__version__}, transformers {transformers.__version__}. Models of billions are counted and not run. "
        f"{describe(record['machine'])} Cores busy with other work before: {record['busy_cores_before'] or 0:.2f}."
    )


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=DOCS, help="folder of benchmarks.md and .json (default: docs)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    record: dict[str, Any] = {
        "command": " ".join(["python benchmarks/kept_turns.py", *sys.argv[1:]]),
        "rounds": options.rounds,
    }
    record |= {"machine": machine(), "busy_cores_before": busy_cores(), "found": []}
    torch.manual_seed(0)
    generator = Generator(LlamaForCausalLM(LlamaConfig(vocab_size=len(ALPHABET), **SIZES)).eval())
    for case in CASES:
        measure(generator, case)  # does not count
        times = [measure(generator, case) for _ in range(options.rounds)]
        record["found"].append(("4 x 128", case.name, times))
        print(*record["found"][-1], flush=True)
    for name, shape in LARGE.items():
        costs = Costs.of(large_model(shape))
        record["found"] += [(name, case.name, [counted(costs, case)]) for case in LARGE_CASES]
    publish(options.out, "kept turns", record, page(record))
    print(page(record))


if __name__ == "__main__":
    main()
