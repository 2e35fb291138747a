"""Measures the wall seconds of `rlx train configs/ppo.yaml` from the command to its exit, for several seeds.

    python benchmarks/time_to_solved.py --seeds 1 2 3 4 5      # into docs/benchmarks.md

Starting Python, importing torch, the run folder, its checkpoints and the end of the process are part of it.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from processes import output_of
from report import DOCS, busy_cores, describe, machine, markdown_table, publish

from rlx.config import load_config
from rlx.metrics import read_metrics

RUN_TIMEOUT_S = 600
CONFIG = Path(__file__).resolve().parents[1] / "configs" / "ppo.yaml"


def main() -> None:
    """Run the benchmark."""
    options = _parse()
    conditions, runs = machine(), []
    for seed in options.seeds:
        runs.append(solve(seed))
        print(f"seed {seed}: {runs[-1]['wall_s']:.2f} s, return {runs[-1]['return']:.1f}", flush=True)
    publish(options.out, "time to solved", {"machine": conditions, "runs": runs}, page(conditions, runs))


def solve(seed: int) -> dict[str, Any]:
    """Return what one run took, and how far it came."""
    busy = busy_cores()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "run"
        rlx = Path(sys.executable).with_name("rlx")
        command = [str(rlx), "train", str(CONFIG), "--set", f"runtime.seed={seed}", "--run-dir", str(folder)]
        started = time.perf_counter()
        output_of(command, RUN_TIMEOUT_S, Path(scratch))
        wall_s = time.perf_counter() - started
        last = read_metrics(folder / "metrics.jsonl")[-1]
    return {
        "seed": seed,
        "wall_s": wall_s,
        "training_s": last["time/total_s"],
        "env_steps": last["env_steps"],
        "return": last["episode_return_mean"],
        "solved": last["episode_return_mean"] >= load_config(CONFIG).settings.stop.episode_return_mean,
        "busy_cores_before": busy,
    }


def page(conditions: dict[str, Any], runs: list[dict[str, Any]]) -> str:
    """Return the table of all seeds and what it was measured with, as markdown."""
    rows = [
        [name, *(f"{function(run[key] for run in runs):{form}}" for function in (median, min, max))]
        for name, key, form in (
            ("seconds, command to exit", "wall_s", ".2f"),
            ("seconds of training iterations", "training_s", ".2f"),
            ("env steps", "env_steps", ",.0f"),
        )
    ]
    solved = f"{sum(run['solved'] for run in runs)} of {len(runs)} seeds reached the return that ends the run."
    busy = max(run["busy_cores_before"] or 0.0 for run in runs)
    facts = f"{describe(conditions)} Cores busy with other work before a run: at most {busy:.2f}."
    return f"{markdown_table(['', 'median', 'lowest', 'highest'], rows)}\n\n{solved} {facts}"


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3, 4, 5], help="default: 1 2 3 4 5")
    parser.add_argument("--out", type=Path, default=DOCS, help="folder of benchmarks.md and .json (default: docs)")
    return parser.parse_args()


if __name__ == "__main__":
    main()
