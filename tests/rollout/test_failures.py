"""Environments that raise: what the trajectory, the statistics, the log and the state make of it."""

import logging

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from rlx.algorithms.ppo import PPOConfig
from rlx.errors import EnvError
from rlx.functional.advantages import gae
from rlx.nets.policy import build_policy
from rlx.rollout.failures import MAX_WARNINGS, Failures

REBUILD = {"on_env_error": "rebuild"}


class Shaky(gymnasium.Env):
    """obs = number of steps in the episode, which is the reward too. `fails` holds (made as, method, its how many-th).

    "made as" counts the environments of one factory, so a rebuilt one has another number.
    """

    observation_space = spaces.Box(-np.inf, np.inf, (1,), np.float32)
    action_space = spaces.Discrete(2)

    def __init__(self, number, fails, length, terminates):
        self.number, self.fails, self.length, self.terminates = number, fails, length, terminates
        self.calls = dict.fromkeys(("step", "reset", "close"), 0)

    def call(self, method):
        self.calls[method] += 1
        if (self.number, method, self.calls[method]) in self.fails:
            raise OSError(f"{method} {self.calls[method]} of environment made as {self.number}")

    def reset(self, *, seed=None, options=None):
        self.call("reset")
        self.steps = 0
        return np.zeros(1, np.float32), {}

    def step(self, action):
        self.call("step")
        self.steps += 1
        ended = self.steps == self.length
        obs = np.full(1, self.steps, np.float32)
        return obs, float(self.steps), ended and self.terminates, ended and not self.terminates, {}

    def close(self):
        self.call("close")


def shaky(*fails, length=5, terminates=False, made=None):
    """A factory of environments; those it makes are appended to `made`."""
    made = [] if made is None else made

    def factory():
        made.append(Shaky(len(made), set(fails), length, terminates))
        return made[-1]

    return factory


def column(array_T_B, index=0):
    return array_T_B[:, index].reshape(len(array_T_B)).tolist()


# Rows, by hand ---------------------------------------------------------------------------------------------------


def test_a_failed_step_is_masked_and_the_one_before_it_truncated_at_the_last_good_observation(make_runner):
    runner = make_runner(shaky((0, "step", 3)), 1, **REBUILD)
    sample = runner.sample(6)
    t = sample.trajectory
    assert column(t.obs) == [0, 1, 2, 0, 1, 2]
    assert column(t.mask) == [1, 1, 0, 1, 1, 1]
    assert column(t.reward) == [1, 2, 0, 1, 2, 3]
    assert column(t.truncated) == [0, 1, 0, 0, 0, 0]
    assert not t.terminated.any()
    assert [column(t.next_value)[i] for i in (0, 1, 3, 4, 5)] == [1, 2, 1, 2, 3]  # V(obs) = obs
    assert (sample.env_steps, sample.env_failures, sample.episodes) == (5, 1, [])
    following = runner.sample(3)  # 3 4 | 0: the episode after the failure counts from its own beginning
    assert following.episodes == [(15.0, 5)] and following.env_failures == 0


def test_advantages_do_not_cross_a_failure(make_runner):
    """gamma = lambda = 1/2. Rows 0 and 1: deltas 1.5 and 2; rows 3 to 5: 1.5, 2 and 2.5; a quarter is carried back."""
    batch = make_runner(shaky((0, "step", 3)), 1, **REBUILD).sample(6).trajectory.tensors()
    advantage, _ = gae(batch.reward, batch.value, batch.next_value, batch.terminated, batch.truncated, 0.5, 0.5)
    torch.testing.assert_close(advantage[batch.mask], torch.tensor([2.0, 2.0, 2.15625, 2.625, 2.5]))


def test_a_failure_in_the_first_row_of_a_fragment_needs_no_row_before_it(make_runner):
    runner = make_runner(shaky((0, "step", 3)), 1, normalize_reward=True, gamma=1.0, **REBUILD)
    first, second = runner.sample(2), runner.sample(6)
    assert column(first.trajectory.next_value) == [1, 2] and not first.trajectory.truncated.any()
    assert column(second.trajectory.obs) == [2, 0, 1, 2, 3, 4]
    assert column(second.trajectory.mask) == [0, 1, 1, 1, 1, 1]
    assert column(second.trajectory.truncated) == [0, 0, 0, 0, 0, 1]
    assert second.episodes == [(15.0, 5)]
    # Discounted returns 1 3 6 10 15; with what the failed episode had gathered they would begin at 4.
    assert second.return_moments.count == 5 and second.return_moments.mean == 7.0


