"""What can be seen of running actors from outside: their boards, timesheets and logs, and /proc.

No process is asked for anything, so a driver that is blocked or stopped and an actor in a long method hide nothing.
"""

from __future__ import annotations

import difflib
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rlx.actors import processes
from rlx.actors.board import ENDED, Entry, RuntimeInfo, list_runtimes, read_board, read_info
from rlx.actors.logs import log_file, tail
from rlx.actors.processes import CpuMeter
from rlx.actors.stacks import read_stacks
from rlx.actors.timesheet import Calls, Span, read_calls
from rlx.errors import ActorError, ConfigError

SAMPLE_S = 0.2
"""Between the two looks that CPU use is the difference of."""
LOG_LINES = 5
NAMED_CALLS = 5
"""Of those that run at once, the oldest."""
BUSY_PERCENT = 50.0
"""Of one CPU: from here on a process is said to compute, whatever its main thread does just then."""


@dataclass(frozen=True)
class RunningCall:
    """A call that runs now."""

    method: str
    seconds: float
    waits_for_reader: bool = False
    """It is a stream whose reader has not taken what it yielded."""


@dataclass(frozen=True)
class ActorView:
    """One actor at one moment."""

    name: str
    status: str
    """pending, starting, alive, debugging, restarting, failed or dead; as its driver sees it, but for debugging."""
    pid: int | None
    """None before it has a process."""
    process: str | None
    """What the process does, see processes.STATES; "ended" if there is none any more, None if there never was."""
    running: list[RunningCall]
    """Oldest first."""
    pending: int
    """Calls that were sent and have not ended, the running ones too."""
    done: int
    restarts: int
    cpu_percent: float | None
    """Of one CPU; None if it was not measured."""
    memory_bytes: int | None
    memory_kind: str | None
    """PSS, or RSS where the system tells no more."""
    resources: str
    waiting: str
    """Why it is pending."""
    breakpoint: str | None
    """file:line of the breakpoint that waits."""
    error: str
    """Why it ended."""
    log: Path
    serial: int
    """Its number within the runtime."""


@dataclass(frozen=True)
class RuntimeView:
    """One runtime at one moment."""

    folder: Path
    driver: int
    alive: bool
    """Whether the driver has not ended."""
    process: str
    """What the driver does, see processes.STATES."""
    command: list[str]
    started: float
    """time.time()"""
    actors: list[ActorView]
    """In the order in which they were made."""


def find_runtimes(which: str | None, only_here: bool = False) -> list[RuntimeInfo]:
    """Return the runtimes that `which` (a driver's process id, a folder or its name) means; None: all that run.

    only_here: without their actors on other machines.
    """
    known = [replace(info, elsewhere=not only_here) for info in list_runtimes() if info.here]
    if which is None:
        return [info for info in known if info.alive]
    if "/" in which or Path(which).is_dir():
        info = read_info(Path(which))
        if info is None:
            raise ConfigError(f"{which} is no folder of a runtime; `rlx ps` lists them.")
        if not info.here:  # its process ids mean other processes here, which signals must not hit
            raise ConfigError(f"the driver of {which} is in another container; look at it from there.")
        return [replace(info, elsewhere=not only_here)]
    if found := [info for info in known if which in (str(info.driver), info.folder.name)]:
        return found
    raise ConfigError(f"{which} is neither the process id of a driver nor the folder of a runtime.{_choice(known)}")


def find_runtime(which: str | None, only_here: bool = False) -> RuntimeInfo:
    """Return the one runtime that `which` means, the only one that runs if None."""
    found = find_runtimes(which, only_here)
    if not found:
        raise ActorError("no runtime of yours is running here; a driver with another TMPDIR keeps its folder there.")
    if len(found) > 1:
        raise ConfigError(f"{len(found)} runtimes are meant; name one with --runtime.{_choice(found)}")
    return found[0]


def view(info: RuntimeInfo, percents: Mapping[int, float] | None = None) -> RuntimeView:
    """Look at a runtime; percents is the CPU use by process id, where it was measured."""
    actors = [_view_actor(info, entry, percents or {}) for entry in _entries(info)]
    process = _state_of(info.driver) if info.alive else "ended"
    return RuntimeView(info.folder, info.driver, info.alive, process, info.command, info.started, actors)


def measured_view(info: RuntimeInfo) -> RuntimeView:
    """Look at a runtime for SAMPLE_S, which tells CPU use."""
    meter = CpuMeter(pids([info]))
    time.sleep(SAMPLE_S)
    return view(info, meter.percent(pids([info])))


def pids(infos: Iterable[RuntimeInfo]) -> list[int]:
    """Return the processes of all living actors."""
    entries = [entry for info in infos for entry in _entries(info)]
    return [entry.pid for entry in entries if entry.pid is not None and entry.status not in ENDED]


