"""PPO as a whole: claims that only hold if sampling, credit assignment and learning fit together."""

from collections import Counter

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces

from rlx.algorithms.ppo import PPO, PPOConfig, PPOTraining
from rlx.envs.corridor import Corridor


class Forever(gymnasium.Env):
    """Reward 1 for ever; one observation."""

    observation_space = spaces.Box(0, 1, (1,), np.float32)
    action_space = spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        return np.ones(1, np.float32), {}

    def step(self, action):
        return np.ones(1, np.float32), 1.0, False, False, {}


class Picture(gymnasium.Env):
    """Noise for a picture; the reward is the action."""

    observation_space = spaces.Box(0, 255, (1, 36, 36), np.uint8)
    action_space = spaces.Discrete(3)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.observation_space.sample(), {}

    def step(self, action):
        return self.np_random.integers(0, 255, (1, 36, 36), np.uint8), float(action), False, False, {}


class Recorder(gymnasium.Wrapper):
    """Pendulum that keeps the actions it gets."""

    actions: list = []  # noqa: RUF012 - shared on purpose: the test reads what the algorithm's copy got

    def __init__(self):
        super().__init__(gymnasium.make("Pendulum-v1"))

    def step(self, action):
        self.actions.append(action.copy())
        return super().step(action)


class ProbeConfig(PPOConfig, training=PPOTraining):
    """PPO's settings."""


class Probe(PPO, config=ProbeConfig):
    """PPO that keeps every minibatch with the new log-probabilities that its loss sees."""

    seen: list = []  # noqa: RUF012 - the loss is static

    @staticmethod
    def loss(policy, minibatch, coefficients, training):
        new_logp = policy.evaluate(minibatch)[0]
        Probe.seen.append((minibatch, new_logp.detach().clone()))
        return PPO.loss(policy, minibatch, coefficients, training)


@pytest.fixture(autouse=True)
def nothing_seen_yet():
    Probe.seen.clear()
    Recorder.actions.clear()


def config(environment, kind=PPOConfig, **training):
    made = kind().environment(environment).env_runners(num_envs_per_env_runner=4, rollout_fragment_length=32)
    return made.training(**{"epochs": 2, "minibatch_size": 32} | training)


# Time limits -----------------------------------------------------------------------------------------------------


def value_after_training(environment):
    """Return V of the one observation by a linear critic: 1 / (1 - 0.98) = 50 if every cut is bootstrapped."""
    made = config(environment, gamma=0.98, lr={"start": 0.3, "end": 0.01, "env_steps": 10_000}, max_grad_norm=None)
    with made.training(epochs=4).model(hidden=[]).build() as algorithm:
        for _ in range(90):
            algorithm.train()
        return float(algorithm.sample().value.mean())


def test_a_time_limit_is_no_end():
    """C2: reward 1 for ever under a limit of 8 steps is worth 50, not the 7.5 of eight discounted ones."""
    assert value_after_training(lambda: gymnasium.wrappers.TimeLimit(Forever(), 8)) == pytest.approx(50, abs=1)


def test_a_terminal_state_is_an_end():
    """The same, terminated after step 8 but looking alike: between a last step's 1 and a first step's 7.5."""

    class Ends(gymnasium.Wrapper):
        def reset(self, **options):
            self.steps = 0
            return super().reset(**options)

        def step(self, action):
            self.steps += 1
            obs, reward, _, _, info = super().step(action)
            return obs, reward, self.steps == 8, False, info

    assert 1 < value_after_training(lambda: Ends(Forever())) < 7.5


