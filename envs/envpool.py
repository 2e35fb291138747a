"""EnvPool's environments, stepped in C++ threads: environment.id rlx.envs.envpool:EnvPool, kwargs {task: Pong-v5}.

Any of `envpool.list_all_envs()`; EnvPool's own options (max_episode_steps, frame_skip, num_threads ...) are further
kwargs. The `atari` section of the settings does not reach them.
"""

from __future__ import annotations

import importlib
import warnings
from typing import Any

import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from rlx.errors import ConfigError, EnvError, MissingExtra


class EnvPool(VectorEnv[Any, Any, Any]):
    """`num_envs` of EnvPool's `task`; a pool's seed is fixed when it is made, so a seeded reset makes a new one."""

    metadata = {"autoreset_mode": AutoresetMode.NEXT_STEP}  # noqa: RUF012

    def __init__(self, task: str, num_envs: int, **options: Any) -> None:
        envpool = _envpool()
        if task not in envpool.list_all_envs():
            raise EnvError(f"EnvPool has no task {task!r}; envpool.list_all_envs() lists those that it has.")
        if "batch_size" in options:
            raise ConfigError("environment.kwargs.batch_size is not for rlx: every step needs all environments.")
        self.num_envs = num_envs
        self._arguments = (task, {"env_type": "gymnasium", "num_envs": num_envs, **options})
        self._pool: Any = None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of gymnasium, that its Box keeps fewer digits of some bounds
            spec = envpool.make_spec(task, num_envs=num_envs, **options)
            self.single_observation_space = spec.gymnasium_observation_space
            self.single_action_space = spec.gymnasium_action_space
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)

    def reset(
        self, *, seed: int | list[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Return the first observations of new episodes."""
        if seed is not None or self._pool is None:
            task, arguments = self._arguments
            self.close()
            self._pool = _envpool().make(task, **arguments, seed=0 if seed is None else seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # as above, when its spaces are first asked for
            return self._pool.reset()

    def step(self, actions: np.ndarray) -> tuple[Any, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Return what followed the actions; an environment whose episode has ended ignores its own, and resets."""
        return self._pool.step(actions)

    def close(self, **_: Any) -> None:
        """End the threads."""
        if self._pool is not None:
            self._pool.close()
            self._pool = None


def _envpool() -> Any:
    try:
        return importlib.import_module("envpool")
    except ImportError as error:
        raise MissingExtra("rlx.envs.envpool needs envpool: pip install 'rlx[envpool]'.") from error
