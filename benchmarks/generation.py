"""Compares rlx's generator with `generate` and continuous batching (`generate_batch`) of transformers, on one model.

    python benchmarks/generation.py                           # into docs/benchmarks.md
    python benchmarks/generation.py --rounds 1 --out /tmp     # a quick look

All generate with the same small Llama, in one process, and take turns (A B C A B C). Every side
has generated once before it counts.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import transformers
from report import DOCS, busy_cores, describe, machine, markdown_table, publish
from transformers import LlamaConfig, LlamaForCausalLM

from rlx.generation.generator import Generator
from rlx.generation.request import Request, Sampling

SIDES = ("rlx", "generate", "generate_batch")
SIZES = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4}
ALPHABET = "0123456789+=_^$ "
"""16 characters, as of the task of addition; the first token of a prompt is ^, and _ is padding."""
PAD = ALPHABET.index("_")
RESULT_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class Case:
    """Prompts, and how many tokens are wanted after each."""

    name: str
    prompts: list[list[int]]
    limits: list[int]
    samples: int = 1
    aim: float | None = None
    """How many times faster than the better one of the others rlx is to be."""
    slow_rounds: int | None = None
    """Rounds of continuous batching; None for all. It takes many times the others' time."""

    @property
    def tokens(self) -> int:
        """Tokens that were asked for."""
        return self.samples * sum(self.limits)


def cases() -> list[Case]:
    """Return what is measured."""
    rng = np.random.default_rng(0)
    sums = [f"^{a}+{b}=" for a, b in rng.integers(0, 100, (32, 2))]
    addition = [[ALPHABET.index(character) for character in text] for text in sums]
    ragged = [rng.integers(len(ALPHABET), size=length).tolist() for length in rng.integers(4, 33, 256)]
    limits = rng.integers(1, 65, 256).tolist()
    return [
        Case("32 prompts x 8 samples, 6 new tokens", addition, [6] * 32, samples=8, aim=3.0),
        Case("256 ragged prompts, 1 to 64 new tokens", ragged, limits, aim=1.7, slow_rounds=1),
        Case("32 prompts x 8 samples, 64 new tokens", addition, [64] * 32, samples=8, slow_rounds=1),
    ]


def sides(model: LlamaForCausalLM, case: Case) -> dict[str, Callable[[], int]]:
    """Return a function of each side that generates once and returns how many of the wanted tokens it made."""
    generator = Generator(model)
    return {
        "rlx": lambda: with_rlx(generator, case),
        "generate": lambda: with_generate(model, case),
        "generate_batch": lambda: with_continuous_batching(model, case),
    }


def with_rlx(generator: Generator, case: Case) -> int:
    """Generate with rlx, log-probabilities included."""
    requests = [
        Request(prompt, n=case.samples, max_new_tokens=limit, seed=number)
        for number, (prompt, limit) in enumerate(zip(case.prompts, case.limits, strict=True))
    ]
    return sum(len(one.tokens) for completions in generator.generate(requests, Sampling()) for one in completions)


