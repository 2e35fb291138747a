"""A memory over sequences: resets exactly where an episode begins, whatever the way of computing it."""

import numpy as np
import pytest
import torch
from gymnasium import spaces

from rlx.nets.acting import RecurrentActing, acting_for
from rlx.nets.policy import RecurrentPolicy, build_policy
from rlx.nets.recurrent import Memory
from rlx.trajectory import Batch

VECTOR = spaces.Box(-1, 1, (3,), np.float32)
DISCRETE = spaces.Discrete(3)
BOX = spaces.Box(-1, 1, (2,), np.float32)
NOWHERE = torch.zeros(4, 6, dtype=torch.bool)


def memory(kind: str) -> Memory:
    made = Memory(kind, 3, 5, torch.Generator().manual_seed(0))
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "bias" in name:
                parameter += torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    return made


def looped(module: Memory, x: torch.Tensor, state: torch.Tensor, first: torch.Tensor) -> torch.Tensor:
    """Return what the memory should give, one step after the other."""
    outputs = []
    for t in range(x.shape[1]):
        y, state = module.step(x[:, t], torch.where(first[:, t, None], 0.0, state))
        outputs.append(y)
    return torch.stack(outputs, 1)


def some_first(seed: int) -> torch.Tensor:
    """Return flags with episodes that begin at the first, at the last and at successive steps of a sequence."""
    first = torch.rand(4, 6, generator=torch.Generator().manual_seed(seed)) < 0.3
    first[0], first[1, 0], first[1, 5], first[2, 2:4] = False, True, True, True
    return first


@pytest.mark.parametrize("kind", ["lstm", "gru"])
@pytest.mark.parametrize("first", [NOWHERE, ~NOWHERE, some_first(0), some_first(1)], ids=["no", "every", "a", "b"])
def test_pieces_side_by_side_equal_a_loop_over_the_steps(kind, first):
    module, generator = memory(kind), torch.Generator().manual_seed(2)
    x = torch.randn(4, 6, 3, generator=generator, requires_grad=True)
    state = torch.randn(4, module.state_size, generator=generator, requires_grad=True)
    weight = torch.randn(4, 6, 5, generator=generator)
    inputs = [x, state, *module.parameters()]
    results = [way(x, state, first) for way in (module, lambda *arguments: looped(module, *arguments))]
    gradients = [torch.autograd.grad((y * weight).sum(), inputs) for y in results]
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_nothing_passes_the_beginning_of_an_episode(kind):
    """What comes after step 2 depends neither on the state nor on the steps before; what comes before does."""
    module, first = memory(kind), NOWHERE.clone()
    first[:, 2] = True
    x, state = torch.randn(4, 6, 3, requires_grad=True), torch.randn(4, module.state_size, requires_grad=True)
    y = module(x, state, first)
    by_x, by_state = torch.autograd.grad(y[:, 2:].sum(), [x, state], retain_graph=True)
    assert not by_x[:, :2].any() and not by_state.any() and by_x[:, 2:].all()
    by_x, by_state = torch.autograd.grad(y[:, :2].sum(), [x, state])
    assert by_state.any() and by_x[:, :2].all() and not by_x[:, 2:].any()


def test_no_sequences_give_no_outputs():
    assert memory("lstm")(torch.zeros(0, 6, 3), torch.zeros(0, 10), NOWHERE[:0]).shape == (0, 6, 5)


def test_weights_start_orthogonal_and_biases_at_zero():
    module = Memory("lstm", 3, 5, torch.Generator().manual_seed(0))
    for name, parameter in module.named_parameters():
        if "bias" in name:
            assert not parameter.any()
        else:
            torch.testing.assert_close(parameter.T @ parameter, torch.eye(parameter.shape[1]), atol=1e-5, rtol=0)


def recurrent(action_space=DISCRETE, **options) -> RecurrentPolicy:
    """Return a policy whose actions and values depend on what it remembers."""
    policy = build_policy(VECTOR, action_space, hidden=(8,), memory="lstm", memory_size=5, **options)
    assert isinstance(policy, RecurrentPolicy)
    with torch.no_grad():
        policy.action_head.weight.mul_(200)
    return policy


@pytest.mark.parametrize("share_encoder", [False, True])
def test_the_value_function_has_a_memory_of_its_own_unless_the_encoder_is_shared(share_encoder):
    policy = recurrent(share_encoder=share_encoder)
    assert policy.state_size == (10 if share_encoder else 20)
    state = torch.ones(1, policy.state_size, requires_grad=True)
    head, value, after = policy.step(torch.ones(1, 3), state)
    by_head, by_value = (torch.autograd.grad(y.sum(), state, retain_graph=True)[0] for y in (head, value))
    assert after.shape == state.shape
    assert by_head[0, :10].all() and not by_head[0, 10:].any()
    assert bool(by_value[0, :10].any()) is share_encoder and (share_encoder or by_value[0, 10:].all())


def test_a_policy_without_a_past_acts_as_at_the_start_of_an_episode():
    policy, obs = recurrent(), torch.randn(2, 3)
    head, value = policy(obs)
    expected = policy.step(obs, torch.zeros(2, 20))
    assert torch.equal(head, expected[0]) and torch.equal(value, expected[1])


