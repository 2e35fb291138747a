"""Compares rlx's decoding on a GPU with `generate` and `generate_batch` of transformers, and with what the GPU can do.

    python benchmarks/decode.py                 # on a GPU, into docs/benchmarks.md
    python benchmarks/decode.py --tiny          # the same program with a small model and few requests, on any machine

A model of the shape of Qwen3-0.6B with random weights in bfloat16; 256 requests, prompts and completions of 100 to
1,024 tokens each. The sides take turns in one process, and each gives its memory back after its turn, as their caches
would not fit beside each other. What can be made before requests come (graphs, a manager) is not counted.
"""

from __future__ import annotations

import contextlib
import gc
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
import on_gpu
import torch
import transformers
from bounds import bandwidth, matrix_rate, synchronize
from decode_bound import Bound, Costs, bound_of
from on_gpu import FEW_LAYERS, QWEN3
from report import describe, machine, markdown_table
from transformers import AutoConfig, ContinuousBatchingConfig, GenerationConfig, Qwen3ForCausalLM

from rlx.generation.generator import Generator
from rlx.generation.request import Request, Sampling

SIDES = ("rlx", "generate", "generate_batch")
AIM, AIM_OF_BOUND = 3.0, 0.5
"""How many times faster than the better one of the others rlx is to be, and which part of the bound it is to reach."""
TINY = FEW_LAYERS | {"vocab_size": 2000, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
PAD = 0
RESULT_TIMEOUT_S = 600.0


@dataclass(frozen=True)
class Load:
    """What is asked for."""

    prompts: list[list[int]]
    limits: list[int]

    @classmethod
    def drawn(cls, count: int, shortest: int, longest: int, vocabulary: int) -> Load:
        """Return requests whose prompts and completions have shortest to longest tokens, uniformly; seed 0."""
        rng = np.random.default_rng(0)
        lengths, limits = rng.integers(shortest, longest + 1, (2, count))
        return cls([rng.integers(1, vocabulary, size=length).tolist() for length in lengths], limits.tolist())

    @property
    def tokens(self) -> int:
        """Tokens that are wanted."""
        return sum(self.limits)

    @property
    def longest(self) -> int:
        """Tokens of a prompt and its completion at most."""
        return max(len(prompt) + limit for prompt, limit in zip(self.prompts, self.limits, strict=True))

    def requests(self, limits: list[int]) -> list[Request]:
        """Return the prompts as rlx takes them, each with its limit."""
        pairs = zip(self.prompts, limits, strict=True)
        return [Request(prompt, max_new_tokens=limit, seed=number) for number, (prompt, limit) in enumerate(pairs)]


Run = Callable[[], int]
"""Generates once; returns how many of the wanted tokens it made."""


@contextlib.contextmanager
def with_rlx(model: Qwen3ForCausalLM, load: Load) -> Iterator[Run]:
    """Yield a run of rlx, log-probabilities included; its graphs have been captured."""
    generator = Generator(model, max_slots=len(load.prompts), max_length=load.longest, static_step=True)
    # With every token half of the rows end, so that steps for all numbers of rows are met.
    count = len(load.prompts)
    generator.generate(load.requests([2 + (count // (number + 1)).bit_length() for number in range(count)]))

    def run() -> int:
        made = generator.generate(load.requests(load.limits), Sampling())
        return sum(len(one.tokens) for completions in made for one in completions)

    yield run


@contextlib.contextmanager
def with_generate(model: Qwen3ForCausalLM, load: Load) -> Iterator[Run]:
    """Yield a run in one left-padded batch, which is as long as its longest row; without log-probabilities."""
    longest = max(map(len, load.prompts))
    rows = [[PAD] * (longest - len(prompt)) + prompt for prompt in load.prompts]
    ids = torch.tensor(rows, device=model.device)
    mask = torch.tensor([[0] * row.count(PAD) + [1] * (longest - row.count(PAD)) for row in rows], device=model.device)
    options: dict[str, Any] = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "pad_token_id": PAD}

    def run() -> int:
        made = model.generate(ids, attention_mask=mask, max_new_tokens=max(load.limits), eos_token_id=None, **options)
        assert made.shape == (len(rows), longest + max(load.limits))
        return load.tokens

    yield run


@contextlib.contextmanager
def with_generate_batch(model: Qwen3ForCausalLM, load: Load) -> Iterator[Run]:
    """Yield a run of what `generate_batch` is made of, so that every row can have its own limit, with sdpa."""
    config = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        pad_token_id=PAD,
        eos_token_id=-1,
        max_new_tokens=max(load.limits),
    )
    # On a GPU its cache takes what memory there is, and steps are captured first; of a CPU's memory it would take most.
    on_gpu = model.device.type == "cuda"
    sizes: dict[str, Any] = {} if on_gpu else {"num_blocks": 16, "max_batch_tokens": 256}
    with model.continuous_batching_context_manager(
        generation_config=config,
        block=True,
        timeout=5,
        warmup=on_gpu,
        continuous_batching_config=ContinuousBatchingConfig(auto_switch_to_flash=False, **sizes),
    ) as manager:

        def run() -> int:
            tokens, waiting = 0, len(load.prompts)
            for prompt, limit in zip(load.prompts, load.limits, strict=True):
                manager.add_request(prompt, max_new_tokens=limit)
            while waiting:
                result = manager.get_result(timeout=RESULT_TIMEOUT_S)
                if result is None:
                    raise TimeoutError(f"continuous batching gave nothing for {RESULT_TIMEOUT_S:g} s.")
                if result.is_finished():
                    tokens, waiting = tokens + len(result.generated_tokens), waiting - 1
            return tokens

        yield run


OPENED = {"rlx": with_rlx, "generate": with_generate, "generate_batch": with_generate_batch}


def measure(model: Qwen3ForCausalLM, load: Load, rounds: int, names: list[str]) -> list[dict[str, Any]]:
    """Return each round's seconds of every side, and what the device did at its best in that round.

    A first round does not count. What a side could not do, as for want of memory, is told and left out.
    """
    found: list[dict[str, Any]] = []
    for number in range(-1, rounds):
        device, dtype = model.device, model.dtype
        results: dict[str, Any] = {"bandwidth": bandwidth(device, dtype), "matrix_rate": matrix_rate(device, dtype)}
        for name in names:
            _give_back(device)
            try:
                results[name] = _seconds(name, model, load)
            except (TimeoutError, torch.OutOfMemoryError) as error:
                print(f"{name}: {error}", flush=True)
        if number >= 0:
            found.append(results)
        print({name: f"{value:.4g}" for name, value in results.items()}, flush=True)
    return found


def page(record: dict[str, Any]) -> str:
    """Return the table: medians over the rounds, and medians of what is compared within them."""
    rounds, bounds = record["rounds"], [Bound(**one) for one in record["bounds"]]
    rows = []
    for name in SIDES:
        seconds = [one[name] for one in rounds if name in one]
        if not seconds:
            continue
        parts = [bound.seconds / one[name] for bound, one in zip(bounds, rounds, strict=True) if name in one]
        row = [name, f"{median(seconds):.2f}", f"{min(seconds):.2f} to {max(seconds):.2f}"]
        rows.append([*row, f"{record['tokens'] / median(seconds):,.0f}", f"{100 * median(parts):.1f} %"])
    lines = [markdown_table(["side", "s", "range", "tokens/s", "of the bound"], rows), "", verdict(record)]
    figures = [median(one[name] for one in rounds) for name in ("bandwidth", "matrix_rate")]
    bound = bounds[len(bounds) // 2]
    lines += [
        "",
        f"Measured beside them: {figures[0] / 1e9:,.0f} GB/s, {figures[1] / 1e12:,.2f} TFLOP/s. A step reads "
        f"{bound.step_bytes / 1e9:.3f} GB on the mean of {bound.steps} steps, so at best prefill takes "
        f"{bound.prefill_s:.3f} s and decoding {bound.decode_s:.3f} s.",
        "",
        f"`{record['command']}`: rounds: {len(rounds)}; {record['requests']} requests, {record['dtype']}, on "
        f"{record['device']}; torch {torch.__version__}, transformers {transformers.__version__}. "
        f"{describe(record['machine'])}",
    ]
    return "\n".join(lines)


def verdict(record: dict[str, Any]) -> str:
    """Return how rlx stands beside the better one of the others and beside the bound, and whether that was aimed at."""
    ratios = [
        min(one[name] for name in SIDES[1:] if name in one) / one["rlx"]
        for one in record["rounds"]
        if "rlx" in one and len(one.keys() & set(SIDES)) > 1
    ]
    parts = [
        (bound["prefill_s"] + bound["decode_s"]) / one["rlx"]
        for bound, one in zip(record["bounds"], record["rounds"], strict=True)
        if "rlx" in one
    ]
    told = []
    for what, values, aim in (("of the better one's speed", ratios, AIM), ("of the bound", parts, AIM_OF_BOUND)):
        if values:
            missed = "" if median(values) >= aim else ", missed"
            told.append(
                f"{median(values):.2f} {what} ({min(values):.2f} to {max(values):.2f}; aimed at: {aim:g}{missed})"
            )
    return f"rlx reaches {' and '.join(told)}." if told else "rlx was not measured."


def _seconds(name: str, model: Qwen3ForCausalLM, load: Load) -> float:
    with OPENED[name](model, load) as run:
        synchronize(model.device)
        began = time.perf_counter()
        tokens = run()
        synchronize(model.device)
        seconds = time.perf_counter() - began
    assert tokens == load.tokens, f"{name} made {tokens} tokens of {load.tokens}"
    return seconds


def _give_back(device: torch.device) -> None:
    """Give the memory back that the last side has left, so that the next one finds all of it."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def main() -> None:
    """Run the benchmark."""
    parser = on_gpu.parser(__doc__, 3)
    parser.add_argument("--sides", nargs="+", default=list(SIDES), choices=SIDES, help="who takes part (default: all)")
    options = parser.parse_args()
    if not on_gpu.runs_here(options.tiny):
        return
    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    device, dtype = ("cpu", torch.float32) if options.tiny else ("cuda", torch.bfloat16)
    config = AutoConfig.for_model(**QWEN3 | (TINY if options.tiny else {}), attn_implementation="sdpa")
    model = Qwen3ForCausalLM(config).eval().to(device, dtype)
    load = (8, 4, 24) if options.tiny else (256, 100, 1024)
    drawn = Load.drawn(*load, vocabulary=config.vocab_size)
    rounds = measure(model, drawn, options.rounds, options.sides)
    lengths = [len(prompt) for prompt in drawn.prompts]
    costs = Costs.of(model)
    record: dict[str, Any] = {
        "command": " ".join(["python benchmarks/decode.py", *sys.argv[1:]]),
        "device": "the CPU" if options.tiny else torch.cuda.get_device_name(),
        "dtype": str(dtype).removeprefix("torch."),
        "requests": len(drawn.prompts),
        "tokens": drawn.tokens,
        "machine": machine(),
        "rounds": rounds,
        "bounds": [
            vars(bound_of(costs, lengths, drawn.limits, one["bandwidth"], one["matrix_rate"])) for one in rounds
        ],
    }
    on_gpu.finish(options, "decode", record, page(record))


if __name__ == "__main__":
    main()
