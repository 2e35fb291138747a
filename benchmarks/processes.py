"""Runs a command as a user would, and leaves nothing of it behind."""

import os
import signal
import subprocess
from collections.abc import Mapping
from pathlib import Path


def output_of(command: list[str], timeout_s: float, folder: Path, environment: Mapping[str, str] = os.environ) -> str:
    """Return what a command prints; where it fails or is late, end with its last words."""
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        cwd=folder,
        start_new_session=True,
    ) as process:
        try:
            output, errors = process.communicate(timeout=timeout_s)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)  # its children too: they hold the pipes open
            raise
    if process.returncode != 0:
        raise SystemExit(f"{' '.join(command)} ended with code {process.returncode}:\n{errors[-3000:]}")
    return output
