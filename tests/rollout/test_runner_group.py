import contextlib
import ctypes
import logging
import os
import signal
import threading
import time

import numpy as np
import pytest

from rlx import actors
from rlx.actors import Restart
from rlx.errors import ActorDied, CallTimeout, CheckpointError, EnvError
from rlx.nets.flat import FlatParameters
from rlx.nets.policy import build_policy
from rlx.rollout.env_runner import EnvRunner
from rlx.rollout.normalizers import RewardScaler, RunningMoments
from rlx.rollout.runner_group import RunnerGroup

OPTIONS = {"seed": 4, "gamma": 0.9, "normalize_obs": True, "normalize_reward": True}


@pytest.fixture(scope="module")
def inline():
    with actors.runtime("inline") as runtime:
        yield runtime


@pytest.fixture(params=["inline", "local"])
def runtime(request):
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def weights():
    observation_space, action_space = EnvRunner("CartPole-v1", 1, build_policy).spaces()
    policy = build_policy(observation_space, action_space, seed=1)
    return FlatParameters(policy).numpy().copy()


@pytest.fixture
def make_group():
    with contextlib.ExitStack() as stack:

        def make(num_runners, runtime=None, env="CartPole-v1", **options):
            group = RunnerGroup(
                *(env, build_policy),
                num_runners=num_runners,
                num_envs=2,
                runtime=None if runtime is None else lambda: runtime,
                **(OPTIONS | options),
            )
            return stack.enter_context(contextlib.closing(group))

        yield make


def assert_same_sample(a, b):
    for name, array in b.trajectory.arrays().items():
        np.testing.assert_array_equal(getattr(a.trajectory, name), array, err_msg=name)
    assert a.episodes == b.episodes


def test_runners_are_joined_in_order_and_merge_their_statistics(make_group, runtime, weights):
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
        for name, array in sample.trajectory.arrays().items():
            expected = np.concatenate([getattr(part.trajectory, name) for part in parts], axis=1)
            if name == "reward":
                expected = RewardScaler(returns, 10.0)(expected)
            np.testing.assert_array_equal(array, expected, err_msg=name)
        assert sample.episodes == parts[0].episodes + parts[1].episodes
        assert (sample.trajectory.weights_version == version).all()
        assert sample.wait_s >= 0 and sample.transfer_s > 0
    assert obs.get_state()["m2"].tolist() == group.normalizer_state()["obs"]["m2"].tolist()


def test_no_runners_collect_in_this_process_what_one_runner_collects(make_group, runtime, weights):
    here, there = make_group(0), make_group(1, runtime)
    for version in range(2):
        here.publish(version, weights)
        there.publish(version, weights)
        assert_same_sample(there.sample(15), here.sample(15))
    assert here.spaces() == there.spaces()
    there.close()


def test_a_group_continues_exactly_from_its_state(make_group, runtime, weights):
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


def test_an_error_in_one_runner_names_it_and_ends_no_other(make_group, runtime, weights):
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


def slow_cartpole():
    import gymnasium

    class Slow(gymnasium.Wrapper):
        def step(self, action):
            time.sleep(30)
            return super().step(action)

    return Slow(gymnasium.make("CartPole-v1"))


def test_a_late_runner_is_named_within_the_deadline(make_group, local, weights):
    group = make_group(1, local, env=slow_cartpole, sample_timeout_s=0.3)
    group.publish(0, weights)
    started = time.monotonic()
    with pytest.raises(CallTimeout, match=r"env_runner/0\.sample\(\) has not answered within 0.3 s"):
        group.sample(1)
    assert time.monotonic() - started < 3


# Deaths ----------------------------------------------------------------------------------------------------------

QUICK = Restart(max=3, per_s=60.0, backoff_s=0.01)


def end_in_c():
    ctypes.CDLL(None).sleep(600)  # no signal handler of Python runs before it returns


ENDS = {
    "killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "exit": lambda: os._exit(3),
    "stopped": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "hangs in C": end_in_c,
}


def is_first(flag):
    """Whether this process is the one that removes the file."""
    try:
        os.unlink(flag)
    except FileNotFoundError:
        return False
    return True


