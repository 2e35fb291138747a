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
PARTS = spaces.MultiDiscrete([2, 4, 1])
ACTIONS = [DISCRETE, BOX, PARTS]
STEPS, ENVS = 7, 5


def observations(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((STEPS, ENVS, 6), dtype=np.float32)


def moved_policy(action_space: spaces.Space, observation_space: spaces.Space = VECTOR, **options) -> Policy:
    """Return a policy some way from its start, so that actions have different probabilities."""
    policy = build_policy(observation_space, action_space, **options)
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
@pytest.mark.parametrize("action_space", ACTIONS)
def test_the_numpy_twin_computes_the_torch_forward_pass(activation, hidden, share_encoder, action_space):
    policy = moved_policy(action_space, activation=activation, hidden=hidden, share_encoder=share_encoder)
    assert_same_forward(twin_of(policy), policy)


@pytest.mark.parametrize("action_space", ACTIONS)
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


@pytest.mark.parametrize("action_space", ACTIONS)
@pytest.mark.parametrize("share_encoder", [False, True])
def test_acting_in_numpy_and_in_torch_agree_on_actions_logp_and_values(action_space, share_encoder):
    policy, obs = moved_policy(action_space, share_encoder=share_encoder), observations()
    in_numpy = rollout(NumpyActing(twin_of(policy)), obs)
    in_torch = rollout(TorchActing(policy), obs)
    for numpy_result, torch_result in zip(in_numpy, in_torch, strict=True):
        assert numpy_result.dtype == torch_result.dtype and numpy_result.shape == torch_result.shape
        np.testing.assert_allclose(numpy_result, torch_result, rtol=1e-5, atol=1e-5)
    assert in_numpy[0].dtype == (np.float32 if action_space is BOX else np.int64)
    assert len(np.unique(in_numpy[0])) > 1


@pytest.mark.parametrize("action_space", ACTIONS)
@pytest.mark.parametrize("way", [TorchActing, lambda policy: NumpyActing(twin_of(policy))])
def test_the_first_ratio_of_an_update_is_one(action_space, way):
    policy, obs = moved_policy(action_space), observations()
    action, logp, value = rollout(way(policy), obs)
    with torch.inference_mode():
        new_logp, _, new_value = policy.evaluate(Batch(obs=torch.from_numpy(obs), action=torch.from_numpy(action)))
    ratio = (new_logp - torch.from_numpy(logp)).exp()
    torch.testing.assert_close(ratio, torch.ones(STEPS, ENVS), rtol=0, atol=1e-5)
    np.testing.assert_allclose(value, new_value.numpy(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("action_space", ACTIONS)
@pytest.mark.parametrize("way", [TorchActing, lambda policy: NumpyActing(twin_of(policy))])
def test_the_generator_s_seed_fixes_every_action(action_space, way):
    acting, obs = way(moved_policy(action_space)), observations()
    first, again, other = (rollout(acting, obs, seed)[0] for seed in (3, 3, 4))
    assert np.array_equal(first, again) and not np.array_equal(first, other)


@pytest.mark.parametrize("action_space", ACTIONS)
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


def masked_case(action_space: spaces.Space, choices: int) -> tuple[Policy, np.ndarray]:
    """Return a policy with a mask, and observations of which about half of the choices are illegal."""
    policy = moved_policy(action_space, spaces.Dict({"action_mask": spaces.MultiBinary(choices), "x": VECTOR}))
    legal = np.random.default_rng(5).random((STEPS, ENVS, choices)) < 0.5
    legal[..., [0, 2, -1]] = True  # of Discrete(3) two, of each of the parts at least one
    return policy, np.concatenate([observations(), legal.astype(np.float32)], -1)


@pytest.mark.parametrize(("action_space", "choices"), [(DISCRETE, 3), (PARTS, 7)])
def test_with_a_mask_numpy_and_torch_agree_and_no_illegal_choice_is_taken(action_space, choices):
    policy, obs = masked_case(action_space, choices)
    in_numpy, in_torch = NumpyActing(twin_of(policy)), TorchActing(policy)
    for seed in range(20):
        action, *rest = rollout(in_numpy, obs, seed)
        for numpy_result, torch_result in zip((action, *rest), rollout(in_torch, obs, seed), strict=True):
            np.testing.assert_allclose(numpy_result, torch_result, rtol=1e-5, atol=1e-5)
        assert is_legal(action, obs, action_space).all()
    assert is_legal(in_numpy.best(obs[0]), obs[0], action_space).all()
    np.testing.assert_array_equal(in_numpy.best(obs[0]), in_torch.best(obs[0]))


def is_legal(action: np.ndarray, obs: np.ndarray, action_space: spaces.Space) -> np.ndarray:
    sizes = [3] if action_space is DISCRETE else [2, 4, 1]
    columns = action.reshape(*obs.shape[:-1], len(sizes)) + np.cumsum([0, *sizes[:-1]])
    return np.take_along_axis(obs[..., 6:], columns, -1) == 1


@pytest.mark.parametrize("case", [(PARTS, 0), (DISCRETE, 3), (PARTS, 7)])
@pytest.mark.parametrize("share_encoder", [False, True])
def test_the_numpy_gradient_of_choices_in_parts_and_masked_ones_is_autograd_s(case, share_encoder):
    action_space, choices = case
    policy, obs = masked_case(action_space, choices) if choices else (moved_policy(action_space), observations())
    if share_encoder:
        policy.value_encoder = None
    action = rollout(TorchActing(policy), obs)[0]
    rng = np.random.default_rng(2)
    weights = [rng.standard_normal((STEPS * ENVS,), dtype=np.float32) for _ in range(3)]
    batch = Batch(obs=torch.from_numpy(obs), action=torch.from_numpy(action)).flatten("obs", "action")
    total = sum((out * torch.from_numpy(w)).sum() for out, w in zip(policy.evaluate(batch), weights, strict=True))
    expected = torch.autograd.grad(total, list(policy.parameters()))
    gradients = {parameter: np.zeros(parameter.shape, np.float32) for parameter in policy.parameters()}
    twin = NumpyPolicy.of(policy, gradients)
    assert twin is not None
    for array, tensor in zip(twin.evaluate(batch.map(torch.Tensor.numpy)), policy.evaluate(batch), strict=True):
        np.testing.assert_allclose(array, tensor.detach(), rtol=1e-5, atol=1e-5)
    twin.backward(*weights)
    for parameter, gradient in zip(policy.parameters(), expected, strict=True):
        np.testing.assert_allclose(gradients[parameter], gradient, rtol=1e-4, atol=1e-5)


def test_integers_beside_floats_act_in_torch():
    space = spaces.Tuple([spaces.Discrete(3), spaces.Box(-1, 1, (2,)), spaces.MultiBinary(2)])
    policy = moved_policy(space)
    assert NumpyPolicy.of(policy) is None
    action, logp, _ = rollout(acting_for(policy), observations())
    assert action.shape == (STEPS, ENVS, 5) and action.dtype == np.float32
    assert (action[..., :3] == action[..., :3].round()).all() and set(np.unique(action[..., 0])) == {0, 1, 2}
    batch = Batch(obs=torch.from_numpy(observations()), action=torch.from_numpy(action))
    np.testing.assert_allclose(policy.evaluate(batch)[0].detach(), logp, rtol=1e-5, atol=1e-5)
