"""Networks of a user's own: found by name, given the observation's structure, checked when they are made."""

import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import nn

from rlx.algorithms.ppo import PPOConfig
from rlx.envs.corridor import Corridor
from rlx.envs.switchboard import Switchboard
from rlx.errors import ConfigError
from rlx.inference import load_policy
from rlx.nets.policy import build_policy

VECTOR, DISCRETE = spaces.Box(-1, 1, (3,), np.float32), spaces.Discrete(2)


class Reader(nn.Module):
    """An encoder of the switchboard's observations, by their names."""

    def __init__(self, observation_space, action_space, width=8):
        super().__init__()
        assert list(observation_space.keys()) == ["action_mask", "screen", "target"]
        assert isinstance(action_space, spaces.Tuple)
        self.features_size = width
        self.screen, self.target = nn.Linear(64, width), nn.Linear(1, width)

    def forward(self, obs):
        assert obs.keys() == {"screen", "target"} and obs["screen"].dtype == torch.uint8
        return self.screen(obs["screen"].flatten(1) / 255).relu() * self.target(obs["target"])


class Whole(nn.Module):
    """A whole policy: of Discrete observations, one-hot."""

    def __init__(self, observation_space, action_space, scale=1.0):
        super().__init__()
        self.head, self.scale = nn.Linear(int(observation_space.n), int(action_space.n) + 1), scale

    def forward(self, obs):
        out = self.head(obs) * self.scale
        return out[:, :-1], out[:, -1]


class Returns(nn.Module):
    """Returns what it was told to."""

    def __init__(self, observation_space, action_space, made=None, size=None, norm=False):
        super().__init__()
        self.weight, self.made = nn.Parameter(torch.zeros(1)), made
        if norm:
            self.norm = nn.BatchNorm1d(3)
        if size is not None:
            self.features_size = size

    def forward(self, obs):
        return self.made


def here(name):
    return f"{__name__}:{name}"


def test_an_encoder_gets_the_observation_by_its_names():
    env = Switchboard()
    policy = build_policy(env.observation_space, env.action_space, custom=Reader, custom_kwargs={"width": 5}, seed=3)
    assert policy.action_head.in_features == 5 and policy.value_encoder is None  # shared, as there is an image
    twin = build_policy(env.observation_space, env.action_space, custom=Reader, custom_kwargs={"width": 5}, seed=3)
    for parameter, other in zip(policy.parameters(), twin.parameters(), strict=True):
        assert torch.equal(parameter, other)


def config(environment, **model):
    made = PPOConfig().environment(environment).model(**model).reporting(progress="none")
    made.env_runners(num_envs_per_env_runner=4, rollout_fragment_length=32).runtime(engine="inline")
    return made.training(epochs=2, minibatch_size=32, lr=0.01)


@pytest.mark.parametrize(
    ("environment", "custom", "kwargs"),
    [(Switchboard, Reader, {"width": 6}), (Corridor, Whole, {"scale": 2.0}), (Switchboard, here("Reader"), {})],
)
def test_a_network_of_one_s_own_trains_is_saved_and_acts_again(environment, custom, kwargs, tmp_path):
    with config(environment, custom=custom, custom_kwargs=kwargs).build() as algorithm:
        before = algorithm.learners.weights()
        for _ in range(2):
            metrics = algorithm.train()
        assert np.isfinite(metrics["learner/loss"]) and not np.array_equal(before, algorithm.learners.weights())
        saved = algorithm.save(tmp_path / "saved")
        expected = algorithm.evaluate(3)
        written = PPOConfig.from_yaml(algorithm.config.to_yaml()).settings.model.custom
        assert written == (custom if isinstance(custom, str) else here(custom.__name__))
    assert load_policy(saved).evaluate(3) == expected


def test_a_whole_policy_of_one_s_own_learns():
    with config(Corridor, custom=Whole).build() as algorithm:
        for _ in range(15):
            metrics = algorithm.train()
        assert metrics["episode_return_mean"] > -25  # a random walk needs some 70 steps, the best is 8


def test_a_mask_is_obeyed_for_a_whole_policy_too():
    space = spaces.Dict({"action_mask": spaces.MultiBinary(2), "x": spaces.Discrete(3)})

    class Careless(Whole):
        def __init__(self, observation_space, action_space):
            super().__init__(observation_space["x"], action_space)

        def forward(self, obs):
            return super().forward(obs["x"])

    head, _ = build_policy(space, DISCRETE, custom=Careless)(torch.tensor([[1.0, 0, 0, 0, 1]]))
    assert head.softmax(-1).tolist() == [[0.0, 1.0]]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            {"made": torch.zeros(2, 3), "size": 4},
            r"returned \(2, 3\) for 2 observations, not \(2, 4\); return features",
        ),
        ({"made": None, "size": 4}, r"returned a NoneType for 2 observations"),
        (
            {"made": (torch.zeros(2, 2), torch.zeros(2, 1))},
            r"returned \[\(2, 2\), \(2, 1\)\] .* not \[\(2, 2\), \(2,\)\]",
        ),
        ({"made": torch.zeros(2, 3)}, r"returned \(2, 3\) .*; return \(head, value\), or set features_size"),
        ({"made": None, "norm": True}, r"has buffers \(norm.num_batches_tracked, norm.running_mean"),
    ],
)
def test_a_network_that_returns_something_else_is_refused_in_one_sentence(options, sentence):
    with pytest.raises(ConfigError, match=f"model.custom .*:Returns {sentence}"):
        build_policy(VECTOR, DISCRETE, custom=Returns, custom_kwargs=options)


def test_what_is_no_network_is_refused():
    with pytest.raises(ConfigError, match=r"model.custom .* made a int; it must make a torch.nn.Module"):
        build_policy(VECTOR, DISCRETE, custom=lambda *spaces: 3)
    for custom in ("no_such_package:Net", "rlx.nets.policy:Nett", "json"):
        with pytest.raises(ConfigError, match=rf"model.custom is \"{custom}\"; "):
            config("CartPole-v1", custom=custom).validate()
    with pytest.raises(ConfigError, match=r"Whole cannot be called .* {'size': 3}: got an unexpected keyword"):
        build_policy(VECTOR, DISCRETE, custom=Whole, custom_kwargs={"size": 3})
    with pytest.raises(ConfigError, match=r"model.memory=gru needs an encoder, and model.custom makes a whole policy"):
        build_policy(spaces.Discrete(3), DISCRETE, custom=Whole, memory="gru")
