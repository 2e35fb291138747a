"""What a user does with a trained algorithm: act, go on, save, restore, evaluate, and write one's own."""

import importlib
import subprocess
import sys
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces

import rlx
from rlx.algorithms.ppo import PPOConfig
from rlx.checkpoint import list_checkpoints
from rlx.cli import main
from rlx.errors import CheckpointError, ConfigError, RlxError
from rlx.metrics import METRICS, read_metrics


class Sevens(gymnasium.Env):
    """Discrete observations and actions that begin at 7 and at 5; the best action is obs - 2."""

    observation_space = spaces.Discrete(3, start=7)
    action_space = spaces.Discrete(3, start=5)

    def __init__(self, offset=0):
        self.offset = offset

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps, self.obs = 0, 7 + int(self.np_random.integers(3))
        return self.obs, {}

    def step(self, action):
        assert 5 <= action < 8
        reward = float(action == self.obs - 2) + self.offset
        self.steps, self.obs = self.steps + 1, 7 + int(self.np_random.integers(3))
        return self.obs, reward, False, self.steps == 10, {}


@pytest.fixture(autouse=True)
def at_home(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))


def config(environment, **options):
    made = PPOConfig().environment(environment, **options).reporting(progress="none")
    made.env_runners(num_envs_per_env_runner=4, rollout_fragment_length=32)
    return made.training(epochs=2, minibatch_size=32, lr=3e-3)


PENDULUM = {"normalize_obs": True, "normalize_reward": True}


# A trained policy ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("environment, options", [("CartPole-v1", {}), ("Pendulum-v1", PENDULUM), (Sevens, {})])
def test_a_loaded_policy_acts_as_the_one_that_trained(environment, options):
    with config(environment, **options).build() as algorithm:
        for _ in range(3):
            algorithm.train()
        loaded = rlx.load_policy(algorithm.save("saved"))
        assert loaded.evaluate(5, seed=3) == evaluate_again(algorithm, 5, seed=3)

        # The same on the observations of a fragment, by the module itself.
        sampled = algorithm.sample()
        policy = algorithm._build_policy()
        policy.load_state_dict(loaded.policy.state_dict())
        seen_N = torch.from_numpy(sampled.obs.reshape(-1, *sampled.obs.shape[2:]))
        with torch.no_grad():
            expected = policy.distribution.mode(policy(seen_N)[0]).numpy()
        raw_N = seen_N.numpy()
        if environment is Sevens:
            raw_N, expected = raw_N.argmax(-1) + 7, expected + 5
        elif options:  # back from normalised observations, as far as they were not clipped
            raw_N = raw_N / loaded._normalize.scale + loaded._normalize.mean
            expected = expected.clip(-2, 2)
        np.testing.assert_allclose(loaded.act(raw_N), expected, atol=1e-4)


def evaluate_again(algorithm, num_episodes, seed):
    settings = algorithm.settings
    evaluation = settings.evaluation.model_copy(update={"seed": seed})
    algorithm.settings = settings.model_copy(update={"evaluation": evaluation})
    try:
        return algorithm.evaluate(num_episodes)
    finally:
        algorithm.settings = settings


@pytest.mark.parametrize("environment, options", [("CartPole-v1", {}), ("Pendulum-v1", PENDULUM), (Sevens, {})])
def test_act_takes_one_observation_or_many(environment, options):
    with config(environment, **options).build() as algorithm:
        algorithm.train()
        policy = rlx.load_policy(algorithm.save("saved"))
    many = np.stack([policy.observation_space.sample() for _ in range(6)])
    actions = policy.act(many)
    assert len(actions) == 6
    for obs, action in zip(many, actions, strict=True):
        one = policy.act(obs)
        assert policy.action_space.contains(one)
        np.testing.assert_allclose(one, action, atol=1e-6)
    assert np.asarray(policy.act(list(many[0]) if many[0].shape else int(many[0]))).shape == actions.shape[1:]
    draw = [policy.act(many, deterministic=False, rng=np.random.default_rng(seed)) for seed in (1, 1, 2)]
    np.testing.assert_array_equal(draw[0], draw[1])
    assert all(policy.action_space.contains(action) for action in draw[2])