def doomed_cartpole(flag, how, at_step):
    """CartPole; the first process to come to the step while there is a file `flag` removes it and ends."""
    import gymnasium

    class Doomed(gymnasium.Wrapper):
        steps = 0

        def step(self, action):
            self.steps += 1
            if self.steps == at_step and is_first(flag):
                ENDS[how]()
            return super().step(action)

    return Doomed(gymnasium.make("CartPole-v1"))


@pytest.fixture
def make_doomed(make_group):
    def make(runtime, flag, how="exit", at_step=7, num_runners=2, **options):
        kwargs = {"flag": str(flag), "how": how, "at_step": at_step}
        options = {"restart": QUICK, "kwargs": kwargs} | options
        return make_group(num_runners, runtime, doomed_cartpole, **options)

    return make


def columns(sample, runner):
    return {name: array[:, 2 * runner : 2 * runner + 2] for name, array in sample.trajectory.arrays().items()}


def are_same(sample, other, runner):
    first, second = columns(sample, runner), columns(other, runner)
    return all(np.array_equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    "how", ["killed", "stopped", *(pytest.param(how, marks=pytest.mark.slow) for how in ("exit", "hangs in C"))]
)
def test_only_the_fragment_of_a_runner_that_dies_or_hangs_is_collected_again(
    make_doomed, local, inline, weights, tmp_path, caplog, how
):
    flag = tmp_path / "flag"
    plain = {"normalize_obs": False, "normalize_reward": False}
    group = make_doomed(local, flag, how, at_step=27, sample_timeout_s=2.0, **plain)
    expected = make_doomed(inline, flag, how, **plain)
    for one in (group, expected):
        one.publish(0, weights)
    first = expected.sample(20)
    assert_same_sample(group.sample(20), first)
    flag.touch()
    for one in (group, expected):
        one.publish(1, weights)
    sample, undisturbed_sample = group.sample(20), expected.sample(20)
    assert sample.runner_restarts == 1 and undisturbed_sample.runner_restarts == 0
    assert (sample.trajectory.weights_version == 1).all()
    kept = [runner for runner in range(2) if are_same(sample, undisturbed_sample, runner)]
    assert len(kept) == 1
    again = columns(sample, 1 - kept[0])
    assert (again["logp"] < 0).all() and again["mask"].all()
    # It begins episodes, and not the first ones of the run once more.
    assert (np.abs(again["obs"][0]) <= 0.05).all()
    assert not np.array_equal(again["obs"][0], columns(first, 1 - kept[0])["obs"][0])
    group.publish(2, weights)
    assert group.sample(20).runner_restarts == 0
    warned = [r.message for r in caplog.records if "begins new episodes" in r.message]
    assert len(warned) == 1
    reason = {"killed": "was killed by SIGKILL in sample()", "exit": "ended with exit code 3 in sample()"}
    assert reason.get(how, "sample() has not answered within 2 s") in warned[0]


def test_a_runner_killed_between_two_samples_is_started_again(make_group, local, weights):
    group = make_group(2, local, restart=QUICK)
    group.publish(0, weights)
    group.sample(2)
    os.kill(local.state()["env_runner/1"].pid, signal.SIGKILL)
    sample = group.sample(2)
    assert sample.env_steps == 8 and sample.runner_restarts == 1


def test_a_state_saved_after_a_restart_is_gone_on_from_exactly(make_doomed, local, weights, tmp_path):
    flag = tmp_path / "flag"
    group = make_doomed(local, flag)
    group.publish(0, weights)
    flag.touch()
    assert group.sample(10).runner_restarts == 1
    state = group.get_state()
    group.publish(1, weights)
    expected = group.sample(10)
    group.set_state(state)
    group.publish(1, weights)
    assert_same_sample(group.sample(10), expected)


def test_a_state_asked_of_a_runner_that_was_just_started_again_has_new_episodes(make_group, local, weights):
    group = make_group(2, local, restart=QUICK)
    group.publish(0, weights)
    group.sample(2)
    os.kill(local.state()["env_runner/1"].pid, signal.SIGKILL)
    first, second = group.get_state()["runners"]
    assert first["fragment"] == 1
    # The call was number 1, after the sample, or number 2 if it came before the death was noticed.
    assert second["fragment"] in (1 << 20, 2 << 20)


