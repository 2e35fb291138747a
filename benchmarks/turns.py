"""How systems are measured side by side: every run is a fresh process, and the systems take turns (A B C A B C).

So a machine that slows down slows all of them, and a ratio compares two runs of one round.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from environments import PACKAGES, python_of
from processes import output_of
from report import DOCS, busy_cores

RUN_TIMEOUT_S = 1800
PEERS = Path(__file__).resolve().parent / "peers"
Run = dict[str, Any]
Round = dict[str, Run]
"""By the name of the system."""


def rounds_of(
    jobs: Mapping[str, dict[str, Any]], options: argparse.Namespace, before: Sequence[Round] = ()
) -> Iterator[list[Round]]:
    """Yield all rounds so far after each one, in which every system does its job with the round's seed.

    jobs: by system; job["script"] is a file of `peers/` without its suffix. options: those of `add_options`.
    before: rounds that `recorded` found, which are gone on from.
    """
    pythons = {name: python_of(peer_of(job), options.envs, dict(options.python)) for name, job in jobs.items()}
    rounds = list(before)
    for seed in range(len(rounds) + 1, len(rounds) + options.rounds + 1):
        rounds.append({})
        for name, job in jobs.items():
            rounds[-1][name] = run = measure(pythons[name], job | {"seed": seed})
            print(f"{job['work']}, round {seed}, {name}: {run['steps_per_s']:,.0f} env steps/s", flush=True)
        yield rounds


def measure(python: str, job: dict[str, Any]) -> Run:
    """Return what one fresh process of a system printed, with the time it took to be ready and the load before it."""
    busy = busy_cores()
    with tempfile.TemporaryDirectory(prefix="b") as scratch:  # a short path: Ray puts sockets there
        command = [python, str(PEERS / f"{job['script']}.py"), json.dumps(job)]
        # A fresh TMPDIR makes every compilation a cold one; Ray would give its workers a lower priority.
        environment = os.environ | {"TMPDIR": scratch, "RAY_TMPDIR": scratch, "RAY_worker_niceness": "0"}
        started = time.time()
        output = output_of(command, RUN_TIMEOUT_S, Path(scratch), environment)
    run = json.loads(output.strip().splitlines()[-1])
    ready_s = run.pop("ready_at") - started
    return {**run, "ready_s": ready_s, "busy_cores_before": busy}


def recorded(section: str, record: dict[str, Any], systems: Iterable[str], options: argparse.Namespace) -> Any:
    """Return what `record` goes on from: with --more the section's record of the same job and systems, else itself."""
    raw = options.out / "benchmarks.json"
    if not options.more:
        return record
    found = json.loads(raw.read_text()).get(section) if raw.exists() else None
    if found is None or found["job"] != record["job"] or list(found["rounds"][0]) != [*systems]:
        raise SystemExit(f"--more: {raw} has no rounds of {section} with this job and these systems; leave --more out.")
    return found


def peer_of(job: Mapping[str, Any]) -> str:
    """Return the library that a job is for: sample_factory of the script sample_factory_appo."""
    return job["script"].rpartition("_")[0]


def span(values: list[float], form: str) -> str:
    """Return the lowest and the highest value in words."""
    return f"{min(values):{form}} to {max(values):{form}}"


def versions(run: Run) -> str:
    """Return the packages of a run with their versions."""
    return ", ".join(f"{name} {version}" for name, version in run["packages"].items())


def add_options(parser: argparse.ArgumentParser, rounds: int) -> None:
    """Add what every benchmark of this kind can be told."""
    parser.add_argument("--rounds", type=int, default=rounds, help=f"runs of each system (default: {rounds})")
    parser.add_argument("--more", action="store_true", help="add the rounds to those in benchmarks.json")
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


def _peer_and_python(text: str) -> tuple[str, str]:
    peer, equals, python = text.partition("=")
    if peer not in PACKAGES or not equals or not Path(python).is_file():
        raise argparse.ArgumentTypeError(f"{text!r} is not PEER=PATH with a peer of {', '.join(PACKAGES)} and a file")
    return peer, os.path.abspath(python)  # not resolved: a link is what makes it an environment's interpreter
