"""A corridor with a known best return: the smallest environment that takes learning to solve.

Cells 0 to `length`; the agent starts in 0 and wants to reach `length`. Every step costs 1, and a random walk bounces
off the wall at 0, so it needs some length^2 steps. Going right all the time is best:

    return        -length
    value of s    -(1 - gamma^(length - s)) / (1 - gamma)
"""

from __future__ import annotations

from typing import Any

import gymnasium
from gymnasium import spaces


class Corridor(gymnasium.Env[int, int]):
    """Observations are the cell (Discrete), actions 0 left and 1 right; truncated after `max_steps`."""

    def __init__(self, length: int = 8, max_steps: int = 200) -> None:
        self.length, self.max_steps = length, max_steps
        self.observation_space = spaces.Discrete(length + 1)  # type: ignore[assignment]
        self.action_space = spaces.Discrete(2)  # type: ignore[assignment]

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[int, dict[str, Any]]:
        """Return the first cell; nothing here is random."""
        self.cell = self.steps = 0
        return self.cell, {}

    def step(self, action: int) -> tuple[int, float, bool, bool, dict[str, Any]]:
        """Return the next cell, the cost of the step, and whether the end or the step limit is reached."""
        self.steps += 1
        self.cell = max(0, self.cell + (1 if action == 1 else -1))
        return self.cell, -1.0, self.cell == self.length, self.steps >= self.max_steps, {}
