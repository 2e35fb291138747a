"""Two-digit addition after SFT that was stopped early, after GRPO and PPO, and after three controls: a page of docs.

    python benchmarks/addition.py --seeds 0 1 2 --out docs/post_training.md

Every run is a process of its own, one after the other, in runs/addition/seed-S. A run that has ended is not made
again, one that was interrupted is resumed. Held-out pairs are those of rlx.envs.addition's split "eval".
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np
from learning import write_section
from report import machine, markdown_table

from rlx.envs.addition import LONGEST_ANSWER, reward, rows
from rlx.metrics import read_metrics
from rlx.plotting import Curve, load_curve, mean_and_range

RUNS = {
    "sft": ("SFT, stopped early", "sft"),
    "grpo": ("GRPO", "grpo"),
    "rlhf_ppo": ("PPO", "rlhf_ppo"),
    "random": ("control: random reward", "grpo", "reward.function=rlx.envs.addition:random_reward"),
    "shuffled": ("control: shuffled reward", "grpo", "reward.function=rlx.envs.addition:shuffled_reward"),
    "lr_0": ("control: learning rate 0", "grpo", "training.lr=0"),
}
"""Each run's title, its config, and what of it is set. All but the first start from the first, runs/sft."""
TIMEOUT_S = 1800.0
FINISHED = "finished"
LAST = 10
"""Iterations at the end of a run that explained variance is averaged over."""
HEADER = ["run", "seeds", "iterations", "tokens", "seconds", "accuracy", "min", "max", "greedy", "explained variance"]


class Result(NamedTuple):
    """One trained and evaluated run."""

    folder: Path
    iterations: int
    tokens: int
    seconds: float
    """Wall time of training and its evaluations; starting the process is not part of it."""
    accuracy: float
    """Share of the held-out pairs that are answered right, one sample at temperature 1 each."""
    greedy: float
    """The same by the likeliest tokens."""
    explained_variance: float | None


def main() -> None:
    """Run the benchmark; write table and picture."""
    options = _parse()
    check_held_out()
    results: dict[str, list[Result]] = {name: [] for name in RUNS if name in options.only}
    for seed in options.seeds:
        for name, done in results.items():
            done.append(measure(train(name, seed, options.runs)))
            print(seed, *table_row(name, done[-1:]), sep="  ", flush=True)
    table = markdown_table(HEADER, [table_row(name, done) for name, done in results.items()])
    write_section(f"{table}\n\n{conditions(results['sft'][0].folder)}", options.out, "addition")
    draw(results, options.out.with_suffix(".png"))
    print(f"table: {options.out}")


def check_held_out() -> None:
    """End where a held-out pair, in either order, could be met in training."""
    held_out, *trained = (
        {frozenset(row["prompt"].rstrip("=").split("+")) for row in rows(split)} for split in ("eval", "sft", "rl")
    )
    if shared := held_out & set.union(*trained):
        raise SystemExit(f"{len(shared)} held-out pairs are in the training data, {min(map(sorted, shared))} for one.")


def train(name: str, seed: int, runs: Path, of: Mapping[str, Sequence[str]] = RUNS) -> Path:
    """Return the folder of a run that has ended; make or finish the run before where there is none."""
    _, config, *changes = of[name]
    home = runs / f"seed-{seed}"  # where the configs' model.path, runs/sft, is this seed's
    folder = home / "runs" / name
    if not (folder / FINISHED).exists():
        home.mkdir(parents=True, exist_ok=True)
        where = ["--resume" if (folder / "config.yaml").exists() else "--run-dir", f"runs/{name}"]
        settings = [part for change in (f"runtime.seed={seed}", *changes) for part in ("--set", change)]
        command = [sys.executable, "-m", "rlx.cli", "train", config, *settings, *where]
        subprocess.run(command, check=True, timeout=TIMEOUT_S, stdout=subprocess.DEVNULL, cwd=home)
        (folder / FINISHED).touch()  # an interrupted run has exported its model as well
    return folder


def measure(folder: Path) -> Result:
    """Return what a run took, and its accuracy on all held-out pairs."""
    from rlx.text_inference import load_text_policy

    policy, held_out = load_text_policy(folder / "model"), rows("eval")
    prompts = [row["prompt"] for row in held_out]

    def accuracy(temperature: float) -> float:
        made = policy.generate(prompts, temperature=temperature, max_new_tokens=LONGEST_ANSWER + 1)
        return fmean(reward(prompts, [texts[0] for texts in made], held_out))

    metrics = read_metrics(folder / "metrics.jsonl")
    variances = [row["learner/explained_variance"] for row in metrics[-LAST:] if "learner/explained_variance" in row]
    return Result(
        folder,
        metrics[-1]["iteration"],
        metrics[-1]["env_steps"],
        metrics[-1]["time/total_s"] + sum(row.get("time/evaluation_s", 0.0) for row in metrics),
        accuracy(1.0),
        accuracy(0.0),
        fmean(variances) if variances else None,
    )


