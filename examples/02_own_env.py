"""Train on an environment that is defined in this very script, with two env runners in processes of their own.

python examples/02_own_env.py

There is no `if __name__ == "__main__"` guard: an env runner gets the class itself and never runs this file.
"""

import gymnasium
import numpy as np
from gymnasium import spaces

from rlx.algorithms.ppo import PPOConfig


class Corridor(gymnasium.Env):
    """Walk right to the end. Every step costs 0.1 and the end pays 1, so the best return is 1 - 0.1 x (length - 1)."""

    def __init__(self, length: int = 8) -> None:
        self.length = length
        self.observation_space = spaces.Box(0.0, 1.0, (1,), np.float32)
        self.action_space = spaces.Discrete(2)  # left, right

    def reset(self, *, seed=None, options=None):
        """Return the observation at the left end."""
        super().reset(seed=seed)
        self.position, self.steps = 0, 0
        return self._obs(), {}

    def step(self, action):
        """Return what one step to the left or right leads to; 50 steps are the limit."""
        self.position = max(0, self.position + (1 if action == 1 else -1))
        self.steps += 1
        terminated = self.position == self.length
        return self._obs(), 1.0 if terminated else -0.1, terminated, self.steps == 50, {}

    def _obs(self):
        return np.array([self.position / self.length], np.float32)


config = (
    PPOConfig()
    .environment(Corridor, kwargs={"length": 8})
    .env_runners(num_env_runners=2, num_envs_per_env_runner=8, rollout_fragment_length=64)
    .training(lr=3e-3)
    .stop(env_steps=30_000)
)

with config.build() as algo:
    metrics = algo.fit()
    print(f"return {metrics['episode_return_mean']:.2f} after {metrics['env_steps']} env steps; the best is 0.30")
    print(f"evaluation {algo.evaluate()['evaluation/episode_return_mean']:.2f}")
