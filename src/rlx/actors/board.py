"""RuntimeFolder and Board: what a driver leaves on disk so that other terminals can see its actors.

<tmp>/rlx-<user id>/<driver pid>-<n>/     mode 0700, removed when the runtime is closed
  info.json         the driver and its command line
  board             a slot per actor: what the driver knows of it (this module)
  <serial>.calls    what actor number <serial> does: its timesheet, written by the actor
  <serial>.stack    stacks that it was asked for
  <serial>.debug    socket of its breakpoint
  logs/<name>.log   what it prints, unless the logs are kept elsewhere

Nobody is asked for anything: a reader opens the files, so a driver that is blocked or stopped hides nothing.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import mmap
import os
import shutil
import struct
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlx.actors import processes
from rlx.errors import ActorError

STATUSES = ("pending", "starting", "alive", "restarting", "failed", "dead")
ENDED = ("failed", "dead")
KEPT_ENDED = 64
"""Ended actors that stay visible; the slot of an older one is given to a new actor."""

SLOT_BYTES = 2048
FIRST_SLOTS = 8  # of the file, with the head; 8 slots are whole pages on every machine
MAGIC = b"rlxboard2"
SERIAL, SENT, PID, RESTARTS, STATUS, HELD, ELSEWHERE = range(7)  # 64-bit numbers at the start of a slot; serial 0: free
TEXTS = {"name": (64, 192), "resources": (192, 320), "waiting": (320, 832), "error": (832, SLOT_BYTES)}
"""Bytes of a slot that hold a text; longer ones are cut."""


class RuntimeFolder:
    """The folder of one runtime."""

    def __init__(self, path: Path, logs: Path) -> None:
        self.path = path
        self.logs = logs
        """Where the actors' output goes."""

    @classmethod
    def create(cls, log_folder: Path | None = None) -> RuntimeFolder:
        """Make the folder of a new runtime of this process, and remove those of drivers that are gone.

        log_folder: where the actors' logs are kept; they go with the runtime folder if None.
        ActorError if somebody else has made the folder in the temporary directory that is to be ours.
        """
        home = _home()
        with contextlib.suppress(FileExistsError):
            home.mkdir(mode=0o700)
        _check_ours(home)
        for left in list_runtimes():
            if not left.alive:
                shutil.rmtree(left.folder, ignore_errors=True)  # another driver may be removing it too
        path = _new_folder(home)
        logs = path / "logs" if log_folder is None else Path(log_folder).absolute()
        try:
            logs.mkdir(parents=True, exist_ok=True)
            _write_info(path, logs)
        except OSError as error:
            shutil.rmtree(path, ignore_errors=True)
            raise ActorError(f"{path} or {logs} cannot be written to ({error}); make room, or set TMPDIR.") from error
        return cls(path, logs)

    def remove(self) -> None:
        """Remove the folder and all that is in it."""
        shutil.rmtree(self.path, ignore_errors=True)  # an actor that is just dying may still make a file in it


@dataclass(frozen=True)
class RuntimeInfo:
    """A runtime, as its info.json describes it."""

    folder: Path
    driver: int
    """Process id of the program that opened it."""
    alive: bool
    """Whether that process still runs."""
    here: bool
    """Whether its process id means the same to us; False for a driver in another container."""
    command: list[str]
    started: float
    """time.time()"""
    logs: Path
    elsewhere: bool = True
    """Whether its actors on other machines are to be seen."""


def list_runtimes() -> list[RuntimeInfo]:
    """Return this user's runtimes in the temporary directory, oldest first, with those whose driver is gone."""
    home = _home()
    if not home.is_dir():
        return []
    _check_ours(home)
    return sorted(filter(None, map(read_info, home.iterdir())), key=lambda info: info.started)


