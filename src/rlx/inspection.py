"""What the commands print that look at running actors: ps, top, why, stack, logs, trace, debug.

Nothing heavy is imported at the top. With --json each prints one JSON value of a stable shape:
ps and top: a list of runtimes, RuntimeView of rlx.actors.observe with its ActorViews; why: an ActorView and `text`;
stack: a list of {actors, stack}; logs: {actor, file, lines}; trace: {file, events}.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlx.errors import ConfigError

if TYPE_CHECKING:
    from rlx.actors.observe import ActorView, RuntimeView
    from rlx.actors.processes import CpuMeter

REFRESH_S = 1.0
FOLLOW_S = 0.1
COLUMNS = ("actor", "status", "pid", "running", "pending", "restarts", "cpu", "memory", "process", "resources")
LEFT = ("actor", "status", "running", "process", "resources")
"""Columns of text; the others are numbers, and stand to the right."""


def ps(options: argparse.Namespace) -> None:
    """Print the runtimes and their actors."""
    from rlx.actors import observe
    from rlx.actors.processes import CpuMeter

    infos = observe.find_runtimes(options.runtime, options.here)
    meter = CpuMeter(observe.pids(infos))
    time.sleep(observe.SAMPLE_S if infos else 0.0)
    _print_views(_views(options, meter), options.json)


def top(options: argparse.Namespace) -> None:
    """Print what `ps` prints, again every second, in place."""
    if options.json or options.once or not sys.stdout.isatty():
        ps(options)
        return
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    from rlx.actors import observe
    from rlx.actors.processes import CpuMeter

    meter = CpuMeter(observe.pids(observe.find_runtimes(options.runtime, options.here)))
    with Live(console=Console(), auto_refresh=False, screen=True) as live:
        while True:
            time.sleep(REFRESH_S)
            table = _table(_views(options, meter))
            live.update(Text(f"{time.strftime('%H:%M:%S')}  Ctrl-C ends\n\n{table}", no_wrap=True), refresh=True)


def why(options: argparse.Namespace) -> None:
    """Print in one paragraph what an actor does or waits for."""
    from rlx.actors import observe

    runtime = observe.measured_view(observe.find_runtime(options.runtime, options.here))
    actor = observe.find_actor(runtime, options.actor)
    text = observe.why(runtime, actor)
    print(_dump(asdict(actor) | {"text": text}) if options.json else text)


def stack(options: argparse.Namespace) -> None:
    """Print the Python stacks of one actor, or of all, equal ones once."""
    from rlx.actors import observe

    runtime = observe.view(observe.find_runtime(options.runtime, options.here))
    if options.actor is not None:
        actor = observe.find_actor(runtime, options.actor)
        found = [([actor.name], observe.stack(runtime, actor))]
    else:
        living = [actor for actor in runtime.actors if actor.process not in (None, "ended")]
        found = observe.stacks(runtime, living)
    if options.json:
        print(_dump([{"actors": names, "stack": text} for names, text in found]))
        return
    parts = [f"{', '.join(names)}:\n{text}" for names, text in sorted(found, key=lambda one: -len(one[0]))]
    print("\n\n".join(parts) or "No actor is alive.")


def logs(options: argparse.Namespace) -> None:
    """Print the end of what an actor has printed, and perhaps what it goes on to print."""
    from rlx.actors.logs import tail

    folder, file = _log(options)
    if options.follow:
        _follow(folder, options.actor, file, options.lines)
        return
    lines = tail(file, options.lines, _bytes_of(options.lines))
    if options.json:
        print(_dump({"actor": options.actor, "file": file, "lines": lines}))
    elif lines:
        print("\n".join(lines))
    else:
        print(f"rlx: {options.actor} has printed nothing", file=sys.stderr)


def trace(options: argparse.Namespace) -> None:
    """Write the latest calls of all actors to a file that ui.perfetto.dev shows."""
    from rlx.actors import observe

    write_trace(observe.trace(observe.find_runtime(options.runtime, options.here)), options)


def write_trace(found: dict[str, Any], options: argparse.Namespace) -> None:
    """Write a trace to the file that is asked for, and say so."""
    calls = sum(event["ph"] == "X" for event in found["traceEvents"])
    try:
        options.output.write_text(json.dumps(found))
    except OSError as error:
        raise ConfigError(f"{options.output} cannot be written ({error}); give another file with -o.") from None
    if options.json:
        print(_dump({"file": options.output, "events": calls}))
    else:
        print(f"{calls:,} calls in {options.output}: open it at https://ui.perfetto.dev")


def debug(options: argparse.Namespace) -> None:
    """Join the breakpoint of an actor."""
    from rlx.actors import debugger, observe

    runtime = observe.view(observe.find_runtime(options.runtime, options.here))
    debugger.debug(runtime.folder, observe.find_actor(runtime, options.actor).serial)


def _views(options: argparse.Namespace, meter: CpuMeter) -> list[RuntimeView]:
    from rlx.actors import observe

    infos = observe.find_runtimes(options.runtime, options.here)
    percents = meter.percent(observe.pids(infos))
    return [observe.view(info, percents) for info in infos]


def _print_views(views: Sequence[RuntimeView], as_json: bool) -> None:
    print(_dump([asdict(view) for view in views]) if as_json else _table(views))


def _table(views: Sequence[RuntimeView]) -> str:
    return "\n\n".join(_of_runtime(view) for view in views) or "No runtime of yours is running."


def _of_runtime(view: RuntimeView) -> str:
    command = " ".join(Path(word).name if number == 0 else word for number, word in enumerate(view.command))
    head = f"driver {view.driver}, {view.process}: {command[:100]}  ({view.folder})"
    if not view.actors:
        return f"{head}\nno actors"
    return f"{head}\n{columns(COLUMNS, [_cells(actor) for actor in view.actors], LEFT)}"


def columns(names: Sequence[str], rows: Sequence[Sequence[str]], left: Sequence[str]) -> str:
    """Return rows of text below the columns' names; those in `left` stand to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(names, *rows, strict=True)]
    aligned = [
        [
            cell.ljust(width) if name in left else cell.rjust(width)
            for name, cell, width in zip(names, row, widths, strict=True)
        ]
        for row in [names, *rows]
    ]
    return "\n".join("  ".join(row).rstrip() for row in aligned)


