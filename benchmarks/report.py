"""Where the benchmarks write to, and what they record of the machine."""

import json
import os
import platform
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parents[1] / "docs"


def publish(folder: Path, section: str, record: dict[str, Any], table: str) -> None:
    """Put `table` between the marks of its section in benchmarks.md, and the raw record into benchmarks.json."""
    folder.mkdir(parents=True, exist_ok=True)
    page, raw = folder / "benchmarks.md", folder / "benchmarks.json"
    begin, end = f"<!-- begin {section} -->", f"<!-- end {section} -->"
    text = page.read_text() if page.exists() else f"{begin}\n{end}\n"
    if begin not in text or end not in text:
        raise SystemExit(f"{page} has no lines {begin} and {end}; add them where the table belongs.")
    before, after = text.partition(begin)[0], text.partition(end)[2]
    page.write_text(f"{before}{begin}\n{table.strip()}\n{end}{after}")
    records = json.loads(raw.read_text()) if raw.exists() else {}
    raw.write_text(json.dumps({**records, section: record}, indent=1) + "\n")


def machine() -> dict[str, Any]:
    """Return what a figure depends on beside the programs: processor, system, priority, load and date."""
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "niceness": os.getpriority(os.PRIO_PROCESS, 0),
        "load_average": os.getloadavg(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }


def describe(facts: dict[str, Any]) -> str:
    """Return `machine()` as a sentence."""
    load = " ".join(f"{value:.2f}" for value in facts["load_average"])
    return (
        f"Measured {facts['date']} on {facts['cores']} cores of {facts['cpu']}, {facts['system']}, niceness "
        f"{facts['niceness']}, load average at the start {load}."
    )


def busy_cores(seconds: float = 1.0) -> float | None:
    """Return how many cores others keep busy now; None where the system does not tell (no /proc)."""
    before = _processor_s()
    time.sleep(seconds)
    after = _processor_s()
    return None if before is None or after is None else (after - before) / seconds


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    """Return a table whose first column is text and whose other columns are numbers."""
    rule = ["---", *["--:"] * (len(header) - 1)]
    return "\n".join(f"| {' | '.join(row)} |" for row in [header, rule, *rows])


def _processor_s() -> float | None:
    """Return the seconds that all cores together were busy since the system started."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return None
    user, nice, system, _idle, _iowait, irq, softirq, steal, *_ = map(int, stat.read_text().split(maxsplit=11)[1:-1])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    return models[0] if models else platform.machine()
