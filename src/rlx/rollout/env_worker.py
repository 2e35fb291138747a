"""What runs in a process of environments: the worker, and the memory that it shares with the runner."""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import gymnasium
import numpy as np

from rlx.nets.observation import Space
from rlx.rollout.env_changes import Changes
from rlx.rollout.failures import Failures
from rlx.rollout.hooks import EnvHooks
from rlx.rollout.in_place import FAILED, InPlaceEnvs, State

EPISODE_ENDED, STEP_FAILED = 1, 2
"""Values of `StepMemory.outcome`; 0 is an ordinary step."""
ALIGNMENT = 64

Row = tuple[tuple[int, ...], np.dtype[Any]]
MakeEnvs = Callable[[int], list[gymnasium.Env[Any, Any]]]
"""make(count) returns so many new environments."""


@dataclass
class StepMemory:
    """What a step exchanges: arrays [B, ...] in memory that several processes map."""

    action: np.ndarray
    """The policy's actions."""
    obs: np.ndarray
    final_obs: np.ndarray
    """The last observation of an episode that ended in this step."""
    reward: np.ndarray
    terminated: np.ndarray
    truncated: np.ndarray
    outcome: np.ndarray
    lives: np.ndarray
    episode: np.ndarray
    """Number of the running episode."""

    @classmethod
    def map(cls, fd: int, num_envs: int, obs: Row, action: Row) -> StepMemory:
        """Return the arrays in the file `fd`, which is made large enough; a row is (shape, dtype)."""
        scalars = {name: ((), np.dtype(kind)) for name, kind in SCALARS.items()}
        rows: dict[str, Row] = {"action": action, "obs": obs, "final_obs": obs, **scalars}
        sizes = [num_envs * int(np.prod(shape)) * dtype.itemsize for shape, dtype in rows.values()]
        starts = list(accumulate((-(-size // ALIGNMENT) * ALIGNMENT for size in sizes), initial=0))
        os.ftruncate(fd, starts[-1])
        memory = mmap.mmap(fd, starts[-1])
        arrays = {
            name: np.ndarray((num_envs, *shape), dtype, memory, start)
            for (name, (shape, dtype)), start in zip(rows.items(), starts, strict=False)
        }
        return cls(**arrays)

    def share(self, first: int, last: int) -> StepMemory:
        """Return the rows of the environments from `first` up to `last`."""
        return StepMemory(**{name: array[first:last] for name, array in vars(self).items()})


SCALARS = {
    "reward": "f8",
    "terminated": "?",
    "truncated": "?",
    "outcome": "u1",
    "lives": "i8",
    "episode": "i8",
}


class EnvWorker:
    """The actor: it owns the environments from `first` up to `last`, counted within the runner."""

    def __init__(
        self,
        make: MakeEnvs,
        first: int,
        last: int,
        name: str,
        seed: int,
        first_env_index: int,
        failures: dict[str, Any],
        counts_lives: bool,
        make_callbacks: Callable[[], Sequence[Any]] | None,
    ) -> None:
        self._failures = Failures(last - first, **failures)
        self._failures.watchdog.watch()
        self._hooks = None if make_callbacks is None else EnvHooks(make_callbacks)
        self._envs = InPlaceEnvs(
            make(last - first),
            *(name, seed, first_env_index + first),
            lambda: make(1)[0],
            self._failures,
            counts_lives,
            self._hooks,
        )
        self._first, self._last = first, last

    def spaces(self) -> tuple[Space, Space]:
        """Return the observation and the action space of one environment."""
        return self._envs.observation_space, self._envs.action_space

    def attach(self, path: str, num_envs: int, obs: Row, action: Row) -> None:
        """Keep what a step exchanges in the memory at `path`."""
        fd = os.open(path, os.O_RDWR)
        try:
            self._memory = StepMemory.map(fd, num_envs, obs, action).share(self._first, self._last)
        finally:
            os.close(fd)
        m = self._memory
        self._envs.keep_in(m.obs, m.reward, m.terminated, m.truncated, m.lives, m.episode)

    def reset(self) -> int:
        """Begin a new episode everywhere; return the number of failures."""
        self._envs.reset()
        return self._failures.take_count()

    def step(self) -> tuple[int, list[tuple[int, dict[str, Any]]]] | None:
        """Take the actions in memory; return the number of failures and what hooks want to know, if any."""
        memory = self._memory
        final_obs = self._envs.step(memory.action)[4]
        for index, obs in final_obs.items():
            if obs is FAILED:
                memory.outcome[index] = STEP_FAILED
            else:
                memory.outcome[index], memory.final_obs[index] = EPISODE_ENDED, obs
        failures, infos = self._failures.take_count(), [] if self._hooks is None else self._hooks.take_infos()
        return (failures, infos) if failures or infos else None

    def step_at_random(self) -> None:
        """Take a random action in every environment; of a worker that only measures."""
        self._envs.step_at_random()

    def record(self, action_T_B: np.ndarray, done_T_B: np.ndarray) -> None:
        """As `InPlaceEnvs.record`."""
        self._envs.record(action_T_B, done_T_B)

    def change(self, changes: Changes) -> None:
        """As `InPlaceEnvs.change`."""
        self._envs.change(changes)

    def get_state(self) -> State:
        """As `InPlaceEnvs.get_state`."""
        return self._envs.get_state()

    def set_state(self, state: State) -> tuple[np.ndarray, int]:
        """As `InPlaceEnvs.set_state`, and the number of failures."""
        return self._envs.set_state(state), self._failures.take_count()

    def close(self) -> None:
        """Close the environments."""
        self._envs.close()
