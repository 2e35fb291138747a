"""Scripted parts whose every number can be predicted: environments and a policy."""

import itertools

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import nn

from rlx import actors
from rlx.nets.observation import ObservationLayout


class Walk(gymnasium.Env):
    """A random walk with its own generator, which resets do not touch: any two of one number walk alike.

    obs = (number, episode, step, position); terminated beyond 2.5, truncated after 6 steps. Actions are 1, 2, 3.
    """

    observation_space = spaces.Box(-np.inf, np.inf, (4,), np.float32)
    action_space = spaces.Discrete(3, start=1)

    def __init__(self, number):
        self.number, self.episode, self.rng = number, -1, np.random.default_rng(number)

    def observe(self):
        return np.array([self.number, self.episode, self.steps, self.position], np.float32)

    def reset(self, *, seed=None, options=None):
        self.episode, self.steps, self.position = self.episode + 1, 0, 0.0
        return self.observe(), {}

    def step(self, action):
        assert 1 <= action <= 3
        self.steps += 1
        self.position += (action - 2) * 0.5 + self.rng.normal()
        reward = action + self.position
        return self.observe(), reward, bool(abs(self.position) > 2.5), self.steps >= 6, {}


class Count(gymnasium.Env):
    """obs = number of steps so far; the reward is that number; truncated (or terminated) after `length` steps."""

    observation_space = spaces.Box(-np.inf, np.inf, (1,), np.float32)
    action_space = spaces.Discrete(2)

    def __init__(self, length=3, terminates=False):
        self.length, self.terminates = length, terminates

    def reset(self, *, seed=None, options=None):
        self.steps = 0
        return np.zeros(1, np.float32), {}

    def step(self, action):
        self.steps += 1
        ended = self.steps == self.length
        obs = np.full(1, self.steps, np.float32)
        return obs, float(self.steps), ended and self.terminates, ended and not self.terminates, {}


class ScriptedPolicy(nn.Module):
    """Acts by the observation's rounded sum; values it by a weighted sum that tells all of ours apart."""

    def __init__(self, observation_space, action_space):
        super().__init__()
        size = ObservationLayout(observation_space).shape[0]
        self.weight = nn.Parameter(10.0 ** torch.arange(size, dtype=torch.float32).neg())
        self.distribution = Scripted(action_space)

    def forward(self, obs):
        return obs, obs @ self.weight


class Scripted:
    noise_size = gumbel_size = 1

    def __init__(self, action_space):
        self.space = action_space

    def mode(self, head):
        total = head.sum(-1)
        if isinstance(self.space, spaces.Discrete):
            return (total * 4).round().long() % int(self.space.n)
        return (total[:, None] * 4).repeat(1, self.space.shape[0])

    def sample(self, head, noise):
        return self.mode(head)

    def logp(self, head, action):
        return -head.sum(-1)


@pytest.fixture
def walk():
    return Walk


@pytest.fixture
def numbered_walks():
    """A function that returns a factory of Walks numbered from 0 in the order they are made."""

    def factory():
        numbers = itertools.count()
        return lambda: Walk(next(numbers))

    return factory


@pytest.fixture
def count():
    return Count


@pytest.fixture
def scripted_policy():
    return ScriptedPolicy


@pytest.fixture
def make_runner():
    """A function that returns an EnvRunner with weights loaded, by default with the scripted policy."""
    from rlx.rollout.env_runner import EnvRunner

    def make(env, num_envs, build_policy=ScriptedPolicy, **options):
        runner = EnvRunner(env, num_envs, build_policy, **options)
        runner.set_weights(7, runner._parameters.numpy().copy())
        return runner

    return make


@pytest.fixture(scope="module")
def local():
    """The runtime of all tests of a file that need processes; env runners have imported what they need."""
    with actors.runtime("local", preload=("numpy", "torch", "rlx.rollout.env_runner")) as runtime:
        yield runtime
