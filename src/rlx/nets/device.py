"""Which device a process of a run computes on."""

from __future__ import annotations

from typing import Literal

import torch

from rlx.errors import ConfigError

Device = Literal["auto", "cpu", "cuda"]


def check_device(setting: str, device: str) -> None:
    """Raise ConfigError where the setting of this name wants a GPU and there is none."""
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"{setting} is cuda and torch finds no CUDA device here; set it to auto or cpu.")


def nth(device: str, index: int) -> str:
    """Return the device of process number `index` of those on "cpu" or "cuda": GPUs are taken in turns."""
    return f"cuda:{index % torch.cuda.device_count()}" if device == "cuda" else device