def test_a_failure_in_the_last_row_of_a_fragment_leaves_a_clean_next_one(make_runner):
    runner = make_runner(shaky((0, "step", 3)), 1, **REBUILD)
    first, second = runner.sample(3).trajectory, runner.sample(6)
    assert column(first.mask) == [1, 1, 0] and column(first.truncated) == [0, 1, 0]
    assert column(first.next_value)[:2] == [1, 2]
    assert column(second.trajectory.obs) == [0, 1, 2, 3, 4, 0] and second.trajectory.mask.all()
    assert second.episodes == [(15.0, 5)]


@pytest.mark.parametrize("terminates", [False, True])
def test_an_episode_that_ended_before_the_failure_keeps_its_end(terminates, make_runner):
    sample = make_runner(shaky((0, "step", 3), length=2, terminates=terminates), 1, **REBUILD).sample(4)
    t = sample.trajectory
    assert column(t.obs) == [0, 1, 0, 0] and column(t.mask) == [1, 1, 0, 1]
    assert column(t.terminated) == [0, terminates, 0, 0] and column(t.truncated) == [0, not terminates, 0, 0]
    assert column(t.next_value)[:2] == [1, 0 if terminates else 2]
    assert sample.episodes == [(3.0, 2)]


def test_failures_in_a_row_mask_a_row_each_and_truncate_once(make_runner):
    sample = make_runner(shaky((0, "step", 3), (1, "step", 1)), 1, **REBUILD).sample(6)
    t = sample.trajectory
    assert column(t.obs) == [0, 1, 2, 0, 0, 1] and column(t.mask) == [1, 1, 0, 0, 1, 1]
    assert column(t.truncated) == [0, 1, 0, 0, 0, 0] and sample.env_failures == 2


def test_a_reset_that_fails_loses_no_transition_and_no_episode(make_runner):
    made = []
    source = shaky((0, "reset", 2), (1, "reset", 1), length=2, made=made)
    sample = make_runner(source, 1, **REBUILD).sample(4)
    assert sample.trajectory.mask.all() and column(sample.trajectory.truncated) == [0, 1, 0, 1]
    assert column(sample.trajectory.next_value) == [1, 2, 1, 2]
    assert sample.episodes == [(3.0, 2)] * 2
    assert sample.env_failures == 2 and len(made) == 3 and [env.calls["close"] for env in made] == [1, 1, 0]


def test_the_other_environments_notice_nothing(make_runner):
    """Environment 1 fails at its 3rd step; made as 0, 1, 2 and, rebuilt, 3."""
    options = {"seed": 3, "normalize_obs": True}
    failing = make_runner(shaky((1, "step", 3)), 3, **options, **REBUILD)
    sound = make_runner(shaky(), 3, **options)
    for _ in range(3):
        sample, expected = failing.sample(7), sound.sample(7)
        for name, array in expected.trajectory.arrays().items():
            np.testing.assert_array_equal(getattr(sample.trajectory, name)[:, ::2], array[:, ::2], err_msg=name)
    assert sample.episodes != expected.episodes


MODES = [AutoresetMode.NEXT_STEP, AutoresetMode.SAME_STEP, AutoresetMode.DISABLED]


@pytest.mark.parametrize("is_rebuilt", [True, False], ids=["factory", "instance"])
@pytest.mark.parametrize("mode", MODES)
def test_a_vector_environment_that_fails_begins_anew_as_a_whole(mode, is_rebuilt, make_runner):
    """Its second environment fails at its 3rd step. Rows: 0 1 2(masked) | 0 1 2 3 4 | ..., in both columns."""
    make = shaky((1, "step", 3), length=5)
    built = []

    def vector():
        built.append(SyncVectorEnv([make, make], autoreset_mode=mode))
        return built[-1]

    runner = make_runner(vector if is_rebuilt else vector(), 2, **REBUILD)
    sample = runner.sample(8)
    for index in range(2):
        t = sample.trajectory
        assert column(t.obs, index) == [0, 1, 2, 0, 1, 2, 3, 4]
        assert column(t.mask, index) == [1, 1, 0, 1, 1, 1, 1, 1]
        assert column(t.reward, index) == [1, 2, 0, 1, 2, 3, 4, 5]
        assert column(t.truncated, index) == [0, 1, 0, 0, 0, 0, 0, 1]
        assert [column(t.next_value, index)[i] for i in (0, 1, 3, 7)] == [1, 2, 1, 5]
    assert sample.episodes == [(15.0, 5)] * 2 and sample.env_failures == 1
    assert len(built) == 1 + is_rebuilt
    assert runner.sample(2).trajectory.mask[0, 0] == (mode is not AutoresetMode.NEXT_STEP)


