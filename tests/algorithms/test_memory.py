"""PPO with a memory: it learns what needs one, and is as exact as PPO without."""

import gymnasium
import numpy as np
import pytest
import torch

import rlx
from rlx.algorithms.appo import APPOConfig
from rlx.algorithms.impala import IMPALAConfig
from rlx.algorithms.ppo import PPO, PPOConfig, PPOTraining
from rlx.envs.masked_cartpole import MaskedCartPole
from rlx.envs.recall import Recall
from rlx.envs.switchboard import Switchboard
from rlx.errors import ConfigError, EnvError


class ProbeConfig(PPOConfig, training=PPOTraining):
    """PPO's settings."""


class Probe(PPO, config=ProbeConfig):
    """PPO that keeps every minibatch with the new log-probabilities that its loss sees."""

    seen: list = []  # noqa: RUF012 - the loss is static

    @staticmethod
    def loss(policy, minibatch, coefficients, training):
        Probe.seen.append((minibatch, policy.evaluate(minibatch)[0].detach().clone()))
        return PPO.loss(policy, minibatch, coefficients, training)


def config(environment=Recall, memory="lstm", kind=PPOConfig, **training):
    made = kind().environment(environment).env_runners(num_envs_per_env_runner=16, rollout_fragment_length=32)
    made.model(memory=memory, memory_size=16, hidden=[16], sequence_length=16, share_encoder=True)
    return made.training(**{"lr": 1e-2, "epochs": 4, "minibatch_size": 128} | training)


def test_one_observation_without_velocities_is_position_and_angle():
    env, whole = MaskedCartPole(), gymnasium.make("CartPole-v1")
    obs, _ = env.reset(seed=3)
    expected, _ = whole.reset(seed=3)
    np.testing.assert_array_equal(obs, expected[[0, 2]])
    assert env.observation_space.contains(obs) and env.observation_space.contains(env.step(1)[0])


def test_recall_asks_for_what_it_showed():
    env = Recall(delay=2)
    for seed in range(6):
        first, _ = env.reset(seed=seed)
        shown = [first, *(env.step(0)[0] for _ in range(3))]
        np.testing.assert_array_equal(np.array(shown)[1:], [[0, 0], [0, 0], [0, 1]])
        answer = int(first[0] > 0) if seed % 2 else int(first[0] < 0)
        assert env.step(answer)[1:4] == (float(seed % 2), True, False)


def solve(algorithm, env_steps):
    while algorithm.env_steps < env_steps and (algorithm.train()["episode_return_mean"] or 0) < 0.98:
        pass
    assert algorithm.evaluate(50)["evaluation/episode_return_mean"] == 1


@pytest.mark.parametrize("memory", ["lstm", pytest.param("gru", marks=pytest.mark.slow)])
def test_a_policy_with_a_memory_answers_the_question(memory):
    with config(memory=memory).build() as algorithm:
        solve(algorithm, 15_000)


