import gymnasium
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from rlx.errors import EnvError
from rlx.nets.policy import build_policy
from rlx.rollout.env_runner import EnvRunner


def test_a_truncated_step_bootstraps_from_its_own_final_observation(count, make_runner):
    """obs counts 0 1 2 | 0 1; V(obs) = obs; step 2 is truncated at observation 3."""
    trajectory = make_runner(count, 1).sample(5).trajectory
    np.testing.assert_array_equal(trajectory.obs[:, 0, 0], [0, 1, 2, 0, 1])
    np.testing.assert_array_equal(trajectory.value[:, 0], [0, 1, 2, 0, 1])
    np.testing.assert_array_equal(trajectory.next_value[:, 0], [1, 2, 3, 1, 2])
    np.testing.assert_array_equal(trajectory.truncated[:, 0], [False, False, True, False, False])
    assert not trajectory.terminated.any() and trajectory.mask.all()


def test_a_terminated_step_has_next_value_zero(count, make_runner):
    trajectory = make_runner(count, 1, kwargs={"terminates": True}).sample(4).trajectory
    np.testing.assert_array_equal(trajectory.next_value[:, 0], [1, 2, 0, 1])


def test_a_step_truncated_at_the_end_of_a_fragment_bootstraps_from_its_final_observation(count, make_runner):
    np.testing.assert_array_equal(make_runner(count, 1).sample(3).trajectory.next_value[:, 0], [1, 2, 3])


def test_the_reset_row_of_next_step_is_masked_across_the_border_of_fragments(count, make_runner):
    """Rows: 0 1 2 | 3 (reset) 0 1 | 2 3 (reset) 0. The reset row holds the final observation."""
    runner = make_runner(lambda: SyncVectorEnv([count]), 1)
    samples = [runner.sample(3) for _ in range(3)]
    obs = np.concatenate([sample.trajectory.obs[:, 0, 0] for sample in samples])
    mask = np.concatenate([sample.trajectory.mask[:, 0] for sample in samples])
    np.testing.assert_array_equal(obs, [0, 1, 2, 3, 0, 1, 2, 3, 0])
    np.testing.assert_array_equal(mask, [1, 1, 1, 0, 1, 1, 1, 0, 1])
    assert [sample.env_steps for sample in samples] == [3, 2, 2]
    assert [episode for sample in samples for episode in sample.episodes] == [(6.0, 3), (6.0, 3)]


def test_an_episode_begins_after_the_row_that_ended_one_also_across_the_border(count, make_runner):
    """Episodes of 3 steps in fragments of 3, 2 and 4."""
    runner = make_runner(count, 1)
    first = [runner.sample(steps).trajectory.first[:, 0].tolist() for steps in (3, 2, 4)]
    assert first == [[True, False, False], [True, False], [False, True, False, False]]


def test_an_episode_begins_after_the_reset_row_of_next_step_also_across_the_border(count, make_runner):
    """obs: 0 1 2 | 3 (reset) 0 1 | 2 3 (reset) | 0 1."""
    runner = make_runner(lambda: SyncVectorEnv([count]), 1)
    first = [runner.sample(steps).trajectory.first[:, 0].tolist() for steps in (3, 3, 2, 2)]
    assert first == [[True, False, False], [False, True, False], [False, False], [True, False]]


def test_an_episode_begins_after_a_failed_step(count, make_runner):
    """The second of two environments fails at its second step and is built anew; so is all of a vector environment."""

    class Fails(count):
        made = 0

        def __init__(self):
            super().__init__(length=9)
            Fails.made += 1
            self.number = Fails.made

        def step(self, action):
            if self.number == 2 and self.steps == 1:
                raise OSError("gone")
            return super().step(action)

    for make, others in ((Fails, False), (lambda: SyncVectorEnv([Fails, Fails]), True)):
        Fails.made = 0
        runner = make_runner(make, 2, on_env_error="rebuild")
        trajectory = runner.sample(4).trajectory
        assert trajectory.first[:, 1].tolist() == [True, False, True, False]
        assert trajectory.first[:, 0].tolist() == [True, False, others, False]
        Fails.made = 0
        runner = make_runner(make, 2, on_env_error="rebuild")  # with the failed row at the fragment's end
        runner.sample(2)
        assert runner.sample(1).trajectory.first.tolist() == [[others, True]]


