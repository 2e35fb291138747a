"""Kills a token runner, a reward model's process or a learner every 20 s of an asynchronous GRPO run, or stops it.

    python benchmarks/soak_post_training.py --runs runs/addition                 # into docs/benchmarks.md
    python benchmarks/soak_post_training.py --iterations 60 --every 8            # a quick look, into no page

The task is two-digit addition. A right answer is worth 4, and the score of a reward model is added, of unit deviation
and trained only a little on right and wrong answers: what is learned is still addition, and the model's processes have
work that others wait for. A twin with the same seed and settings makes as many iterations, and nobody disturbs it.
Signals go to the kinds in turns; in some rounds it is SIGSTOP, which only deadlines find.

Ends with code 1 where a run does not finish, their accuracies differ by more than 2 points, the run stands still for
more than 10 s, a death is noticed later than that or told by any other number of lines than one, a sample is counted
twice or lost, or anything is left at the end. Linux only.
"""

from __future__ import annotations

import argparse
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import addition
import numpy as np
import psutil
from memory import tree
from report import DOCS, describe, machine, markdown_table, publish
from soak import Left
from strikes import Line, Lines, Strike, Striker, Watch, faults_of_counts, faults_of_lines, told

from rlx import load_config
from rlx.algorithms.reward_model import RewardModelConfig
from rlx.envs.addition import LONGEST_ANSWER, reward, rows
from rlx.metrics import Metrics, read_metrics

KINDS = ("token_runner", "reward_model", "learner")
STOPS = (1, 4)
"""Rounds over the kinds whose signal is SIGSTOP."""
FULL = 600
"""Iterations from which on it is no quick look."""
DEADLINE_S = 4.0
"""For all that an actor is asked for, far above what it takes here."""
LONGEST_WAIT_S = 10.0
LARGEST_LOSS = 0.02
RIGHT = 4.0
"""What a right answer is worth, in deviations of the reward model's score."""
SAMPLES = 8
"""Completions of each held-out prompt: the accuracy's standard error is 0.003."""


class Result(NamedTuple):
    """One of the two runs."""

    seconds: float
    """From the first iteration's start to the last one's end."""
    rows: list[Metrics]
    watch: Watch
    strikes: list[Strike]
    lines: list[Line]
    accuracy: float
    greedy: float
    faults: list[str]


def main() -> None:
    """Run the soak; end with code 1 if it found a fault."""
    options, conditions = _parse(), machine()
    home = options.runs / f"seed-{options.seed}"
    sft = addition.train("sft", options.seed, options.runs)
    judge = train_judge(sft, home / "runs" / "judge", options.seed)
    left = Left.before()
    with tempfile.TemporaryDirectory() as folder:
        twin, struck = (
            run(settings(sft, judge, options), Path(folder) / name, every_s, left)
            for name, every_s in (("twin", None), ("struck", options.every))
        )
    found = [*faults(twin, struck), *(f"{one} is left." for one in left.over())]
    text = page(twin, struck, found)
    print(text)
    if options.iterations >= FULL:
        record = {"machine": conditions, "last": [one.rows[-1] for one in (twin, struck)], "strikes": struck.strikes}
        publish(options.out, "soak post-training", record, f"{text}\n\n{describe(conditions)}")
    sys.exit(1 if found else 0)


def train_judge(sft: Path, folder: Path, seed: int) -> Path:
    """Return the run of a reward model that prefers right answers; make it where there is none."""
    if (folder / addition.FINISHED).exists():
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    rng = np.random.default_rng(seed)
    pairs = []
    for row in rows("sft"):
        wrong = str(max(0, int(row["answer"]) + int(rng.choice([-20, -10, -9, -2, -1, 1, 2, 9, 10, 20]))))
        if wrong != row["answer"]:
            pairs.append({"prompt": row["prompt"], "chosen": row["answer"], "rejected": wrong})
    config = RewardModelConfig().model(str(sft)).data(pairs, rows_per_iteration=128).reporting(progress="none")
    config.training(lr=5e-4, lr_warmup=5_000, minibatch_sequences=32).stop(iterations=15)
    with config.build(run_dir=folder) as algorithm:
        algorithm.fit()
    (folder / addition.FINISHED).touch()
    return folder