@pytest.mark.parametrize(
    ("kind", "options", "env_steps"),
    [
        pytest.param(IMPALAConfig, {}, 60_000, marks=pytest.mark.slow),
        (APPOConfig, {"epochs": 2, "minibatch_size": 128}, 40_000),
    ],
)
@pytest.mark.parametrize("num_env_runners", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_the_asynchronous_algorithms_learn_to_remember_too(kind, options, env_steps, num_env_runners):
    """In step with their runners, one update behind, so that the outcome is always the same."""
    made = kind().environment(Recall).training(lr=1e-2, updates_per_iteration=4, max_age=1, **options)
    made.model(memory="lstm", memory_size=16, hidden=[16], share_encoder=True)
    made.env_runners(num_env_runners=num_env_runners, num_envs_per_env_runner=16, rollout_fragment_length=32)
    with made.build() as algorithm:
        solve(algorithm, env_steps * max(1, num_env_runners))


def test_a_policy_without_a_memory_can_only_guess():
    with config(memory="none").build() as algorithm:
        for _ in range(30):
            metrics = algorithm.train()
        assert 0.3 < metrics["episode_return_mean"] < 0.7


@pytest.mark.parametrize("vectorization", ["in_place", "native"])
def test_the_ratio_of_every_minibatch_is_one_before_the_first_step(vectorization):
    """C11, with a learning rate of 0, so before any step; the native CartPole resets on the next step."""
    Probe.seen.clear()
    made = config("CartPole-v1", kind=ProbeConfig, lr=0.0, epochs=1).model(share_encoder=False, sequence_length=13)
    with made.environment(vectorization=vectorization, normalize_obs=True).build() as algorithm:
        for _ in range(3):
            metrics = algorithm.train()
            assert metrics["learner/kl"] == pytest.approx(0, abs=1e-6)
    # 32 steps as three sequences of 11, the last of 10, for each of 16 environments: 12 of them are 132 samples.
    assert [tuple(minibatch.mask.shape) for minibatch, _ in Probe.seen[:5]] == [(11, 11)] * 4 + [(4, 11)]
    inner_resets = 0
    for minibatch, new_logp in Probe.seen:
        inner_resets += (minibatch.first[:, 1:] & minibatch.mask[:, 1:]).sum().item()
        ratio = (new_logp - minibatch.logp)[minibatch.mask].exp()
        torch.testing.assert_close(ratio, torch.ones_like(ratio), rtol=0, atol=1e-5)
    assert inner_resets > 20
    assert sum(minibatch.mask.sum().item() for minibatch, _ in Probe.seen) == metrics["env_steps"]


def test_a_memory_stands_between_any_observation_and_any_action():
    """Image, numbers and action mask; an index and a number; 10 steps as three sequences of 4, padded with zeros."""
    Probe.seen.clear()
    made = config(Switchboard, kind=ProbeConfig, lr=0.0, epochs=1, minibatch_size=64).model(sequence_length=4)
    made.environment(kwargs={"length": 7}).env_runners(rollout_fragment_length=10, num_envs_per_env_runner=8)
    with made.build() as algorithm:
        for _ in range(2):
            assert algorithm.train()["learner/kl"] == pytest.approx(0, abs=1e-6)
    masks = torch.cat([minibatch.mask for minibatch, _ in Probe.seen])
    assert masks.shape == (2 * 3 * 8, 4) and (~masks[:, :2]).sum() == 0 and (~masks[:, 2:]).sum() == 2 * 2 * 8
    for minibatch, new_logp in Probe.seen:
        assert new_logp.isfinite().all(), "also where an observation of zeros forbids every action"
        torch.testing.assert_close(new_logp[minibatch.mask], minibatch.logp[minibatch.mask], rtol=1e-5, atol=1e-5)


def test_a_run_with_a_memory_goes_on_from_its_checkpoint_as_if_never_interrupted(tmp_path):
    """Between two fragments, in the middle of episodes, with statistics of observations."""
    made = config(MaskedCartPole).environment(normalize_obs=True)

    def rows(algorithm, count):
        every = [algorithm.train() for _ in range(count)]
        return [
            {name: value for name, value in row.items() if "time" not in name and "per_s" not in name} for row in every
        ]

    with made.build() as straight, made.build() as first, made.build() as resumed:
        expected = rows(straight, 4)
        assert rows(first, 2) == expected[:2]
        first.save(tmp_path / "checkpoint")
        resumed.restore(tmp_path / "checkpoint")
        assert rows(resumed, 2) == expected[2:]
        np.testing.assert_array_equal(resumed.learners.weights(), straight.learners.weights())


def test_two_learners_make_the_steps_of_one():
    weights = []
    for num_learners in (0, 2):
        with config(MaskedCartPole, lr=1e-3).learners(num_learners=num_learners).build() as algorithm:
            algorithm.train()
            weights.append(algorithm.learners.weights())
    np.testing.assert_allclose(weights[1], weights[0], rtol=0, atol=2e-5)


def test_a_loaded_policy_remembers_until_it_is_reset(tmp_path):
    with config().build() as algorithm:
        for _ in range(16):
            algorithm.train()
        algorithm.save(tmp_path / "checkpoint")
    policy, env = rlx.load_policy(tmp_path / "checkpoint"), Recall()
    assert policy.evaluate(20)["evaluation/episode_return_mean"] == 1
    for seed in range(6):
        obs, _ = env.reset(seed=seed)
        policy.reset()
        ended = False
        while not ended:
            obs, reward, ended, _, _ = env.step(policy.act(obs))
        assert reward == 1, "the question alone does not tell the answer"


def test_a_batch_of_observations_is_of_episodes_side_by_side(tmp_path):
    with config().build() as algorithm:
        algorithm.save(tmp_path / "checkpoint")
    policy = rlx.load_policy(tmp_path / "checkpoint")
    assert policy.state is None
    policy.act(np.ones((2, 2), np.float32))
    after_one = policy.state
    policy.act(np.ones((2, 2), np.float32), deterministic=False)
    after_two = policy.state
    policy.reset(np.array([False, True]))
    assert not policy.state[1].any() and np.array_equal(policy.state[0], after_two[0])
    policy.act(np.ones((2, 2), np.float32))
    np.testing.assert_array_equal(policy.state[1], after_one[1])
    policy.state = after_one
    policy.act(np.ones((2, 2), np.float32))
    np.testing.assert_array_equal(policy.state, after_two)
    with pytest.raises(EnvError, match=r"remembers 2 environments and was given observations of 1; call reset\(\)"):
        policy.act(np.ones(2, np.float32))
    policy.reset()
    policy.act(np.ones(2, np.float32))
    assert policy.state.shape == (1, 32)


def test_minibatches_too_small_for_sequences_are_refused():
    with pytest.raises(
        ConfigError, match=r"minibatch_size=8 is less than a sequence of 16 steps; set it to 16 or more"
    ):
        config(minibatch_size=8).build()
    with pytest.raises(ConfigError, match=r"without a sequence of 16 steps of a minibatch of 40; set it to 2 or less"):
        config(minibatch_size=40).learners(num_learners=3).build()