def test_episodes_begin_anew_where_a_runner_is_restored(count, make_runner):
    """Saved within an episode and at the end of one, in fragments of 2 steps of episodes of 3."""
    for fragments, expected in ((1, False), (2, False), (3, True)):
        runner, restored = make_runner(count, 1), make_runner(count, 1)
        for _ in range(fragments):
            runner.sample(2)
        restored.set_state(runner.get_state())
        first = restored.sample(2).trajectory.first
        assert first[0, 0] == expected
        np.testing.assert_array_equal(first, runner.sample(2).trajectory.first)


def test_a_reward_on_a_reset_row_counts_for_nothing(count, make_runner):
    class Generous(SyncVectorEnv):
        def step(self, actions):
            obs, reward, *rest = super().step(actions)
            return obs, reward + 100.0 * (obs[:, 0] == 0), *rest

    sample = make_runner(lambda: Generous([count]), 1).sample(8)
    np.testing.assert_array_equal(sample.trajectory.reward[:, 0], [1, 2, 3, 0, 1, 2, 3, 0])
    assert sample.episodes == [(6.0, 3), (6.0, 3)]


def test_episodes_span_fragments_and_come_in_order_of_their_end(make_runner, count):
    lengths = iter([5, 3])
    runner = make_runner(lambda: count(next(lengths)), 2)
    assert [runner.sample(4).episodes for _ in range(2)] == [[(6.0, 3)], [(15.0, 5), (6.0, 3)]]


def test_rows_carry_the_version_of_the_weights_that_acted(count, make_runner):
    runner = make_runner(count, 2)
    runner.set_weights(8, runner._parameters.numpy().copy())
    assert (runner.sample(2).trajectory.weights_version == 8).all()
    with pytest.raises(RuntimeError, match="before set_weights"):
        EnvRunner(count, 1, type(runner._acting.policy)).sample(1)


def test_trajectories_are_not_written_to_by_the_next_fragment(make_runner):
    runner = make_runner("CartPole-v1", 2, build_policy)
    first = runner.sample(4).trajectory
    copies = {name: np.copy(array) for name, array in first.arrays().items()}
    runner.sample(4)
    for name, array in first.arrays().items():
        np.testing.assert_array_equal(array, copies[name])


