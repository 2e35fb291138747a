"""Compares a GRPO step of rlx with TRL's: generation, rewards, loss, gradient, optimizer, of one model on two cores.

    python benchmarks/grpo.py                                 # into docs/benchmarks.md
    python benchmarks/grpo.py --rounds 1 --out /tmp           # a quick look

Both trainers stay up, each in a process of its own with two torch threads, and take turns step by step; the one that
waits uses no processor. A step that nobody counts comes first. Processor time is counted beside the wall's, as other
programs disturb it less.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

from environments import python_of
from report import DOCS, busy_cores, describe, machine, markdown_table, publish
from turns import PEERS, span

SIZES = {
    "model_type": "llama",
    "hidden_size": 128,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 128,
}
JOB = {"model": SIZES, "prompts": 32, "samples": 8, "lr": 1e-4, "seed": 0}
JOB |= {"device": "cpu", "dtype": "float32", "microbatch": 4096}
LIBRARIES = ("rlx", "trl")
PARTS = ("generate_s", "score_s", "logp_s", "train_s", "sync_s")
ANSWER_TIMEOUT_S = 300.0


@dataclass(frozen=True)
class Case:
    """How long completions are, and how many steps of it make a turn."""

    name: str
    new_tokens: int
    stops: bool
    steps: int
    aim: float | None


CASES = (
    Case("6 new tokens, none ends early", 6, False, 6, 2.5),
    Case("64 new tokens, none ends early", 64, False, 1, 2.0),
    Case("up to 64 new tokens, EOS ends", 64, True, 1, None),
)


class Trainer:
    """One library in a process of its own, which makes a step when it is told to; `opened` leaves nothing behind."""

    def __init__(self, name: str, process: subprocess.Popen[str], errors: Path) -> None:
        self.name, self._process, self._errors = name, process, errors
        self.packages: dict[str, str] = {}

    @classmethod
    @contextlib.contextmanager
    def opened(cls, name: str, python: str, job: dict[str, Any]) -> Iterator[Trainer]:
        """Yield the trainer, started; `wait_until_ready` says when its first step is behind it."""
        with tempfile.TemporaryDirectory() as scratch:
            errors = Path(scratch) / "errors"
            command = [python, str(PEERS / f"{name}_grpo.py"), json.dumps(job)]
            with (
                errors.open("w") as sink,
                subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=sink, text=True, cwd=scratch
                ) as process,
            ):
                try:
                    yield cls(name, process, errors)
                finally:
                    process.kill()

    def wait_until_ready(self) -> None:
        """Wait for the end of the step that nobody counts."""
        self.packages = self._answer()["packages"]

    def steps(self, count: int) -> dict[str, float]:
        """Return the means over so many steps: seconds, tokens of a completion, and what else the library tells."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"steps": count}) + "\n")
        self._process.stdin.flush()
        steps = self._answer()["steps"]
        return {name: fmean(step[name] for step in steps) for name in steps[0]}

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        late = threading.Timer(ANSWER_TIMEOUT_S, self._process.kill)
        late.start()
        line = self._process.stdout.readline()
        late.cancel()
        if not line:
            raise SystemExit(
                f"{self.name} gave no answer within {ANSWER_TIMEOUT_S:.0f} s, or ended; its last words:\n"
                f"{self._errors.read_text()[-3000:]}"
            )
        return json.loads(line)


def measure(case: Case, job: dict[str, Any], pythons: dict[str, str], rounds: int) -> dict[str, Any]:
    """Return every round's means of the libraries that pythons names, and their packages."""
    job = job | {"new_tokens": case.new_tokens, "stops": case.stops}
    found: list[dict[str, dict[str, float]]] = []
    with contextlib.ExitStack() as stack:
        trainers = []
        for name in pythons:  # one after the other: threads of both at once would wait for each other's cores
            trainers.append(stack.enter_context(Trainer.opened(name, pythons[name], job)))
            trainers[-1].wait_until_ready()
        for _ in range(rounds):
            found.append({trainer.name: trainer.steps(case.steps) for trainer in trainers})
            shown = {name: f"{one['seconds']:.3f} s, cpu {one['cpu_s']:.3f} s" for name, one in found[-1].items()}
            print(case.name, shown, flush=True)
            if not case.stops:
                assert all(one["tokens"] == case.new_tokens for one in found[-1].values()), found[-1]
        packages = {trainer.name: trainer.packages for trainer in trainers}
    return {"name": case.name, "steps": case.steps, "aim": case.aim, "rounds": found, "packages": packages}


