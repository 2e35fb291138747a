"""MuJoCo's warnings as log lines: by itself it prints them, every time, and writes MUJOCO_LOG.TXT where it runs."""

from __future__ import annotations

import importlib
import logging
from typing import Any

log = logging.getLogger(__name__)

_told: set[str] = set()


def log_warnings() -> None:
    """Have every kind of warning logged once in this process, unless somebody else listens to them already.

    Deprecations concern who writes the model, and are debug lines.
    """
    mujoco: Any = importlib.import_module("mujoco")  # its stubs leave these two out
    if mujoco.get_mju_user_warning() is None:
        mujoco.set_mju_user_warning(_tell)


def _tell(text: str) -> None:
    kind = text.partition(" Time = ")[0]
    if kind not in _told:
        _told.add(kind)
        log.log(logging.DEBUG if "deprecated" in text else logging.WARNING, "MuJoCo: %s", text)
