"""Target: a policy as it was some updates ago."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from rlx.nets.flat import FlatParameters


class Target:
    """A copy of a policy that follows it every `interval` updates."""

    def __init__(self, build_policy: Callable[[], nn.Module], interval: int, device: torch.device) -> None:
        self._policy = build_policy().to(device)
        self._flat = FlatParameters(self._policy, device)
        self._interval = interval
        self._updates = 0

    def of(self, flat: FlatParameters) -> nn.Module:
        """Return the target of the policy with these parameters, copied from it where that is due."""
        if self._updates % self._interval == 0:
            self._flat.data.copy_(flat.data)
            self._flat.refresh()
        return self._policy

    def count_update(self) -> None:
        """One more update was made."""
        self._updates += 1

    def get_state(self) -> dict[str, Any]:
        """Return parameters and count."""
        return {"weights": self._flat.numpy().copy(), "updates": self._updates}

    def set_state(self, state: dict[str, Any]) -> None:
        """Continue from `get_state`."""
        self._flat.load(state["weights"])
        self._updates = int(state["updates"])
