"""The Python stacks of a living actor, asked for by another process with a signal.

faulthandler answers from the signal handler itself, in C, so a thread that holds the GIL in native code, or a method
that never returns, is seen as well as any other.
"""

from __future__ import annotations

import faulthandler
import os
import re
import signal
import time
from pathlib import Path

from rlx.actors import processes
from rlx.actors.timesheet import Timesheet
from rlx.errors import ActorError

STACK_SIGNAL = signal.SIGUSR2
ANSWER_S = 2.0
QUIET_S = 0.05  # a dump is many writes; this long after the last one it is whole
HEADER = re.compile(r"^(?:Current thread|Thread) 0x[0-9a-f]+(?: \[.*\])? \(most recent call first\):\n", re.MULTILINE)


def install_stack_dumps(sheet: Timesheet) -> None:
    """Have this actor process answer `read_stacks`."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC
    fd = os.open(stack_file(sheet.folder, sheet.serial), flags, 0o600)  # open as long as the process lives
    faulthandler.register(STACK_SIGNAL, file=fd, all_threads=True, chain=False)


def read_stacks(folder: Path, serial: int, pid: int) -> str:
    """Return the stacks of all threads of actor number `serial`, innermost call first, the main thread first.

    ActorError if there is no answer, with the reason: a stopped process, for one, is not waited for.
    """
    process = os.pidfd_open(pid)  # from here on the signal can hit nobody else
    try:
        _check_answers(pid)
        file = stack_file(folder, serial)
        before = file.stat().st_size
        signal.pidfd_send_signal(process, STACK_SIGNAL)
    finally:
        os.close(process)
    size, changed, deadline = before, time.monotonic(), time.monotonic() + ANSWER_S
    while size == before or time.monotonic() < changed + QUIET_S:
        if time.monotonic() > deadline:
            now = processes.stat(pid)
            state = "gone" if now is None else processes.STATES.get(now.state, now.state)
            raise ActorError(f"process {pid} has not shown its stacks within {ANSWER_S:g} s; it is {state}.")
        time.sleep(0.005)
        if (grown := file.stat().st_size) != size:
            size, changed = grown, time.monotonic()
    with file.open("rb") as dumps:
        dumps.seek(before)
        return _readable(dumps.read().decode("utf-8", "replace"))


def stack_file(folder: Path, serial: int) -> Path:
    """Return the file that actor number `serial` writes its stacks to."""
    return folder / f"{serial}.stack"


def _check_answers(pid: int) -> None:
    """Refuse a process that cannot answer; the signal would end one that has no handler."""
    now = processes.stat(pid)
    if now is None or now.state in "ZXTt":
        raise ActorError(f"process {pid} is {processes.STATES[now.state] if now else 'gone'}, and shows no stacks.")
    if not processes.handles(pid, STACK_SIGNAL):
        raise ActorError(f"process {pid} shows no stacks: it is still starting, or its engine does not provide them.")


def _readable(dump: str) -> str:
    """Return a dump without its addresses, so that equal stacks are equal texts."""
    threads = [stack.strip("\n") for stack in HEADER.split(dump)[1:]]
    if len(threads) == 1:
        return threads[0]
    threads.reverse()  # faulthandler begins with the youngest thread, and the main thread is the oldest
    names = ["main thread", *(f"thread {number}" for number in range(2, len(threads) + 1))]
    return "\n".join(f"{name}:\n{stack}" for name, stack in zip(names, threads, strict=True))