def test_act_clips_to_the_box_of_the_environment():
    with config("Pendulum-v1").model(log_std_init=3.0).build() as algorithm:
        policy = rlx.load_policy(algorithm.save("saved"))
    drawn = policy.act(np.zeros((500, 3), np.float32), deterministic=False, rng=np.random.default_rng(0))
    assert drawn.shape == (500, 1) and drawn.dtype == np.float32
    assert drawn.min() == -2 and drawn.max() == 2
    assert (np.abs(drawn) == 2).mean() > 0.8


def test_a_policy_trained_on_spaces_with_an_offset_finds_the_best_actions():
    with config(Sevens).training(lr=1e-2).build() as algorithm:
        for _ in range(25):
            algorithm.train()
        policy = rlx.load_policy(algorithm.save("saved"))
        assert algorithm.evaluate(5)["evaluation/episode_return_mean"] == 10
    assert [int(policy.act(obs)) for obs in (7, 8, 9)] == [5, 6, 7]


def test_a_policy_is_loaded_without_the_code_that_trained_it():
    """In a fresh process that knows neither the algorithm's file nor the environment."""
    Path("mine.py").write_text(OWN_ALGORITHM)
    Path("own.yaml").write_text(OWN_CONFIG.format(algorithm="./mine.py"))
    assert main(["train", "own.yaml", "--run-dir", "run"]) == 0
    Path("mine.py").unlink()
    code = "import rlx; print(rlx.load_policy('run').act([0.0, 0.0, 0.0, 0.0]) in (0, 1))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "True\n", done.stderr


# Going on --------------------------------------------------------------------------------------------------------


def test_train_and_fit_go_on_from_each_other():
    with config("CartPole-v1").stop(iterations=4).build() as algorithm:
        assert algorithm.train()["iteration"] == 1
        assert algorithm.fit()["iteration"] == 4
        assert algorithm.stop_reason == "iterations 4 reached 4"
        assert algorithm.fit() == {}  # nothing left to do
        assert algorithm.train()["iteration"] == 5
        assert algorithm.fit() == {} and algorithm.iteration == 5


@pytest.mark.parametrize("runners", [0, 1])
def test_what_was_closed_says_so(runners):
    with config("CartPole-v1").env_runners(num_env_runners=runners).stop(iterations=1).build("run") as algorithm:
        pass
    for call in (algorithm.train, algorithm.fit, algorithm.evaluate):
        with pytest.raises(RlxError, match=r"this algorithm was closed, .* build it again from its config"):
            call()
    assert not Path("run/config.yaml").exists()


def test_a_folder_that_holds_a_run_is_refused_before_anything_is_trained():
    made = config("CartPole-v1").stop(iterations=1)
    with made.copy().build("run") as algorithm:
        algorithm.fit()
    with pytest.raises(
        CheckpointError, match=r"run was trained with other settings: training.lr was 0.003 and would be 1"
    ):
        made.copy().training(lr=1.0).build("run")
    with made.copy().build("run") as algorithm, pytest.raises(ConfigError, match="run already holds a run"):
        algorithm.train()  # it may be meant to be restored
    with made.copy().build("run", restore="run") as algorithm:
        assert algorithm.train()["iteration"] == 2
    Path("run/config.yaml").write_text("algorithm: impala\n")
    with pytest.raises(ConfigError, match="run already holds a run"):
        made.copy().build("run")


def test_fit_with_a_run_folder_after_train_keeps_a_run_that_can_be_resumed():
    with config("CartPole-v1").stop(iterations=3).checkpointing(interval=1).build("run") as algorithm:
        algorithm.train()
        algorithm.fit()
    assert [row["iteration"] for row in read_metrics(Path("run/metrics.jsonl"))] == [2, 3]
    assert main(["train", "--resume", "run", "--set", "stop.iterations=4"]) == 0


