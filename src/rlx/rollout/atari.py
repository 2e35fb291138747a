"""Atari games as Machado et al. 2018 (arXiv:1709.06009) ask for them, on ale-py's native vector environment.

The settings are those of `rlx.settings.AtariSection`. Two of them are not for the emulator: `episodic_life` and
`clip_reward` are what learning sees, and the environment runner applies them after it has accounted for the episode.
So a reported return is the score of a whole game, in training as in evaluation.

One game is the vector environment of one: the same code skips, pools, scales and stacks, so that scalar and vector
games of equal seeds and actions are equal byte for byte.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import gymnasium
import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv

from rlx.errors import EnvError, MissingExtra

FRAME_SCALE = 4
"""A rendered frame shows each pixel that the policy sees as a square of so many."""


def is_atari(env: Any) -> bool:
    """Return whether `env` is an id such as ALE/Pong-v5, which `rlx.settings.AtariSection` speaks of."""
    return isinstance(env, str) and env.rpartition(":")[2].startswith("ALE/")


def atari_vector_env(
    env_id: str, atari: Mapping[str, Any], *, num_envs: int, num_threads: int = 0, **options: Any
) -> VectorEnv[Any, Any, Any]:
    """Return `num_envs` games that are stepped in threads; an ended one waits for `reset` with a reset_mask.

    num_threads: 0 is one per core. options: further arguments of ale_py.vector_env.AtariVectorEnv.
    """
    try:
        from ale_py.vector_env import AtariVectorEnv
    except ImportError as error:
        raise MissingExtra(f"{env_id} needs ale_py, which is not installed: pip install 'rlx[atari]'.") from error
    arguments = {
        "num_envs": num_envs,
        "num_threads": num_threads,
        "frameskip": atari["frame_skip"],
        "maxpool": atari["max_pool"],
        "repeat_action_probability": atari["sticky_actions"],
        "noop_max": atari["noop_max"],
        "use_fire_reset": atari["fire_reset"],
        "stack_num": atari["stack"],
        "img_height": atari["size"],
        "img_width": atari["size"],
        "full_action_space": atari["full_action_space"],
        "max_num_frames_per_episode": atari["max_frames"],
        "reward_clipping": False,
        "episodic_life": False,
    }
    shared = dict(VectorEnv.metadata)
    try:
        env = AtariVectorEnv(gymnasium.spec(env_id).kwargs["game"], **arguments | options)
    except (gymnasium.error.Error, TypeError) as error:
        raise EnvError(f"{env_id} cannot be made: {error}") from error
    finally:
        # It states its mode in the metadata of the base class, where it would stand for every other class.
        VectorEnv.metadata.clear()
        VectorEnv.metadata.update(shared)
    # It resets by itself where nobody else does; who does it in time loses no step on it.
    env.metadata = {"autoreset_mode": AutoresetMode.DISABLED}
    return env


class AtariEnv(gymnasium.Env[np.ndarray, Any]):
    """One game; observations are uint8 [stack, size, size], the newest frame last. info: lives."""

    def __init__(
        self, env_id: str, atari: Mapping[str, Any], *, render_mode: str | None = None, **options: Any
    ) -> None:
        self._games = atari_vector_env(env_id, atari, num_envs=1, num_threads=1, **options)
        self.observation_space = self._games.single_observation_space
        self.action_space = self._games.single_action_space
        self.render_mode = render_mode
        self.metadata = {"render_modes": ["rgb_array"], "render_fps": 60 // atari["frame_skip"]}

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Begin a game."""
        obs_B, info = self._games.reset(seed=seed)
        self._obs = obs_B[0]
        return self._obs, {"lives": int(info["lives"][0])}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Play one action for `frame_skip` frames; the reward is the points of the score."""
        obs_B, reward_B, terminated_B, truncated_B, info = self._games.step(np.asarray(action)[None])
        self._obs = obs_B[0]
        lives = {"lives": int(info["lives"][0])}
        return self._obs, float(reward_B[0]), bool(terminated_B[0]), bool(truncated_B[0]), lives

    def render(self) -> np.ndarray:  # type: ignore[override]
        """Return the newest frame that the policy sees, uint8 [height, width, 3]."""
        frame = self._obs[-1].repeat(FRAME_SCALE, axis=0).repeat(FRAME_SCALE, axis=1)
        return np.stack([frame] * 3, axis=-1)