def test_logp_and_value_are_those_of_the_policy_at_the_stored_observation_and_action(make_runner):
    import torch

    runner = make_runner("Pendulum-v1", 2, build_policy)
    trajectory = runner.sample(6).trajectory
    policy = build_policy(spaces.Box(-8, 8, (3,)), spaces.Box(-2, 2, (1,)))
    with torch.no_grad():
        logp, _, value = policy.evaluate(trajectory.tensors())
    np.testing.assert_allclose(trajectory.logp, logp, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(trajectory.value, value, rtol=1e-5, atol=1e-5)


def test_observations_are_normalised_with_frozen_statistics_and_counted_raw_once(count, make_runner):
    """Raw 0 1 2 | 3 0 1 with the reset row's 3 uncounted; the policy saw them under mean 1, deviation 2."""
    runner = make_runner(lambda: SyncVectorEnv([count]), 1, normalize_obs=True, obs_clip=0.9)
    state = {"obs": {"count": 4, "mean": np.array([1.0]), "m2": np.array([16.0])}, "returns": None}
    runner.set_weights(0, runner._parameters.numpy().copy(), state)
    sample = runner.sample(6)
    np.testing.assert_allclose(sample.trajectory.obs[:, 0, 0], [-0.5, 0, 0.5, 0.9, -0.5, 0], rtol=1e-6)
    np.testing.assert_allclose(sample.trajectory.next_value[:, 0], [0, 0.5, 0.9, -0.5, 0, 0.5], rtol=1e-6, atol=1e-7)
    assert sample.obs_moments.count == 5
    np.testing.assert_allclose(sample.obs_moments.mean, [4 / 5], rtol=1e-12)


def test_images_are_not_normalised(make_runner):
    class Image(gymnasium.Env):
        observation_space = spaces.Box(0, 255, (8, 8, 1), np.uint8)
        action_space = spaces.Discrete(2)

        def reset(self, *, seed=None, options=None):
            return np.full((8, 8, 1), 200, np.uint8), {}

        def step(self, action):
            return np.full((8, 8, 1), 100, np.uint8), 0.0, False, True, {}

    sample = make_runner(Image, 2, build_policy, normalize_obs=True).sample(2)
    assert sample.trajectory.obs.dtype == np.uint8 and (sample.trajectory.obs == 200).all()
    assert sample.obs_moments is None


@pytest.mark.parametrize("seed", range(20))
def test_episodes_of_fragments_are_those_of_a_walk_over_the_rows(seed, make_runner, count):
    """Ends, failures and reset rows at random, also at the borders; rewards are whole numbers: exact sums."""
    rng, runner, num_envs = np.random.default_rng(seed), make_runner(count, 3), 3
    return_B, length_B = [0.0] * num_envs, [0] * num_envs
    for num_steps in (5, 1, 4):
        done, failed = (rng.random((num_steps, num_envs)) < rate for rate in (0.4, 0.1))
        mask = (rng.random((num_steps, num_envs)) < 0.8) & ~failed
        reward = rng.integers(-9, 10, (num_steps, num_envs)) * mask.astype(float)
        expected = []
        for t, index in np.ndindex(num_steps, num_envs):
            return_B[index] += reward[t, index]
            length_B[index] += int(mask[t, index])
            if done[t, index]:
                expected.append((return_B[index], length_B[index]))
            if done[t, index] or failed[t, index]:
                return_B[index], length_B[index] = 0.0, 0
        assert runner._ended_episodes(reward, done, failed, mask) == expected
        assert (runner._return_B.tolist(), runner._length_B.tolist()) == (return_B, length_B)


def test_the_moments_of_discounted_returns_come_from_unscaled_rewards(count, make_runner):
    """Rewards 1 2 3 with gamma .5: 1, 2.5, 4.25."""
    sample = make_runner(count, 1, normalize_reward=True, gamma=0.5).sample(3)
    np.testing.assert_array_equal(sample.trajectory.reward[:, 0], [1, 2, 3])
    np.testing.assert_allclose(sample.return_moments.mean, 7.75 / 3, rtol=1e-12)


NOTHING = object()


class Faulty(gymnasium.Env):
    """Counts; at step 4 it returns what it was given."""

    observation_space = spaces.Box(-np.inf, np.inf, (2,), np.float32)
    action_space = spaces.Discrete(2)

    def __init__(self, step=NOTHING, reset=NOTHING):
        self.faulty_step, self.faulty_reset, self.steps = step, reset, 0

    def reset(self, *, seed=None, options=None):
        return (np.zeros(2, np.float32), {}) if self.faulty_reset is NOTHING else self.faulty_reset

    def step(self, action):
        self.steps += 1
        faulty = self.steps == 4 and self.faulty_step is not NOTHING
        if faulty and isinstance(self.faulty_step, BaseException):
            raise self.faulty_step
        return self.faulty_step if faulty else (np.zeros(2, np.float32), 1.0, False, False, {})


def faults(**kwargs):
    """A factory whose second environment is faulty."""
    made = []

    def factory():
        made.append(Faulty(**kwargs) if len(made) == 1 else Faulty())
        return made[-1]

    return factory


OBS = np.zeros(2, np.float32)


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (
            (OBS, 1.0, False, {}),
            r"environment 1: step\(\) returned a tuple of 4: .* gymnasium asks for \(obs, reward, term",
        ),
        (None, r"environment 1: step\(\) returned None; gymnasium asks for"),
        ((np.zeros(3, np.float32), 1.0, False, False, {}), r"environment 1: step\(\) returned .*array of shape \(3,\)"),
        (([0.0, 0.0], 1.0, False, False, {}), r"environment 1: step\(\) returned .*\[0.0, 0.0\]"),
        ((OBS, None, False, False, {}), r"environment 1: step\(\) returned .*None"),
    ],
)
def test_a_step_that_breaks_the_api_is_an_env_error_that_shows_what_was_returned(returned, message, make_runner):
    with pytest.raises(EnvError, match=message) as caught:
        make_runner(faults(step=returned), 2).sample(8)
    assert "at step 3 of fragment 0" in caught.value.__notes__[-1]


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (OBS, r"environment 1: reset\(\) returned array of shape \(2,\).*gymnasium asks for \(obs, info\)"),
        ((np.zeros(2, np.complex64), {}), r"environment 1: reset\(\) returned the observation .*complex64"),
        ((np.zeros(1, np.float32), {}), r"environment 1: reset\(\) returned the observation array of shape \(1,\)"),
    ],
)
def test_a_reset_that_breaks_the_api_is_an_env_error_that_shows_what_was_returned(returned, message, make_runner):
    with pytest.raises(EnvError, match=message):
        make_runner(faults(reset=returned), 2).sample(1)