def test_restore_in_a_new_algorithm_goes_on_exactly():
    made = config("Pendulum-v1", **PENDULUM)
    watched = ("time/", "env_steps_per_s")
    with made.copy().build() as algorithm:
        algorithm.train()
        saved = algorithm.save("saved")
        expected = [algorithm.train() for _ in range(3)]
    with made.copy().build() as algorithm:
        for _ in range(5):  # whatever it did before does not count
            algorithm.train()
        algorithm.restore(saved)
        again = [algorithm.train() for _ in range(3)]
    for one, other in zip(expected, again, strict=True):
        assert {k: v for k, v in one.items() if not k.startswith(watched)} == {
            k: v for k, v in other.items() if not k.startswith(watched)
        }


def test_restore_takes_a_run_folder_too():
    made = config("CartPole-v1").stop(iterations=3)
    with made.copy().build("run") as algorithm:
        algorithm.fit()
    with made.copy().build() as algorithm:
        algorithm.restore("run")
        assert algorithm.iteration == 3
    with made.copy().build() as algorithm, pytest.raises(CheckpointError, match="nowhere"):
        algorithm.restore("nowhere")


def test_saving_twice_to_a_folder_keeps_the_last_and_never_eats_the_files_of_others():
    with config("CartPole-v1").build() as algorithm:
        algorithm.save("saved")
        algorithm.train()
        assert algorithm.save("saved") == Path("saved")
        Path("mine").mkdir()
        Path("mine/thesis.txt").write_text("years of work")
        with pytest.raises(CheckpointError, match=r"holds files of others \(thesis.txt\)"):
            algorithm.save("mine")
        algorithm.restore("saved")
        assert algorithm.iteration == 1
    assert Path("mine/thesis.txt").read_text() == "years of work"


def test_closing_twice_and_failing_in_a_with_block_are_fine():
    with pytest.raises(ZeroDivisionError), config("CartPole-v1").build() as algorithm:
        algorithm.train()
        raise ZeroDivisionError
    algorithm.close()


# Metrics ---------------------------------------------------------------------------------------------------------


def test_evaluation_metrics_are_those_of_the_episodes_played():
    """30 steps of at most 1; the seeds of the episodes do not depend on how many envs play them."""
    made = config(Sevens).evaluation(interval=2, num_episodes=4, num_envs=3).stop(iterations=4)
    with made.build("run") as algorithm:
        last = algorithm.fit()
    rows = read_metrics(Path("run/metrics.jsonl"))
    assert ["evaluation/episodes" in row for row in rows] == [False, True, False, True]
    assert last["evaluation/episodes"] == 4 and last["evaluation/episode_length_mean"] == 10
    policy = rlx.load_policy("run")
    returns = []
    for episode in range(4):
        env = Sevens()
        obs, _ = env.reset(seed=1_000_000 + episode)
        total = 0.0
        for _ in range(10):
            obs, reward, *_ = env.step(int(policy.act(obs)))
            total += reward
        returns.append(total)
    assert last["evaluation/episode_return_mean"] == pytest.approx(np.mean(returns))
    assert last["evaluation/episode_return_std"] == pytest.approx(np.std(returns))
    assert (last["evaluation/episode_return_min"], last["evaluation/episode_return_max"]) == (
        min(returns),
        max(returns),
    )


def test_every_metric_of_a_run_is_documented():
    made = config("CartPole-v1").evaluation(interval=1, num_episodes=1).stop(iterations=2)
    with made.build("run") as algorithm:
        algorithm.fit()
    for row in read_metrics(Path("run/metrics.jsonl")):
        assert row.keys() == METRICS.keys() - {"frames", "learner/rho_clip_fraction"}  # of Atari, of IMPALA
        parts = [row[f"time/{part}_s"] for part in ("env", "inference", "learn", "transfer", "wait", "other")]
        assert sum(parts) == pytest.approx(row["time/iteration_s"], rel=0.05, abs=1e-3)


