"""Measures a packed step of reinforcement learning on a GPU: forward, backward and AdamW, beside what the GPU can do.

    python benchmarks/training.py                 # on a GPU, into docs/benchmarks.md
    python benchmarks/training.py --tiny          # the same program with a small model, on any machine

A model of Qwen3-0.6B's shape with random weights, in bfloat16 with weights, gradient and optimizer kept in float32, by
GRPO's loss: 16,384 tokens of rows of 512 to 1,536, and 16 rows of 2,048 for the memory. FLOPs are those of products:
six for each weight and token, and attention to what stands before; what is computed twice counts once.
"""

from __future__ import annotations

import sys
import time
from functools import partial
from statistics import median
from typing import Any, NamedTuple

import on_gpu
import torch
from bounds import bandwidth, matrix_rate, synchronize
from end_to_end import ADAM_BYTES
from on_gpu import FEW_LAYERS, QWEN3
from report import describe, machine, markdown_table

from rlx.algorithms.grpo import GRPOConfig
from rlx.trajectory import Batch

AIM_TOKENS, AIM_SHARE, AIM_SPARE_GB = 30_000, 0.35, 2.0
"""Tokens/s and the share of the products' rate on an H100 or H200, and memory beside what the plan names."""


class Case(NamedTuple):
    """Rows that are learned from in one step."""

    name: str
    lengths: list[int]
    checkpointing: bool


def cases(tiny: bool) -> list[Case]:
    """Return what is measured."""
    if tiny:
        return [Case("rows of 8 to 24", [8, 24, 16, 16], False), Case("2 rows of 32", [32] * 2, True)]
    ragged = [512 + 1024 * number // 15 for number in range(16)]  # 16,384 in all
    return [Case("16,384 tokens, rows of 512 to 1,536", ragged, False), Case("16 rows of 2,048", [2048] * 16, True)]


def batch_of(lengths: list[int], vocabulary: int) -> Batch:
    """Return rows of random tokens, of which the first eighth is the prompt."""
    generator = torch.Generator().manual_seed(0)
    shape = len(lengths), max(lengths)
    tokens = torch.randint(vocabulary, (shape[0], shape[1] + 1), generator=generator)
    length, step = torch.tensor(lengths), torch.arange(shape[1])
    mask = (step >= length[:, None] // 8) & (step < length[:, None])
    noise = partial(torch.randn, shape, generator=generator)
    return Batch(obs=tokens[:, :-1], action=tokens[:, 1:], mask=mask, length=length, logp=noise(), advantage=noise())


def flops(model: Any, lengths: list[int]) -> float:
    """Return the multiplications and additions of the products of a step, forwards and backwards."""
    config = model.config
    weights = sum(parameter.numel() for parameter in model.parameters())  # the embedding is the head, once
    attention = 4 * config.num_hidden_layers * config.num_attention_heads * config.head_dim
    return 3.0 * sum(2 * weights * length + attention * length * (length + 1) / 2 for length in lengths)


def measure(case: Case, config: dict[str, Any], device: str, rounds: int) -> dict[str, Any]:
    """Return each round's seconds of a step, its FLOPs, the plan's bytes and the most that were taken."""
    dtype, tokens = ("bfloat16" if device == "cuda" else "float32"), sum(case.lengths)
    made = GRPOConfig().model(config=config, dtype=dtype, tokenizer="rlx.envs.addition:tokenizer")
    made.prompts([{"prompt": "1+1="}], prompts_per_iteration=len(case.lengths) // 2, samples_per_prompt=2)
    made.generation(max_new_tokens=max(case.lengths) - 4, max_slots=1).reward(lambda prompts, texts: [0.0] * len(texts))
    made.learners(device=device, max_tokens_per_microbatch=tokens, activation_checkpointing=case.checkpointing)
    with made.build() as algorithm:
        model: Any = algorithm.learners.local_policy.model
        batch = batch_of(case.lengths, model.config.vocab_size)
        step = partial(algorithm.learners.update, batch, epochs=1, lr=1e-6, coefficients={"clip_range": 0.2})
        step(seed=0)
        step(seed=1)
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        seconds = []
        for number in range(rounds):
            synchronize(device)
            began = time.perf_counter()
            step(seed=number)
            synchronize(device)
            seconds.append(time.perf_counter() - began)
        return {
            "name": case.name,
            "tokens": tokens,
            "weights": sum(parameter.numel() for parameter in model.parameters()),
            "flops": flops(model, case.lengths),
            "seconds": seconds,
            "planned": algorithm._plan.total,  # type: ignore[attr-defined]
            "peak": torch.cuda.max_memory_allocated() if device == "cuda" else None,
        }


def bound_s(case: dict[str, Any], record: dict[str, Any]) -> float:
    """Return the least seconds of a step: its products, then AdamW's moves."""
    return case["flops"] / record["matrix_rate"] + case["weights"] * ADAM_BYTES / record["bandwidth"]


def page(record: dict[str, Any]) -> str:
    """Return the table: tokens/s, share of the products' rate and of the bound, and memory."""
    rows = []
    for case in record["cases"]:
        taken = median(case["seconds"])
        rate, peak = case["flops"] / taken, case["peak"]
        row = [case["name"], f"{1000 * taken:,.1f}", f"{case['tokens'] / taken:,.0f}", f"{rate / 1e12:,.3f}"]
        row += [f"{rate / record['matrix_rate']:.2f}", f"{bound_s(case, record) / taken:.2f}"]
        rows.append([*row, f"{case['planned'] / 1e9:.2f}", "-" if peak is None else f"{peak / 1e9:.2f}"])
    header = ["step", "ms", "tokens/s", "TFLOP/s", "of the products' rate", "of the bound", "planned GB", "peak GB"]
    facts = (
        f"`{record['command']}`: median of {len(record['cases'][0]['seconds'])} steps on {record['device']}; products "
        f"{record['matrix_rate'] / 1e12:,.2f} TFLOP/s, bandwidth {record['bandwidth'] / 1e9:,.0f} GB/s, measured just "
        f"before; torch {torch.__version__}. Aims on an H100 or H200: {AIM_TOKENS:,} tokens/s, {AIM_SHARE:g} of the "
        f"products' rate, at most {AIM_SPARE_GB:g} GB above the plan. {describe(record['machine'])}"
    )
    return f"{markdown_table(header, rows)}\n\n{facts}"


def main() -> None:
    """Run the benchmark."""
    options = on_gpu.parser(__doc__, 7).parse_args()
    if not on_gpu.runs_here(options.tiny):
        return
    device, dtype = ("cpu", torch.float32) if options.tiny else ("cuda", torch.bfloat16)
    record: dict[str, Any] = {
        "command": " ".join(["python benchmarks/training.py", *sys.argv[1:]]),
        "device": "the CPU" if options.tiny else torch.cuda.get_device_name(),
        "machine": machine(),
        "bandwidth": bandwidth(device, dtype),
        "matrix_rate": matrix_rate(device, dtype),
    }
    config = QWEN3 | FEW_LAYERS if options.tiny else QWEN3
    record["cases"] = [measure(case, config, device, options.rounds) for case in cases(options.tiny)]
    on_gpu.finish(options, "training", record, page(record))


if __name__ == "__main__":
    main()