@pytest.mark.parametrize("mode", MODES)
def test_a_vector_environment_whose_ended_episode_cannot_be_reset_loses_that_step(mode, make_runner):
    """The second reset of environment 0 fails: in the step that ends an episode, or in the one after it."""
    make = shaky((0, "reset", 2), length=2)
    sample = make_runner(lambda: SyncVectorEnv([make], autoreset_mode=mode), 1, **REBUILD).sample(4)
    is_late = mode is AutoresetMode.NEXT_STEP
    assert column(sample.trajectory.obs) == ([0, 1, 2, 0] if is_late else [0, 1, 0, 1])
    assert column(sample.trajectory.mask) == ([1, 1, 0, 1] if is_late else [1, 0, 1, 1])
    assert column(sample.trajectory.truncated) == ([0, 1, 0, 0] if is_late else [1, 0, 0, 1])
    assert sample.episodes == [(3.0, 2)] and sample.env_failures == 1


# Limits ----------------------------------------------------------------------------------------------------------


def always(*numbers, method="step", first=1):
    return [(number, method, k) for number in numbers for k in range(first, 100)]


@pytest.mark.parametrize("kind", ["in_place", "vector"])
@pytest.mark.parametrize("first", [1, 4], ids=["every step", "every fourth step"])
def test_failures_in_a_row_end_the_run_at_the_limit_and_say_so(kind, first, make_runner):
    made = []
    source = shaky(*always(*range(9), first=first), made=made)
    runner = make_runner(
        source if kind == "in_place" else lambda: SyncVectorEnv([source]), 1, max_env_failures=3, **REBUILD
    )
    with pytest.raises(OSError, match=f"step {first} of environment made as 3") as caught:
        runner.sample(50)
    notes = "\n".join(caught.value.__notes__)
    assert "failed 4 times in a row" in notes and "fault_tolerance.max_env_failures=3" in notes
    assert "in step() " in notes and f"at step {4 * first - 1} of fragment 0" in notes
    assert len(made) == 4


def test_failures_a_hundred_steps_apart_are_no_row(make_runner):
    for gap, ends in ((100, False), (99, True)):
        fails = [(number, "step", gap if number else 1) for number in range(5)]
        runner = make_runner(shaky(*fails, length=1000), 1, max_env_failures=1, **REBUILD)
        if ends:
            with pytest.raises(OSError, match="made as 1"):
                runner.sample(450)
        else:
            assert runner.sample(450).env_failures == 5


def test_a_reset_that_fails_in_every_new_environment_ends_the_run_at_the_limit(make_runner):
    made = []
    source = shaky((0, "step", 2), *always(*range(1, 9), method="reset"), made=made)
    with pytest.raises(OSError, match="reset 1 of environment made as 3") as caught:
        make_runner(source, 1, max_env_failures=3, **REBUILD).sample(4)
    assert "failed 4 times in a row" in "\n".join(caught.value.__notes__) and len(made) == 4


@pytest.mark.parametrize("kind", ["in_place", "vector"])
def test_an_environment_that_never_worked_ends_the_run_at_once(kind, make_runner):
    made = []
    source = shaky((0, "reset", 1), made=made)
    runner = make_runner(source if kind == "in_place" else lambda: SyncVectorEnv([source]), 1, **REBUILD)
    with pytest.raises(OSError, match="reset 1 of environment made as 0"):
        runner.sample(3)
    assert len(made) == 1


def test_a_factory_that_fails_is_asked_again(make_runner):
    moods = iter([None, OSError("no port"), OSError("no port"), None])
    inner = shaky((0, "step", 2))

    def factory():
        if (mood := next(moods)) is not None:
            raise mood
        return inner()

    assert make_runner(factory, 1, **REBUILD).sample(4).env_failures == 3


def test_without_rebuilding_the_first_failure_ends_the_run(make_runner):
    made = []
    with pytest.raises(OSError, match="step 3") as caught:
        make_runner(shaky((0, "step", 3), made=made), 1, on_env_error="raise").sample(6)
    assert len(made) == 1 and "in a row" not in "\n".join(caught.value.__notes__)


def test_what_an_environment_gets_wrong_ends_the_run_even_so(make_runner):
    class Wrong(Shaky):
        def step(self, action):
            return np.zeros(3, np.float32), 0.0, False, False, {}

    class Diverging(Shaky):
        def step(self, action):
            return np.full(1, np.nan, np.float32), 0.0, False, False, {}

    for env, message in ((Wrong, "shape \\(3,\\)"), (Diverging, "must be finite")):
        with pytest.raises(EnvError, match=message):
            make_runner(lambda env=env: env(0, (), 5, False), 1, **REBUILD).sample(2)


# The log ---------------------------------------------------------------------------------------------------------


