"""What actors print: LogFolder keeps it in files, LogFollower reads on in them, Damper decides what is shown.

An actor's stdout and stderr are its log file itself, so no kill loses a line and nobody who reads slowly holds it up.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

MAX_NAME_BYTES = 200  # a file's name may have 255
READ_BYTES = 256 * 1024  # of one file at a time; if more has come in meanwhile, what lies between is not shown
LINE_BYTES = 64 * 1024  # an unfinished line that is longer is shown as it is
LAST_READINGS = 4  # hold what `_Log` does not leave out; a process that outlives its actor may go on writing
PACE_S = 0.05  # between two readings, so that an actor that prints all the time cannot keep the reader busy
POLL_S = 0.5  # without inotify
REPEAT_S = 5.0
WINDOW_S = 1.0
IN_MODIFY, IN_ONESHOT, IN_NONBLOCK_CLOEXEC = 0x2, 0x80000000, os.O_NONBLOCK | os.O_CLOEXEC


class LogFolder:
    """The log files of a runtime's actors."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._starts: dict[str, int] = {}  # where the output of the latest actor of a name begins

    def file(self, name: str) -> Path:
        """Return the log file of the actor `name`."""
        return log_file(self.path, name)

    def open(self, name: str) -> int:
        """Return a descriptor to write to; it is for the actor's 1 and 2. An earlier actor's lines stay in the file."""
        fd = os.open(self.file(name), os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        self._starts[name] = os.fstat(fd).st_size
        return fd

    def start(self, name: str) -> int:
        """Return the byte at which the output of the latest actor of this name begins."""
        return self._starts.get(name, 0)

    def tail(self, name: str, lines: int = 20, max_bytes: int = LINE_BYTES) -> list[str]:
        """Return the last lines that the latest actor of this name printed, of its last `max_bytes` bytes."""
        return tail(self.file(name), lines, max_bytes, self.start(name))

    def close(self, name: str) -> None:
        """The actor has ended: remove its file if nobody ever wrote to it."""
        self._starts.pop(name, None)
        with contextlib.suppress(FileNotFoundError):
            if self.file(name).stat().st_size == 0:
                self.file(name).unlink()


def log_file(folder: Path, name: str) -> Path:
    """Return where the actor `name` logs: env/3 is env.3.log."""
    stem = name.replace("/", ".")
    if len(stem.encode()) > MAX_NAME_BYTES:
        stem = stem.encode()[:MAX_NAME_BYTES].decode("utf-8", "ignore") + hashlib.sha1(name.encode()).hexdigest()[:8]
    return folder / f"{stem}.log"


def tail(file: Path, lines: int = 20, max_bytes: int = LINE_BYTES, start: int = 0) -> list[str]:
    """Return the last lines of a log behind byte `start`; none if there is no such file."""
    if lines <= 0:
        return []
    try:
        with file.open("rb") as log:
            end = log.seek(0, os.SEEK_END)
            log.seek(max(start, end - max_bytes))
            data = log.read(max_bytes)
    except FileNotFoundError:
        return []
    return [text(line) for line in data.removesuffix(b"\n").split(b"\n")[-lines:]] if data else []


def text(line: bytes) -> str:
    """Return a line as it would stand on a terminal in the end: a progress bar draws over itself with \\r."""
    return line.rstrip(b"\r").rpartition(b"\r")[2].decode("utf-8", "replace")


class LogFollower:
    """Shows what actors print, while they print it. Any thread may call it; nothing in it waits.

    An epoll loop registers `fileno()` and calls `on_readable()` when it can be read. Every method that returns
    seconds asks for a call of `tick()` after that time, which replaces what was asked for before; None asks for none.
    """

    def __init__(self, folder: LogFolder, damper: Damper | None = None) -> None:
        self._folder = folder
        self._damper = damper or Damper(folder)
        self._inotify = _Inotify.open(folder.path)
        self._lock = threading.Lock()
        self._logs: dict[str, _Log] = {}
        self._last_s = 0.0

    def fileno(self) -> int | None:
        """Return the descriptor to watch; None where there is no inotify, and then only `tick()` finds anything."""
        return None if self._inotify is None else self._inotify.fd

    def follow(self, name: str) -> float | None:
        """Show what the actor `name` prints from now on: after `LogFolder.open`, before it can print."""
        with self._lock:
            self._logs[name] = _Log(self._folder.file(name), self._folder.start(name))
        return None if self._inotify else POLL_S

    def finish(self, name: str) -> float | None:
        """Show the rest of what an ended actor has printed, and follow it no longer."""
        with self._lock:
            self._finish(name)
            return self._damper.flush()

    def on_readable(self) -> float | None:
        """Somebody has printed."""
        if self._inotify:
            self._inotify.take()
        return max(0.0, self._last_s + PACE_S - time.monotonic())

    def tick(self) -> float | None:
        """Show what is new, and what the damper has to say about lines that it held back."""
        with self._lock:
            if self._inotify:
                self._inotify.arm()  # before looking, so that what is printed meanwhile is noticed
            self._last_s = time.monotonic()
            more = [name for name, log in self._logs.items() if self._show(name, log)]
            quiet_s = self._damper.flush()
        if more:
            return PACE_S
        return quiet_s if self._inotify else min(POLL_S, quiet_s or POLL_S)

    def close(self) -> None:
        """Show the rest, say what was held back, and free the descriptor."""
        with self._lock:
            for name in list(self._logs):
                self._finish(name)
            self._damper.flush(everything=True)
            inotify, self._inotify = self._inotify, None
            if inotify:
                inotify.close()

    def _finish(self, name: str) -> None:
        log = self._logs.pop(name, None)
        if log is None:
            return
        for _ in range(LAST_READINGS):
            if not self._show(name, log):
                break
        if log.unfinished:
            self._damper.feed(name, [text(log.unfinished)])

    def _show(self, name: str, log: _Log) -> bool:
        """Show the new lines of one log; True if there is more to read."""
        lines, skipped, more = log.read()
        if skipped:
            self._damper.skip(name, skipped)
        if lines:
            self._damper.feed(name, lines)
        return more


class _Log:
    """A log file and how far it was read."""

    def __init__(self, file: Path, offset: int) -> None:
        self._file, self._offset = file, offset
        self.unfinished = b""

    def read(self) -> tuple[list[str], int, bool]:
        """Return the new lines, how many bytes were left out before them, and whether there is more."""
        try:
            size = os.stat(self._file).st_size
            if size == self._offset:
                return [], 0, False
            skipped = max(0, size - self._offset - 2 * READ_BYTES)
            with open(self._file, "rb") as log:
                log.seek(self._offset + skipped)
                data = log.read(READ_BYTES)
        except FileNotFoundError:  # the user has tidied up
            return [], 0, False
        if size < self._offset or not data:  # somebody has emptied it: go on from where it ends now
            self._offset, self.unfinished = size, b""
            return [], 0, False
        self._offset += skipped + len(data)
        whole = data.partition(b"\n")[2] if skipped else self.unfinished + data
        *lines, self.unfinished = whole.split(b"\n")
        if len(self.unfinished) > LINE_BYTES:
            lines, self.unfinished = [*lines, self.unfinished], b""
        return [text(line) for line in lines], skipped, self._offset < size


@dataclass
class _Repeated:
    """A text that was shown, and how often it came again."""

    sample: str
    shown_at: float
    lines: int = 0
    actors: list[str] = field(default_factory=list)


@dataclass
class _Flood:
    """What one actor had to say within one window."""

    started_at: float
    shown: int = 0
    lines: int = 0
    skipped_bytes: int = 0


class Damper:
    """Shows lines, but no floods: of what is held back it says how much it is, whose, and where it stands.

    Held back are lines that, but for their digits, any actor has shown within the last 5 s, and lines of an actor
    that has shown `per_second` within one second. Indented lines share the fate of the line above them, so that a
    traceback is shown as a whole or counted as a whole.
    """

    def __init__(
        self,
        folder: LogFolder,
        show: Callable[[str], object] | None = None,
        per_second: int = 20,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        """show: gets text to print, whole lines; the default writes to what sys.stderr is at that moment."""
        self._folder, self._show, self._per_second, self._now = folder, show or _to_stderr, per_second, now
        self._repeated: dict[str, _Repeated] = {}  # by the text without its digits
        self._floods: dict[str, _Flood] = {}  # by actor
        self._flushed_at = now()

    def feed(self, name: str, lines: Sequence[str]) -> None:
        """Show or count new lines of the actor `name`."""
        now, out = self._now(), []
        if now - self._flushed_at >= PACE_S:
            self.flush()
        flood = self._floods.setdefault(name, _Flood(now))
        for paragraph in _paragraphs(lines):
            room = max(0, self._per_second - flood.shown)
            key = re.sub(r"\d+", "0", "\n".join(paragraph))
            repeated = self._repeated.get(key)
            if repeated is not None and not paragraph[0].startswith("breakpoint in "):  # each waits for a person
                repeated.lines += len(paragraph)
                repeated.actors += [name] if name not in repeated.actors else []
                continue
            if room:
                self._repeated[key] = _Repeated(paragraph[0], now)
            out += [f"[{name}] {line}\n" for line in paragraph[:room]]
            flood.shown += len(paragraph[:room])
            flood.lines += len(paragraph[room:])
        if out:
            self._show("".join(out))

    def skip(self, name: str, count: int) -> None:
        """Count bytes that came too fast to be read."""
        self._floods.setdefault(name, _Flood(self._now())).skipped_bytes += count

    def flush(self, everything: bool = False) -> float | None:
        """Say what was held back in windows that have ended; return the seconds until the next one ends."""
        now, out, waits = self._now(), [], []
        self._flushed_at = now
        for name, flood in list(self._floods.items()):
            left = flood.started_at + WINDOW_S - now
            if left > 0 and not everything:
                waits += [left] if flood.lines or flood.skipped_bytes else []
                continue
            del self._floods[name]
            much = [f"{flood.lines:,} more lines"] if flood.lines else []
            much += [f"{flood.skipped_bytes:,} more bytes"] if flood.skipped_bytes else []
            if much:
                out.append(f"[{name}] {' and '.join(much)} within {WINDOW_S:g} s: {self._folder.file(name)}\n")
        for key, repeated in list(self._repeated.items()):
            left = repeated.shown_at + REPEAT_S - now
            if left > 0 and not everything:
                waits += [left] if repeated.lines else []
                continue
            del self._repeated[key]
            if repeated.lines:
                out.append(self._of_repeated(repeated))
        if out:
            self._show("".join(out))
        return min(waits, default=None)

    def _of_repeated(self, repeated: _Repeated) -> str:
        first, *others = repeated.actors
        who = f"{first} and {len(others)} other actors" if len(others) > 1 else " and ".join(repeated.actors)
        where = self._folder.file(first) if not others else self._folder.path
        lines = f"{repeated.lines:,} more line{'s' * (repeated.lines > 1)}"
        return f"[{who}] {lines} within {REPEAT_S:g} s like {repeated.sample[:60]!r}: {where}\n"


def _paragraphs(lines: Sequence[str]) -> Iterator[list[str]]:
    """Yield each line with the indented and empty ones below it."""
    paragraph: list[str] = []
    for line in lines:
        if paragraph and line.strip() and not line[0].isspace():
            yield paragraph
            paragraph = []
        paragraph.append(line)
    if paragraph:
        yield paragraph


def _to_stderr(lines: str) -> None:
    sys.stderr.write(lines)
    sys.stderr.flush()


class _Inotify:
    """Tells once that some file of a folder was written to, and then no more until it is armed again.

    So a descriptor that is not looked at stays quiet, however much is written.
    """

    def __init__(self, fd: int, folder: Path) -> None:
        self.fd, self._folder = fd, os.fsencode(folder)

    @classmethod
    def open(cls, folder: Path) -> _Inotify | None:
        """Return an armed one; None where the system has none, or no more for this user."""
        fd = _libc.inotify_init1(IN_NONBLOCK_CLOEXEC)
        if fd < 0:
            return None
        inotify = cls(fd, folder)
        try:
            inotify.arm()
        except OSError as error:
            inotify.close()
            if error.errno == errno.ENOSPC:  # this user's limit of watches
                return None
            raise
        return inotify

    def arm(self) -> None:
        if _libc.inotify_add_watch(self.fd, self._folder, IN_MODIFY | IN_ONESHOT) < 0:
            raise OSError(ctypes.get_errno(), "inotify_add_watch failed", os.fsdecode(self._folder))

    def take(self) -> None:
        """Forget what was told."""
        with contextlib.suppress(BlockingIOError):
            while os.read(self.fd, 64 * 1024):
                pass

    def close(self) -> None:
        os.close(self.fd)


_libc = ctypes.CDLL(None, use_errno=True)
_libc.inotify_add_watch.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_uint32]