@pytest.mark.parametrize("memory", ["none", "gru"])
def test_building_a_policy_with_a_memory_neither_reads_nor_moves_torch_s_global_generator(memory):
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    first = build_policy(VECTOR, DISCRETE, memory=memory, seed=5)
    assert torch.equal(torch.rand(4), expected)
    for one, other in zip(
        first.parameters(), build_policy(VECTOR, DISCRETE, memory=memory, seed=5).parameters(), strict=True
    ):
        assert torch.equal(one, other)


# Acting ----------------------------------------------------------------------------------------------------------


STEPS, ENVS = 7, 3


def act_through(acting: RecurrentActing, first: np.ndarray, seed: int = 0):
    """Return obs, action, logp and value of a fragment in which episodes begin where `first` [T, B] says."""
    obs = np.random.default_rng(seed).standard_normal((STEPS, ENVS, 3), dtype=np.float32)
    acting.start(STEPS, ENVS, np.random.default_rng(seed))
    action = np.stack([(acting.forget(first[t]), acting.act(t, obs[t]))[1] for t in range(STEPS)])
    return obs, action, *acting.finish(obs, action)


@pytest.mark.parametrize("action_space", [DISCRETE, BOX])
@pytest.mark.parametrize("share_encoder", [False, True])
@pytest.mark.parametrize("sequence_length", [3, 7, 9])
def test_the_first_ratio_of_a_fragment_s_sequences_is_one(action_space, share_encoder, sequence_length):
    """Sequences begin with the state that was carried there, from fragment to fragment."""
    policy = recurrent(action_space, share_encoder=share_encoder, sequence_length=sequence_length)
    acting = acting_for(policy)
    assert isinstance(acting, RecurrentActing)
    for seed in (0, 1):
        first = np.random.default_rng(seed).random((STEPS, ENVS)) < 0.2
        obs, action, logp, value = act_through(acting, first, seed)
        state = acting.states()
        assert state.shape == (3 if sequence_length == 3 else 1, ENVS, policy.state_size)
        assert seed == 0 or state[0].any(), "the second fragment begins with what the first one left"
        fields = {"obs": obs, "action": action, "first": first, "state": state, "mask": np.ones((STEPS, ENVS), bool)}
        batch = Batch(**{name: torch.from_numpy(array) for name, array in fields.items()})
        sequences = batch.rows("obs", "action", "mask", logp=torch.from_numpy(logp), value=torch.from_numpy(value))
        with torch.inference_mode():
            new_logp, entropy, new_value = policy.evaluate(sequences)
        assert new_logp.shape == entropy.shape == new_value.shape == sequences.mask.shape
        ratio = (new_logp - sequences.logp).exp()[sequences.mask]
        torch.testing.assert_close(ratio, torch.ones(STEPS * ENVS), rtol=0, atol=1e-5)
        torch.testing.assert_close(new_value[sequences.mask], sequences.value[sequences.mask], rtol=1e-5, atol=1e-5)


def test_a_state_is_carried_and_emptied_where_an_episode_begins():
    """The same observation again: only the environment that forgot acts and values as at first."""
    policy, acting = recurrent(), RecurrentActing(recurrent())
    obs = np.ones((1, 2, 3), np.float32)
    acting.start(1, 2, np.random.default_rng(0))
    acting.act(0, obs[0])
    _, at_first = acting.finish(obs, np.zeros((1, 2), np.int64))
    acting.forget(np.array([True, False]))
    acting.start(1, 2, np.random.default_rng(0))
    acting.act(0, obs[0])
    _, later = acting.finish(obs, np.zeros((1, 2), np.int64))
    assert later[0, 0] == at_first[0, 0] and later[0, 1] != at_first[0, 1]
    with torch.inference_mode():
        state = policy.step(torch.ones(1, 3), torch.zeros(1, 20))[2]
        _, expected, _ = policy.step(torch.ones(1, 3), state)
    np.testing.assert_allclose(later[0, 1], expected[0], rtol=1e-5)


def test_the_value_of_what_followed_a_step_remembers_that_step():
    policy = recurrent()
    acting = RecurrentActing(policy)
    obs, _, _, _ = act_through(acting, np.zeros((STEPS, ENVS), bool))
    following = np.full((2, 3), 0.5, np.float32)
    values = acting.value(following, [(2, 1), (6, 0)])
    for value, (t, index) in zip(values, [(2, 1), (6, 0)], strict=True):
        state = torch.zeros(1, 20)
        with torch.inference_mode():
            for step in range(t + 1):
                _, _, state = policy.step(torch.from_numpy(obs[step, index : index + 1]), state)
            expected = policy.step(torch.full((1, 3), 0.5), state)[1]
        np.testing.assert_allclose(value, expected[0], rtol=1e-5, atol=1e-6)


def test_the_best_action_remembers_too():
    acting = RecurrentActing(recurrent(BOX))
    obs = np.ones((2, 3), np.float32)
    first, second = acting.best(obs), acting.best(obs)
    acting.forget(np.array([True, True]))
    assert not np.array_equal(first, second) and np.array_equal(acting.best(obs), first)
