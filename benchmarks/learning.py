"""Trains shipped configs with several seeds, evaluates each run, and writes the table of docs/learning.md.

    python benchmarks/learning.py --configs ppo ppo_acrobot --seeds 0 1 2 --out table.md

Every run is a process of its own, one after the other. A run folder that exists is resumed, so that an
interrupted benchmark goes on where it stopped and a finished run is only evaluated again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from report import machine, markdown_table

import rlx
from rlx.config import list_configs, load_config
from rlx.metrics import read_metrics

EVALUATION_EPISODES = 30
TRAINING_TIMEOUT_S = 3600.0
HEADER = ["config", "environment", "seeds", "env steps", "seconds", "mean return", "IQM", "min", "each seed"]
PACKAGES = ("rlx", "torch", "gymnasium", "numpy", "mujoco")


class Result(NamedTuple):
    """One trained and evaluated run."""

    folder: Path
    env: str
    env_steps: int
    seconds: float
    """Wall time of the training iterations; starting the process is not part of it."""
    mean_return: float
    """Mean over the evaluation episodes."""


def main() -> None:
    """Run the benchmark and write the table."""
    options = _parse()
    rows = []
    for config in options.configs:
        results = [measure(config, seed, options.runs) for seed in options.seeds]
        rows.append(table_row(config, results))
        print(*rows[-1], sep="  ", flush=True)
        write_table(rows, conditions(results[-1].folder), options.out)
    print(f"table: {options.out}")


def measure(config: str, seed: int, runs: Path) -> Result:
    """Return the result of one seed of one config."""
    folder = runs / f"{config}-seed{seed}"
    where = ["--resume" if (folder / "config.yaml").exists() else "--run-dir", str(folder)]
    command = [sys.executable, "-m", "rlx.cli", "train", config, "--set", f"runtime.seed={seed}", *where]
    subprocess.run(command, check=True, timeout=TRAINING_TIMEOUT_S, stdout=subprocess.DEVNULL)
    policy = rlx.load_policy(folder)
    evaluation: dict[str, Any] = policy.evaluate(EVALUATION_EPISODES)
    last = read_metrics(folder / "metrics.jsonl")[-1]
    mean_return, env = evaluation["evaluation/episode_return_mean"], str(policy.settings.environment.id)
    return Result(folder, env, last["env_steps"], last["time/total_s"], mean_return)


def table_row(config: str, results: list[Result]) -> list[str]:
    """Return a config's cells: means over seeds, and the spread of the returns."""
    returns = [result.mean_return for result in results]
    return [
        f"`{config}`",
        results[0].env,
        str(len(results)),
        f"{fmean(result.env_steps for result in results):,.0f}",
        f"{fmean(result.seconds for result in results):.1f}",
        *(f"{value:,.1f}" for value in (fmean(returns), interquartile_mean(returns), min(returns))),
        " ".join(f"{value:,.0f}" for value in returns),
    ]


def interquartile_mean(values: list[float]) -> float:
    """Return the mean without the lowest and the highest quarter, rounded down (Agarwal et al. 2021)."""
    cut = len(values) // 4
    return fmean(sorted(values)[cut : len(values) - cut])


def conditions(folder: Path) -> str:
    """Return how the numbers were measured, with the versions that the run in `folder` was trained with."""
    manifest, facts = json.loads((folder / "manifest.json").read_text()), machine()
    versions = ", ".join(f"{name} {manifest['versions'].get(name, '-')}" for name in PACKAGES)
    return (
        f"Return: mean of {EVALUATION_EPISODES} deterministic episodes with a seed's final policy; min: the lowest "
        f"seed. Seconds: training alone, without starting Python. Measured on {facts['cores']} cores of "
        f"{facts['cpu']} with Python {manifest['python']}, {versions}."
    )


BEGIN, END = "<!-- begin learning -->", "<!-- end learning -->"


def write_table(rows: list[list[str]], facts: str, file: Path) -> None:
    """Write the table as `file`, or between the two marks of a file that has them; there, other configs' rows stay."""
    old = section_of(file, "learning")
    cells = [line.strip("| ").split(" | ") for line in old.splitlines() if line.startswith("| `")]
    merged = {row[0].strip("`"): row for row in [*cells, *rows]}
    write_section(f"{markdown_table(HEADER, [merged[name] for name in sorted(merged)])}\n\n{facts}", file)


def section_of(file: Path, section: str) -> str:
    """Return what stands between the two marks of a section; nothing where the file has none."""
    text = file.read_text() if file.exists() else ""
    return text.partition(f"<!-- begin {section} -->")[2].partition(f"<!-- end {section} -->")[0]


def write_section(table: str, file: Path, section: str = "learning") -> None:
    """Write the table as `file`, or between the two marks of a section in a file that has them."""
    begin, end = f"<!-- begin {section} -->", f"<!-- end {section} -->"
    text = file.read_text() if file.exists() else ""
    if begin in text and end in text:
        table = text.partition(begin)[0] + f"{begin}\n{table}\n{end}" + text.partition(end)[2]
    file.write_text(table.rstrip("\n") + "\n")


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    names = [name for name, _ in list_configs() if hasattr(load_config(name).settings, "environment")]
    parser.add_argument(
        "--configs", nargs="+", default=names, metavar="NAME", help="default: every one on environments"
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4], help="default: 0 1 2 3 4")
    parser.add_argument("--out", type=Path, default=Path("learning.md"), help="markdown file for the table")
    parser.add_argument("--runs", type=Path, default=Path("runs/learning"), help="folder of the run folders")
    return parser.parse_args()


if __name__ == "__main__":
    main()