def with_generate(model: LlamaForCausalLM, case: Case) -> int:
    """Generate in one left-padded batch, which is as long as its longest row; without log-probabilities."""
    rows = [prompt for prompt in case.prompts for _ in range(case.samples)]
    longest = max(map(len, rows))
    ids = torch.tensor([[PAD] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    options = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "pad_token_id": PAD}
    made = model.generate(ids, attention_mask=mask, max_new_tokens=max(case.limits), eos_token_id=None, **options)
    assert made.shape == (len(rows), longest + max(case.limits))
    return case.tokens


def with_continuous_batching(model: LlamaForCausalLM, case: Case) -> int:
    """Generate with what `generate_batch` is made of, so that every row can have its own limit."""
    config = transformers.GenerationConfig(
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, pad_token_id=PAD, eos_token_id=-1, max_new_tokens=64
    )
    rows = [
        (prompt, limit) for prompt, limit in zip(case.prompts, case.limits, strict=True) for _ in range(case.samples)
    ]
    tokens, waiting = 0, len(rows)
    with model.continuous_batching_context_manager(
        generation_config=config, block=True, timeout=5, warmup=False
    ) as manager:
        for prompt, limit in rows:
            manager.add_request(prompt, max_new_tokens=limit)
        while waiting:
            result = manager.get_result(timeout=RESULT_TIMEOUT_S)
            if result is None:
                raise TimeoutError(f"continuous batching gave nothing for {RESULT_TIMEOUT_S:g} s.")
            if result.is_finished():
                tokens, waiting = tokens + len(result.generated_tokens), waiting - 1
    assert tokens == case.tokens
    return tokens


def measure(model: LlamaForCausalLM, case: Case, rounds: int, names: list[str]) -> list[dict[str, float]]:
    """Return each round's seconds of every side."""
    ways = {name: way for name, way in sides(model, case).items() if name in names}
    found: list[dict[str, float]] = []
    for number in range(-1, rounds):
        results: dict[str, float] = {}
        for name, way in ways.items():
            if name == "generate_batch" and case.slow_rounds is not None and not 0 <= number < case.slow_rounds:
                continue
            gc.collect()
            began = time.perf_counter(), time.process_time()
            try:
                tokens = way()
            except TimeoutError as error:
                print(f"{case.name}, {name}: {error}", flush=True)
                continue
            results[name], results[f"{name} cpu"] = time.perf_counter() - began[0], time.process_time() - began[1]
            assert tokens == case.tokens
        if number >= 0:
            found.append(results)
            print(case.name, {name: f"{value:.3f}" for name, value in results.items()}, flush=True)
    return found


def page(record: dict[str, Any]) -> str:
    """Return the table: medians over the rounds, and the median of the ratios within them."""
    rows = []
    for case in record["cases"]:
        rounds = case["rounds"]
        row = [case["name"]]
        for name in SIDES:
            seconds = [one[name] for one in rounds if name in one]
            row += (
                [f"{1000 * median(seconds):,.0f}", f"{case['tokens'] / median(seconds):,.0f}"] if seconds else ["", ""]
            )
        ratios, cpu = (
            [min(one[f"{name}{kind}"] for name in SIDES[1:] if name in one) / one[f"rlx{kind}"] for one in rounds]
            for kind in ("", " cpu")
        )
        row += [f"{median(ratios):.2f}", f"{min(ratios):.2f} to {max(ratios):.2f}", f"{median(cpu):.2f}"]
        aim = case["aim"]
        row += ["" if aim is None else f"{aim:g}" + ("" if median(ratios) >= aim else ", missed")]
        rows.append(row)
    header = ["work", "rlx, ms", "tokens/s", "generate, ms", "tokens/s", "generate_batch, ms", "tokens/s"]
    header += ["rlx beside the better one", "range", "in CPU time", "aim"]
    rounds = len(record["cases"][0]["rounds"])
    return (
        f"{markdown_table(header, rows)}\n\n`{record['command']}`: {rounds} rounds, {record['threads']} torch threads; "
        f"torch {torch.__version__}, transformers {transformers.__version__}. {describe(record['machine'])} "
        f"Cores busy with other work before: {record['busy_cores_before'] or 0:.2f}."
    )


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2, help="torch threads (default: 2)")
    parser.add_argument("--sides", nargs="+", default=list(SIDES), choices=SIDES, help="who takes part (default: all)")
    parser.add_argument("--only", type=int, nargs="+", default=[0, 1, 2], help="numbers of the cases (default: all)")
    parser.add_argument("--out", type=Path, default=DOCS, help="folder of benchmarks.md and .json (default: docs)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    transformers.logging.set_verbosity_error()
    record: dict[str, Any] = {
        "threads": options.threads,
        "command": " ".join(["python benchmarks/generation.py", *sys.argv[1:]]),
    }
    record |= {"machine": machine(), "busy_cores_before": busy_cores(), "cases": []}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(ALPHABET), max_position_embeddings=128, **SIZES)).eval()
    for case in [cases()[number] for number in options.only]:
        rounds = measure(model, case, options.rounds, options.sides)
        record["cases"].append({"name": case.name, "tokens": case.tokens, "aim": case.aim, "rounds": rounds})
    publish(options.out, "generation", record, page(record))
    print(page(record))


if __name__ == "__main__":
    main()
