"""The actor's process: it settles in, makes its object, serves calls, and ends with its driver."""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from rlx.actors.debugger import install_breakpoint
from rlx.actors.engines import pickling, wire
from rlx.actors.engines.actor_link import ActorLink
from rlx.actors.engines.memory import ActorMemory
from rlx.actors.engines.serving import TASKS, leave, server_for
from rlx.actors.stacks import install_stack_dumps
from rlx.actors.timesheet import Timesheet

DESCRIPTORS = 5
"""What a new process is given: its link, the socket of later descriptors, its own and the driver's memory, its log."""


def main(fds: Sequence[int], name: str, object_memory: int) -> NoReturn:
    """Be the actor at the other end of these descriptors until it is stopped, fails or loses its driver."""
    try:
        link, later, own, drivers, log = fds
        for standard in (1, 2):
            os.dup2(log, standard)
        os.close(log)
        faulthandler.enable()  # a crash in C leaves the Python stack in the last lines of its log
        sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
        memory = ActorMemory(own, drivers, object_memory, socket.socket(fileno=later))
        sys.exit(_serve(ActorLink(socket.socket(fileno=link), memory), name))
    except BaseException as error:
        leave(error)


def _serve(link: ActorLink, name: str) -> int:
    """Return the exit code."""
    first = link.receive()
    if first is None:
        return 1
    settings = json.loads(first.text)
    _settle_in(settings["env"], settings["cwd"], settings["path"], settings["threads"])
    concurrency = settings["concurrency"]
    sheet = Timesheet(Path(settings["folder"]), settings["serial"], name, lanes=concurrency or TASKS)
    install_stack_dumps(sheet)
    install_breakpoint(sheet)
    running, made = sheet.begin("__init__"), False
    try:
        make, args, kwargs = pickling.loads(first.open(link.memory.borrow))
        instance = make(*args, **kwargs)
        made = True
    except SystemExit:
        raise
    except BaseException as error:
        link.send_error(wire.INIT_FAILED, 0, error, f"{name}.__init__(), process {os.getpid()}")
        return 1
    finally:
        sheet.end(running, made)
    del first, make, args, kwargs
    link.send(wire.READY)
    server_for(link, instance, name, sheet, concurrency).serve()
    return 0


def _settle_in(env: dict[str, str], cwd: str, path: list[str], threads: int) -> None:
    """Look like a process that the driver has started itself, at the moment of the spawn."""
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    sys.path[:] = path
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the driver's; it decides what becomes of its actors
    # New seeds from the system's entropy, as a fresh process has them: forked siblings would all draw alike.
    if "numpy.random" in sys.modules:
        import numpy

        numpy.random.seed()
    if "torch" in sys.modules:
        import torch

        torch.default_generator.seed()
        torch.set_num_threads(threads)
    else:
        os.environ.setdefault("OMP_NUM_THREADS", str(threads))