@pytest.mark.parametrize("lambda_", [0.0, 0.95])
def test_ppo_solves_the_corridor_and_its_critic_knows_what_is_left(lambda_):
    """C4: values of the best policy follow from the discount alone: -(1 - 0.9^n) / 0.1, n steps before the end."""
    made = config(Corridor, gamma=0.9, lambda_=lambda_, minibatch_size=64, entropy_coef=0.02, epochs=4)
    made.training(lr={"start": 5e-3, "end": 1e-4, "env_steps": 15_000}).reporting(window_episodes=20)
    with made.env_runners(num_envs_per_env_runner=8).build() as algorithm:
        for _ in range(60):
            metrics = algorithm.train()
        assert metrics["episode_return_mean"] > -8.7
        evaluated = algorithm.evaluate(3)
        assert evaluated["evaluation/episode_return_min"] == evaluated["evaluation/episode_return_max"] == -8.0
        sampled = algorithm.sample()
        value = {int(obs.argmax()): value for obs, value in zip(sampled.obs[:, 0], sampled.value[:, 0], strict=True)}
    for cell in range(8):
        assert value[cell] == pytest.approx(-(1 - 0.9 ** (8 - cell)) / 0.1, abs=0.3)


# The first minibatch ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "environment, options, model",
    [
        ("CartPole-v1", {}, {}),
        ("Pendulum-v1", {"normalize_obs": True, "normalize_reward": True}, {"log_std_init": 0.5}),
        ("CartPole-v1", {}, {"share_encoder": True, "activation": "gelu"}),
        (Corridor, {}, {"activation": "relu"}),
        (Picture, {}, {"hidden": [16]}),
    ],
)
def test_the_first_minibatch_of_an_iteration_has_ratio_1_and_no_kl(environment, options, model):
    """C11: learning evaluates the very policy, observation and unclipped action that acted."""
    made = config(environment, ProbeConfig, lr=3e-3).environment(environment, **options).model(**model)
    with made.build() as algorithm:
        for _ in range(2):  # in the second one weights and statistics are no longer the initial ones
            Probe.seen.clear()
            algorithm.train()
            minibatch, new_logp = Probe.seen[0]
            counted = minibatch.mask
            log_ratio = (new_logp - minibatch.logp)[counted].double()  # in float32, exp(x) - 1 - x is rounding alone
            assert log_ratio.abs().max() < 1e-5
            assert ((log_ratio.exp() - 1) - log_ratio).mean() < 1e-9
            last, last_logp = Probe.seen[-1]
            assert (last_logp - last.logp)[last.mask].abs().max() > 1e-4  # and it did learn


# What counts -----------------------------------------------------------------------------------------------------


class Garbled(PPO):
    """PPO whose sample holds nonsense wherever the mask says that there is no transition."""

    def sample(self):
        sampled = super().sample()
        for name in ("obs", "reward", "value", "next_value", "logp"):
            getattr(sampled, name)[~sampled.mask] = 1e3
        sampled.action[~sampled.mask] = 1 - sampled.action[~sampled.mask]
        self.garbled = int((~sampled.mask).sum())
        return sampled


def test_masked_steps_count_nowhere():
    """C12: neither in the advantages' moments nor in any loss, statistic or step count."""
    made = config("CartPole-v1", minibatch_size=24, value_clip=0.2)
    with PPO(made) as plain, Garbled(made) as garbled:
        for _ in range(3):
            expected, seen = plain.train(), garbled.train()
            assert garbled.garbled > 0
            assert seen["env_steps"] == expected["env_steps"] < 128 * seen["iteration"]
            for name in expected:
                if not name.startswith(("time/", "env_steps_per_s")):
                    assert seen[name] == expected[name], name
        np.testing.assert_array_equal(garbled.learners.weights(), plain.learners.weights())


def test_actions_are_stored_as_sampled_and_clipped_only_for_the_environment():
    """C13: Pendulum takes [-2, 2]; a standard deviation of e^2 leaves it most of the time."""
    with config(Recorder).environment(vectorization="in_place").model(log_std_init=2.0).build() as algorithm:
        sampled = algorithm.sample()
        stored = sampled.action.reshape(-1)
        received = np.array(Recorder.actions).reshape(-1)
        assert (np.abs(stored) > 2).mean() > 0.5
        np.testing.assert_array_equal(received, np.clip(stored, -2, 2))
        policy = algorithm._build_policy()
        mean = policy(torch.from_numpy(sampled.obs.reshape(-1, 3)))[0].detach().numpy().reshape(-1)
        expected = -0.5 * ((stored - mean) / np.e**2) ** 2 - 2 - 0.5 * np.log(2 * np.pi)
        np.testing.assert_allclose(sampled.logp.reshape(-1), expected, atol=1e-4)


