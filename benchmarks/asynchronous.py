"""Compares IMPALA and APPO of rlx with other libraries, and measures what one slow env runner costs.

    python benchmarks/asynchronous.py                                 # everything, into docs/benchmarks.md
    python benchmarks/asynchronous.py --work impala --seconds 5 --rounds 1 --out /tmp

Every run is a fresh process, and the systems take turns (A B A B). Results are written after every round.
"""

from __future__ import annotations

import argparse
from statistics import median
from typing import Any

from report import describe, machine, markdown_table, publish
from turns import Round, Run, add_options, recorded, rounds_of, span, versions
from workloads import ASYNCHRONOUS

FASTER_BY = {"impala": 8.0, "appo": 6.0, "ppo pong": 1.6}
"""The aims: how many times the env steps/s of the other library."""
SHARE_KEPT = {"PPO": None, "IMPALA": 0.75}
"""The aims: what is left of the env steps/s while one of four runners is slow."""

SHARE_OF_LIMIT = 0.6
"""The aim: what part of the env steps/s that emulator and arithmetic alone would leave on all cores."""


def main() -> None:
    """Run the benchmark."""
    make = {"slow runner": slow_runner_page, "impala pong": limit_page}
    options = _parse()
    for work in options.work:
        shared = {"work": work, "seconds": options.seconds}
        jobs = {name: ASYNCHRONOUS[work][name] | shared for name in options.systems or ASYNCHRONOUS[work]}
        record = recorded(work, {"job": shared, "machine": machine(), "rounds": []}, jobs, options)
        for rounds in rounds_of(jobs, options, record["rounds"]):
            record = {**record, "rounds": rounds}
            publish(options.out, work, record, make.get(work, page)(record))


def page(record: dict[str, Any]) -> str:
    """Return the table of one algorithm beside another library's, and what it was measured with, as markdown."""
    rounds: list[Round] = record["rounds"]
    first, aim = next(iter(rounds[0])), FASTER_BY[record["job"]["work"]]
    rows = []
    for name in rounds[0]:
        runs = [one[name] for one in rounds]
        ratios = [one[first]["steps_per_s"] / one[name]["steps_per_s"] for one in rounds]
        is_first = name == first
        rows.append(
            [
                f"{name}, {runs[0]['version']}",
                *_rates(runs),
                "" if is_first else f"{median(ratios):.1f}",
                "" if is_first else span(ratios, ".1f"),
                "" if runs[0]["system"] == "rlx" else _judged(f"{aim:g}", median(ratios) >= aim),
                *_ages(runs),
                span([run["returns"] for run in runs if run["returns"] is not None] or [float("nan")], ",.0f"),
            ]
        )
    header = ["system", "env steps/s", "lowest to highest", f"{first} is faster by", "range", "aim"]
    header += ["mean age", "largest age", "largest allowed", f"return after {record['job']['seconds']:g} s"]
    return f"{markdown_table(header, rows)}\n\n{_facts(record)}"


def slow_runner_page(record: dict[str, Any]) -> str:
    """Return the table of what one slow runner costs, and what it was measured with, as markdown."""
    rounds: list[Round] = record["rounds"]
    rows = []
    for name, aim in SHARE_KEPT.items():
        undisturbed, slow = ([one[key] for one in rounds] for key in (name, f"{name}, one slow"))
        shares = [b["steps_per_s"] / a["steps_per_s"] for a, b in zip(undisturbed, slow, strict=True)]
        rows.append(
            [
                name,
                *(f"{median(run['steps_per_s'] for run in runs):,.0f}" for runs in (undisturbed, slow)),
                f"{median(shares):.2f}",
                span(shares, ".2f"),
                "" if aim is None else _judged(f"{aim:.2f}", median(shares) >= aim),
            ]
        )
    header = ["algorithm", "env steps/s", "with a slow runner", "share that is left", "range", "aim"]
    return f"{markdown_table(header, rows)}\n\n{_facts(record)}"


def limit_page(record: dict[str, Any]) -> str:
    """Return the table of how near rlx comes to what the machine can do, and what it was measured with, as markdown.

    A step takes its time in the emulator and its share of a gradient step, of each as one core does it alone, and the
    limit has all cores at that without a break; with "acting", a forward pass for every action as well.
    """
    cores = record["machine"]["cores"]
    rounds: list[Round] = record["rounds"]
    rates = {name: [one[name]["steps_per_s"] for one in rounds] for name in rounds[0]}
    rows = []
    for name in ("emulator", "arithmetic", "acting"):
        rows.append([f"{name}, one core", *_rates([one[name] for one in rounds]), "", "", ""])
    for names, aim in ((("emulator", "arithmetic"), SHARE_OF_LIMIT), (("emulator", "arithmetic", "acting"), None)):
        limits = [cores / sum(1 / rates[name][number] for name in names) for number in range(len(rounds))]
        shares = [rate / limit for rate, limit in zip(rates["rlx"], limits, strict=True)]
        judged = "" if aim is None else _judged(f"{aim}", median(shares) >= aim)
        rows.append(
            [
                f"limit: {' and '.join(names)}, {cores} cores",
                *(f"{median(limits):,.0f}", span(limits, ",.0f"), f"{median(shares):.2f}", span(shares, ".2f"), judged),
            ]
        )
    runs = [one["rlx"] for one in rounds]
    rows.append([f"rlx, {runs[0]['version']}", *_rates(runs), "", "", ""])
    header = ["", "env steps/s", "lowest to highest", "rlx's share of it", "range", "aim"]
    return f"{markdown_table(header, rows)}\n\n{_facts(record)}"


def _judged(aim: str, is_met: bool) -> str:
    return aim if is_met else f"{aim}, missed"


def _rates(runs: list[Run]) -> list[str]:
    rates = [run["steps_per_s"] for run in runs]
    return [f"{median(rates):,.0f}", span(rates, ",.0f")]


def _ages(runs: list[Run]) -> list[str]:
    if "age_mean" not in runs[0]:
        return ["", "", ""]
    allowed = runs[0].get("max_age")
    mean, largest = median(run["age_mean"] for run in runs), max(run["age_max"] for run in runs)
    return [f"{mean:.1f}", f"{largest:.0f}", "" if allowed is None else f"{allowed}"]


def _facts(record: dict[str, Any]) -> str:
    rounds: list[Round] = record["rounds"]
    busy = [run["busy_cores_before"] or 0.0 for one in rounds for run in one.values()]
    size = f"{record['job']['seconds']:g} s a run, {len(rounds)} rounds."
    facts = f"{size} {describe(record['machine'])} Cores busy with other work before a run: {span(busy, '.2f')}."
    packages = dict.fromkeys(f"- {run['system']}: {versions(run)}" for run in rounds[0].values())
    warnings = [f"- {name} says: {text}" for name, run in rounds[0].items() for text in run.get("warnings", ())]
    return "\n".join([facts, "", *packages, *warnings])


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--work", nargs="+", choices=ASYNCHRONOUS, default=[*ASYNCHRONOUS], help="default: all")
    parser.add_argument("--seconds", type=float, default=60.0, help="length of a run after its start (default: 60)")
    parser.add_argument("--systems", nargs="+", help="of one work beside another library; the first one is the base")
    add_options(parser, rounds=3)
    options = parser.parse_args()
    known = {name for work in options.work for name in ASYNCHRONOUS[work] if work in FASTER_BY}
    if options.systems and (len(options.work) > 1 or not known.issuperset(options.systems)):
        parser.error(f"--systems needs one --work of {', '.join(FASTER_BY)}, and systems of it: {', '.join(known)}")
    return options


if __name__ == "__main__":
    main()
