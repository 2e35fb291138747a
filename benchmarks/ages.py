"""GRPO on two-digit addition with token runners that work while the learner learns: accuracy and speed by age.

    python benchmarks/ages.py --seeds 0 1 2 --runs runs/addition     # into docs/post_training.md

All start from the SFT run of the same seed, which is made first where it is missing (addition.py has the same). One
token runner, one learner, one thread each; the run of age 0 has them take turns.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import fmean

import addition
from addition import Result, conditions, measure, train
from learning import write_section
from report import DOCS, markdown_table

from rlx.metrics import read_metrics

RUNNER = ("token_runners.num_token_runners=1", "token_runners.torch_threads=1")
BOLD = (
    *("training.kl_coef=0", "training.epochs=2", "training.minibatch_sequences=64", "stop.iterations=150"),
    "training.lr={start: 3.0e-4, end: 1.0e-4, env_steps: 265_000}",
)
"""16 steps an iteration that clip and correction alone hold back; those of the config are 4, with a KL penalty."""
RUNS = {
    "sft": addition.RUNS["sft"],
    "age_0": ("0: turns are taken", "grpo", *RUNNER),
    "age_1": ("at most 1", "grpo", *RUNNER, "training.max_age=1"),
    "age_4": ("at most 4", "grpo", *RUNNER, "training.max_age=4"),
    "in_flight": (
        "at most 4, weights change in mid-sequence",
        *("grpo", *RUNNER, "training.max_age=4", "token_runners.on_new_weights=keep_cache"),
    ),
    "bold": ("at most 4, bold", "grpo", *RUNNER, "training.max_age=4", *BOLD),
    "bold_uncorrected": (
        "at most 4, bold, neither clipped nor corrected",
        *("grpo", *RUNNER, "training.max_age=4", *BOLD),
        *("training.importance_cap=null", "training.clip_range=1000"),
    ),
}
"""Each run's title, its config, and what of it is set."""
HEADER = ["age", "seeds", "samples/s", "age seen", "largest", "accuracy", "min", "max", "greedy"]


def main() -> None:
    """Run the benchmark; write the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="default: 0 1 2")
    parser.add_argument("--only", nargs="+", choices=list(RUNS)[1:], default=list(RUNS)[1:], help="default: every run")
    parser.add_argument("--out", type=Path, default=DOCS / "post_training.md", help="markdown file")
    parser.add_argument("--runs", type=Path, default=Path("runs/addition"), help="folder of the run folders")
    options = parser.parse_args()
    results: dict[str, list[Result]] = {name: [] for name in options.only}
    for seed in options.seeds:
        train("sft", seed, options.runs, RUNS)
        for name, done in results.items():
            done.append(measure(train(name, seed, options.runs, RUNS)))
            print(seed, *table_row(name, done[-1:]), sep="  ", flush=True)
    table = markdown_table(HEADER, [table_row(name, done) for name, done in results.items()])
    of_any = next(iter(results.values()))[0].folder
    write_section(f"{table}\n\n{conditions(of_any)}", options.out, "ages")


def table_row(name: str, results: list[Result]) -> list[str]:
    """Return a run's cells: means over seeds, and the spread of the accuracy."""
    rows = [read_metrics(result.folder / "metrics.jsonl") for result in results]
    speeds = [each[-1]["episodes"] / each[-1]["time/total_s"] for each in rows]
    ages = [fmean(row["age_mean"] for row in each) for each in rows]
    accuracies = [result.accuracy for result in results]
    return [
        RUNS[name][0],
        str(len(results)),
        f"{fmean(speeds):,.0f}",
        f"{fmean(ages):.2f}",
        str(max(row["age_max"] for each in rows for row in each)),
        *(f"{value:.3f}" for value in (fmean(accuracies), min(accuracies), max(accuracies))),
        f"{fmean(result.greedy for result in results):.3f}",
    ]


if __name__ == "__main__":
    main()
