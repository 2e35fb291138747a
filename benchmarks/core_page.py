"""The rows of benchmarks/core.py with what is aimed at, and the tables that say how far that is reached."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median
from typing import Any

from peers.core_traffic import BROADCAST_MIB, ECHO_MIB, MIB
from report import describe, markdown_table

Record = dict[str, Any]
Round = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Row:
    """One thing that is measured of every library."""

    key: str
    name: str
    form: str = ",.0f"
    beside_ray: float | None = None
    """How many times better than Ray it is to be."""
    bound: str | None = None
    """What nobody can do without: "ping-pong", "two copies", "one copy"; the value there is a rate as well."""
    of_bound: float = 0.0
    """Which part of the bound is to be reached."""
    at_most: float | None = None
    """What a value in seconds or MB may be; on top of the row's bound, where one was measured."""


RATES = [
    Row("sync", "calls, one at a time", beside_ray=6, bound="ping-pong", of_bound=0.4),
    Row("pipelined", "calls, 1,000 on their way, 1 actor", beside_ray=17),
    Row("pipelined_to_all", "calls, 1,000 on their way, 8 actors", beside_ray=17),
    Row("echo_numpy", "10 MiB numpy there and back", beside_ray=6, bound="two copies", of_bound=1 / 3),
    Row("echo_torch", "10 MiB torch there and back", beside_ray=6, bound="two copies", of_bound=1 / 3),
    Row("broadcast", "25 MiB to 8 actors, put and call", beside_ray=4.5, bound="one copy", of_bound=0.5),
    Row("publish", "25 MiB to 8 actors, channel", beside_ray=4.5, bound="one copy", of_bound=0.5),
]
TIMES = [
    Row("start", "start of 8 actors, s", ".3f", beside_ray=15),
    Row("kill", "kill -9 to the caller's error, s", ".3f", at_most=0.2),
]
STARTS = [
    Row("first_torch", "import to first results, with torch, s", ".2f", at_most=1.5),
    Row("first", "import to first results, without torch, s", ".2f", at_most=1.5),
    Row("memory_torch", "forkserver and 8 idle actors, with torch, MB", at_most=320),
    Row("memory", "forkserver and 8 idle actors, without torch, MB"),
]
TRAFFIC = RATES + TIMES
"""What is measured of libraries that stay up."""


def page(record: Record) -> str:
    """Return the tables and what they were measured with, as markdown."""
    rounds: list[Round] = record["rounds"]
    bounds = ["median part of its bound", "range", "aim"]
    header = ["a second", "rlx", "Ray", "rlx beside Ray", "range", "aim", "bound", *bounds]
    rates = [[*_beside_ray(row, rounds), *_beside_bound(row, rounds)] for row in RATES]
    costs = [[*_beside_ray(row, rounds), _limit(row, rounds)] for row in TIMES + STARTS]
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    missed = [cells[0] for cells in [*rates, *costs] if any("missed" in cell for cell in cells)]
    return "\n".join(
        [
            markdown_table(header, rates),
            "",
            markdown_table(["seconds or MB", "rlx", "Ray", "Ray beside rlx", "range", "aim", "at most"], costs),
            "",
            f"`{record['command']}`: {len(rounds)} rounds, windows of {record['seconds']:g} s; {versions}. "
            f"{describe(record['machine'])} Cores busy with other work before: {record['busy_cores_before'] or 0:.2f}.",
            "",
            f"- {_raw(rounds)}",
            f"- Torch alone is imported in {median(one['first_torch']['bound'] for one in rounds):.2f} s.",
            f"- Beside that memory the driver of rlx has {_driver_mb(rounds):.0f} MB. Strangers that map torch: "
            f"{max(one['memory_torch']['rlx strangers'] for one in rounds)}.",
            f"- The caller of a killed actor reads: {rounds[-1]['kill']['rlx error']}",
            f"- Missed: {'; '.join(missed) or 'nothing'}.",
        ]
    )


def _beside_ray(row: Row, rounds: list[Round]) -> list[str]:
    """Return name, both medians, and how many times better rlx is: by which aim, and reached or not."""
    cells = [row.name, format(median(one[row.key]["rlx"] for one in rounds), row.form)]
    if not all("ray" in one[row.key] for one in rounds):
        return [*cells, "", "", "", ""]
    pairs = [(one[row.key]["rlx"], one[row.key]["ray"]) for one in rounds]
    ratios = [rlx / ray if row in RATES else ray / rlx for rlx, ray in pairs]
    aim = _aim(row.beside_ray, median(ratios), "{:g}") if row.beside_ray else ""
    return [
        *cells,
        format(median(ray for _, ray in pairs), row.form),
        f"{median(ratios):.1f}",
        _span(ratios, ".1f"),
        aim,
    ]


def _beside_bound(row: Row, rounds: list[Round]) -> list[str]:
    """Return the bound's median, and which part of it rlx reaches."""
    if row.bound is None:
        return ["", "", "", ""]
    bounds = [one[row.key]["bound"] for one in rounds]
    parts = [one[row.key]["rlx"] / one[row.key]["bound"] for one in rounds]
    cells = f"{row.bound} {median(bounds):,.0f}", f"{median(parts):.2f}", _span(parts, ".2f")
    return [*cells, _aim(row.of_bound, median(parts), "{:.2f}")]


def _limit(row: Row, rounds: list[Round]) -> str:
    if row.at_most is None:
        return ""
    above = [one[row.key]["rlx"] - one[row.key].get("bound", 0.0) for one in rounds]
    text = f"{row.at_most:g}" + (" and the import of torch" if "bound" in rounds[0][row.key] else "")
    return text + ("" if median(above) <= row.at_most else ", missed")


def _aim(aim: float, reached: float, form: str) -> str:
    return form.format(aim) + ("" if reached >= aim else ", missed")


def _raw(rounds: list[Round]) -> str:
    """Return what the machine does without a library."""
    bytes_copied = {"two copies": 2 * ECHO_MIB * MIB, "one copy": BROADCAST_MIB * MIB}
    rows = [row for row in RATES if row.bound in bytes_copied]
    copies = [one[row.key]["bound"] * bytes_copied[str(row.bound)] / 1e9 for one in rounds for row in rows]
    calls = [one["sync"]["bound"] for one in rounds]
    return (
        f"In these minutes memory was copied at {_span(copies, '.1f')} GB/s (median {median(copies):.1f}), and a frame "
        f"went between two processes and back {_span(calls, ',.0f')} times a second (median {median(calls):,.0f})."
    )


def _driver_mb(rounds: list[Round]) -> float:
    return median(one["memory_torch"]["rlx driver"] for one in rounds)


def _span(values: list[float], form: str) -> str:
    return f"{min(values):{form}} to {max(values):{form}}"
