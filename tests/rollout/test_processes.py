"""Environments in several processes: the rows of one loop, whatever becomes of a worker; and when auto takes them."""

import contextlib
import logging
import os
import re
import signal
import subprocess
import sys
import time

import cloudpickle
import gymnasium
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.vector import SyncVectorEnv

from rlx.errors import ActorDied, CheckpointError, EnvError
from rlx.nets.policy import build_policy
from rlx.rollout.deadline import EnvTimeout
from rlx.rollout.env_changes import EnvChange
from rlx.rollout.env_runner import EnvRunner
from rlx.rollout.first_ready import make_runner
from rlx.rollout.in_place import InPlaceEnvs, episode_seed
from rlx.rollout.processes import ProcessEnvs, shared_runtime
from rlx.rollout.vector import make_envs
from rlx.trajectory import Trajectory

# A worker that imported this module would import torch and pytest with it.
cloudpickle.register_pickle_by_value(sys.modules[__name__])

REBUILD = {"on_env_error": "rebuild"}
SEED = 3


@pytest.fixture(scope="module", autouse=True)
def lasting_runtime():
    """Have the runtime of all environments last from test to test."""
    yield shared_runtime.take()
    shared_runtime.give_back()


class Story(gymnasium.Env):
    """obs = (seed of the episode, step, position of a seeded walk, level); truncated after 6 steps.

    Either terminated beyond 2; or trouble comes in step `when` of the episode with seed `at`.
    """

    observation_space = spaces.Box(-np.inf, np.inf, (4,), np.float64)
    action_space = spaces.Discrete(3, start=1)

    def __init__(self, trouble=None, at=None, when=3, step_s=0.0):
        self.trouble, self.at, self.when, self.step_s, self.level = trouble, at, when, step_s, 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.seed, self.steps, self.position = seed, 0, 0.0
        return self.observe(), {}

    def observe(self):
        return np.array([self.seed, self.steps, self.position, self.level], np.float64)

    def step(self, action):
        if self.step_s:
            time.sleep(self.step_s)
        self.steps += 1
        if self.trouble is not None and self.seed == self.at and self.steps == self.when:
            self.make_trouble()
        self.position += (action - 2) * 0.3 + self.np_random.normal()
        terminated = self.trouble is None and bool(abs(self.position) > 2)
        return self.observe(), self.position + action, terminated, self.steps == 6, {"end": self.position}

    def make_trouble(self):
        if self.trouble == "raise":
            raise OSError("no luck")
        if self.trouble in ("kill", "stop"):
            os.kill(os.getpid(), {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}[self.trouble])
        while self.trouble == "hang":
            time.sleep(0.01)


def runner_of(env, num_envs, vectorization="processes", num_processes=2, **options):
    options = {"seed": SEED, **options}
    runner = EnvRunner(env, num_envs, build_policy, vectorization=vectorization, num_processes=num_processes, **options)
    runner.set_weights(0, np.full_like(runner._parameters.numpy(), 0.01))
    return contextlib.closing(runner)


def assert_same(sample, expected):
    for name, array in expected.trajectory.arrays().items():
        np.testing.assert_array_equal(getattr(sample.trajectory, name), array, err_msg=name)


@pytest.mark.parametrize(
    ("env", "kwargs"),
    [(Story, {}), ("Pendulum-v1", {"max_episode_steps": 9}), ("CartPole-v1", {}), ("FrozenLake-v1", {})],
)
def test_processes_give_the_rows_of_one_loop_bit_for_bit(env, kwargs):
    """Five environments in three processes; every fragment ends episodes somewhere."""
    options = {"kwargs": kwargs, "normalize_reward": True}
    with (
        runner_of(env, 5, "in_place", **options) as loop,
        runner_of(env, 5, num_processes=3, **options) as processes,
    ):
        for _ in range(3):
            sample, expected = processes.sample(17), loop.sample(17)
            assert_same(sample, expected)
            assert sample.episodes == expected.episodes
        assert expected.trajectory.truncated.any() or expected.trajectory.terminated.any()


@pytest.mark.slow
@pytest.mark.parametrize("order", [("in_place", "processes"), ("processes", "in_place"), ("processes", "processes")])
def test_either_goes_on_exactly_from_a_state_of_the_other(order):
    first, second = order
    with runner_of(Story, 4, first) as one, runner_of(Story, 4, second, num_processes=3) as other:
        one.sample(10)
        other.set_state(one.get_state())
        for _ in range(2):
            sample, expected = other.sample(7), one.sample(7)
            assert_same(sample, expected)
            assert sample.episodes == expected.episodes


