"""Acting in numpy is acting in torch, and both match what the learner will compute."""

import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import nn

from rlx.nets.acting import NumpyActing, TorchActing, acting_for
from rlx.nets.distributions import Categorical
from rlx.nets.flat import FlatParameters
from rlx.nets.numpy_mlp import NumpyPolicy
from rlx.nets.policy import Policy, build_policy
from rlx.trajectory import Batch

VECTOR = spaces.Box(-1, 1, (6,), np.float32)
DISCRETE, BOX = spaces.Discrete(3), spaces.Box(-1, 1, (2,), np.float32)
STEPS, ENVS = 7, 5


def observations(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((STEPS, ENVS, 6), dtype=np.float32)


def moved_policy(action_space: spaces.Space, **options) -> Policy:
    """Return a policy some way from its start, so that actions have different probabilities."""
    policy = build_policy(VECTOR, action_space, **options)
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return policy


def twin_of(policy: Policy) -> NumpyPolicy:
    twin = NumpyPolicy.of(policy)
    assert twin is not None
    return twin


def assert_same_forward(twin: NumpyPolicy, policy: Policy) -> None:
    obs = observations()[0]
    with torch.inference_mode():
        head, value = policy(torch.from_numpy(obs))
    np.testing.assert_allclose(twin.head(obs), head.numpy(), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(twin.value(obs), value.numpy(), rtol=1e-5, atol=1e-5)


def rollout(acting: NumpyActing | TorchActing, obs: np.ndarray, seed: int = 0) -> tuple[np.ndarray, ...]:
    """Return actions, logp and values of one fragment."""
    acting.start(STEPS, ENVS, np.random.default_rng(seed))
    action = np.stack([acting.act(t, obs[t]) for t in range(STEPS)])
    return action, *acting.finish(obs, action)


@pytest.mark.parametrize("activation", ["tanh", "relu"])
@pytest.mark.parametrize("hidden", [(), (8,), (16, 8), (8, 8, 8)])
@pytest.mark.parametrize("share_encoder", [False, True])
@pytest.mark.parametrize("action_space", [DISCRETE, BOX])
def test_the_numpy_twin_computes_the_torch_forward_pass(activation, hidden, share_encoder, action_space):
    policy = moved_policy(action_space, activation=activation, hidden=hidden, share_encoder=share_encoder)
    assert_same_forward(twin_of(policy), policy)


@pytest.mark.parametrize("action_space", [DISCRETE, BOX])
def test_the_numpy_twin_sees_weights_loaded_into_the_flat_buffer(action_space):
    policy = moved_policy(action_space, hidden=(8, 8))
    flat = FlatParameters(policy)
    twin = twin_of(policy)
    flat.load(np.random.default_rng(1).standard_normal(len(flat.data), dtype=np.float32) / 3)
    assert_same_forward(twin, policy)
    if action_space is BOX:
        log_std = policy.get_parameter("distribution.log_std")
        np.testing.assert_allclose(twin.std(), log_std.detach().exp().numpy(), rtol=1e-6)


class OtherForward(Policy):
    """A policy that numpy cannot know."""

    def forward(self, obs):
        head, value = super().forward(obs)
        return 2 * head, value


class OtherLinear(nn.Linear):
    """A layer that numpy cannot know."""

    def forward(self, input):
        return super().forward(input) ** 2


def with_encoder(*modules: nn.Module) -> Policy:
    return Policy(nn.Sequential(*modules), nn.Linear(4, 3), None, nn.Linear(4, 1), Categorical(3))


@pytest.mark.parametrize(
    "policy",
    [
        build_policy(VECTOR, DISCRETE, activation="gelu"),
        build_policy(VECTOR, DISCRETE, hidden=(300, 300)),
        build_policy(spaces.Box(0, 255, (9, 9, 3), np.uint8), DISCRETE),
        build_policy(spaces.Box(-1, 1, (3, 2), np.float32), DISCRETE),
        OtherForward(nn.Sequential(nn.Linear(6, 4)), nn.Linear(4, 3), None, nn.Linear(4, 1), Categorical(3)),
        with_encoder(nn.Linear(6, 4), nn.LayerNorm(4)),
        with_encoder(nn.Tanh(), nn.Linear(6, 4)),
        with_encoder(nn.Linear(6, 4), nn.Tanh(), nn.ReLU()),
        with_encoder(nn.Linear(6, 4, bias=False), nn.Tanh()),
        with_encoder(nn.Linear(6, 4), nn.Dropout(0.5)),
        with_encoder(OtherLinear(6, 4)),
    ],
)
def test_the_numpy_twin_declines_what_it_cannot_compute(policy):
    assert NumpyPolicy.of(policy) is None
    assert isinstance(acting_for(policy), TorchActing)


@pytest.mark.parametrize("action_space", [DISCRETE, BOX])
@pytest.mark.parametrize("share_encoder", [False, True])
def test_acting_in_numpy_and_in_torch_agree_on_actions_logp_and_values(action_space, share_encoder):
    policy, obs = moved_policy(action_space, share_encoder=share_encoder), observations()
    in_numpy = rollout(NumpyActing(twin_of(policy)), obs)
    in_torch = rollout(TorchActing(policy), obs)
    for numpy_result, torch_result in zip(in_numpy, in_torch, strict=True):
        assert numpy_result.dtype == torch_result.dtype and numpy_result.shape == torch_result.shape
        np.testing.assert_allclose(numpy_result, torch_result, rtol=1e-5, atol=1e-5)
    assert in_numpy[0].dtype == (np.int64 if action_space is DISCRETE else np.float32)
    assert len(np.unique(in_numpy[0])) > 1


@pytest.mark.parametrize("action_space", [DISCRETE, BOX])
@pytest.mark.parametrize("way", [TorchActing, lambda policy: NumpyActing(twin_of(policy))])
def test_the_first_ratio_of_an_update_is_one(action_space, way):
    policy, obs = moved_policy(action_space), observations()
    action, logp, value = rollout(way(policy), obs)
    with torch.inference_mode():
        new_logp, _, new_value = policy.evaluate(Batch(obs=torch.from_numpy(obs), action=torch.from_numpy(action)))
    ratio = (new_logp - torch.from_numpy(logp)).exp()
    torch.testing.assert_close(ratio, torch.ones(STEPS, ENVS), rtol=0, atol=1e-5)
    np.testing.assert_allclose(value, new_value.numpy(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("action_space", [DISCRETE, BOX])
@pytest.mark.parametrize("way", [TorchActing, lambda policy: NumpyActing(twin_of(policy))])
def test_the_generator_s_seed_fixes_every_action(action_space, way):
    acting, obs = way(moved_policy(action_space)), observations()
    first, again, other = (rollout(acting, obs, seed)[0] for seed in (3, 3, 4))
    assert np.array_equal(first, again) and not np.array_equal(first, other)


@pytest.mark.parametrize("action_space", [DISCRETE, BOX])
def test_the_best_action_and_the_value_are_the_same_in_both_ways(action_space):
    policy, obs = moved_policy(action_space), observations()[0]
    in_numpy, in_torch = NumpyActing(twin_of(policy)), TorchActing(policy)
    np.testing.assert_allclose(in_numpy.best(obs), in_torch.best(obs), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(in_numpy.value(obs), in_torch.value(obs), rtol=1e-5, atol=1e-5)


def test_a_policy_of_images_acts_in_torch():
    policy = build_policy(spaces.Box(0, 255, (9, 9, 3), np.uint8), DISCRETE)
    obs = np.random.default_rng(0).integers(0, 256, (STEPS, ENVS, 9, 9, 3), dtype=np.uint8)
    action, logp, value = rollout(TorchActing(policy), obs)
    assert action.shape == logp.shape == value.shape == (STEPS, ENVS)
    assert set(np.unique(action)) <= {0, 1, 2}