@pytest.mark.parametrize("num_learners", [0, 1])
def test_every_sample_is_used_once_an_epoch(num_learners):
    """C16: 128 samples in minibatches of 50, 50 and 28; the last one is not dropped."""
    made = config("Pendulum-v1", ProbeConfig, epochs=3, minibatch_size=50).learners(num_learners=num_learners)
    with made.runtime(engine="inline").build() as algorithm:
        assert algorithm.train()["gradient_steps"] == 9
    uses = Counter(action for minibatch, _ in Probe.seen for action in minibatch.action.flatten().tolist())
    assert len(uses) == 128 and set(uses.values()) == {3}
    assert [len(minibatch) for minibatch, _ in Probe.seen] == [50, 50, 28] * 3
    for minibatch, _ in Probe.seen:
        assert float(minibatch.weight.sum()) == pytest.approx(1, abs=1e-6)


def test_the_kl_limit_ends_the_update_before_the_step_that_would_follow():
    """C17: the first minibatch has no KL and makes a step; the second sees its effect and makes none."""
    made = config("Pendulum-v1", ProbeConfig, lr=1e-2, target_kl=1e-6)
    with made.build() as algorithm, config("Pendulum-v1", lr=1e-2).build() as unlimited:
        before = algorithm.learners.weights()
        metrics = algorithm.train()
        assert (metrics["gradient_steps"], metrics["learner/stopped_early"]) == (1, 1.0)
        assert len(Probe.seen) == 2
        # One step of Adam moves no parameter by more than lr, whatever the gradient; two would.
        assert 0.9e-2 < np.abs(algorithm.learners.weights() - before).max() <= 1.001e-2
        assert unlimited.train()["gradient_steps"] == 2 * 4
        assert algorithm.train()["gradient_steps"] >= 2  # the next iteration starts anew


def test_schedules_follow_the_env_steps_of_the_run():
    made = config("Pendulum-v1", lr={"start": 1e-3, "end": 0.0, "env_steps": 256}, clip_range=0.3)
    with made.build() as algorithm:
        rates = [algorithm.train()["learner/lr"] for _ in range(4)]
        before = algorithm.learners.weights()
        assert rates == pytest.approx([1e-3, 0.5e-3, 0.0, 0.0])
        algorithm.train()
        np.testing.assert_array_equal(algorithm.learners.weights(), before)  # a rate of 0 learns nothing


def test_the_reported_return_is_that_of_the_episodes_played():
    """Counted by hand from the rewards of the fragments, unscaled though rewards are normalised."""
    made = config(Corridor).environment(Corridor, kwargs={"length": 3}, normalize_reward=True)
    played = []

    class Counting(Corridor):
        total = 0.0

        def step(self, action):
            obs, reward, terminated, truncated, info = super().step(action)
            self.total += reward
            if terminated or truncated:
                played.append((self.total, self.steps))
                self.total = 0.0
            return obs, reward, terminated, truncated, info

    made.environment(Counting, vectorization="in_place").reporting(window_episodes=10)
    with made.build() as algorithm:
        for _ in range(3):
            metrics = algorithm.train()
            returns, lengths = zip(*played[-10:], strict=True)
            assert metrics["episodes"] == len(played)
            assert metrics["episode_return_mean"] == pytest.approx(np.mean(returns))
            assert metrics["episode_length_mean"] == pytest.approx(np.mean(lengths))
            assert (metrics["episode_return_min"], metrics["episode_return_max"]) == (min(returns), max(returns))


def test_a_fragment_without_a_single_transition_teaches_nothing():
    """One env and one step: every now and then the only row is the reset step of the vector environment."""
    made = PPOConfig().environment("CartPole-v1").env_runners(num_envs_per_env_runner=1, rollout_fragment_length=1)
    with made.training(epochs=1, minibatch_size=1).build() as algorithm:
        steps = [0] + [algorithm.train()["env_steps"] for _ in range(60)]
        assert set(np.diff(steps)) == {0, 1}
        assert np.isfinite(algorithm.learners.weights()).all()