def _cells(actor: ActorView) -> tuple[str, ...]:
    running = f"{actor.running[0].method}() {_duration(actor.running[0].seconds)}" if actor.running else "-"
    if len(actor.running) > 1:
        running += f" +{len(actor.running) - 1}"
    return (
        actor.name,
        actor.status,
        str(actor.pid or "-"),
        running,
        str(actor.pending),
        str(actor.restarts),
        "-" if actor.cpu_percent is None else f"{actor.cpu_percent:.0f}%",
        "-" if actor.memory_bytes is None else f"{actor.memory_bytes / 2**20:,.0f} MB",
        actor.process or "-",
        actor.resources or "-",
    )


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f}s"
    minutes = int(seconds) // 60
    return f"{minutes}m{int(seconds) % 60:02}s" if minutes < 60 else f"{minutes // 60}h{minutes % 60:02}m"


def _log(options: argparse.Namespace) -> tuple[Path | None, Path]:
    """Return the runtime folder and the log that are meant: of an actor that is seen, of one long gone, or of a run."""
    from rlx.actors import observe
    from rlx.actors.logs import log_file

    if options.run is not None:
        runtime, logs, names = None, options.run / "logs", []
        if not logs.is_dir():
            raise ConfigError(f"{options.run} has no folder logs; give the folder of a run.")
    else:
        info = observe.find_runtime(options.runtime, options.here)
        runtime, logs, names = info.folder, info.logs, [actor.name for actor in observe.view(info).actors]
    file = log_file(logs, options.actor)
    if options.actor not in names and not file.exists():
        kept = names or sorted(found.stem for found in logs.glob("*.log"))
        raise ConfigError(f"there is no log {file}{observe.did_you_mean(options.actor, kept)}.")
    return runtime, file


def _follow(runtime: Path | None, name: str, file: Path, count: int) -> None:
    """Print the last lines and then whatever comes, until the actor has ended."""
    if not file.exists():
        return
    with file.open("rb") as log:
        log.seek(max(0, file.stat().st_size - _bytes_of(count)))
        data = b"".join(log.read().splitlines(keepends=True)[-count:])
        while True:
            sys.stdout.buffer.write(data)
            sys.stdout.buffer.flush()
            time.sleep(0.0 if data else FOLLOW_S)
            ended = runtime is None or _has_ended(runtime, name)  # before reading: what came before the end is shown
            data = log.read(_bytes_of(0))
            if ended and not data:
                return


def _has_ended(folder: Path, name: str) -> bool:
    from rlx.actors import observe
    from rlx.actors.board import read_info

    info = read_info(folder)
    if info is None or not info.alive:
        return True
    states = [(actor.status, actor.process) for actor in observe.view(info).actors if actor.name == name]
    return not states or states[-1][0] in ("failed", "dead")


def _bytes_of(lines: int) -> int:
    """Return how much of a file to read for so many lines."""
    return 1024 * max(64, lines)


def _dump(value: Any) -> str:
    return json.dumps(value, indent=2, default=str)
