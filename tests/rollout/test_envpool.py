"""EnvPool behind the door for any VectorEnv: its episodes follow gymnasium's rules, and rlx's accounts fit."""

import gymnasium
import numpy as np
import pytest

from rlx.errors import ConfigError, EnvError
from rlx.nets.policy import build_policy
from rlx.rollout.env_runner import EnvRunner
from rlx.rollout.vector import make_envs

pytest.importorskip("envpool")
POOL = "rlx.envs.envpool:EnvPool"


def cartpole_runner(**options):
    runner = EnvRunner(POOL, 3, build_policy, kwargs={"task": "CartPole-v1", **options}, seed=4)
    runner.set_weights(0, runner._parameters.numpy().copy())
    return runner


def test_its_rows_are_transitions_of_gymnasiums_cartpole_and_resets_are_masked():
    """Every unmasked row is one step of gymnasium's own environment from that row's observation."""
    t = cartpole_runner(max_episode_steps=15).sample(60).trajectory
    env = gymnasium.make("CartPole-v1", disable_env_checker=True).unwrapped
    env.reset(seed=0)
    begins = np.ones(3, bool)
    for row in range(59):
        done = t.terminated[row] | t.truncated[row]
        for i in range(3):
            if begins[i]:
                assert (abs(t.obs[row, i]) <= 0.05).all()
            if not t.mask[row, i]:
                assert not done[i] and (abs(t.obs[row + 1, i]) <= 0.05).all()
                continue
            env.state, env.steps_beyond_terminated = t.obs[row, i].astype(float), None
            obs, _, terminated, _, _ = env.step(int(t.action[row, i]))
            np.testing.assert_allclose(t.obs[row + 1, i], obs, rtol=1e-4, atol=1e-5)
            assert t.terminated[row, i] == terminated
        begins = ~t.mask[row]
        np.testing.assert_array_equal(t.mask[row + 1], ~done)
    assert t.terminated.any() and t.truncated.any() and (~t.mask).sum() > 9


def test_episodes_have_the_lengths_of_their_rows():
    """CartPole gives 1 a step, so that return and length are equal, and none is longer than the limit."""
    sample = cartpole_runner(max_episode_steps=15).sample(100)
    assert len(sample.episodes) > 9
    assert all(return_ == length <= 15 for return_, length in sample.episodes)
    assert sample.env_steps == sample.trajectory.mask.sum() < 300


def test_the_runners_seed_decides_and_pools_of_other_runners_differ():
    first, again, other = (
        make_envs(POOL, 2, kwargs={"task": "Pendulum-v1"}, seed=seed).reset().copy() for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other) and not np.array_equal(first[0], first[1])


def test_what_it_cannot_do_is_one_sentence():
    with pytest.raises(EnvError, match=r"EnvPool has no task 'NoSuch-v0'; envpool.list_all_envs\(\)"):
        make_envs(POOL, 2, kwargs={"task": "NoSuch-v0"})
    with pytest.raises(ConfigError, match="batch_size is not for rlx"):
        make_envs(POOL, 2, kwargs={"task": "CartPole-v1", "batch_size": 1})