def test_the_first_step_is_checked_for_the_types_that_arrays_would_swallow(make_runner):
    class Wordy(Faulty):
        def step(self, action):
            return OBS, "1.0", False, False, {}

    class Vague(Faulty):
        def step(self, action):
            return OBS, 1.0, None, False, {}

    with pytest.raises(EnvError, match=r"environment 0: step\(\) returned the reward '1.0'"):
        make_runner(Wordy, 1).sample(1)
    with pytest.raises(EnvError, match=r"environment 0: step\(\) returned terminated None"):
        make_runner(Vague, 1).sample(1)


def test_an_exception_in_an_environment_travels_with_a_note_of_where(make_runner):
    with pytest.raises(ZeroDivisionError) as caught:
        make_runner(faults(step=ZeroDivisionError("mine")), 2).sample(8)
    notes = "\n".join(caught.value.__notes__)
    assert "in step() with action" in notes and "of environment 1 of" in notes and "at step 3 of fragment 0" in notes


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (
            (np.float32([0, np.nan]), 1.0, False, False, {}),
            "environment 11: observation .*nan.* at step 4 of fragment 0",
        ),
        ((OBS, np.inf, False, False, {}), "environment 11: reward inf at step 3 of fragment 0"),
        ((np.float32([0, np.inf]), 1.0, False, True, {}), "environment 11: final observation .*inf.* at step 3"),
    ],
)
@pytest.mark.parametrize("num_steps", [4, 6])
def test_values_that_are_not_finite_are_an_env_error_that_says_where(returned, message, num_steps, make_runner):
    with pytest.raises(EnvError, match=message):
        make_runner(faults(step=returned), 2, first_env_index=10).sample(num_steps)


def test_an_action_that_is_not_finite_reaches_no_environment(make_runner):
    class Obedient(Faulty):
        """Would take NaN without a word, and go on with numbers of its own."""

        action_space = spaces.Box(-1, 1, (2,), np.float32)

        def step(self, action):
            actions.append(action)
            return super().step(action)

    actions = []
    runner = make_runner(Obedient, 2, build_policy, first_env_index=3)
    runner.sample(5)
    weights = runner._parameters.numpy().copy()
    runner.set_weights(1, np.full_like(weights, np.nan))
    sentence = (
        r"environment 3: the policy's action \[nan nan\] at step 0 of fragment 1 is not finite.*lower training.lr"
    )
    with pytest.raises(EnvError, match=sentence):
        runner.sample(5)
    assert len(actions) == 10 and np.isfinite(actions).all()
    runner.set_weights(2, weights)
    assert runner.sample(5).trajectory.mask.all()


@pytest.mark.parametrize("mode", ["in_place", AutoresetMode.NEXT_STEP, AutoresetMode.DISABLED])
def test_an_interrupt_leaves_a_runner_whose_next_fragment_begins_clean(mode, make_runner):
    env = Faulty(step=KeyboardInterrupt())
    source = (lambda: env) if mode == "in_place" else SyncVectorEnv([lambda: env], autoreset_mode=mode)
    runner = make_runner(source, 1, normalize_reward=True, gamma=1.0)
    runner.sample(2)
    with pytest.raises(KeyboardInterrupt):
        runner.sample(8)
    sample = runner.sample(3)
    assert runner._length_B == [3] and runner._return_B == [3.0]
    assert sample.return_moments.mean == 2.0  # returns 1, 2, 3: nothing of the cut fragment
    assert sample.env_steps == 3


def test_one_seed_gives_one_trajectory_and_another_seed_another(make_runner):
    a, b, c = (make_runner("CartPole-v1", 2, build_policy, seed=seed).sample(20).trajectory for seed in (1, 1, 2))
    np.testing.assert_array_equal(a.obs, b.obs)
    np.testing.assert_array_equal(a.action, b.action)
    assert not np.array_equal(a.obs, c.obs)
