"""breakpoint() in an actor: it waits for `rlx debug NAME`, which runs pdb over a Unix socket of the runtime folder."""

from __future__ import annotations

import contextlib
import dis
import os
import pdb
import re
import socket
import struct
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from rlx.actors.timesheet import Timesheet
from rlx.errors import ActorError, ConfigError

WAIT_VARIABLE, WAIT_S = "RLX_DEBUG_WAIT_S", 600.0
BELOW_METHODS = ("rlx.actors.", "asyncio.", "concurrent.futures.", "threading.")
"""Modules that call an actor's methods: a session ends where the method returns to them."""
PROMPT = re.compile(r"\(+(?:Pdb|com)\)+ $")


def install_breakpoint(sheet: Timesheet) -> None:
    """Have breakpoint() in this actor process wait for `rlx debug`, unless PYTHONBREAKPOINT says otherwise.

    The actor goes on if nobody comes within RLX_DEBUG_WAIT_S seconds, 600 by default, and when the session ends.
    """
    if not os.environ.get("PYTHONBREAKPOINT"):
        sys.breakpointhook = _Breakpoint(sheet)


def debug(folder: Path, serial: int) -> None:
    """Join the breakpoint of actor number `serial` to this terminal; return when the session is over.

    What stdin holds is sent line by line, whenever pdb asks; the end of it lets the actor go on.
    ActorError if no breakpoint waits.
    """
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  gives input() a history and keys to edit with
    with socket.socket(socket.AF_UNIX) as connection:
        with _short_path(folder) as short:
            try:
                connection.connect(f"{short}/{socket_name(serial)}")
            except (FileNotFoundError, ConnectionRefusedError):
                raise ActorError(
                    "no breakpoint waits in this actor; call breakpoint() in one of its methods."
                ) from None
        with contextlib.suppress(ConnectionError, EOFError):  # the actor has died; our stdin is at its end
            _talk(connection)


def socket_name(serial: int) -> str:
    """Return the name, in the runtime folder, of the socket at which a breakpoint waits."""
    return f"{serial}.debug"


def _talk(connection: socket.socket) -> None:
    with connection.makefile("rb", buffering=0) as incoming:
        text = ""
        while data := incoming.read(64 * 1024):
            text += data.decode("utf-8", "replace")
            if prompt := PROMPT.search(text):
                print(text[: prompt.start()], end="", flush=True)
                text = ""
                connection.sendall(input(prompt[0]).encode() + b"\n")
        print(text, end="", flush=True)


class _Breakpoint:
    """sys.breakpointhook of an actor process: one session at a time, whichever threads ask for one."""

    def __init__(self, sheet: Timesheet) -> None:
        self._sheet = sheet
        self._lock = threading.Lock()
        self._session: _Session | None = None
        self._thread: int | None = None  # that has the lock

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        frame = sys._getframe(1)
        if self._thread == threading.get_ident() and self._session is not None:
            sys.settrace(None)  # somebody is here already, and would see the next call from the inside
            self._session.set_trace(frame)
            return
        self._lock.acquire()
        self._thread = threading.get_ident()
        try:
            client = self._meet(frame)
        except BaseException:
            self._end()
            raise
        if client is None:
            self._end()
        else:
            self._session = _Session(client, frame, self._end)
            self._session.set_trace(frame)  # whatever were called after this would be traced already

    def _meet(self, frame: FrameType) -> socket.socket | None:
        """Wait for somebody with a terminal; None if nobody comes."""
        wait_s, name = _wait_s(), self._sheet.name
        place = f"{frame.f_code.co_filename}:{frame.f_lineno}"
        running = self._sheet.running()
        method = running[0].method if running else frame.f_code.co_name
        with socket.socket(socket.AF_UNIX) as listener, _short_path(self._sheet.folder) as short:
            address = f"{short}/{socket_name(self._sheet.serial)}"
            with contextlib.suppress(FileNotFoundError):
                os.unlink(address)  # of an earlier process of this actor
            listener.bind(address)
            try:
                os.chmod(address, 0o600)
                listener.listen()
                self._sheet.debugging(place)
                _say(f"breakpoint in {name}.{method} ({place}): rlx debug {name}")
                client = _accept(listener, time.monotonic() + wait_s)
            finally:
                with contextlib.suppress(FileNotFoundError):  # the runtime was closed meanwhile
                    os.unlink(address)
        if client is None:
            _say(f"warning: nobody has come to the breakpoint at {place} for {wait_s:g} s; {name} goes on")
        return client

    def _end(self) -> None:
        self._sheet.debugging(None)
        self._session = self._thread = None
        self._lock.release()


