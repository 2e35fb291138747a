"""Compares PPO of rlx with other libraries: same hyper-parameters, same torch threads, same number of iterations.

    python benchmarks/ppo.py                                          # everything, into docs/benchmarks.md
    python benchmarks/ppo.py --work cartpole --systems rlx sb3 --rounds 1 --out /tmp

Every run is a fresh process. The systems take turns (A B C A B C), so that a machine that slows down slows all of
them, and a ratio compares two runs of one round. Results are written after every round.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from environments import PACKAGES, python_of
from processes import output_of
from report import DOCS, busy_cores, describe, machine, markdown_table, publish
from workloads import RUNS_ONLY, SYSTEMS, WORK

RUN_TIMEOUT_S = 1800
PEERS = Path(__file__).resolve().parent / "peers"
Run = dict[str, Any]


def main() -> None:
    """Run the benchmark."""
    options = _parse()
    for work in options.work:
        conditions = machine()
        job = WORK[work] | {"work": work} | ({"iterations": options.iterations} if options.iterations else {})
        systems = [name for name in options.systems if name in RUNS_ONLY.get(work, SYSTEMS)]
        if not systems:
            raise SystemExit(f"{work} is run with {', '.join(RUNS_ONLY[work])} only; add one of them to --systems.")
        pythons = {name: python_of(name.split()[0], options.envs, dict(options.python)) for name in systems}
        rounds: list[dict[str, Run]] = []
        for seed in range(1, options.rounds + 1):
            rounds.append({})
            for name in systems:
                rounds[-1][name] = run = measure(name, pythons[name], job | {"seed": seed})
                print(f"{work}, round {seed}, {name}: {run['steps_per_s']:,.0f} env steps/s", flush=True)
            record = {"job": job, "machine": conditions, "rounds": rounds}
            publish(options.out, work, record, page(record))


def measure(name: str, python: str, job: dict[str, Any]) -> Run:
    """Return what one fresh process of a system printed, with the time it took to be ready and the load before it."""
    job = {**job, **SYSTEMS[name]}
    busy = busy_cores()
    with tempfile.TemporaryDirectory(prefix="b") as scratch:  # a short path: Ray puts sockets there
        command = [python, str(PEERS / f"{name.split()[0]}_ppo.py"), json.dumps(job)]
        # A fresh TMPDIR makes every compilation a cold one; Ray would give its workers a lower priority.
        environment = os.environ | {"TMPDIR": scratch, "RAY_TMPDIR": scratch, "RAY_worker_niceness": "0"}
        started = time.time()
        output = output_of(command, RUN_TIMEOUT_S, Path(scratch), environment)
    run = json.loads(output.strip().splitlines()[-1])
    ready_s = run.pop("ready_at") - started
    return {**run, "ready_s": ready_s, "busy_cores_before": busy}


def page(record: dict[str, Any]) -> str:
    """Return the table of one workload and what it was measured with, as markdown."""
    rounds: list[dict[str, Run]] = record["rounds"]
    first = next(iter(rounds[0]))
    rows = []
    for name in rounds[0]:
        runs = [one[name] for one in rounds]
        ratios = [one[first]["steps_per_s"] / one[name]["steps_per_s"] for one in rounds]
        returns = [run["returns"] for run in runs if run["returns"] is not None]
        rows.append(
            [
                f"{name}, {runs[0]['version']}",
                f"{median(run['steps_per_s'] for run in runs):,.0f}",
                _span([run["steps_per_s"] for run in runs], ",.0f"),
                f"{median(ratios):.2f}",
                _span(ratios, ".2f"),
                f"{median(run['ready_s'] for run in runs):.1f}",
                f"{median(returns):,.0f}" if returns else "",
            ]
        )
    header = ["system", "env steps/s", "lowest to highest", f"{first} is faster by", "range", "ready after s", "return"]
    busy = [run["busy_cores_before"] or 0.0 for one in rounds for run in one.values()]
    facts = f"{describe(record['machine'])} Cores busy with other work before a run: {_span(busy, '.2f')}."
    size = f"{record['job']['iterations']} iterations a run, {len(rounds)} rounds."
    packages = [f"- {name}: {_versions(run)}" for name, run in rounds[0].items() if len(name.split()) == 1]
    warnings = [f"- {name} says: {text}" for name, run in rounds[0].items() for text in run.get("warnings", ())]
    return "\n".join([markdown_table(header, rows), "", f"{size} {facts}", "", *packages, *warnings])


def _versions(run: Run) -> str:
    return ", ".join(f"{name} {version}" for name, version in run["packages"].items())


def _span(values: list[float], form: str) -> str:
    return f"{min(values):{form}} to {max(values):{form}}"


def _peer_and_python(text: str) -> tuple[str, str]:
    peer, equals, python = text.partition("=")
    if peer not in PACKAGES or not equals or not Path(python).is_file():
        raise argparse.ArgumentTypeError(f"{text!r} is not PEER=PATH with a peer of {', '.join(PACKAGES)} and a file")
    return peer, os.path.abspath(python)  # not resolved: a link is what makes it an environment's interpreter


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--work", nargs="+", choices=WORK, default=[*WORK], help="default: all")
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=[*SYSTEMS], help="the first one is the base")
    parser.add_argument("--rounds", type=int, default=5, help="runs of each system (default: 5)")
    parser.add_argument("--iterations", type=int, help="measured iterations in a run (default: the workload's)")
    parser.add_argument("--envs", type=Path, default=Path(".benchmark-envs"), help="folder of the peers' environments")
    parser.add_argument(
        "--python",
        action="append",
        default=[],
        metavar="PEER=PATH",
        type=_peer_and_python,
        help=f"use an interpreter that has the peer ({', '.join(PACKAGES)}) instead of an environment in --envs",
    )
    parser.add_argument("--out", type=Path, default=DOCS, help="folder of benchmarks.md and .json (default: docs)")
    return parser.parse_args()


if __name__ == "__main__":
    main()