def seed_of(index, episode=0):
    return episode_seed(SEED, index, episode)


@pytest.mark.slow
def test_an_environment_that_raises_is_built_anew_in_its_worker_as_in_a_loop():
    options = {"kwargs": {"trouble": "raise", "at": seed_of(1)}, **REBUILD}
    with runner_of(Story, 4, "in_place", **options) as loop, runner_of(Story, 4, **options) as processes:
        for failures in (1, 0):
            sample, expected = processes.sample(9), loop.sample(9)
            assert_same(sample, expected)
            assert sample.env_failures == expected.env_failures == failures
            assert sample.episodes == expected.episodes


@pytest.mark.slow
def test_an_error_that_ends_the_run_names_environment_action_and_the_lines_of_its_process():
    with runner_of(Story, 4, kwargs={"trouble": "raise", "at": seed_of(3)}) as runner:
        with pytest.raises(OSError, match="no luck") as caught:
            runner.sample(9)
        notes = "\n".join(caught.value.__notes__)
        assert "in step() with action" in notes and "of environment 3 of Story" in notes
        assert "in make_trouble" in notes and "at step 2 of fragment 0" in notes


@pytest.mark.slow
@pytest.mark.parametrize("trouble", ["kill", "stop"])
def test_a_worker_that_is_lost_costs_its_environments_one_row(trouble):
    """Environments 0 and 1 share it: row 2 fails, and from row 3 on both play their next episodes."""
    options = {"kwargs": {"trouble": trouble, "at": seed_of(1)}, "env_step_timeout_s": 0.4, **REBUILD}
    calm = {"trouble": "raise", "at": -1}
    with runner_of(Story, 4, "in_place", kwargs=calm) as undisturbed, runner_of(Story, 4, **options) as runner:
        sample, expected = runner.sample(8), undisturbed.sample(8)
        t = sample.trajectory
        for name in ("obs", "action", "reward", "truncated", "mask", "first"):
            np.testing.assert_array_equal(getattr(t, name)[:, 2:], getattr(expected.trajectory, name)[:, 2:])
        for index in (0, 1):
            np.testing.assert_array_equal(t.mask[:, index], [1, 1, 0, 1, 1, 1, 1, 1])
            assert t.truncated[1, index] and t.first[3, index]
            np.testing.assert_array_equal(t.obs[3, index, :2], np.float32([seed_of(index, 1), 0]))
        assert (sample.env_failures, runner.sample(3).env_failures) == (1, 0)


@pytest.mark.slow
def test_nothing_of_the_step_before_shows_in_a_row_that_is_lost():
    """All episodes end in row 5, and a worker dies in row 6."""
    trouble = {"trouble": "kill", "at": seed_of(1, 1), "when": 1}
    with runner_of(Story, 4, kwargs=trouble, **REBUILD) as runner:
        t = runner.sample(8).trajectory
    np.testing.assert_array_equal(t.truncated[5:7], [[1, 1, 1, 1], [0, 0, 0, 0]])
    np.testing.assert_array_equal(t.mask[6], [0, 0, 1, 1])
    np.testing.assert_array_equal(t.reward[6, :2], [0, 0])


@pytest.mark.slow
def test_a_worker_that_dies_ends_the_run_where_failures_do_and_says_what_it_did():
    with runner_of(Story, 4, kwargs={"trouble": "kill", "at": seed_of(2)}) as runner:
        with pytest.raises(ActorDied, match=r"SIGKILL.*step\(\)") as caught:
            runner.sample(9)
        notes = "\n".join(caught.value.__notes__)
        assert f"environment 2 was in the episode with seed {seed_of(2)}; its last action was" in notes
        assert "environment 3 was" in notes and "environment 1 was" not in notes


@pytest.mark.slow
def test_python_code_that_hangs_is_interrupted_in_its_worker():
    options = {"kwargs": {"trouble": "hang", "at": seed_of(0)}, "env_step_timeout_s": 0.3}
    with runner_of(Story, 2, **options, **REBUILD) as runner:
        sample = runner.sample(5)
        np.testing.assert_array_equal(sample.trajectory.mask, [[1, 1], [1, 1], [0, 1], [1, 1], [1, 1]])
        assert sample.env_failures == 1
    with runner_of(Story, 2, **options) as runner, pytest.raises(EnvTimeout, match="took longer than"):
        runner.sample(5)


