"""Compares PPO of rlx with other libraries: same hyper-parameters, same torch threads, same number of iterations.

    python benchmarks/ppo.py                                          # everything, into docs/benchmarks.md
    python benchmarks/ppo.py --work cartpole --systems rlx sb3 --rounds 1 --out /tmp

Every run is a fresh process, and the systems take turns (A B C A B C). Results are written after every round.
"""

from __future__ import annotations

import argparse
from statistics import median
from typing import Any

from report import describe, machine, markdown_table, publish
from turns import Round, add_options, recorded, rounds_of, span, versions
from workloads import RUNS_ONLY, SYSTEMS, WORK


def main() -> None:
    """Run the benchmark."""
    options = _parse()
    for work in options.work:
        job = WORK[work] | {"work": work} | ({"iterations": options.iterations} if options.iterations else {})
        systems = [name for name in options.systems or RUNS_ONLY[work] if name in RUNS_ONLY[work]]
        if not systems:
            raise SystemExit(f"{work} is run with {', '.join(RUNS_ONLY[work])} only; add one of them to --systems.")
        record = recorded(work, {"job": job, "machine": machine(), "rounds": []}, systems, options)
        for rounds in rounds_of({name: job | SYSTEMS[name] for name in systems}, options, record["rounds"]):
            record = {**record, "rounds": rounds}
            publish(options.out, work, record, page(record))


def page(record: dict[str, Any]) -> str:
    """Return the table of one workload and what it was measured with, as markdown."""
    rounds: list[Round] = record["rounds"]
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
                span([run["steps_per_s"] for run in runs], ",.0f"),
                f"{median(ratios):.2f}",
                span(ratios, ".2f"),
                f"{median(run['ready_s'] for run in runs):.1f}",
                f"{median(returns):,.0f}" if returns else "",
            ]
        )
    header = ["system", "env steps/s", "lowest to highest", f"{first} is faster by", "range", "ready after s", "return"]
    busy = [run["busy_cores_before"] or 0.0 for one in rounds for run in one.values()]
    facts = f"{describe(record['machine'])} Cores busy with other work before a run: {span(busy, '.2f')}."
    size = f"{record['job']['iterations']} iterations a run, {len(rounds)} rounds."
    packages = [f"- {name}: {versions(run)}" for name, run in rounds[0].items() if len(name.split()) == 1]
    warnings = [f"- {name} says: {text}" for name, run in rounds[0].items() for text in run.get("warnings", ())]
    return "\n".join([markdown_table(header, rows), "", f"{size} {facts}", "", *packages, *warnings])


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--work", nargs="+", choices=WORK, default=[*WORK], help="default: all")
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, help="the first one is the base; default: the work's")
    parser.add_argument("--iterations", type=int, help="measured iterations in a run (default: the workload's)")
    add_options(parser, rounds=5)
    return parser.parse_args()


if __name__ == "__main__":
    main()
