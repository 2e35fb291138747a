"""Algorithms on an image beside numbers and a mask, with an action of two parts."""

import numpy as np
import pytest
from gymnasium.vector import AutoresetMode, SyncVectorEnv

import rlx
from rlx.algorithms.appo import APPOConfig
from rlx.algorithms.impala import IMPALAConfig
from rlx.algorithms.ppo import PPOConfig
from rlx.envs.switchboard import Switchboard
from rlx.errors import EnvError


def config(environment=Switchboard, num_envs=4, steps=16, **training):
    made = PPOConfig().environment(environment, normalize_obs=True, normalize_reward=True)
    made.env_runners(num_envs_per_env_runner=num_envs, rollout_fragment_length=steps).reporting(progress="none")
    return made.training(**{"epochs": 2, "minibatch_size": 32} | training)


def vector(mode):
    def make(num_envs):
        return SyncVectorEnv([Switchboard] * num_envs, autoreset_mode=mode)

    return make


def of_learning(metrics):
    watched = ("time/", "env_steps_per_s", "num_env_runners")
    return {name: value for name, value in metrics.items() if not name.startswith(watched)}


@pytest.mark.parametrize("environment", [Switchboard, *map(vector, AutoresetMode)])
def test_nested_spaces_train_in_every_way_of_stepping(environment):
    with config(environment).build() as algorithm:
        for _ in range(3):
            metrics = algorithm.train()
        assert np.isfinite(metrics["learner/loss"]) and metrics["episodes"] >= 12
        assert metrics["episode_length_mean"] == 8 and 0 < metrics["episode_return_mean"] < 16
        assert metrics["learner/entropy"] > 0


@pytest.mark.parametrize("made", [PPOConfig, IMPALAConfig, APPOConfig])
@pytest.mark.parametrize("memory", ["none", "gru"])
def test_every_algorithm_takes_nested_spaces_with_and_without_a_memory(made, memory):
    """Fragments of 16 steps and sequences of at most 5 leave padded steps, of which nothing is legal."""
    made = made().environment(Switchboard).env_runners(num_envs_per_env_runner=4, rollout_fragment_length=16)
    made.model(memory=memory, memory_size=8, sequence_length=5).reporting(progress="none").runtime(engine="inline")
    made.training(minibatch_size=32) if isinstance(made, PPOConfig) else made.training(updates_per_iteration=2)
    with made.build() as algorithm:
        for _ in range(2):
            metrics = algorithm.train()
        assert np.isfinite(metrics["learner/loss"]) and metrics["learner/grad_norm"] > 0
        assert np.isfinite(algorithm.learners.weights()).all()


def test_a_runner_in_another_process_collects_the_same():
    rows = []
    for num_env_runners in (0, 1):
        with config().env_runners(num_env_runners=num_env_runners).build() as algorithm:
            rows.append([of_learning(algorithm.train()) for _ in range(2)])
    assert rows[0] == rows[1]


def test_a_run_on_nested_spaces_resumes_exactly(tmp_path):
    with config().build() as straight, config().build() as broken:
        for _ in range(2):
            straight.train(), broken.train()
        broken.save(tmp_path / "saved")
        with config().build() as resumed:
            resumed.restore(tmp_path / "saved")
            for _ in range(2):
                assert of_learning(resumed.train()) == of_learning(straight.train())


@pytest.mark.slow
def test_ppo_learns_the_switchboard():
    """A random policy gets 6.7, the best one 16; without the screen, the target or the mask it stays below 13."""
    made = PPOConfig().environment(Switchboard).reporting(progress="none").model(log_std_init=-0.5, share_encoder=True)
    made.env_runners(num_envs_per_env_runner=16, rollout_fragment_length=32)
    made.training(lr=2e-3, gamma=0.0, lambda_=0.0, minibatch_size=128)
    with made.build() as algorithm:
        for _ in range(20):
            algorithm.train()
        assert algorithm.evaluate(20)["evaluation/episode_return_mean"] > 14.5


def test_a_trained_policy_takes_and_gives_what_the_environment_does(tmp_path):
    with config().build() as algorithm:
        algorithm.train()
        policy = rlx.load_policy(algorithm.save(tmp_path / "saved"))
        expected = algorithm.evaluate(5)
    assert policy.evaluate(5) == expected
    env = Switchboard()
    obs, _ = env.reset(seed=0)
    observations = []
    for step in range(8):
        observations.append(obs)
        action = policy.act(obs, deterministic=step % 2 == 0, rng=np.random.default_rng(step))
        assert env.action_space.contains(action)
        obs, *_ = env.step(action)  # raises where the mask is not obeyed
    batch = {key: np.stack([one[key] for one in observations]) for key in obs}
    switches, dials = policy.act(batch)
    alone = [policy.act(one) for one in observations]
    np.testing.assert_array_equal(switches, [switch for switch, _ in alone])
    np.testing.assert_allclose(dials, [dial for _, dial in alone], rtol=1e-4, atol=1e-5)
    for bad, sentence in (
        ({**obs, "action_mask": np.zeros(4, np.int8)}, "leaves no legal action"),
        ({**obs, "target": np.float32([np.nan])}, "is not finite"),
        ({**obs, "screen": np.zeros((7, 8, 1), np.uint8)}, r"not of Dict.*shape \(7, 8, 1\)"),
        ({"target": obs["target"]}, "is not of Dict"),
    ):
        with pytest.raises(EnvError, match=sentence):
            policy.act(bad)