def test_each_error_is_told_once_with_its_traceback_and_where(make_runner, caplog):
    class Moody(gymnasium.Wrapper):
        def step(self, action):
            try:
                return super().step(action)
            except OSError as error:
                raise OSError("the simulator is gone") from error

    make = shaky((0, "step", 3), (0, "close", 1), (2, "step", 2), (3, "reset", 1))
    runner = make_runner(lambda: Moody(make()), 2, first_env_index=4, **REBUILD)
    sample = runner.sample(10)
    assert sample.env_failures == 3
    told = [record for record in caplog.records if "is built anew" in record.message]
    assert len(told) == 2
    assert "environment 4 failed at its step 3" in told[0].message and "the simulator is gone" in told[0].message
    text = logging.Formatter().format(told[0])
    assert "step 3 of environment made as 0" in text and "in call" in text and "in step() with action" in text
    assert "reset 1 of environment made as 3" in told[1].message
    (closing,) = [record.message for record in caplog.records if "close()" in record.message]
    assert "environment 4 failed, and so did its close(): OSError('close 1 of environment made as 0')" in closing


def test_errors_that_differ_every_time_do_not_fill_the_log(caplog):
    failures = Failures(1, on_env_error="rebuild")
    for number in range(3 * MAX_WARNINGS):
        failures.recover(OSError(number), lambda: None, where="here", index=0, step=100 * number)
    assert len(caplog.records) == MAX_WARNINGS and failures.take_count() == 3 * MAX_WARNINGS


# Reproducible, resumable, and learned from -----------------------------------------------------------------------


class Unlucky(gymnasium.Wrapper):
    """CartPole that fails at the 6th step of every episode whose seed is a multiple of three: as a simulator's bug."""

    def __init__(self):
        super().__init__(gymnasium.make("CartPole-v1"))

    def reset(self, *, seed=None, options=None):
        assert seed is not None
        self.fails_at = 6 if seed % 3 == 0 else 0
        return super().reset(seed=seed)

    def step(self, action):
        self.fails_at -= 1
        if self.fails_at == 0:
            raise FloatingPointError("the pole has left the universe")
        return super().step(action)


def assert_same_sample(a, b):
    for name, array in b.trajectory.arrays().items():
        np.testing.assert_array_equal(getattr(a.trajectory, name), array, err_msg=name)
    assert (a.episodes, a.env_failures) == (b.episodes, b.env_failures)


def test_failures_are_reproduced_and_a_resume_between_them_is_exact(make_runner, caplog):
    """A new runner after every fragment makes what one runner makes in one go: every border of a failure is hit."""
    straight, twin, broken = (make_runner(Unlucky, 3, build_policy, seed=3, **REBUILD) for _ in range(3))
    failures = 0
    for _ in range(30):
        expected = straight.sample(5)
        assert_same_sample(twin.sample(5), expected)
        restored = make_runner(Unlucky, 3, build_policy, seed=3, **REBUILD)
        restored.set_state(broken.get_state())
        broken = restored
        assert_same_sample(broken.sample(5), expected)
        failures += expected.env_failures
    state = broken.get_state()["envs"]
    assert failures == sum(state["rebuilds"]) > 5 and min(state["rebuilds"]) > 0
    assert "not deterministic" not in caplog.text


def test_a_replay_that_fails_begins_a_new_episode(make_runner, caplog):
    first = make_runner(shaky(), 2, **REBUILD)
    first.sample(3)
    second = make_runner(shaky((1, "step", 2)), 2, **REBUILD)
    second.set_state(first.get_state())
    sample = second.sample(2)
    assert column(sample.trajectory.obs, 0) == [3, 4] and column(sample.trajectory.obs, 1) == [0, 1]
    assert sample.env_failures == 1 and "1 of 2 environments" in caplog.text


def config():
    made = PPOConfig().environment(Unlucky, normalize_obs=True).reporting(progress="none")
    made.env_runners(num_envs_per_env_runner=8, rollout_fragment_length=64)
    return made.training(lr=3e-3, epochs=6, minibatch_size=128)


def test_ppo_goes_on_learning_from_an_environment_that_fails():
    with config().build() as algorithm:
        history = [algorithm.train() for _ in range(12)]
        state = algorithm.get_state()
    counts = [metrics["env_failures"] for metrics in history]
    assert counts == sorted(counts) and 20 < counts[-1] == state["env_failures"]
    assert history[-1]["env_steps"] == 12 * 512 - counts[-1]
    assert history[-1]["episode_return_mean"] > 2 * history[0]["episode_return_mean"]
    with config().build() as resumed:
        resumed.set_state(state)
        assert resumed.train()["env_failures"] >= counts[-1]


def test_ppo_ends_where_the_settings_say_so():
    with config().fault_tolerance(on_env_error="raise").build() as algorithm, pytest.raises(FloatingPointError):
        algorithm.train()


def test_runners_of_a_group_add_up_their_failures():
    made = config().env_runners(num_env_runners=2, num_envs_per_env_runner=4).runtime(engine="inline")
    with made.build() as algorithm:
        count = algorithm.train()["env_failures"]
        parts = [sum(runner["envs"]["rebuilds"]) for runner in algorithm.get_state()["runners"]["runners"]]
    assert count == sum(parts) and min(parts) > 0
