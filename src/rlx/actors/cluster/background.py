"""Daemons in the background: started in sessions of their own, which outlive who starts them, and ended by signals."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rlx.actors.cluster import notes
from rlx.actors.cluster.daemon import Options
from rlx.actors.cluster.notes import Note
from rlx.errors import ActorError, ConfigError

START_TIMEOUT_S = 60.0
"""Until a daemon has listened and joined; it comes on top of the time that it waits for its head."""
LAST_LINES_BYTES = 4096


def start(options: Options, *, attached: bool = False) -> tuple[subprocess.Popen[bytes], str]:
    """Return the process of a daemon and its address, once it listens and has joined; ActorError otherwise.

    attached: its log goes to this process' stderr and not to a file, and the caller waits for its end.
    """
    command = [sys.executable, "-m", "rlx.actors.cluster.daemon", json.dumps(dataclasses.asdict(options))]
    with contextlib.nullcontext() if attached else _log_file(options.log) as stderr:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=stderr, start_new_session=True
        )
    assert process.stdout is not None
    try:
        with process.stdout:
            news = _first_line(process.stdout.fileno(), START_TIMEOUT_S + options.wait_for_head_s)
        if news is None or "address" not in news:
            raise _failure(process, options, news)
        if not attached:
            let_go(process)
        return process, news["address"]
    except BaseException:
        process.kill()
        process.wait()
        raise


def let_go(process: subprocess.Popen[bytes]) -> None:
    """Have Python not complain that nobody waits for the process."""
    process.returncode = 0


def stop(running: Iterable[Note], timeout_s: float) -> list[Note]:
    """End daemons by SIGTERM, and by SIGKILL where `timeout_s` has passed; return those that had to be killed."""
    deadline, killed = time.monotonic() + timeout_s, []
    with contextlib.ExitStack() as stack:
        ending = []
        for note in running:
            try:
                pidfd = os.pidfd_open(note.pid)
            except ProcessLookupError:
                continue
            stack.callback(os.close, pidfd)
            if note.is_running():  # looked at once the descriptor holds the process, so that its id is nobody else's
                _send(pidfd, signal.SIGTERM)
                ending.append((note, pidfd))
        for note, pidfd in ending:
            if not _has_ended(pidfd, max(0.0, deadline - time.monotonic())):
                killed.append(note)
                _send(pidfd, signal.SIGKILL)
                _has_ended(pidfd, timeout_s)
            note.remove()
    return killed


def _send(pidfd: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        signal.pidfd_send_signal(pidfd, number)


def _has_ended(pidfd: int, timeout_s: float) -> bool:
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(timeout_s * 1e3))


def _log_file(path: str) -> Any:
    try:
        notes.folder().mkdir(mode=0o700, parents=True, exist_ok=True)
        return open(path, "ab")
    except OSError as error:
        raise ConfigError(
            f"the daemon's log {path} cannot be written ({error.strerror}): set RLX_HOME to a folder that can be."
        ) from None


def _first_line(pipe: int, timeout_s: float) -> dict[str, Any] | None:
    """Return what the daemon says; {} when it ends without a word, None when it says nothing in time."""
    deadline, line = time.monotonic() + timeout_s, b""
    poll = select.poll()
    poll.register(pipe, select.POLLIN)
    while poll.poll(max(0.0, deadline - time.monotonic()) * 1e3):
        data = os.read(pipe, 65536)
        line += data
        if line.endswith(b"\n"):
            return json.loads(line)
        if not data:
            return {}
    return None


def _failure(process: subprocess.Popen[bytes], options: Options, news: dict[str, Any] | None) -> Exception:
    if news:
        return ConfigError(news["error"]) if news["bad_input"] else ActorError(news["error"])
    if news is None:
        how = f"has not started within {START_TIMEOUT_S + options.wait_for_head_s:g} s, and was killed"
    else:
        how = f"ended with exit code {process.wait(START_TIMEOUT_S)} before it listened"
    return ActorError(f"the daemon {options.name} {how}{_last_line(options.log)}.")


def _last_line(log: str) -> str:
    try:
        lines = Path(log).read_bytes()[-LAST_LINES_BYTES:].decode(errors="replace").split("\n")
    except OSError:
        return ""
    last = next((line for line in reversed(lines) if line.strip()), "nothing")
    return f"; the last line of its log {log}: {last}"