def test_a_runner_that_always_dies_ends_the_run_with_advice(make_group, local, weights):
    group = make_group(2, local, env=deadly_cartpole, restart=Restart(max=2, per_s=60.0, backoff_s=0.01))
    group.publish(0, weights)
    with pytest.raises(ActorDied) as caught:
        group.sample(10)
    sentence, advice = str(caught.value).splitlines()
    assert sentence.startswith("env_runner/") and "ended with exit code 4 in sample()" in sentence
    assert advice.startswith("It was started again 2 times already; lower env_runners.num_envs_per_env_runner")
    assert advice.endswith("raise fault_tolerance.max_restarts.")


def deadly_cartpole():
    import gymnasium

    class Deadly(gymnasium.Wrapper):
        def step(self, action):
            os._exit(4)

    return Deadly(gymnasium.make("CartPole-v1"))


def test_without_restarts_a_death_is_an_error_at_once(make_group, local, weights):
    group = make_group(2, local)
    group.publish(0, weights)
    group.sample(2)
    os.kill(local.state()["env_runner/1"].pid, signal.SIGKILL)
    with pytest.raises(ActorDied, match=r"env_runner/1.*was killed by SIGKILL(.|\n)*fault_tolerance.max_restarts"):
        group.sample(2)


def cartpole_that_dies_while_it_is_made(flag):
    import gymnasium

    if is_first(flag):
        os._exit(5)
    return gymnasium.make("CartPole-v1")


def test_a_runner_that_dies_while_it_starts_is_started_again(make_group, local, weights, tmp_path):
    flag = tmp_path / "flag"
    flag.touch()
    kwargs = {"flag": str(flag)}
    group = make_group(2, local, cartpole_that_dies_while_it_is_made, restart=QUICK, kwargs=kwargs)
    group.publish(0, weights)
    sample = group.sample(2)
    assert sample.env_steps == 8 and sample.runner_restarts == 1


def test_what_the_making_of_a_runner_raises_is_an_error_at_once(make_group, local, tmp_path):
    made = tmp_path / "made"

    def broken():
        with made.open("a") as file:
            file.write("x")
        raise ZeroDivisionError("in the factory")

    with pytest.raises(ZeroDivisionError, match="in the factory"):
        make_group(1, local, broken, restart=QUICK)
    assert made.read_text() == "x"


def test_an_error_of_an_environment_is_no_death(make_group, local, weights, tmp_path):
    def broken():
        import gymnasium

        class Broken(gymnasium.Wrapper):
            def step(self, action):
                raise ZeroDivisionError("in step")

        return Broken(gymnasium.make("CartPole-v1"))

    group = make_group(1, local, broken, restart=QUICK)
    group.publish(0, weights)
    with pytest.raises(ZeroDivisionError, match="in step"):
        group.sample(3)
    assert local.state()["env_runner/0"].restarts == 0


@pytest.mark.slow
def test_a_stopped_runner_is_reported_before_it_is_ended(make_doomed, local, weights, tmp_path, caplog):
    """sample_timeout_s is 8 s, so the core looks for a stall after 2 s."""
    flag = tmp_path / "flag"
    flag.touch()
    with caplog.at_level(logging.WARNING):
        group = make_doomed(local, flag, "stopped", num_runners=1, sample_timeout_s=8.0)
        group.publish(0, weights)
        woken = threading.Thread(target=wake_when_reported, args=(local, caplog))
        woken.start()
        assert group.sample(10).runner_restarts == 0
        woken.join()
        group.close()
    assert "env_runner/0 has been in sample() for" in caplog.text and "SIGCONT lets it go on" in caplog.text


def wake_when_reported(runtime, caplog):
    deadline = time.monotonic() + 8.0
    while "has been in sample()" not in caplog.text and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(runtime.state()["env_runner/0"].pid, signal.SIGCONT)


def test_advice_is_given_when_runners_take_longer_than_their_work(make_group, local, weights):
    """Fragments of one CartPole step cost far less than the way to another process and back."""
    group = make_group(1, local)
    assert group.advice() is None
    for _ in range(6):
        group.publish(0, weights)
        group.sample(1)
    assert "num_env_runners=0" in str(group.advice())
    assert make_group(0).advice() is None