def read_info(folder: Path) -> RuntimeInfo | None:
    """Read the info.json of a runtime folder; None if it is none, not yet one, or of another version of rlx."""
    try:
        info = json.loads((folder / "info.json").read_text())
        here = info["pid_namespace"] == processes.pid_namespace()
        alive = processes.is_running(info["driver"], info["start_ticks"]) if here else True
        return RuntimeInfo(folder, info["driver"], alive, here, info["command"], info["started"], Path(info["logs"]))
    except (FileNotFoundError, NotADirectoryError, KeyError):
        return None


class Board:
    """The driver's list of actors, in a file that grows by doubling."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock = threading.Lock()
        self._serials = itertools.count(1)
        self._slots: list[Slot] = []
        self._free: list[memoryview] = []
        self._maps: list[mmap.mmap] = []
        self._size = 0  # slots in the file
        self._grow()
        head = self._free.pop(0)
        struct.pack_into("16sQ", head, 0, MAGIC, SLOT_BYTES)

    def add(self, name: str, resources: str = "", status: str = "starting") -> Slot:
        """Return a slot for a new actor."""
        with self._lock:
            ended = [slot for slot in self._slots if slot.ended_at is not None]
            if len(ended) >= KEPT_ENDED:
                self._recycle(min(ended, key=lambda slot: slot.ended_at or 0.0))
            if not self._free:
                self._grow()
            slot = Slot(self._free.pop(0), next(self._serials), name, resources, status)
            self._slots.append(slot)
            return slot

    def close(self) -> None:
        """Let go of the file; slots may still be written to, and nobody reads it."""
        with self._lock:
            for slot in self._slots:
                slot.detach()
            for free in self._free:
                free.release()
            for mapped in self._maps:
                with contextlib.suppress(BufferError):  # a thread is writing just now; its view was the last
                    mapped.close()

    def _recycle(self, slot: Slot) -> None:
        self._slots.remove(slot)
        self._free.insert(0, slot.detach())  # for the next one, which overwrites it
        for file in self.folder.glob(f"{slot.serial}.*"):
            file.unlink(missing_ok=True)

    def _grow(self) -> None:
        added = self._size or FIRST_SLOTS
        file, start, size = self.folder / "board", self._size * SLOT_BYTES, added * SLOT_BYTES
        fd = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.posix_fallocate(fd, start, size)  # in a hole of a full disk a write through the map would be a SIGBUS
            mapped = mmap.mmap(fd, size, offset=start)
        except OSError as error:
            raise ActorError(
                f"{file} cannot grow by {size} bytes ({error}); make room there, or set TMPDIR to another folder."
            ) from error
        finally:
            os.close(fd)
        self._maps.append(mapped)
        view = memoryview(mapped)
        self._free += [view[start : start + SLOT_BYTES] for start in range(0, len(mapped), SLOT_BYTES)]
        self._size += added


class Slot:
    """What the driver tells about one actor."""

    def __init__(self, memory: memoryview, serial: int, name: str, resources: str, status: str) -> None:
        self.serial = serial
        """Number of the actor within its runtime: names its files."""
        self.ended_at: float | None = None
        self._sent = 0
        self._memory = memory
        self._words = memory[: TEXTS["name"][0]].cast("Q")
        memory[:] = bytes(SLOT_BYTES)
        self.update(status=status, name=name, resources=resources)
        self._words[SERIAL] = serial  # last: from now on the slot is read

    def sent(self) -> None:
        """Count a call that was sent to the actor; the caller holds the lock that orders its calls."""
        self._sent = sent = self._sent + 1
        self._words[SENT] = sent

    def update(
        self,
        *,
        status: str | None = None,
        pid: int | None = None,
        restarts: int | None = None,
        sent: int | None = None,
        held: int | None = None,
        elsewhere: bool | None = None,
        **texts: str,
    ) -> None:
        """Change what is given: a status of STATUSES, numbers, and the texts resources, waiting and error.

        waiting says why the actor is pending, error why it ended. A restart sets `sent` to the number of calls that
        wait for the new process, whose timesheet counts from 0.
        """
        if status is not None:
            self._words[STATUS] = STATUSES.index(status)
            self.ended_at = time.monotonic() if status in ENDED else None
        if sent is not None:
            self._sent = sent
        for place, number in ((PID, pid), (RESTARTS, restarts), (SENT, sent), (HELD, held), (ELSEWHERE, elsewhere)):
            if number is not None:
                self._words[place] = number
        for key, text in texts.items():
            start, end = TEXTS[key]
            # One byte stays 0; a character that would be cut in two is left out.
            data = text.encode("utf-8", "replace")[: end - start - 1].decode("utf-8", "ignore").encode()
            self._memory[start:end] = data.ljust(end - start, b"\0")

    def detach(self) -> memoryview:
        """Return the slot's memory for others; what is written here from now on nobody sees."""
        memory = self._memory
        self._memory = memoryview(bytearray(memory))
        self._words = self._memory[: TEXTS["name"][0]].cast("Q")
        return memory


