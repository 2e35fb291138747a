"""What is changed in running environments reaches all of them, and stays: through rebuilds, restarts and resumes."""

import contextlib
import os
import signal

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorEnv
from gymnasium.wrappers import TimeLimit

from rlx.actors import Restart
from rlx.errors import EnvError
from rlx.rollout.env_changes import EnvChange, changes_from_state, changes_to_state, covered, with_change
from rlx.rollout.evaluation import evaluate
from rlx.rollout.runner_group import RunnerGroup


def set_to(name, value):
    return EnvChange("set", name, (value,))


def task(level):
    return EnvChange("call", "set_task", (level,))


class Levels(gymnasium.Env):
    """obs = (level, bonus, step); the reward is the level; truncated after `length` steps; broken at step `breaks`."""

    observation_space = spaces.Box(-np.inf, np.inf, (3,), np.float32)
    action_space = spaces.Discrete(2)

    def __init__(self, length=3, breaks=None):
        self.length, self.breaks, self.level, self.bonus, self.steps = length, breaks, 0, 0.0, 0

    def set_task(self, level):
        if level > 9:
            raise ValueError("there are ten levels")
        self.level = level

    def reset(self, *, seed=None, options=None):
        self.steps = 0
        return self._obs(), {}

    def step(self, action):
        self.steps += 1
        if self.steps == self.breaks:
            self.breaks = None
            raise RuntimeError("broken")
        return self._obs(), float(self.level), False, self.steps == self.length, {}

    def _obs(self):
        return np.array([self.level, self.bonus, self.steps], np.float32)


class LevelsVector(VectorEnv):
    """One object for all its environments, whose every attribute is plain."""

    metadata = {"autoreset_mode": AutoresetMode.SAME_STEP}  # noqa: RUF012
    single_observation_space, single_action_space = Levels.observation_space, Levels.action_space

    def __init__(self, num_envs, breaks=None):
        self.num_envs, self.level, self.bonus, self.breaks, self.steps = num_envs, 0, 0.0, breaks, 0

    def set_task(self, level):
        self.level = level

    def reset(self, *, seed=None, options=None):
        self.steps = 0
        return self._obs(), {}

    def step(self, actions):
        self.steps += 1
        if self.steps == self.breaks:
            self.breaks = None
            raise RuntimeError("broken")
        no = np.zeros(self.num_envs, bool)
        return self._obs(), np.full(self.num_envs, float(self.level)), no, no, {}

    def _obs(self):
        return np.tile(np.array([self.level, self.bonus, self.steps], np.float32), (self.num_envs, 1))


def levels_seen(sample):
    return sample.trajectory.obs[:, :, 0].tolist()


# Changes as values ------------------------------------------------------------------------------------------------


def test_the_newest_change_of_a_name_stands_for_those_before_it():
    changes = with_change(with_change(with_change((), task(1)), set_to("bonus", 2.0)), task(3))
    assert changes == (set_to("bonus", 2.0), task(3))
    assert changes_from_state(changes_to_state(changes)) == changes
    assert covered((task(1),), changes) and not covered((set_to("set_task", 1),), changes)
    assert [str(change) for change in changes] == ["bonus = 2.0", "set_task(3)"]


# Scalar environments ----------------------------------------------------------------------------------------------


def test_a_scalar_environment_is_changed_when_its_next_episode_begins(make_runner):
    runner = make_runner(lambda: Levels(3), 1)
    assert levels_seen(runner.sample(2)) == [[0], [0]]
    runner.change_envs((task(4), set_to("bonus", 0.5)))
    obs = runner.sample(3).trajectory.obs[:, 0].tolist()
    assert obs == [[0, 0, 2], [4, 0.5, 0], [4, 0.5, 1]]
    runner.change_envs((task(4), set_to("bonus", 0.25)))
    assert runner.sample(3).trajectory.obs[:, 0, 1].tolist() == [0.5, 0.25, 0.25]


def test_the_change_reaches_through_wrappers(make_runner):
    runner = make_runner(lambda: TimeLimit(Levels(99), 2), 1)
    runner.change_envs((task(1), set_to("bonus", 1.0), set_to("_max_episode_steps", 5)))
    assert runner.sample(6).trajectory.obs[:, 0].tolist() == [[1, 1, step] for step in (0, 1, 2, 3, 4, 0)]


def test_an_environment_that_is_built_anew_is_changed_as_the_others(make_runner):
    runner = make_runner(lambda: Levels(3, breaks=2), 2, on_env_error="rebuild")
    runner.change_envs((task(2),))
    sample = runner.sample(3)  # both break once in their second step
    assert sample.env_failures == 2 and levels_seen(sample) == [[2, 2]] * 3
    assert sample.trajectory.mask.tolist() == [[True, True], [False, False], [True, True]]


def test_episodes_under_way_are_resumed_under_the_level_that_they_began_with(make_runner):
    runner = make_runner(lambda: Levels(4), 2)
    runner.sample(3)
    runner.change_envs((task(5),))
    state = runner.get_state()
    expected = runner.sample(4).trajectory.obs
    other = make_runner(lambda: Levels(4), 2)
    other.set_state(state)
    other.change_envs((task(5),))
    resumed = other.sample(4).trajectory.obs
    np.testing.assert_array_equal(resumed, expected)
    assert resumed[:, 0].tolist() == [[0, 0, 3], [5, 0, 0], [5, 0, 1], [5, 0, 2]]


