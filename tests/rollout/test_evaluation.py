import itertools

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from rlx.errors import EnvError
from rlx.nets.policy import build_policy
from rlx.rollout.evaluation import evaluate


class SeedLong(gymnasium.Env):
    """An episode with seed s lasts 1 + s % 7 steps and pays s per step."""

    observation_space = spaces.Box(-np.inf, np.inf, (2,), np.float32)
    action_space = spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        self.seed, self.steps = seed, 0
        return np.float32([self.seed, 0]), {}

    def step(self, action):
        self.steps += 1
        return np.float32([self.seed, self.steps]), float(self.seed), self.steps == 1 + self.seed % 7, False, {}

    def render(self):
        return np.full((2, 2, 3), self.steps, np.uint8)


@pytest.fixture
def policy(scripted_policy):
    return scripted_policy(SeedLong.observation_space, SeedLong.action_space)


@pytest.mark.parametrize("num_envs", [1, 3, 10, 99])
def test_every_episode_counts_once_whatever_the_number_of_environments(num_envs, policy):
    """Episode k has seed 100 + k: its length and return are known. Short episodes are not favoured."""
    result = evaluate(SeedLong, policy, num_episodes=10, num_envs=num_envs, seed=100)
    lengths = [1 + seed % 7 for seed in range(100, 110)]
    assert result.lengths == lengths
    assert result.returns == [float(seed * length) for seed, length in zip(range(100, 110), lengths, strict=True)]


@pytest.mark.parametrize("mode", AutoresetMode)
def test_a_vector_environment_counts_a_fixed_share_of_each_of_its_environments(mode, policy, count):
    """7 episodes of 3 environments: 3 + 2 + 2, although the first environment ends ten times as often."""
    lengths = itertools.cycle([2, 20, 20])

    def make():
        return SyncVectorEnv([lambda: Twice(count(next(lengths)))] * 3, autoreset_mode=mode)

    result = evaluate(make, policy, num_episodes=7, num_envs=3)
    assert result.lengths == [2, 20, 20, 2, 20, 20, 2]
    assert result.returns == [3.0, 210.0, 210.0, 3.0, 210.0, 210.0, 3.0]


class Blind(SeedLong):
    def render(self):
        return None


class Twice(gymnasium.ObservationWrapper):
    def __init__(self, env):
        super().__init__(env)
        self.observation_space = SeedLong.observation_space

    def observation(self, observation):
        return np.repeat(observation, 2)


def test_observations_are_normalised_with_the_given_statistics(policy):
    seen = []
    forward = policy.forward
    policy.forward = lambda obs: seen.append(obs.numpy().copy()) or forward(obs)
    state = {"obs": {"count": 1, "mean": np.array([4.0, 0.0]), "m2": np.array([4.0, 1.0])}, "returns": None}
    evaluate(SeedLong, policy, num_episodes=1, seed=7, normalizer_state=state, obs_clip=1.0)
    np.testing.assert_allclose(seen, [[[1.0, 0.0]]])


def test_sampled_actions_depend_on_the_seed_alone():
    policy = build_policy(spaces.Box(-9, 9, (4,)), spaces.Discrete(2))
    results = [
        evaluate("CartPole-v1", policy, num_episodes=6, num_envs=2, deterministic=False, seed=seed)
        for seed in (1, 1, 2)
    ]
    assert results[0] == results[1] != results[2]
    assert sum(results[0].lengths) > 64  # the noise was drawn more than once


def test_frames_are_those_of_the_first_environment_with_both_ends_of_each_episode(policy):
    """Seeds 8 and 9 last 2 and 3 steps; the frame tells the step."""
    frames = []
    evaluate(
        SeedLong, policy, num_episodes=2, num_envs=1, seed=8, on_frame=lambda frame: frames.append(int(frame.max()))
    )
    assert frames == [0, 1, 2, 0, 1, 2, 3]


def test_an_environment_that_renders_nothing_is_an_env_error(policy):
    with pytest.raises(EnvError, match="render_mode='rgb_array'"):
        evaluate(Blind, policy, num_episodes=1, on_frame=print)


def test_an_episode_without_end_meets_the_deadline(policy, count):
    with pytest.raises(EnvError, match=r"0 of 1 evaluation episodes have ended in time .* time limit"):
        evaluate(lambda: Twice(count(-1)), policy, num_episodes=1, timeout_s=0.05)
