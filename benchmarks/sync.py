"""Measures how long new weights take from the learner to token runners in processes of their own on this machine.

    python benchmarks/sync.py                                  # into docs/benchmarks.md
    python benchmarks/sync.py --tiny --out /tmp                # a model of two layers

With a GPU it is a model of Qwen3-0.6B's shape, and learner and runners compute there; without, one of 110 million
weights on the CPU. Weights are published as one flat float32 buffer into shared memory, copied once for all runners,
and each runner copies them into its model. The bounds are what these copies take at bandwidths measured just before.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import on_gpu
import torch
from bounds import bandwidth, synchronize
from on_gpu import FEW_LAYERS, QWEN3
from report import busy_cores, describe, machine, markdown_table

from rlx import actors
from rlx.generation.request import Sampling
from rlx.nets.flat import FlatParameters
from rlx.nets.language_model import load_language_model
from rlx.rollout.token_runner import TokenRunner

RUNNERS = (1, 4)
GPT2 = {"model_type": "gpt2", "vocab_size": 32_000, "n_positions": 128}
"""Of 12 layers 768 wide."""
TIMEOUT_S = 300.0


def measure(build: Callable[[], Any], device: str, runners: int, rounds: int) -> dict[str, Any]:
    """Return the bytes of the weights, and each round's seconds until they are published, and until all have them."""
    learner = FlatParameters(build().to(device), device)
    found = []
    with actors.runtime("local", system_timeout_s=TIMEOUT_S, object_memory=8 * learner.data.nbytes) as rt:
        channel = rt.channel("policy")
        options = {"device": device, "torch_threads": 1, "max_slots": 1, "policy_channel": channel}
        readers = rt.group([rt.spawn(TokenRunner, build, **options) for _ in range(runners)])
        take(readers)
        for version in range(-2, rounds):  # memory is new in the first two
            learner.data += 1e-6
            synchronize(device)
            began = time.perf_counter()
            channel.publish({"weights": learner.numpy()}, version + 2)
            published = time.perf_counter()
            take(readers)
            found.append({"publish_s": published - began, "all_s": time.perf_counter() - began})
    return {"runners": runners, "bytes": learner.data.nbytes, "rounds": found[2:]}


def take(readers: actors.Group) -> None:
    """Have all runners generate nothing with the newest weights."""
    for outcome in readers.generate.call([], Sampling()).result(TIMEOUT_S):
        if isinstance(outcome, actors.Err):
            raise outcome.error


def bounds(record: dict[str, Any], case: dict[str, Any]) -> tuple[float, float]:
    """Return the least seconds of publishing, and of all: a copy to the host, and from there one for each runner."""
    copies = case["bytes"] / record["to_host"], case["bytes"] / record["from_host"]
    return copies[0], copies[0] + case["runners"] * copies[1]


def page(record: dict[str, Any]) -> str:
    """Return the table: seconds and share of the bounds."""
    rows = []
    for case in record["cases"]:
        row = [str(case["runners"]), f"{case['bytes'] / 1e6:,.1f}"]
        for name, least in zip(("publish_s", "all_s"), bounds(record, case), strict=True):
            taken = median(one[name] for one in case["rounds"])
            row += [f"{1000 * taken:,.1f}", f"{1000 * least:,.1f}", f"{least / taken:.2f}"]
        rows.append(row)
    header = ["runners", "MB", "published, ms", "bound, ms", "share", "all have them, ms", "bound, ms", "share"]
    facts = (
        f"`{record['command']}`: {len(record['cases'][0]['rounds'])} rounds; {record['device']}; one copy runs at "
        f"{record['to_host'] / 1e9:.1f} GB/s to the host and at {record['from_host'] / 1e9:.1f} GB/s from it. "
        f"{describe(record['machine'])} Cores busy with other work before: {record['busy_cores_before'] or 0:.2f}."
    )
    return f"{markdown_table(header, rows)}\n\n{facts}"


def copy_rates(device: str) -> dict[str, float]:
    """Return the bytes/s of a copy from the device to pinned memory of the host and back; on the CPU both are one."""
    if device == "cpu":
        return dict.fromkeys(("to_host", "from_host"), bandwidth("cpu", torch.float32) / 2)
    there, here = torch.empty(2**28, device=device), torch.empty(2**28, pin_memory=True)
    return {"to_host": _rate(partial(here.copy_, there), there), "from_host": _rate(partial(there.copy_, here), there)}


def _rate(copy: Callable[[], Any], tensor: torch.Tensor) -> float:
    times = []
    for _ in range(6):
        began = time.perf_counter()
        copy()
        synchronize(tensor.device)
        times.append(time.perf_counter() - began)
    return tensor.nbytes / min(times[1:])


def main() -> None:
    """Run the benchmark."""
    options = on_gpu.parser(__doc__, 7).parse_args()
    device = "cuda" if torch.cuda.is_available() and not options.tiny else "cpu"
    config = QWEN3 | FEW_LAYERS if options.tiny else QWEN3 if device == "cuda" else GPT2
    record: dict[str, Any] = {
        "command": " ".join(["python benchmarks/sync.py", *sys.argv[1:]]),
        "device": torch.cuda.get_device_name() if device == "cuda" else "no GPU: learner and runners on the CPU",
        "machine": machine(),
        "busy_cores_before": busy_cores(),
        **copy_rates(device),
    }
    build = partial(load_language_model, config=config)
    record["cases"] = [measure(build, device, count, options.rounds) for count in RUNNERS]
    on_gpu.finish(options, "sync", record, page(record))


if __name__ == "__main__":
    main()