def beside(cases: list[dict[str, Any]]) -> str:
    """Return the table of a step's seconds; where TRL took part, beside each other."""
    rows = []
    for case in cases:
        row = [case["name"]]
        for name in LIBRARIES:
            steps = [one[name] for one in case["rounds"] if name in one]
            row += [f"{1000 * median(one['seconds'] for one in steps):,.0f}" if steps else ""]
            row += [f"{1000 * median(one['cpu_s'] for one in steps):,.0f}" if steps else ""]
            row += [f"{fmean(one['tokens'] for one in steps):.1f}" if steps else ""]
        rows.append([*row, *_ratios(case)])
    header = ["step", "rlx, ms", "cpu, ms", "tokens each", "TRL, ms", "cpu, ms", "tokens each"]
    return markdown_table([*header, "rlx beside TRL", "range", "in cpu time", "aim"], rows)


def _ratios(case: dict[str, Any]) -> list[str]:
    """Return how many times faster rlx is, the range of it, the same in processor time, and what is aimed at."""
    aim, pairs = case["aim"], [[one[name] for name in LIBRARIES] for one in case["rounds"] if len(one) > 1]
    wanted = "" if aim is None else f"{aim:g}"
    if not pairs:
        return ["", "", "", wanted]
    ratios, cpu = ([other[kind] / own[kind] for own, other in pairs] for kind in ("seconds", "cpu_s"))
    missed = ", missed" if aim is not None and median(ratios) < aim else ""
    return [f"{median(ratios):.2f}", span(ratios, ".2f"), f"{median(cpu):.2f}", wanted + missed]


def split(cases: list[dict[str, Any]]) -> str:
    """Return the table of what rlx's steps went to."""
    rows = []
    for case in cases:
        own = [one["rlx"] for one in case["rounds"]]
        rest = median(one["seconds"] - sum(one[name] for name in PARTS) for one in own)
        times = [*(median(one[name] for one in own) for name in PARTS), rest]
        rows.append([case["name"], *(f"{1000 * seconds:,.1f}" for seconds in times)])
    return markdown_table(["rlx's step, ms", *(name.removesuffix("_s") for name in PARTS), "rest"], rows)


def facts(record: dict[str, Any]) -> str:
    """Return in words how it was measured, and with which packages."""
    first = record["cases"][0]
    turns = ", ".join(str(case["steps"]) for case in record["cases"])
    packages = [
        f"- {name}: {', '.join(f'{package} {version}' for package, version in versions.items() if version != '-')}"
        for name, versions in first["packages"].items()
    ]
    how = (
        f"`{record['command']}`: {len(first['rounds'])} rounds, in turns of {turns} steps; {record['threads']} torch "
        f"threads. {describe(record['machine'])} Cores busy with other work before: "
        f"{record['busy_cores_before'] or 0:.2f}."
    )
    return "\n".join([how, "", *packages])


def page(record: dict[str, Any]) -> str:
    """Return the tables: seconds of a step beside each other, and what rlx's went to."""
    return "\n\n".join([beside(record["cases"]), split(record["cases"]), facts(record)])


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2, help="torch threads of each trainer")
    parser.add_argument("--only", type=int, nargs="+", default=[0, 1, 2], help="numbers of the cases (default: all)")
    parser.add_argument("--envs", type=Path, default=Path(".benchmark-envs"), help="folder of TRL's environment")
    parser.add_argument("--trl", help="use an interpreter that has TRL instead of an environment in --envs")
    parser.add_argument("--out", type=Path, default=DOCS, help="folder of benchmarks.md and .json (default: docs)")
    options = parser.parse_args()
    given = {} if options.trl is None else {"trl": options.trl}
    pythons = {name: python_of(name, options.envs, given) for name in LIBRARIES}
    record: dict[str, Any] = {
        "command": f"python benchmarks/grpo.py --rounds {options.rounds} --threads {options.threads}",
        "threads": options.threads,
    }
    record |= {"machine": machine(), "busy_cores_before": busy_cores(), "cases": []}
    for case in [CASES[number] for number in options.only]:
        record["cases"].append(measure(case, JOB | {"threads": options.threads}, pythons, options.rounds))
        publish(options.out, "grpo", record, page(record))
    print(page(record))


if __name__ == "__main__":
    main()
