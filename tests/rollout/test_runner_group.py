import os
import signal
import time

import numpy as np
import pytest

from rlx import actors
from rlx.errors import ActorDied, CallTimeout, CheckpointError, EnvError
from rlx.nets.flat import FlatParameters
from rlx.nets.policy import build_policy
from rlx.rollout.env_runner import EnvRunner
from rlx.rollout.normalizers import RewardScaler, RunningMoments
from rlx.rollout.runner_group import RunnerGroup
from rlx.rollout.spaces import encoded_observation_space

OPTIONS = {"seed": 4, "gamma": 0.9, "normalize_obs": True, "normalize_reward": True}


@pytest.fixture(params=["inline", "local"])
def runtime(request):
    with actors.runtime(request.param) as runtime:
        yield runtime


@pytest.fixture(scope="module")
def weights():
    observation_space, action_space = EnvRunner("CartPole-v1", 1, build_policy).spaces()
    policy = build_policy(encoded_observation_space(observation_space), action_space, seed=1)
    return FlatParameters(policy).numpy().copy()


def make_group(num_runners, runtime=None, env="CartPole-v1", **options):
    return RunnerGroup(
        *(env, build_policy),
        num_runners=num_runners,
        num_envs=2,
        runtime=None if runtime is None else lambda: runtime,
        **(OPTIONS | options),
    )


def assert_same_sample(a, b):
    for name, array in vars(b.trajectory).items():
        np.testing.assert_array_equal(getattr(a.trajectory, name), array, err_msg=name)
    assert a.episodes == b.episodes


def test_runners_are_joined_in_order_and_merge_their_statistics(runtime, weights):
    """The oracle is two plain runners whose moments are merged by hand and sent with the next weights."""
    group = make_group(2, runtime)
    runners = [EnvRunner("CartPole-v1", 2, build_policy, first_env_index=i * 2, **OPTIONS) for i in range(2)]
    obs, returns = RunningMoments(), RunningMoments()
    for version in range(3):
        group.publish(version, weights)
        state = {"obs": obs.get_state() if version else None, "returns": None}
        for runner in runners:
            runner.set_weights(version, weights, state)
        sample, parts = group.sample(20), [runner.sample(20) for runner in runners]
        for part in parts:
            obs.merge(part.obs_moments)
            returns.merge(part.return_moments)
        for name, array in vars(sample.trajectory).items():
            expected = np.concatenate([getattr(part.trajectory, name) for part in parts], axis=1)
            if name == "reward":
                expected = RewardScaler(returns, 10.0)(expected)
            np.testing.assert_array_equal(array, expected, err_msg=name)
        assert sample.episodes == parts[0].episodes + parts[1].episodes
        assert (sample.trajectory.weights_version == version).all()
        assert sample.wait_s >= 0 and sample.transfer_s > 0
    assert obs.get_state()["m2"].tolist() == group.normalizer_state()["obs"]["m2"].tolist()
    group.close()


def test_no_runners_collect_in_this_process_what_one_runner_collects(runtime, weights):
    here, there = make_group(0), make_group(1, runtime)
    for version in range(2):
        here.publish(version, weights)
        there.publish(version, weights)
        assert_same_sample(there.sample(15), here.sample(15))
    assert here.spaces() == there.spaces() and here.policy_spaces() == there.policy_spaces()
    there.close()


def test_a_group_continues_exactly_from_its_state(runtime, weights):
    straight = make_group(2, runtime)
    for version in range(2):
        straight.publish(version, weights)
        straight.sample(10)
    state = straight.get_state()
    straight.publish(2, weights)
    expected = straight.sample(10)
    straight.close()
    resumed = make_group(2, runtime)
    resumed.set_state(state)
    resumed.publish(2, weights)
    assert_same_sample(resumed.sample(10), expected)
    assert resumed.normalizer_state()["obs"]["count"] == straight.normalizer_state()["obs"]["count"]
    resumed.close()
    with pytest.raises(CheckpointError, match="holds 2 env runners and this group has 1"):
        make_group(0).set_state(state)


def test_an_error_in_one_runner_names_it_and_ends_no_other(runtime, weights):
    with pytest.raises(EnvError, match="NoSuchEnv") as caught:
        make_group(2, runtime, env="NoSuchEnv-v0")
    assert "spaces() failed in 2 of 2 actors: env_runner/0, env_runner/1" in "\n".join(caught.value.__notes__)
    group = make_group(2, runtime)
    group.publish(0, weights[:-1])
    with pytest.raises(Exception, match="size") as caught:
        group.sample(3)
    assert "sample() failed in 2 of 2 actors: env_runner/0, env_runner/1" in "\n".join(caught.value.__notes__)
    group.publish(1, weights)
    assert group.sample(3).env_steps == 12
    group.close()


def slow_cartpole():
    import gymnasium

    class Slow(gymnasium.Wrapper):
        def step(self, action):
            time.sleep(30)
            return super().step(action)

    return Slow(gymnasium.make("CartPole-v1"))


def test_a_late_runner_is_named_within_the_deadline(weights):
    with actors.runtime("local") as runtime:
        group = make_group(1, runtime, env=slow_cartpole, sample_timeout_s=0.3)
        group.publish(0, weights)
        started = time.monotonic()
        with pytest.raises(CallTimeout, match=r"env_runner/0\.sample\(\) has not answered within 0.3 s"):
            group.sample(1)
        assert time.monotonic() - started < 3


def test_a_killed_runner_is_reported_at_the_next_sample(weights):
    with actors.runtime("local") as runtime:
        group = make_group(2, runtime)
        group.publish(0, weights)
        group.sample(2)
        os.kill(runtime.state()["env_runner/1"].pid, signal.SIGKILL)
        with pytest.raises(ActorDied, match="env_runner/1"):
            group.sample(2)
        group.close()


def test_advice_is_given_when_runners_take_longer_than_their_work(weights):
    """Fragments of one CartPole step cost far less than the way to another process and back."""
    with actors.runtime("local") as runtime:
        group = make_group(1, runtime)
        assert group.advice() is None
        for _ in range(6):
            group.publish(0, weights)
            group.sample(1)
        assert "num_env_runners=0" in str(group.advice())
    assert make_group(0).advice() is None