class Doomed(Story):
    def reset(self, *, seed=None, options=None):
        os.abort()


@pytest.mark.slow
def test_a_worker_that_never_worked_is_not_tried_again():
    with runner_of(Doomed, 2, **REBUILD) as runner, pytest.raises(ActorDied, match="SIGABRT") as caught:
        runner.sample(1)
    assert "times in a row" not in "\n".join(caught.value.__notes__)


@pytest.mark.slow
def test_changes_reach_every_worker_and_those_that_follow_it():
    level = (EnvChange("set", "level", (4,)),)
    with runner_of(Story, 4, kwargs={"trouble": "kill", "at": seed_of(1)}, **REBUILD) as runner:
        runner.change_envs(level)
        obs = runner.sample(6).trajectory.obs
        np.testing.assert_array_equal(obs[..., 3], np.full((6, 4), 4))


# First ready ---------------------------------------------------------------------------------------------------------


def first_ready(env, num_envs, num_processes=2, **options):
    runner = make_runner(
        *(env, num_envs, build_policy), vectorization="first_ready", num_processes=num_processes, seed=SEED, **options
    )
    runner.set_weights(0, np.full_like(runner._runners[0]._parameters.numpy(), 0.01))
    return contextlib.closing(runner)


@pytest.mark.slow
def test_first_ready_collects_what_as_many_runners_collect():
    options = {"normalize_reward": True}
    with (
        first_ready(Story, 5, **options) as runner,
        runner_of(Story, 2, "in_place", first_env_index=0, **options) as first,
        runner_of(Story, 3, "in_place", first_env_index=2, **options) as second,
    ):
        for _ in range(2):
            sample, parts = runner.sample(9), [first.sample(9), second.sample(9)]
            expected = Trajectory.concatenate([part.trajectory for part in parts])
            for name, array in expected.arrays().items():
                np.testing.assert_array_equal(getattr(sample.trajectory, name), array, err_msg=name)
            assert sample.episodes == parts[0].episodes + parts[1].episodes
            assert sample.return_moments.count == sum(part.return_moments.count for part in parts)


@pytest.mark.slow
def test_first_ready_goes_on_exactly_and_survives_a_kill_and_an_error():
    with first_ready(Story, 4) as one, first_ready(Story, 4) as other:
        one.sample(7)
        other.set_state(one.get_state())
        assert_same(other.sample(7), one.sample(7))
        with pytest.raises(CheckpointError, match="in 2 shares and this runner has 3"), first_ready(Story, 4, 3) as odd:
            odd.set_state(one.get_state())
    with first_ready(Story, 4, kwargs={"trouble": "kill", "at": seed_of(1)}, **REBUILD) as runner:
        sample = runner.sample(8)
        assert sample.trajectory.mask[2].tolist() == [False, False, True, True] and sample.env_failures == 1
    with first_ready(Story, 4, kwargs={"trouble": "raise", "at": seed_of(1)}) as runner:
        with pytest.raises(OSError, match="no luck"):
            runner.sample(8)
        sample = runner.sample(8)
        np.testing.assert_array_equal(sample.trajectory.obs[0, :, 1], np.zeros(4))  # all begin new episodes


class Uneven(Story):
    """40 ms in every fourth step, and in another one than its neighbours."""

    def __init__(self):
        super().__init__(trouble="raise", at=-1)

    def step(self, action):
        if (self.seed + self.steps) % 4 == 0:
            time.sleep(0.04)
        return super().step(action)


@pytest.mark.slow
def test_first_ready_does_not_wait_for_the_slowest_of_every_step():
    """One of four sleeps in nearly every step, and each of them in a quarter of its own."""
    seconds = {}
    for way, make in (("processes", runner_of), ("first_ready", first_ready)):
        with make(Uneven, 4, num_processes=4) as runner:
            runner.sample(2)
            seconds[way] = min(runner.sample(24).busy_s for _ in range(3))
    assert seconds["first_ready"] < 0.75 * seconds["processes"], seconds


# Callbacks, interrupts, ends -----------------------------------------------------------------------------------------


class Listener:
    """Gives every environment its number as level, and measures with which position an episode ends."""

    def on_env_created(self, env, index):
        env.unwrapped.level = index

    def on_episode_end(self, episode):
        return {"end": episode.info["end"], "env": episode.env_index}