class _Session(pdb.Pdb):
    """pdb with a client, from a breakpoint to `c`, `q` or the return of the actor's method."""

    def __init__(self, client: socket.socket, frame: FrameType, on_end: Any) -> None:
        self._terminal = _Terminal(client)
        super().__init__(stdin=self._terminal, stdout=self._terminal, nosigint=True)  # type: ignore[arg-type]
        self._bottom, self._on_end, self._ended = _bottom(frame), on_end, False

    def dispatch_return(self, frame: FrameType, arg: Any) -> Any:
        """End with the method, so that nobody steps on into the engine."""
        trace = super().dispatch_return(frame, arg)
        if frame is self._bottom and not self._ended and not _is_suspended(frame):
            self.clear_all_breaks()
            self.set_continue()
            return None
        return trace

    def set_continue(self) -> None:
        """Go on; without a breakpoint to come back to, the session is over."""
        super().set_continue()
        if not self.breaks:
            self._end()

    def set_quit(self) -> None:
        """End the method with BdbQuit, and the session."""
        super().set_quit()
        self._end()

    def do_EOF(self, arg: str) -> bool:
        """The client has gone: go on as if no breakpoint were there."""
        self.clear_all_breaks()
        self.set_continue()
        return True

    def _end(self) -> None:
        if not self._ended:
            self._ended = True
            self._terminal.close()
            self._on_end()


class _Terminal:
    """A client's terminal, as a file; one that has gone reads as an ended file, and takes in everything."""

    encoding = "utf-8"

    def __init__(self, client: socket.socket) -> None:
        self._client = client
        self._input = client.makefile("r", encoding="utf-8", errors="replace")

    def readline(self) -> str:
        try:
            return self._input.readline()
        except (ConnectionError, ValueError):  # ValueError: closed by us
            return ""

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            self._client.sendall(text.encode("utf-8", "replace"))
        return len(text)

    def flush(self) -> None:
        """Nothing is held back."""

    def close(self) -> None:
        self._input.close()
        self._client.close()


def _accept(listener: socket.socket, deadline: float) -> socket.socket | None:
    """Return a connection of this user; None when the deadline has passed."""
    while (left := deadline - time.monotonic()) > 0:
        listener.settimeout(left)
        try:
            client, _ = listener.accept()
        except TimeoutError:
            return None
        _, user, _ = struct.unpack("3i", client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        if user == os.getuid():
            client.settimeout(None)
            return client
        client.close()
    return None


def _bottom(frame: FrameType) -> FrameType:
    """Return the frame of the actor's method, on which everything up to `frame` stands."""
    while frame.f_back is not None and not _is_below(frame.f_back):
        frame = frame.f_back
    return frame


def _is_below(frame: FrameType) -> bool:
    return f"{frame.f_globals.get('__name__', '')}.".startswith(BELOW_METHODS)


def _is_suspended(frame: FrameType) -> bool:
    """True if a coroutine or generator has stopped at an await or yield, and will come back."""
    return dis.opname[frame.f_code.co_code[frame.f_lasti]] in ("YIELD_VALUE", "RESUME")  # RESUME: from 3.13 on


def _wait_s() -> float:
    text = os.environ.get(WAIT_VARIABLE) or str(WAIT_S)
    try:
        return float(text)
    except ValueError:
        raise ConfigError(f"{WAIT_VARIABLE}={text} is no number of seconds; use one, such as 60.") from None


def _say(line: str) -> None:
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()


@contextlib.contextmanager
def _short_path(folder: Path) -> Iterator[str]:
    """Yield another path of the folder: the address of a Unix socket may have 107 bytes."""
    fd = os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{fd}"
    finally:
        os.close(fd)
