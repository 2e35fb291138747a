"""The process that forks actors: it has imported what they need, so each starts in milliseconds and shares the pages.

It imports and forks and buries the dead; it never computes and never starts a thread. After one matrix product in a
parent, the same product hangs in every forked child; after a thread was started, any lock may be held for ever.

The driver talks to it in JSON messages over one SOCK_SEQPACKET pair, with the file descriptors of a new actor
attached. When that socket or the driver's process ends, everything below ends.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import json
import os
import select
import shutil
import signal
import socket
import threading
import time
import traceback
from typing import Any, NoReturn

from rlx.actors.engines import actor_main
from rlx.actors.engines.death import describe_exit

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
LAST_RITES_S = 5.0
MAX_MESSAGE = 64 * 1024
MAX_PROBLEM = 8000  # characters; in JSON each may take 6 bytes


def main(control_fd: int, driver_pid: int, preload: list[str], folder: str) -> NoReturn:
    """Serve until the driver is gone; then kill every actor and whatever the actors have started."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    control = socket.socket(fileno=control_fd)
    problem = _import_all(preload, driver_pid)
    if problem is not None:
        with contextlib.suppress(ConnectionError):
            control.send(json.dumps({"event": "broken", "text": problem[:MAX_PROBLEM]}).encode())
        os._exit(1)
    gc.freeze()  # the collector leaves shared pages alone in the children
    server = _ForkServer(control, driver_pid)
    tidy = False
    with contextlib.suppress(ConnectionError):
        tidy = server.serve()
    server.end_all()
    if not tidy:  # nobody else is left to remove it
        shutil.rmtree(folder, ignore_errors=True)
    os._exit(0)


class _ForkServer:
    """The living actors, by process id."""

    def __init__(self, control: socket.socket, driver_pid: int) -> None:
        self._control = control
        self._driver = os.pidfd_open(driver_pid)
        self._actors: dict[int, int] = {}  # process id -> the driver's number for the actor
        self._wake, self._woken = socket.socketpair()
        for end in (self._wake, self._woken):
            end.setblocking(False)
        _prctl(PR_SET_CHILD_SUBREAPER, 1)  # what a dead actor leaves behind becomes our child
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(self._wake.fileno(), warn_on_full_buffer=False)

    def serve(self) -> bool:
        """Return True when the driver has closed its runtime, False when it has died."""
        poll = select.poll()
        for source in (self._control.fileno(), self._woken.fileno(), self._driver):
            poll.register(source, select.POLLIN)
        while True:
            ready = {descriptor for descriptor, _ in poll.poll()}
            if self._woken.fileno() in ready:
                with contextlib.suppress(BlockingIOError):
                    self._woken.recv(4096)
                self._bury()
            if self._control.fileno() in ready:
                data, fds, _, _ = socket.recv_fds(self._control, MAX_MESSAGE, actor_main.DESCRIPTORS)
                if not data:
                    return False
                order = json.loads(data)
                if order["do"] == "close":
                    return True
                self._obey(order, fds)
            elif self._driver in ready:  # the socket says nothing: a fork of the driver may still hold it
                return False

    def end_all(self) -> None:
        """Kill until there is nobody left."""
        deadline = time.monotonic() + LAST_RITES_S
        while time.monotonic() < deadline:
            for pid in [*self._actors, *_children()]:
                _kill_tree(pid)
            try:
                pid, _ = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            self._actors.pop(pid, None)
            if pid == 0:
                select.select([self._woken], [], [], 0.05)

    def _obey(self, order: dict[str, Any], fds: list[int]) -> None:
        if order["do"] == "kill":
            for pid in [pid for pid, actor in self._actors.items() if actor == order["actor"]]:
                _kill_tree(pid)
            return
        actor, parent = order["actor"], os.getpid()
        try:
            pid = os.fork()
        except OSError as error:
            self._tell(event="exited", actor=actor, how=f"could not be started ({error})")
        else:
            if pid == 0:
                try:
                    self._become_actor(parent, fds, order["name"], order["object_memory"])
                finally:  # whatever goes wrong, a child must never come back into the server's loop
                    os._exit(1)
            self._actors[pid] = actor
            self._tell(event="started", actor=actor, pid=pid)
        for fd in fds:
            os.close(fd)

    def _become_actor(self, parent: int, fds: list[int], name: str, object_memory: int) -> NoReturn:
        """In the child: let go of all that is the server's, then be the actor."""
        os.setsid()
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died before prctl took hold
            os._exit(1)
        _prctl(PR_SET_CHILD_SUBREAPER, 1)  # daemons of a living actor stay its own until it dies
        for end in (self._control, self._wake, self._woken):
            end.close()
        os.close(self._driver)
        actor_main.main(fds, name, object_memory)

    def _bury(self) -> None:
        """Report dead actors, and kill what they left: any child of ours that is no actor is such an orphan."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                break
            actor = self._actors.pop(pid, None)
            if actor is not None:
                _kill_tree(pid)  # its process group may outlive it
                self._tell(event="exited", actor=actor, how=describe_exit(os.waitstatus_to_exitcode(status)))
        for orphan in _children() - self._actors.keys():
            _kill_tree(orphan)

    def _tell(self, **event: Any) -> None:
        self._control.send(json.dumps(event).encode())


def _import_all(modules: list[str], driver_pid: int) -> str | None:
    """Import the modules; return what is wrong, None if nothing."""

    def leave_if_orphaned(*_: object) -> None:
        if os.getppid() != driver_pid:
            os._exit(1)

    # Importing torch takes seconds in which nobody watches the control socket.
    signal.signal(signal.SIGALRM, leave_if_orphaned)
    signal.setitimer(signal.ITIMER_REAL, 0.2, 0.2)
    try:
        for module in modules:
            importlib.import_module(module)
    except BaseException as error:
        return f"preload module {module!r} cannot be imported ({error!r}):\n{traceback.format_exc()[-4000:]}"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
    if threading.active_count() > 1:
        names = [thread.name for thread in threading.enumerate()]
        return f"the preload modules {modules} have started threads ({names}), and such a process cannot be forked."
    return None


def _kill_tree(pid: int) -> None:
    """SIGKILL the process and its process group."""
    for kill in (os.killpg, os.kill):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            kill(pid, signal.SIGKILL)


def _children() -> set[int]:
    """Return the process ids of this process's children; none where the kernel does not list them."""
    try:
        with open(f"/proc/self/task/{os.getpid()}/children") as file:
            return {int(pid) for pid in file.read().split()}
    except FileNotFoundError:
        return set()


_libc = ctypes.CDLL(None, use_errno=True)


def _prctl(option: int, value: int) -> None:
    if _libc.prctl(option, ctypes.c_ulong(value), 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), f"prctl({option}, {value}) failed")