@pytest.mark.slow
def test_callbacks_hear_of_environments_and_episodes_as_in_a_loop():
    def listeners():
        return [Listener()]

    options = {"callbacks": listeners, "first_env_index": 8}
    with runner_of(Story, 4, "in_place", **options) as loop, runner_of(Story, 4, **options) as processes:
        for _ in range(2):
            sample, expected = processes.sample(9), loop.sample(9)
            assert_same(sample, expected)
            assert sample.episode_metrics == expected.episode_metrics
    assert set(sample.trajectory.obs[..., 3].ravel()) == {8, 9, 10, 11} and expected.episode_metrics["env"]


@pytest.mark.slow
def test_an_interrupted_step_leaves_envs_that_can_be_reset():
    envs = make_envs(Story, 2, vectorization="processes", num_processes=2, kwargs={"step_s": 0.3})
    try:
        envs.reset()
        previous = signal.signal(signal.SIGALRM, signal.default_int_handler)
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        with pytest.raises(KeyboardInterrupt):
            envs.step(np.zeros(2, np.int64))
        signal.signal(signal.SIGALRM, previous)
        obs_B = envs.reset()
        np.testing.assert_array_equal(obs_B[:, 1], [0, 0])
        assert envs.step(np.zeros(2, np.int64))[0][:, 1].tolist() == [1, 1]
    finally:
        envs.close()


ORPHANS = """
import os, sys
from rlx.rollout.vector import make_envs
envs = make_envs("Pendulum-v1", 2, vectorization="processes", num_processes=2)
envs.reset()
print(*(worker.pid for worker in envs._runtime.state().values()), flush=True)
sys.stdin.read()
"""


@pytest.mark.slow
def test_no_worker_outlives_a_runner_that_is_killed():
    with subprocess.Popen(
        [sys.executable, "-c", ORPHANS], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as driver:
        pids = [int(pid) for pid in driver.stdout.readline().split()]
        assert len(pids) == 2
        driver.kill()
    deadline = time.monotonic() + 20
    while any(os.path.exists(f"/proc/{pid}") for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.slow
def test_vector_environments_do_not_go_into_processes():
    with pytest.raises(EnvError, match="made a VectorEnv, which steps its environments itself"):
        make_envs(lambda: SyncVectorEnv([Story]), 2, vectorization="processes", num_processes=2)


# The choice ----------------------------------------------------------------------------------------------------------


SLOW_ENVS = """
import os, time
from gymnasium.envs.classic_control.pendulum import PendulumEnv

class Slow(PendulumEnv):
    def step(self, action):
        time.sleep(0.03)
        return super().step(action)

class OnlyHere(Slow):
    def __init__(self, home):
        super().__init__()
        if home != os.getpid():
            raise OSError("no display")
"""
SLOW, ONLY_HERE = "rlx_slow_envs:Slow", "rlx_slow_envs:OnlyHere"
UNMEASURED = r"no measurement of environment.vectorization, so it is in_place: .*no display"


@pytest.fixture
def slow_envs(tmp_path, monkeypatch):
    """A module of environments that other processes find, too."""
    (tmp_path / "rlx_slow_envs.py").write_text(SLOW_ENVS)
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("rlx_slow_envs", None)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("env", "kwargs", "kind", "text"),
    [
        (SLOW, {}, ProcessEnvs, r"in_place: \d+ steps/s, processes\(2\): \d+ steps/s; it is stepped in processes"),
        ("Pendulum-v1", {}, InPlaceEnvs, r"steps/s in_place, too many for processes to pay"),
        (ONLY_HERE, {"home": os.getpid()}, InPlaceEnvs, UNMEASURED),
    ],
)
def test_auto_measures_and_tells_the_figures(env, kwargs, kind, text, slow_envs, caplog):
    caplog.set_level(logging.INFO)
    envs = make_envs(env, 4, num_cores=2, kwargs=kwargs)
    try:
        assert isinstance(envs, kind)
        assert re.search(text, caplog.text)
    finally:
        envs.close()


@pytest.mark.slow
def test_one_core_one_environment_or_what_is_passed_in_python_is_not_measured(slow_envs, caplog):
    caplog.set_level(logging.INFO)
    for env, num_envs, num_cores in ((SLOW, 4, 1), (SLOW, 1, 2), (Story, 4, 2)):
        assert isinstance(make_envs(env, num_envs, num_cores=num_cores), InPlaceEnvs)
    assert not caplog.text