def right(prompts: Sequence[str], completions: Sequence[str], records: Sequence[Mapping[str, Any]]) -> list[float]:
    """Return the function's part of the reward."""
    return [RIGHT * score for score in reward(prompts, completions, records)]


def settings(sft: Path, judge: Path, options: argparse.Namespace) -> Any:
    """Return the settings that both runs have."""
    config: Any = load_config("grpo", [f"model.path={sft.resolve()}", f"reward.model={judge.resolve()}"])
    config.token_runners(num_token_runners=2, torch_threads=1).reward(right, num_actors=2, timeout_s=DEADLINE_S)
    config.learners(num_learners=options.learners, torch_threads=1).training(max_age=1)
    config.fault_tolerance(generate_timeout_s=DEADLINE_S, update_timeout_s=DEADLINE_S, max_restarts=1000)
    config.checkpointing(interval=5).evaluation(interval=0).reporting(progress="none")
    decay = {"start": 2e-4, "end": 2e-5, "env_steps": 530_000 * options.iterations // 300}  # as the config's, in length
    config.training(lr=decay)
    return config.runtime(seed=options.seed).stop(iterations=options.iterations)


def run(config: Any, folder: Path, every_s: float | None, left: Left) -> Result:
    """Make a run, disturbed every so many seconds or never; return what came of it."""
    found: list[str] = []

    def due(striker: Striker) -> float:
        return max([started, *(one.at_s for one in striker.strikes)]) + (every_s or 0)

    with Lines() as lines, config.callbacks([Watch]).build(run_dir=folder) as algorithm:
        (watch,) = algorithm.callbacks._all
        started = time.monotonic()
        striker = Striker(algorithm, KINDS, lambda one: every_s is not None and time.monotonic() > due(one), STOPS)
        with striker:
            try:
                algorithm.fit()
            except Exception as error:
                found.append(f"the run ended in iteration {algorithm.iteration + 1}: {error!r}")
        seconds = time.monotonic() - started
        left.processes.update(tree(psutil.Process())[1:])
        made = read_metrics(folder / "metrics.jsonl")
        found += faults_of_counts(algorithm, watch, made)
    found += faults_of_lines(striker.strikes, lines.seen, LONGEST_WAIT_S)
    deaths = [made[-1]["runner_restarts"], made[-1]["learner_restarts"]]
    of_learners = sum(strike.name.startswith("learner") for strike in striker.strikes)
    if deaths != [len(striker.strikes) - of_learners, of_learners]:
        found.append(f"runner_restarts and learner_restarts are {deaths}, of {len(striker.strikes)} deaths.")
    accuracies = (0.0, 0.0) if found and found[0].startswith("the run ended") else accuracy(folder / "model")
    return Result(seconds, made, watch, striker.strikes, lines.seen, *accuracies, found)


def accuracy(model: Path) -> tuple[float, float]:
    """Return the share of held-out sums that are answered right: at temperature 1, and by the likeliest tokens."""
    from rlx.text_inference import load_text_policy

    policy, held_out = load_text_policy(model), rows("eval")
    prompts = [row["prompt"] for row in held_out]

    def of(temperature: float, samples: int) -> float:
        made = policy.generate(prompts, n=samples, temperature=temperature, max_new_tokens=LONGEST_ANSWER + 1)
        each = zip(*made, strict=True)
        return fmean(fmean(reward(prompts, list(texts), held_out)) for texts in each)

    return of(1.0, SAMPLES), of(0.0, 1)


def faults(twin: Result, struck: Result) -> list[str]:
    """Return what is wrong, in words."""
    found = [f"{name}: {fault}" for name, one in (("twin", twin), ("struck", struck)) for fault in one.faults]
    if (loss := twin.accuracy - struck.accuracy) > LARGEST_LOSS:
        found.append(f"the accuracy is {struck.accuracy:.3f}, {loss:.3f} below the twin's {twin.accuracy:.3f}.")
    for strike, (_, wait_s) in zip(struck.strikes, waits(struck), strict=True):
        if wait_s > LONGEST_WAIT_S:
            found.append(
                f"after {strike.number.name} to {strike.name}, sent after iteration {strike.iteration}, the run stood "
                f"still for {wait_s:.1f} s."
            )
    return found


def waits(struck: Result) -> list[tuple[float, float]]:
    """Return for each strike in how many seconds it was noticed, and how long it kept the run from any progress.

    The wait is the longest time between the ends of two iterations up to the next strike; iterations that learners
    who have lost their state make once more are progress.
    """
    measured = []
    ends_s = [*(one.at_s for one in struck.strikes[1:]), float("inf")]
    for strike, until_s, own in zip(struck.strikes, ends_s, told(struck.strikes, struck.lines), strict=False):
        noticed = min((line.at_s for line in own), default=float("inf")) - strike.at_s
        last = min(until_s, struck.watch.ends_s[-1])
        measured.append((noticed, struck.watch.longest_wait_s(strike.at_s, max(last, strike.at_s))))
    return measured


def page(twin: Result, struck: Result, found: Sequence[str]) -> str:
    """Return the tables of both runs and of all strikes, and the verdict, as markdown."""
    runs = [
        [
            name,
            f"{one.seconds:.0f}",
            str(len(one.rows)),
            str(len(one.watch.ends_s) - len(one.rows)),
            *(f"{one.rows[-1][metric]:,}" for metric in ("env_steps", "episodes", "dropped_env_steps")),
            str(max(int(row["age_max"] or 0) for row in one.rows)),
            f"{one.accuracy:.3f}",
            f"{one.greedy:.3f}",
            f"{one.watch.longest_wait_s(one.watch.ends_s[0], one.watch.ends_s[-1]):.1f}",
        ]
        for name, one in (("undisturbed", twin), ("struck", struck))
    ]
    header = ["run", "seconds", "iterations", "made again", "tokens", "samples", "dropped", "oldest"]
    measured = list(zip(struck.strikes, waits(struck), strict=True))
    deaths = []
    for number in (signal.SIGKILL, signal.SIGSTOP):
        for kind in KINDS:
            of_kind = [times for one, times in measured if one.number == number and one.name.partition("/")[0] == kind]
            if of_kind:
                noticed, stood = zip(*of_kind, strict=True)
                times = (fmean(noticed), max(noticed), fmean(stood), max(stood))
                deaths.append([f"{kind}, {number.name}", str(len(of_kind)), *(f"{one:.2f}" for one in times)])
    titles = ["actor", "times", "noticed after s", "at most", "run stood still s", "at most"]
    verdict = (
        "No fault: both finished with the same accuracy, nothing stood still for long, each death was told once, "
        "every sample was counted once, nothing is left."
    )
    return (
        f"{markdown_table([*header, 'accuracy', 'greedy', 'longest wait s'], runs)}\n\n"
        f"{markdown_table(titles, deaths)}\n\n" + ("\n".join(f"FAULT: {fault}" for fault in found) or verdict)
    )


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--iterations", type=int, default=FULL, help=f"of each run (default: {FULL})")
    parser.add_argument("--every", type=float, default=20.0, help="seconds between two signals (default: 20)")
    parser.add_argument("--learners", type=int, default=2, help="processes that learn (default: 2)")
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    parser.add_argument("--runs", type=Path, default=Path("runs/addition"), help="folder of the run folders")
    parser.add_argument("--out", type=Path, default=DOCS, help="folder of benchmarks.md and .json (default: docs)")
    return parser.parse_args()


if __name__ == "__main__":
    main()
