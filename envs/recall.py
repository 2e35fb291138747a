"""A cue, a corridor, a question: the smallest environment that nothing without a memory can solve.

The first observation shows one of two cues, then nothing is shown for `delay` steps, then the question: the action
that the cue named is worth 1, the other one nothing, and the episode ends. Actions before the question do nothing.

    return of a policy with a memory         1, the best there is
    return of any policy without a memory    1/2 on average
"""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

Observation = np.ndarray[Any, np.dtype[np.float32]]


class Recall(gymnasium.Env[Observation, int]):
    """Observations [2]: the cue, -1 or 1, at the first step and 0 later; 1 at the question and 0 before."""

    def __init__(self, delay: int = 4) -> None:
        self.delay = delay
        self.observation_space = spaces.Box(-1, 1, (2,), np.float32)
        self.action_space = spaces.Discrete(2)  # type: ignore[assignment]

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Return the observation with the cue."""
        super().reset(seed=seed)
        self.steps, self.named = 0, int(self.np_random.integers(2))
        return np.array([2 * self.named - 1, 0], np.float32), {}

    def step(self, action: int) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """Return what is seen next; an answer ends the episode."""
        self.steps += 1
        if self.steps <= self.delay:
            return np.zeros(2, np.float32), 0.0, False, False, {}
        if self.steps == self.delay + 1:
            return np.array([0, 1], np.float32), 0.0, False, False, {}
        return np.zeros(2, np.float32), float(action == self.named), True, False, {}