@dataclass(frozen=True)
class Entry:
    """One actor, as its driver sees it."""

    serial: int
    name: str
    status: str
    pid: int | None
    """The process; None before there is one."""
    restarts: int
    sent: int
    """Calls sent to this process, cancelled ones too."""
    held: int
    """Calls that wait until there is a process that takes them."""
    elsewhere: bool
    """Whether it is on another machine."""
    resources: str
    waiting: str
    error: str


def read_board(folder: Path) -> list[Entry]:
    """Return the actors of a runtime in the order in which they were made, ended ones too."""
    try:
        data = (folder / "board").read_bytes()
    except FileNotFoundError:
        return []
    if not data.startswith(MAGIC):
        raise ActorError(f"{folder / 'board'} was written by another version of rlx; use that version's command.")
    slots = (data[start : start + SLOT_BYTES] for start in range(SLOT_BYTES, len(data), SLOT_BYTES))
    return sorted((_entry(slot) for slot in slots if any(slot[:8])), key=lambda entry: entry.serial)


def _entry(slot: bytes) -> Entry:
    words = struct.unpack_from("7Q", slot)
    texts = {key: slot[start:end].partition(b"\0")[0].decode("utf-8", "replace") for key, (start, end) in TEXTS.items()}
    status = STATUSES[min(words[STATUS], len(STATUSES) - 1)]
    return Entry(
        words[SERIAL],
        status=status,
        pid=words[PID] or None,
        restarts=words[RESTARTS],
        sent=words[SENT],
        held=words[HELD],
        elsewhere=bool(words[ELSEWHERE]),
        **texts,
    )


def _home() -> Path:
    return Path(tempfile.gettempdir()) / f"rlx-{os.getuid()}"


def _check_ours(home: Path) -> None:
    """Refuse a folder that somebody else could read or change, or has prepared."""
    found = home.lstat()
    if found.st_uid != os.getuid() or not home.is_dir() or home.is_symlink() or found.st_mode & 0o077:
        raise ActorError(
            f"{home} must be a folder of user {os.getuid()} that nobody else can enter, and is not (owner "
            f"{found.st_uid}, mode {found.st_mode & 0o777:o}); remove it, or set TMPDIR to another folder."
        )


def _new_folder(home: Path) -> Path:
    for number in itertools.count():
        path = home / f"{os.getpid()}-{number}"
        try:
            path.mkdir(mode=0o700)
        except FileExistsError:
            continue
        return path
    raise AssertionError("numbers never end")


def _write_info(path: Path, logs: Path) -> None:
    own = processes.stat(os.getpid())
    assert own is not None
    info: dict[str, Any] = {
        "driver": os.getpid(),
        "start_ticks": own.start_ticks,
        "pid_namespace": processes.pid_namespace(),
        "command": [sys.executable, *sys.argv],
        "started": time.time(),
        "logs": str(logs),
    }
    unfinished = path / "info.json.part"
    unfinished.write_text(json.dumps(info, indent=2))
    unfinished.rename(path / "info.json")  # so that nobody reads half of it