# One's own -------------------------------------------------------------------------------------------------------

OWN_ALGORITHM = '''\
"""PPO that likes the actions that it took, whatever came of them."""
from rlx.algorithms.ppo import PPO, PPOConfig, PPOTraining


class OwnTraining(PPOTraining):
    """PPO's, and one more."""

    fondness: float = 0.5
    """Weight of the log-probability of the actions taken."""


class OwnConfig(PPOConfig, training=OwnTraining):
    """Settings of Own."""


class Own(PPO, config=OwnConfig):
    """PPO with another loss."""

    @staticmethod
    def loss(policy, minibatch, coefficients, training):
        total, stats = PPO.loss(policy, minibatch, coefficients, training)
        logp, _, _ = policy.evaluate(minibatch)
        fondness = (logp * minibatch.weight).sum()
        return total - training.fondness * fondness, stats | {"fondness": fondness.detach()}
'''

OWN_CONFIG = """\
algorithm: {algorithm}
environment: {{id: CartPole-v1}}
env_runners: {{num_envs_per_env_runner: 4, rollout_fragment_length: 32}}
training: {{epochs: 1, minibatch_size: 64, fondness: 0.25}}
reporting: {{progress: none}}
stop: {{iterations: 2}}
"""


@pytest.mark.parametrize("algorithm", ["./mine.py", "mine"])
@pytest.mark.parametrize("num_learners", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_an_algorithm_of_ones_own_trains_from_yaml_and_resumes(algorithm, num_learners):
    """By the path of its file, next to the YAML, and by its module's name; its loss travels to learner processes."""
    Path("mine.py").write_text(OWN_ALGORITHM)
    name = algorithm if algorithm == "./mine.py" else "package_of_ones_own.mine"
    Path("package_of_ones_own").mkdir()
    Path("package_of_ones_own/mine.py").write_text(OWN_ALGORITHM)
    importlib.invalidate_caches()
    Path("own.yaml").write_text(OWN_CONFIG.format(algorithm=name))
    changes = ["--set", f"learners.num_learners={num_learners}"]
    assert main(["train", "own.yaml", "--run-dir", "run", *changes]) == 0
    assert main(["train", "--resume", "run", "--set", "stop.iterations=3"]) == 0
    assert all(row["learner/fondness"] < 0 for row in read_metrics(Path("run/metrics.jsonl")))
    assert main(["train", "own.yaml", "--run-dir", "other", "--set", "training.fondnes=1"]) == 2
    for module in [module for module in sys.modules if module.startswith("package_of_ones_own")]:
        del sys.modules[module]


def test_two_algorithms_do_not_share_one_config():
    """The second would take PPOConfig().build() over, everywhere and in silence."""
    from rlx.algorithms.ppo import PPO

    with pytest.raises(TypeError, match="PPOConfig builds PPO already; give Mine a config of its own"):

        class Mine(PPO, config=PPOConfig):
            pass

    with config("CartPole-v1").build() as algorithm:
        assert type(algorithm) is PPO


def test_a_config_in_use_cannot_change():
    made = config("CartPole-v1")
    with made.build(), pytest.raises(ConfigError, match="frozen"):
        made.training(lr=1.0)
    assert made.copy().training(lr=1.0).settings.training.lr.end == 1.0


def test_the_best_checkpoint_stays():
    made = config("CartPole-v1").checkpointing(interval=1, keep=1).stop(iterations=8).reporting(window_episodes=5)
    with made.build("run") as algorithm:
        algorithm.fit()
        best = algorithm.best_iteration
    rows = read_metrics(Path("run/metrics.jsonl"))
    scores = {row["iteration"]: row["episode_return_mean"] for row in rows if row["episode_return_mean"] is not None}
    assert best == max(scores, key=lambda iteration: (scores[iteration], -iteration))
    kept = {int(path.name.removeprefix("iter_")) for path in list_checkpoints(Path("run/checkpoints"))}
    assert kept == {best, 8}
