"""Callbacks: a metric of one's own, a curriculum, and an end when it is mastered, in one training.

python examples/07_callbacks.py

In YAML it is `callbacks: [my_module:Success, my_module:Curriculum]`; docs/callbacks.md has a table of all points.
"""

import gymnasium
import numpy as np
from gymnasium import spaces

from rlx import Callback
from rlx.algorithms.ppo import PPOConfig


class Reach(gymnasium.Env):
    """Walk from 0 to a goal within 40 steps, up to 3 x level away on either side."""

    observation_space = spaces.Box(-np.inf, np.inf, (2,), np.float32)
    action_space = spaces.Discrete(2)  # left, right
    level = 1

    def reset(self, *, seed=None, options=None):
        """Return position and goal of a new episode."""
        super().reset(seed=seed)
        side, distance = self.np_random.choice([-1, 1]), self.np_random.integers(1, 3 * self.level + 1)
        self.position, self.goal, self.steps = 0, int(side * distance), 0
        return self._obs(), {}

    def step(self, action):
        """Return what a step leads to; the last info says whether the goal was reached."""
        self.position += 1 if action == 1 else -1
        self.steps += 1
        reached = self.position == self.goal
        return self._obs(), 1.0 if reached else -0.05, reached, self.steps == 40, {"success": reached}

    def _obs(self):
        return np.array([self.position, self.goal], np.float32) / 10


class Success(Callback):
    """The share of episodes that reach their goal, as custom/success; measured in the env runners."""

    def on_episode_end(self, episode):
        """Return what becomes a metric: its mean over the episodes of an iteration."""
        return {"success": episode.info["success"]}


class Curriculum(Callback):
    """Raises the level when nine of ten episodes succeed; ends the run when the last one is mastered."""

    def __init__(self, last_level=3):
        self.level, self.last_level = 1, last_level

    def on_train_result(self, algo, metrics):
        """Look at the iteration; the next episode of every environment is played at the new level."""
        metrics["custom/level"] = self.level
        mastered = metrics.get("custom/success", 0.0) >= 0.9
        if mastered and self.level == self.last_level:
            algo.request_stop("the last level is mastered")
        elif mastered:
            self.level += 1
            print(f"iteration {metrics['iteration']}: level {self.level}")
            algo.set_env_attribute("level", self.level)

    def get_state(self):
        """Return what a resumed run needs."""
        return self.level

    def set_state(self, state):
        """Continue from `get_state`."""
        self.level = state


config = PPOConfig().environment(Reach).callbacks([Success, Curriculum]).env_runners(num_env_runners=2)
with config.training(lr=3e-3).stop(env_steps=300_000).build() as algo:
    metrics = algo.fit()
    print(f"{algo.stop_reason} after {metrics['env_steps']} env steps; success {metrics['custom/success']:.2f}")