def table_row(name: str, results: Sequence[Result]) -> list[str]:
    """Return a run's cells: means over seeds, the spread of the accuracy, the lowest explained variance."""
    accuracies = [result.accuracy for result in results]
    variances = [result.explained_variance for result in results if result.explained_variance is not None]
    return [
        RUNS[name][0],
        str(len(results)),
        f"{fmean(result.iterations for result in results):,.0f}",
        f"{fmean(result.tokens for result in results):,.0f}",
        f"{fmean(result.seconds for result in results):.0f}",
        *(f"{value:.3f}" for value in (fmean(accuracies), min(accuracies), max(accuracies))),
        f"{fmean(result.greedy for result in results):.3f}",
        f"{min(variances):.2f}" if variances else "",
    ]


def conditions(folder: Path) -> str:
    """Return how the numbers were measured, with the versions that the run in `folder` was trained with."""
    manifest, facts = json.loads((folder / "manifest.json").read_text()), machine()
    versions = ", ".join(f"{name} {manifest['versions'].get(name, '-')}" for name in ("rlx", "torch", "transformers"))
    return (
        f"Accuracy: share of the {len(rows('eval')):,} held-out pairs that are answered exactly, one sample each at "
        "temperature 1; mean, lowest and highest over seeds; greedy: by the likeliest tokens. Explained variance: "
        f"mean of the last {LAST} iterations, the lowest seed. Tokens: those generated, or in SFT learned from. "
        "Seconds: training and its evaluations, without starting Python; mean. Measured on "
        f"{facts['cores']} cores of {facts['cpu']} with Python {manifest['python']}, {versions}."
    )


def draw(results: dict[str, list[Result]], file: Path) -> None:
    """Draw the accuracy on held-out pairs during reinforcement learning: mean and range over the seeds."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: F401 - a picture without a display
    from matplotlib.figure import Figure

    axes = (figure := Figure(figsize=(8, 4.8), dpi=120, layout="constrained")).add_subplot()
    starts = [result.accuracy for result in results["sft"]]
    for name, done in results.items():
        if name == "sft":
            continue
        curves = [_from_start(_curve(name, result), at) for result, at in zip(done, starts, strict=True)]
        tokens, mean, low, high = mean_and_range(curves)
        style: dict[str, Any] = {"linestyle": "--"} if RUNS[name][0].startswith("control") else {}
        (line,) = axes.plot(tokens, mean, label=RUNS[name][0], linewidth=2, **style)
        axes.fill_between(tokens, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
    axes.set_title("Two-digit addition after SFT", loc="left", fontweight="bold")
    axes.set_xlabel("tokens generated")
    axes.set_ylabel("accuracy on held-out pairs, temperature 1")
    axes.set_ylim(0, 1)
    axes.grid(color="0.9", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9)
    figure.savefig(file)


METRIC = "evaluation/episode_return_mean"


def _curve(name: str, result: Result) -> Curve:
    """Return a run's accuracy over its tokens; of one whose evaluations are scored at random, the last one alone."""
    curve = load_curve(result.folder, METRIC)
    if name != "random":
        return curve
    return Curve(curve.run, curve.settings, curve.env_steps[-1:], np.array([result.accuracy]))


def _from_start(curve: Curve, accuracy: float) -> Curve:
    """Return the curve with a first point for the model that reinforcement learning started from."""
    return Curve(curve.run, curve.settings, np.r_[0.0, curve.env_steps], np.r_[accuracy, curve.values])


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="default: 0 1 2")
    parser.add_argument("--only", nargs="+", choices=list(RUNS), default=list(RUNS), help="default: every run")
    parser.add_argument("--out", type=Path, default=Path("post_training.md"), help="markdown file; a .png beside it")
    parser.add_argument("--runs", type=Path, default=Path("runs/addition"), help="folder of the run folders")
    options = parser.parse_args()
    options.only = list(dict.fromkeys(["sft", *options.only]))  # what all others start from
    return options


if __name__ == "__main__":
    main()
