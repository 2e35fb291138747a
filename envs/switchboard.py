"""A switchboard with a known best return: an image beside numbers, an action of two parts, and an action mask.

One of four lamps on the screen is lit; its switch is to be pressed, and a dial to be set to where `target` says.
Each step pays 1 for the right switch, and 1 less the dial's distance from the target:

    best return      2 * length
    a random one     5/6 * length: 1/2 a step from the switch, as the mask allows two, and 1/3 from a uniform dial
"""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

Observation = dict[str, Any]
LAMPS = 4


class Switchboard(gymnasium.Env[Observation, tuple[int, np.ndarray]]):
    """Observations are {screen, target, action_mask}, actions (switch, [dial]); terminated after `length` steps."""

    def __init__(self, length: int = 8) -> None:
        self.length = length
        self.observation_space = spaces.Dict(  # type: ignore[assignment]
            {
                "screen": spaces.Box(0, 255, (8, 8, 1), np.uint8),
                "target": spaces.Box(-1, 1, (1,), np.float32),
                "action_mask": spaces.MultiBinary(LAMPS),
            }
        )
        self.action_space = spaces.Tuple(  # type: ignore[assignment]
            [spaces.Discrete(LAMPS), spaces.Box(-1, 1, (1,), np.float32)]
        )

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Return the first task."""
        super().reset(seed=seed)
        self.steps = 0
        return self._next_task(), {}

    def step(self, action: tuple[int, np.ndarray]) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """Return the next task and what this one paid; ValueError for a switch that the mask forbids."""
        switch, (dial,) = action
        if not self.legal[switch]:
            raise ValueError(f"switch {switch} is not one of {np.flatnonzero(self.legal)}, which the mask allows")
        reward = float(switch == self.lit) + 1.0 - abs(float(dial) - self.target)
        self.steps += 1
        return self._next_task(), reward, self.steps == self.length, False, {}

    def _next_task(self) -> Observation:
        self.lit, other = self.np_random.choice(LAMPS, 2, replace=False)
        self.target = float(np.float32(self.np_random.uniform(-1, 1)))
        self.legal = np.isin(np.arange(LAMPS), [self.lit, other]).astype(np.int8)
        screen = np.zeros((8, 8, 1), np.uint8)
        row, column = 4 * (self.lit // 2), 4 * (self.lit % 2)
        screen[row : row + 4, column : column + 4] = 255
        return {"screen": screen, "target": np.array([self.target], np.float32), "action_mask": self.legal}