def find_actor(runtime: RuntimeView, name: str) -> ActorView:
    """Return the newest actor of that name."""
    found = [actor for actor in runtime.actors if actor.name == name]
    if not found:
        raise ConfigError(f"no actor is named {name!r}{did_you_mean(name, [one.name for one in runtime.actors])}.")
    return found[-1]


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """Return the end of a sentence that offers the names most like `name`."""
    names = list(dict.fromkeys(names))
    near = difflib.get_close_matches(name, names, 3, 0.5) or names[:10]
    return f"; there is {', '.join(near)}" if near else "; there are no actors"


def stacks(runtime: RuntimeView, actors: Iterable[ActorView]) -> list[tuple[list[str], str]]:
    """Return (names, text) of each different stack among the living actors, or of the reason why there is none."""
    texts: dict[str, list[str]] = {}
    for actor in actors:
        try:
            text = stack(runtime, actor)
        except (ActorError, ProcessLookupError) as error:
            text = str(error).replace(f"process {actor.pid} ", "")
        texts.setdefault(text, []).append(actor.name)
    return [(names, text) for text, names in texts.items()]


def stack(runtime: RuntimeView, actor: ActorView) -> str:
    """Return the stacks of an actor's threads; ActorError if it cannot show them."""
    if actor.pid is None or actor.process == "ended":
        raise ActorError(f"{actor.name} has no process: it is {actor.status}.")
    return read_stacks(runtime.folder, actor.serial, actor.pid)


def why(runtime: RuntimeView, actor: ActorView) -> str:
    """Return in one paragraph what an actor does, waits for, or died of; after it perhaps lines of its log."""
    sentences = [_of_status(actor)]
    if actor.process is not None and actor.status not in ENDED:
        sentences += _of_process(actor)
    if runtime.process.startswith("stopped"):
        sentences.append(f"Its driver (process {runtime.driver}) is {runtime.process}.")
    elif not runtime.alive:
        sentences.append(f"Its driver (process {runtime.driver}) has ended, and with it all its actors.")
    paragraph = " ".join(sentences)
    if actor.status in ("failed", "dead", "restarting") or actor.process == "ended":
        lines = [line for line in tail(actor.log, LOG_LINES) if line not in actor.error]
        paragraph += "".join(f"\n  {line}" for line in ["Its last lines:", *lines]) if lines else ""
    return paragraph


def trace(info: RuntimeInfo) -> dict[str, Any]:
    """Return the latest calls of all actors as Chrome's trace events, which ui.perfetto.dev shows; times are in us."""
    now, events = time.monotonic(), []
    for entry in _entries(info):
        calls = read_calls(info.folder, entry.serial, ended=True)
        name = f"{entry.name} ({entry.status})" if entry.status in ENDED else entry.name
        events += [
            {"ph": "M", "pid": entry.serial, "name": "process_name", "args": {"name": name}},
            {"ph": "M", "pid": entry.serial, "name": "process_sort_index", "args": {"sort_index": entry.serial}},
        ]
        if calls is not None:
            running = _own(entry, calls).running if entry.status not in ENDED else []
            events += _events(entry.serial, calls.ended, running, now)
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def _entries(info: RuntimeInfo) -> list[Entry]:
    """Return what the board says; of an actor elsewhere, whose machine is asked itself, only its end."""
    entries = read_board(info.folder)
    return [entry for entry in entries if info.elsewhere or not entry.elsewhere or entry.status in ENDED]


def _view_actor(info: RuntimeInfo, entry: Entry, percents: Mapping[int, float]) -> ActorView:
    ended = entry.status in ENDED
    calls = _own(entry, read_calls(info.folder, entry.serial))
    process = memory = used = None
    if entry.pid is not None:
        process = "ended" if ended or not info.alive else _state_of(entry.pid, calls.start_ticks)
        if process != "ended":
            memory, used = processes.memory(entry.pid), percents.get(entry.pid)
    gone, now = ended or process == "ended", time.monotonic()
    return ActorView(
        name=entry.name,
        status="debugging" if calls.breakpoint and not gone else entry.status,
        pid=entry.pid,
        process=process,
        running=[] if gone else [_running(call, now) for call in calls.running],
        pending=0 if ended else entry.held + (0 if entry.status == "restarting" else max(0, entry.sent - calls.done)),
        done=calls.done,
        restarts=entry.restarts,
        cpu_percent=None if used is None else round(used, 1),
        memory_bytes=memory[0] if memory else None,
        memory_kind=memory[1] if memory else None,
        resources=entry.resources,
        waiting=entry.waiting,
        breakpoint=None if gone else calls.breakpoint,
        error=entry.error,
        log=log_file(info.logs, entry.name),
        serial=entry.serial,
    )


