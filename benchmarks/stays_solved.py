"""Trains configs/impala.yaml and configs/appo.yaml for a minute each, and looks whether what was learned stays.

    python benchmarks/stays_solved.py                                 # into docs/benchmarks.md
    python benchmarks/stays_solved.py --configs appo --seeds 0 --seconds 20 --out /tmp

Every run is a process of its own, one after the other, and goes on after it has reached the return that would end it.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from processes import output_of
from report import DOCS, busy_cores, describe, machine, markdown_table, publish
from turns import span

import rlx
from rlx.config import load_config
from rlx.metrics import read_metrics

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
SECTION = "stays solved"
EVALUATION_EPISODES = 30
START_AND_END_S = 120.0


def main() -> None:
    """Run the benchmark."""
    options = _parse()
    conditions, runs = machine(), []
    for seed in options.seeds:
        for config in options.configs:
            runs.append(train(config, seed, options.seconds))
            print(*(f"{name}: {value}" for name, value in runs[-1].items()), sep="  ", flush=True)
        record = {"machine": conditions, "seconds": options.seconds, "runs": runs}
        publish(options.out, SECTION, record, page(record))


def train(config: str, seed: int, seconds: float) -> dict[str, Any]:
    """Return when one run first reached its goal, how far it fell again, and how good its policy is at the end."""
    file, busy = CONFIGS / f"{config}.yaml", busy_cores()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "run"
        changes = {
            "runtime.seed": seed,
            "stop.time_s": seconds,
            "stop.env_steps": None,
            "stop.episode_return_mean": None,
        }
        settings = [f"--set={key}={'null' if value is None else value}" for key, value in changes.items()]
        command = [sys.executable, "-m", "rlx.cli", "train", str(file), *settings, "--run-dir", str(folder)]
        output_of(command, seconds + START_AND_END_S, Path(scratch))
        rows = read_metrics(folder / "metrics.jsonl")
        evaluation = rlx.load_policy(folder).evaluate(EVALUATION_EPISODES)
    run = {"config": config, "seed": seed, **summary(rows, load_config(file).settings.stop.episode_return_mean or 0)}
    return {**run, "evaluation": evaluation["evaluation/episode_return_mean"], "busy_cores_before": busy}


def summary(rows: list[dict[str, Any]], goal: float) -> dict[str, Any]:
    """Return what the metrics of one run say; seconds, steps and the lowest return are null where it missed `goal`."""
    returns = [row["episode_return_mean"] or 0.0 for row in rows]
    first = next((number for number, value in enumerate(returns) if value >= goal), None)
    return {
        "solved_s": None if first is None else rows[first]["time/total_s"],
        "solved_env_steps": None if first is None else rows[first]["env_steps"],
        "lowest_after": None if first is None else min(returns[first:]),
        "last": returns[-1],
        "env_steps": rows[-1]["env_steps"],
        "dropped_env_steps": rows[-1]["dropped_env_steps"],
        "age_mean": sum(row["age_mean"] for row in rows) / len(rows),
        "age_max": max(row["age_max"] for row in rows),
    }


def page(record: dict[str, Any]) -> str:
    """Return the table of all configs, and what it was measured with, as markdown."""
    rows = []
    for config in dict.fromkeys(run["config"] for run in record["runs"]):
        runs = [run for run in record["runs"] if run["config"] == config]
        solved = [run for run in runs if run["solved_s"] is not None]
        seconds, steps, lowest = (
            [run[key] for run in solved] for key in ("solved_s", "solved_env_steps", "lowest_after")
        )
        rows.append(
            [
                f"`{config}`",
                f"{len(solved)} of {len(runs)}",
                f"{median(seconds):.1f} ({span(seconds, '.1f')})" if solved else "",
                f"{median(steps):,.0f}" if solved else "",
                f"{min(lowest):.0f}" if solved else "",
                f"{min(run['evaluation'] for run in runs):.0f}",
                f"{median(run['env_steps'] for run in runs):,.0f}",
                f"{median(run['age_mean'] for run in runs):.1f}, {max(run['age_max'] for run in runs)}",
            ]
        )
    header = ["config", "seeds that reached it", "after s", "after env steps", "lowest mean return after that"]
    header += [f"lowest evaluation after {record['seconds']:g} s", "env steps by then", "mean and largest age"]
    busy = [run["busy_cores_before"] or 0.0 for run in record["runs"]]
    facts = f"{describe(record['machine'])} Cores busy with other work before a run: {span(busy, '.2f')}."
    return f"{markdown_table(header, rows)}\n\n{facts}"


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--configs", nargs="+", default=["impala", "appo"], help="default: impala appo")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4], help="default: 0 1 2 3 4")
    parser.add_argument("--seconds", type=float, default=60.0, help="length of a run (default: 60)")
    parser.add_argument("--out", type=Path, default=DOCS, help="folder of benchmarks.md and .json (default: docs)")
    return parser.parse_args()


if __name__ == "__main__":
    main()
