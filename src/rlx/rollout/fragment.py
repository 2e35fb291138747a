"""Fragment: the arrays that `EnvRunner.sample` collects into, before they become a Trajectory."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from rlx.rollout.vector import Envs


@dataclass
class Fragment:
    """Arrays [T, B, ...], and the seconds that it took to fill them."""

    raw: np.ndarray
    """Observations as rows, not normalised."""
    obs: np.ndarray
    """What the policy saw; the same array as `raw` when nothing is normalised."""
    action: np.ndarray
    reward: np.ndarray
    terminated: np.ndarray
    truncated: np.ndarray
    failed: np.ndarray
    """True where the step failed: the row is no transition, and an episode begins after it."""
    lives: np.ndarray | None
    """Lives left, [T + 1, B]: at the beginning, and after each step; None where nobody counts them."""
    cuts: list[tuple[int, int, Any]] = field(default_factory=list)
    """(t, index, final observation as in `raw`) of truncated episodes whose obs[t + 1] is of the next one already."""
    env_s: float = 0.0
    inference_s: float = 0.0

    @classmethod
    def empty(cls, num_steps: int, envs: Envs, is_normalized: bool) -> Fragment:
        """Return new arrays: a trajectory's arrays are never written to again."""
        shape = (num_steps, envs.num_envs)
        raw = np.empty((*shape, *envs.layout.shape), envs.layout.dtype)
        return cls(
            raw=raw,
            obs=np.empty_like(raw) if is_normalized else raw,
            action=np.empty((*shape, *envs.actions.shape), envs.actions.dtype),
            reward=np.empty(shape),
            terminated=np.empty(shape, bool),
            truncated=np.empty(shape, bool),
            failed=np.zeros(shape, bool),
            lives=None if envs.lives_B is None else np.empty((num_steps + 1, envs.num_envs), np.int64),
        )

    def life_lost(self) -> np.ndarray:
        """Return a bool [T, B]: True where a life was lost and the episode goes on with another one."""
        if self.lives is None:
            return np.zeros(self.terminated.shape, bool)
        lost = (self.lives[1:] < self.lives[:-1]) & (self.lives[1:] > 0)
        return lost & ~(self.terminated | self.truncated | self.failed)
