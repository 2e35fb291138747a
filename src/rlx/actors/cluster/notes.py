"""What each daemon notes of itself in a file, so that its user finds, from another terminal, those of this machine."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import socket
from dataclasses import dataclass
from pathlib import Path

from rlx.actors import processes
from rlx.actors.cluster.credentials import HOME


@dataclass(frozen=True)
class Note:
    """One daemon of this machine."""

    name: str
    address: str
    """HOST:PORT, as other machines reach it."""
    head: str | None
    """HOST:PORT of the head's daemon; None: this is the head."""
    key: str
    log: str
    """The file of its log; "": its log is not in a file."""
    pid: int
    start_ticks: int
    """When its process has started: tells it from a later one with the same id."""

    def write(self) -> None:
        """Make the file, for its user alone."""
        folder().mkdir(mode=0o700, parents=True, exist_ok=True)
        file = self._file()
        new = file.with_suffix(".new")
        new.write_text(json.dumps(dataclasses.asdict(self)))
        os.replace(new, file)

    def remove(self) -> None:
        """Remove the file."""
        with contextlib.suppress(OSError):
            self._file().unlink()

    def is_running(self) -> bool:
        """True while its process has not ended."""
        return processes.is_running(self.pid, self.start_ticks)

    def _file(self) -> Path:
        return folder() / f"{_here()}{self.pid}.json"


def folder() -> Path:
    """Return where the notes and logs of this user's daemons are."""
    return HOME.expanduser() / "nodes"


def find() -> list[Note]:
    """Return the notes of this machine's daemons that run, by name; those of daemons that have ended are removed.

    The folder may be shared with other machines, whose process ids say nothing here.
    """
    running = []
    for file in folder().glob(f"{_here()}*.json"):
        try:
            note = Note(**json.loads(file.read_text()))
        except (OSError, ValueError, TypeError):  # removed meanwhile, or of another version of rlx
            continue
        if file != note._file():  # another machine's, whose name begins as ours does
            continue
        if note.is_running():
            running.append(note)
        else:
            note.remove()
    return sorted(running, key=lambda note: note.name)


def _here() -> str:
    """Return how notes are named whose process ids can be looked up here; containers have numbers of their own."""
    return f"{socket.gethostname()}.{os.stat('/proc/self/ns/pid').st_ino}."
