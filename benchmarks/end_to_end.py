"""Compares a whole GRPO step of a model of half a billion weights with TRL's on one GPU, and both with the bound.

    python benchmarks/end_to_end.py                           # into docs/benchmarks.md; needs CUDA
    python benchmarks/end_to_end.py --tiny --out /tmp         # the same program on a CPU, with a model of two layers

64 prompts x 8 completions of 256 tokens by a model of Qwen3-0.6B's shape with random weights, in bfloat16, no
reference, one gradient step on all of them. The trainers take turns as in benchmarks/grpo.py. The bound is the time in
which the device can do what no program can leave out, at the bandwidth and the matrix rate measured in the same minute.
"""

from __future__ import annotations

import sys
from pathlib import Path
from statistics import median
from typing import Any

import on_gpu
import torch
from bounds import bandwidth, matrix_rate
from environments import python_of
from grpo import Case, beside, facts, measure, split
from on_gpu import FEW_LAYERS, QWEN3
from report import busy_cores, machine, markdown_table

from rlx.nets.language_model import load_language_model

JOB = {"lr": 1e-6, "seed": 0, "stops": False}
ON_GPU = Case("64 prompts x 8, 256 new tokens", 256, False, 1, 3.0)
TINY = Case("4 prompts x 2, 8 new tokens", 8, False, 1, None)
PROMPT_TOKENS = 6
"""Of a sum of two numbers, as 12+34=."""
ADAM_BYTES = 28
"""Of a float32 weight, its gradient and its two moments that AdamW reads, and those that it writes."""


def job_of(tiny: bool) -> dict[str, Any]:
    """Return what both trainers are told; microbatch: tokens that go through the model at once."""
    if tiny:
        size = {"prompts": 4, "samples": 2, "microbatch": 64, "threads": 1}
        return JOB | size | {"model": QWEN3 | FEW_LAYERS, "device": "cpu", "dtype": "float32"}
    size = {"prompts": 64, "samples": 8, "microbatch": 16_384, "threads": 4}
    return JOB | size | {"model": QWEN3, "device": "cuda", "dtype": "bfloat16"}


def bound(job: dict[str, Any], new_tokens: int, rates: dict[str, float]) -> dict[str, float]:
    """Return the seconds that generating and learning take at least: what they move or multiply, whichever is more.

    Generating reads all weights for each token, and every key and value that was made before it; learning multiplies
    three times as often as a forward pass of the tokens once each, attention to what stands before them included, and
    AdamW moves its moments.
    """
    config, dtype = job["model"], getattr(torch, job["dtype"])
    with torch.device("meta"):
        weights = sum(parameter.numel() for parameter in load_language_model(config=config).parameters())
    rows, layers = job["prompts"] * job["samples"], config["num_hidden_layers"]
    heads = layers * config["num_attention_heads"] * config["head_dim"]
    kept = 2 * layers * config["num_key_value_heads"] * config["head_dim"] * dtype.itemsize  # of one token
    seen = sum(PROMPT_TOKENS + number for number in range(new_tokens))  # by all tokens of a completion
    moved = new_tokens * weights * dtype.itemsize + rows * seen * kept
    multiplied = rows * (2 * new_tokens * weights + 4 * seen * heads)
    length = PROMPT_TOKENS + new_tokens
    learned = 3 * rows * (2 * length * weights + 4 * heads * length * (length + 1) / 2)
    return {
        "generate_s": max(moved / rates["bandwidth"], multiplied / rates["matrix_rate"]),
        "train_s": learned / rates["matrix_rate"] + weights * ADAM_BYTES / rates["bandwidth"],
    }


def page(record: dict[str, Any]) -> str:
    """Return the tables: seconds beside each other, what rlx's went to, and what of them the bound is."""
    case, limit, rates = record["cases"][0], record["bound"], record["rates"]
    own = [one["rlx"] for one in case["rounds"]]
    rows = []
    for name in ("generate_s", "train_s"):
        spent = median(one[name] for one in own)
        shown = f"{1000 * limit[name]:,.1f}", f"{1000 * spent:,.1f}", f"{limit[name] / spent:.2f}"
        rows.append([name.removesuffix("_s"), *shown])
    header = ["part of rlx's step", "bound, ms", "taken, ms", "share"]
    measured = (
        f"Bandwidth {rates['bandwidth'] / 1e9:,.0f} GB/s, products {rates['matrix_rate'] / 1e12:,.2f} TFLOP/s in "
        f"{record['dtype']} on {record['device']}, both measured before the first turn."
    )
    return "\n\n".join([beside([case]), split([case]), markdown_table(header, rows), measured, facts(record)])


def main() -> None:
    """Run the benchmark."""
    parser = on_gpu.parser(__doc__, 5)
    parser.add_argument("--envs", type=Path, default=Path(".benchmark-envs"), help="folder of TRL's environment")
    parser.add_argument("--trl", help="use an interpreter that has TRL instead of an environment in --envs")
    parser.add_argument("--systems", nargs="+", default=["rlx", "trl"], choices=["rlx", "trl"])
    options = parser.parse_args()
    if not on_gpu.runs_here(options.tiny):
        return
    job, case = job_of(options.tiny), TINY if options.tiny else ON_GPU
    given = {} if options.trl is None else {"trl": options.trl}
    pythons = {name: python_of(name, options.envs, given) for name in options.systems}
    dtype = getattr(torch, job["dtype"])
    rates = {"bandwidth": bandwidth(job["device"], dtype), "matrix_rate": matrix_rate(job["device"], dtype)}
    torch.cuda.empty_cache()
    record: dict[str, Any] = {
        "command": " ".join(["python benchmarks/end_to_end.py", *sys.argv[1:]]),
        "threads": job["threads"],
        "dtype": job["dtype"],
        "device": torch.cuda.get_device_name() if job["device"] == "cuda" else "the CPU",
        "machine": machine(),
        "busy_cores_before": busy_cores(),
        "rates": rates,
        "bound": bound(job, case.new_tokens, rates),
    }
    record["cases"] = [measure(case, job, pythons, options.rounds)]
    on_gpu.finish(options, "end to end", record, page(record))


if __name__ == "__main__":
    main()