def test_going_back_to_before_a_change_undoes_it(make_runner):
    runner = make_runner(lambda: Levels(3), 1)
    runner.sample(1)
    state = runner.get_state()
    runner.change_envs((task(7),))
    assert levels_seen(runner.sample(4)) == [[0], [0], [7], [7]]
    runner.change_envs(())
    runner.set_state(state)
    assert levels_seen(runner.sample(4)) == [[0], [0], [0], [0]]


# Vector environments ----------------------------------------------------------------------------------------------


def sync(num_envs):
    return SyncVectorEnv([lambda: Levels(3)] * num_envs, autoreset_mode=AutoresetMode.SAME_STEP)


def in_processes(num_envs):
    return AsyncVectorEnv([lambda: Levels(3)] * num_envs, autoreset_mode=AutoresetMode.SAME_STEP)


@pytest.mark.parametrize("env", [LevelsVector, sync, in_processes])
def test_a_vector_environment_is_changed_at_once(make_runner, env):
    runner = make_runner(env, 2)
    runner.sample(1)
    runner.change_envs((task(3), set_to("bonus", 1.5)))
    # The observation that the fragment begins with was made before.
    assert runner.sample(2).trajectory.obs[:, :, :2].tolist() == [[[0, 0]] * 2, [[3, 1.5]] * 2]
    runner.close()


def test_a_vector_environment_that_is_built_anew_is_changed_again(make_runner):
    runner = make_runner(lambda num_envs: LevelsVector(num_envs, breaks=2), 2, on_env_error="rebuild")
    runner.change_envs((task(2),))
    sample = runner.sample(3)
    assert sample.env_failures == 1 and levels_seen(sample) == [[2, 2]] * 3


def test_a_vector_environment_resumes_exactly_with_its_changes_and_goes_back_without(make_runner):
    runner = make_runner(LevelsVector, 2)
    runner.sample(2)
    before = runner.get_state()
    runner.change_envs((task(6),))
    runner.sample(2)
    after, expected = runner.get_state(), runner.sample(3).trajectory.obs
    other = make_runner(LevelsVector, 2)
    other.set_state(after)
    np.testing.assert_array_equal(other.sample(3).trajectory.obs, expected)
    other.set_state(before)
    assert other.sample(2).trajectory.obs[:, 0].tolist() == [[0, 0, 2], [0, 0, 3]]


# Mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("env", [lambda: Levels(), LevelsVector, sync])
@pytest.mark.parametrize("change", [set_to("levle", 1), EnvChange("call", "set_tusk", (1,))], ids=["set", "call"])
def test_a_name_that_is_not_there_is_one_sentence(make_runner, env, change):
    runner = make_runner(env, 1, on_env_error="rebuild")
    with pytest.raises(EnvError, match=rf"cannot be changed by {change.name}.*: it has no {change.name}\.$"):
        runner.change_envs((change,))
        runner.sample(1)


def test_a_method_that_raises_ends_the_run_with_its_error(make_runner):
    runner = make_runner(lambda: Levels(), 1, on_env_error="rebuild", first_env_index=3)
    runner.change_envs((task(10),))
    with pytest.raises(EnvError, match=r"environment 3 cannot be changed by set_task\(10\): that raised ValueError"):
        runner.sample(1)


# Groups and evaluation --------------------------------------------------------------------------------------------


def weights_of(make_runner, env):
    return make_runner(env, 1)._parameters.numpy().copy()


@pytest.mark.parametrize("num_runners", [0, 2])
def test_all_runners_are_changed_with_the_next_publish(make_runner, scripted_policy, local, num_runners):
    weights, width = weights_of(make_runner, Levels), 2 * max(1, num_runners)
    made = RunnerGroup(Levels, scripted_policy, num_runners=num_runners, num_envs=2, runtime=lambda: local)
    with contextlib.closing(made) as group:
        group.publish(1, weights)
        assert levels_seen(group.sample(3)) == [[0] * width] * 3
        group.change_envs(task(8))
        state = group.get_state()
        group.publish(1, weights)  # the same version: only the environments have changed
        expected = [[0] * width] * 3 + [[8] * width]
        assert levels_seen(group.sample(4)) == expected
        group.set_state(state)  # as of before that publish: the change is to come
        group.publish(1, weights)
        assert levels_seen(group.sample(4)) == expected


def test_a_runner_that_is_killed_comes_back_with_the_change(make_runner, scripted_policy, local):
    weights, restart = weights_of(make_runner, Levels), Restart(max=3, per_s=60)
    made = RunnerGroup(Levels, scripted_policy, num_runners=2, num_envs=1, runtime=lambda: local, restart=restart)
    with contextlib.closing(made) as group:
        group.change_envs(task(8))
        group.publish(1, weights)
        assert levels_seen(group.sample(2)) == [[8, 8]] * 2
        os.kill(local.state()["env_runner/1"].pid, signal.SIGKILL)
        sample = group.sample(2)
        assert sample.runner_restarts == 1 and levels_seen(sample)[1] == [8, 8]


@pytest.mark.parametrize("env", [Levels, sync])
def test_evaluation_episodes_are_played_with_the_changes(scripted_policy, env):
    policy = scripted_policy(Levels.observation_space, Levels.action_space)
    assert evaluate(env, policy, num_episodes=2, changes=(task(4),)).returns == [12.0, 12.0]
    assert evaluate(env, policy, num_episodes=2).returns == [0.0, 0.0]