def _running(call: Span, now: float) -> RunningCall:
    return RunningCall(call.method, round(now - call.start, 3), call.waits_for_reader)


def _own(entry: Entry, calls: Calls | None) -> Calls:
    """Return the calls of the actor's present process; none if what there is was written by an earlier one."""
    return calls if calls is not None and calls.pid == entry.pid else Calls(0, 0, 0, [], [], None)


def _state_of(pid: int, start_ticks: int = 0) -> str:
    """Return what a process does; "ended" if it has gone, also if another one that began later has its id now."""
    now = processes.stat(pid)
    if now is None or start_ticks not in (0, now.start_ticks):
        return "ended"
    return processes.STATES.get(now.state, now.state)


def _of_status(actor: ActorView) -> str:
    who = f"{actor.name} (process {actor.pid})" if actor.pid else actor.name
    if actor.status in ENDED:
        if actor.error and actor.error.startswith(actor.name):  # a whole sentence, of the engine
            return actor.error
        return f"{who} is {actor.status}: {actor.error or 'the reason is not known'}"
    if actor.status == "pending":
        calls = f"; {_calls(actor.pending)}" if actor.pending else ""
        return f"{who} is pending: it {actor.waiting or 'waits for its turn'}{calls}."
    if actor.status == "restarting":
        reason = f" It died because: {actor.error}" if actor.error else ""
        return f"{who} is restarting, {actor.restarts} restarts so far; {_calls(actor.pending)}.{reason}"
    if actor.process == "ended":
        return f"{who} is {actor.status} for its driver, which has not noticed yet that the process has ended."
    if actor.status == "debugging":
        return f"{who} is at a breakpoint, {actor.breakpoint}: `rlx debug {actor.name}` goes there."
    if actor.running:
        runs = " and ".join([f"{call.method}() for {call.seconds:,.1f} s" for call in actor.running[:NAMED_CALLS]])
        if (more := len(actor.running) - NAMED_CALLS) > 0:
            runs += f" and {more:,} more"
        return f"{who} is {actor.status} and has run {runs}; {_calls(actor.pending - len(actor.running))}."
    if actor.status == "starting":
        return f"{who} is starting; {_calls(actor.pending)}."
    return f"{who} is {actor.status} and runs nothing; {_calls(actor.pending)}."


def _calls(waiting: int) -> str:
    return f"{waiting:,} more {'call waits' if waiting == 1 else 'calls wait'}" if waiting > 0 else "no call waits"


def _of_process(actor: ActorView) -> list[str]:
    """Return what the process itself does, and what to do about it."""
    if actor.process == "ended":
        return []
    if actor.process == processes.STATES["T"]:
        return [f"The process is {actor.process}; `kill -CONT {actor.pid}` lets it go on."]
    used = "" if actor.cpu_percent is None else f", {actor.cpu_percent:.0f} % of a CPU"
    state = "computing" if (actor.cpu_percent or 0.0) >= BUSY_PERCENT else actor.process
    hint = [f"`rlx stack {actor.name}` shows where."] if actor.running and actor.status != "debugging" else []
    streams = sorted({f"{call.method}()" for call in actor.running if call.waits_for_reader})
    idle = [f"{name} waits for the reader of its stream to take the next item or close it." for name in streams]
    return [*idle, f"The process is {state}{used}.", *hint]


def _events(serial: int, ended: list[Span], running: list[Span], now: float) -> list[dict[str, Any]]:
    """Return complete events, each in the first row of the actor that is free when it begins."""
    events: list[dict[str, Any]] = []
    free_at: list[float] = []
    for span in sorted([*ended, *running], key=lambda span: span.start):
        end = span.end or now
        row = next((row for row, free in enumerate(free_at) if free <= span.start), len(free_at))
        free_at[row : row + 1] = [end]
        outcome = ("returned" if span.ok else "raised") if span.end else "running"
        events.append(
            {
                "ph": "X",
                "name": span.method,
                "cat": outcome,
                "pid": serial,
                "tid": row + 1,
                "ts": round(span.start * 1e6, 1),
                "dur": round((end - span.start) * 1e6, 1),
                "args": {"outcome": outcome},
            }
        )
    rows = [
        {"ph": "M", "pid": serial, "tid": row + 1, "name": "thread_name", "args": {"name": f"calls {row + 1}"}}
        for row in range(len(free_at))
    ]
    return rows + events


def _choice(infos: Iterable[RuntimeInfo]) -> str:
    lines = []
    for info in infos:
        command = " ".join(Path(part).name for part in info.command)[:80]
        lines.append(f"\n  {info.folder}  {command}{'' if info.alive else ' (ended)'}")
    return "".join(lines) or " None is there."
