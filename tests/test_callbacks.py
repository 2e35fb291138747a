"""Callbacks: every point, where it runs, what it may change, and that nothing of it is lost or swallowed."""

import json
import os
import signal
import sys
import textwrap

import gymnasium
import jsonschema
import numpy as np
import pytest
import yaml
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, SyncVectorEnv

import rlx
from rlx import Callback
from rlx.algorithms.impala import IMPALAConfig
from rlx.algorithms.ppo import PPOConfig
from rlx.checkpoint import list_checkpoints
from rlx.cli import main
from rlx.errors import ConfigError, RlxError
from rlx.metrics import read_metrics
from tests.polling import until

pytestmark = pytest.mark.usefixtures("shared_processes")


class Levels(gymnasium.Env):
    """obs = (level, step); the reward is the level; truncated after 4 steps, whose last info says the level."""

    observation_space = spaces.Box(-np.inf, np.inf, (2,), np.float32)
    action_space = spaces.Discrete(2)

    def __init__(self, breaks=None):
        self.level, self.steps, self.breaks = 0, 0, breaks

    def set_task(self, level):
        self.level = level

    def reset(self, *, seed=None, options=None):
        self.steps = 0
        return np.array([self.level, 0], np.float32), {}

    def step(self, action):
        self.steps += 1
        if self.steps == self.breaks:
            self.breaks = None
            raise RuntimeError("broken")
        obs = np.array([self.level, self.steps], np.float32)
        return obs, float(self.level), False, self.steps == 4, {"level": self.level} if self.steps == 4 else {}


def config(*callbacks, num_env_runners=0, env=Levels, **environment):
    made = PPOConfig().environment(env, **environment).reporting(progress="none").checkpointing(interval=2)
    made.env_runners(num_env_runners=num_env_runners, num_envs_per_env_runner=2, rollout_fragment_length=8)
    return made.training(epochs=1, minibatch_size=16).stop(iterations=4).callbacks(list(callbacks))


def computed(row):
    return {name: value for name, value in row.items() if not name.startswith(("time/", "env_steps_per_s"))}


# Which point comes when ----------------------------------------------------------------------------------------------


class Diary(Callback):
    """Notes every point of the driver."""

    entries: list[tuple] = []  # noqa: RUF012

    def on_algorithm_start(self, algo):
        Diary.entries = [("on_algorithm_start", algo.iteration)]

    def on_restore(self, algo):
        self.entries.append(("on_restore", algo.iteration))

    def on_sample_end(self, algo, sample):
        self.entries.append(("on_sample_end", sample.reward.shape))

    def on_train_result(self, algo, metrics):
        self.entries.append(("on_train_result", metrics["iteration"]))

    def on_evaluate_start(self, algo):
        self.entries.append(("on_evaluate_start",))

    def on_evaluate_end(self, algo, metrics):
        self.entries.append(("on_evaluate_end", metrics["evaluation/episodes"]))

    def on_checkpoint(self, algo, path):
        self.entries.append(("on_checkpoint", path.name, (path / "state.json").exists()))

    def on_stop(self, algo, reason):
        self.entries.append(("on_stop", reason))


def test_the_points_of_the_driver_come_in_this_order(tmp_path):
    made = config(Diary).stop(iterations=2).evaluation(interval=2, num_episodes=3)
    with made.build(tmp_path / "run") as algorithm:
        assert algorithm.run_dir == tmp_path / "run"
        algorithm.fit()
        algorithm.restore(tmp_path / "run")
    assert Diary.entries == [
        ("on_algorithm_start", 0),
        ("on_checkpoint", "iter_000000", True),
        ("on_sample_end", (8, 2)),
        ("on_train_result", 1),
        ("on_sample_end", (8, 2)),
        ("on_train_result", 2),
        ("on_evaluate_start",),
        ("on_evaluate_end", 3),
        ("on_checkpoint", "iter_000002", True),
        ("on_stop", "iterations 2 reached 2"),
        ("on_restore", 2),
    ]


class InRunner(Callback):
    """Measures episodes in the env runners, and counts the environments that it has seen made."""

    def __init__(self, offset=0.0):
        self.offset, self.envs = offset, []

    def on_env_created(self, env, index):
        self.envs.append(index)

    def on_episode_end(self, episode):
        assert (episode.return_, episode.length, episode.terminated) == (4.0 * episode.info["level"], 4, False)
        assert self.envs[0] <= episode.env_index < self.envs[0] + 2
        return {"level": episode.info["level"] + self.offset, "index": episode.env_index, "envs": len(self.envs)}


def vector(mode):
    def make(num_envs):
        return SyncVectorEnv([Levels] * num_envs, autoreset_mode=mode)

    return make


ENVS = [Levels, *(vector(mode) for mode in AutoresetMode)]


@pytest.mark.parametrize("env", ENVS, ids=["in_place", *(mode.name for mode in AutoresetMode)])
def test_episodes_are_measured_with_their_last_info(env):
    with config({"class": InRunner, "kwargs": {"offset": 0.5}}, env=env).build() as algorithm:
        algorithm.call_envs("set_task", 3)
        row = algorithm.train()
    assert row["episode_return_mean"] == 12.0
    assert (row["custom/level"], row["custom/index"]) == (3.5, 0.5)
    assert row["custom/envs"] == (2 if env is Levels else 1)


def test_each_env_runner_has_callbacks_of_its_own():
    with config(InRunner, num_env_runners=2).build() as algorithm:
        row = algorithm.train()
    # Two environments for each runner, numbered 0 to 3 over both; eight episodes.
    assert (row["custom/envs"], row["custom/index"]) == (2.0, 1.5)


def test_an_iteration_without_an_episode_has_no_metric_of_episodes():
    with config(InRunner).env_runners(rollout_fragment_length=2).training(minibatch_size=4).build() as algorithm:
        rows = [algorithm.train() for _ in range(2)]
    assert ["custom/level" in row for row in rows] == [False, True]


def test_an_environment_that_is_built_anew_is_told_of_before_its_reset():
    class Mends(InRunner):
        def on_env_created(self, env, index):
            super().on_env_created(env, index)
            if len(self.envs) > 2:
                env.breaks = None

    with config(Mends, kwargs={"breaks": 3}).build() as algorithm:
        row = algorithm.train()
    assert (row["env_failures"], row["custom/envs"]) == (2, 4)


def test_no_runner_makes_callbacks_that_have_nothing_to_do_there():
    with config(Diary).build() as algorithm:
        assert algorithm.callbacks.for_runners() is None
    with config().build() as algorithm:
        assert algorithm.callbacks.for_runners() is None
        assert not any(name.startswith("custom/") for name in algorithm.train())


# What callbacks may do ------------------------------------------------------------------------------------------------


class Report(Callback):
    def __init__(self, name="custom/double", value=None):
        self.name, self.value = name, value

    def on_train_result(self, algo, metrics):
        metrics[self.name] = np.float32(2 * metrics["iteration"]) if self.value is None else self.value


def report(**kwargs):
    return {"class": Report, "kwargs": kwargs}


def test_metrics_of_its_own_reach_the_row_and_the_file(tmp_path):
    class OfEvaluation(Callback):
        def on_evaluate_end(self, algo, metrics):
            metrics["custom/span"] = metrics["evaluation/episode_return_max"] - metrics["evaluation/episode_return_min"]

    with config(Report, OfEvaluation).evaluation(interval=2).build(tmp_path / "run") as algorithm:
        assert algorithm.fit()["custom/double"] == 8.0
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [row["custom/double"] for row in rows] == [2.0, 4.0, 6.0, 8.0]
    assert [row.get("custom/span") for row in rows] == [None, 0.0, None, 0.0]


@pytest.mark.parametrize(
    "kwargs, sentence",
    [
        ({"name": "double"}, r"Report\.on_train_result\(\) set the metric double; call it custom/double\."),
        ({"name": "env_steps"}, r"set the metric env_steps; call it custom/env_steps\."),
        ({"name": "learner/x"}, r"call it custom/x\."),
        ({"value": "high"}, r"set custom/double to 'high'; a metric is a number or None\."),
    ],
)
def test_what_is_no_metric_of_its_own_is_refused(kwargs, sentence):
    with config(report(**kwargs)).build() as algorithm, pytest.raises(RlxError, match=sentence):
        algorithm.train()


class Stop(Callback):
    def on_train_result(self, algo, metrics):
        if metrics["iteration"] == 3:
            algo.request_stop("three are enough")


def test_a_request_ends_the_run_with_its_reason_and_a_checkpoint(tmp_path):
    with config(Stop).stop(iterations=9).build(tmp_path / "run") as algorithm:
        algorithm.fit()
        assert (algorithm.iteration, algorithm.stop_reason) == (3, "three are enough")
        assert list_checkpoints(tmp_path / "run" / "checkpoints")[-1].name == "iter_000003"
        algorithm.fit()  # the request was for one fit
        assert (algorithm.iteration, algorithm.stop_reason) == (9, "iterations 9 reached 9")


class SlowDown(Callback):
    def on_train_result(self, algo, metrics):
        if metrics["iteration"] == 2:
            algo.set_schedule("lr", 1e-5)
            algo.set_schedule("clip_range", {"start": 0.3, "end": 0.1, "env_steps": 64})


def test_a_schedule_can_be_changed_and_stays_so_in_a_resumed_run(tmp_path):
    with config(SlowDown).build() as algorithm:
        rows = [algorithm.train() for _ in range(3)]
        saved = algorithm.save(tmp_path / "saved")
        rows.append(algorithm.train())
    assert [row["learner/lr"] for row in rows] == [3e-4, 3e-4, 1e-5, 1e-5]
    # 16 steps an iteration: at 32 and 48 of 64.
    assert [row["learner/clip_range"] for row in rows] == pytest.approx([0.2, 0.2, 0.2, 0.15])
    with config(SlowDown).build() as again:
        again.restore(saved)
        assert computed(again.train()) == computed(rows[3])
        with pytest.raises(ConfigError, match=r"training\.gamma is no schedule.*; lr, clip_range can\."):
            again.set_schedule("gamma", 0.5)
        with pytest.raises(ConfigError, match=r"training\.lr is -1; it must be a number >= 0"):
            again.set_schedule("lr", -1)


# Curriculum -----------------------------------------------------------------------------------------------------------


class Curriculum(Callback):
    """Raises the level after every second iteration; the level is in its state."""

    def __init__(self):
        self.level = 0

    def on_train_result(self, algo, metrics):
        if metrics["iteration"] % 2 == 0:
            self.level += 1
            algo.call_envs("set_task", self.level)
        metrics["custom/level"] = self.level

    def get_state(self):
        return {"level": self.level}

    def set_state(self, state):
        self.level = state["level"]


@pytest.mark.slow
@pytest.mark.parametrize("num_env_runners, max_age", [(0, 0), (2, 0), (2, 1)])
def test_a_curriculum_raises_the_level_and_a_resumed_run_goes_on_exactly(tmp_path, num_env_runners, max_age):
    made = config(Curriculum, InRunner, num_env_runners=num_env_runners).env_runners(rollout_fragment_length=6)
    made.training(minibatch_size=12, max_age=max_age)
    with made.copy().build() as algorithm:
        rows = [computed(algorithm.train()) for _ in range(3)]
        saved = algorithm.save(tmp_path / "saved")  # in mid-episode: 6 steps of an episode of 4
        rows += [computed(algorithm.train()) for _ in range(4)]
        evaluated = algorithm.evaluate(num_episodes=2)
    assert [row["custom/level"] for row in rows] == [0, 1, 1, 2, 2, 3, 3]
    assert evaluated["evaluation/episode_return_mean"] == 12.0
    with made.copy().build() as again:
        again.restore(saved)
        resumed = [computed(again.train()) for _ in range(4)]
    # All but what an object of the runner counted: it is new, and has seen its environments made anew.
    assert [row | {"custom/envs": 0} for row in resumed] == [row | {"custom/envs": 0} for row in rows[3:]]
    assert rlx.load_policy(saved).evaluate(2)["evaluation/episode_return_mean"] == 4.0


def test_going_back_in_the_same_algorithm_goes_back_in_the_level(tmp_path):
    with config(Curriculum).build() as algorithm:
        saved = algorithm.save(tmp_path / "saved")
        rows = [computed(algorithm.train()) for _ in range(5)]
        algorithm.restore(saved)
        assert [computed(algorithm.train()) for _ in range(5)] == rows
    assert rows[-1]["episode_return_max"] == 8.0


@pytest.mark.slow
def test_a_killed_runner_comes_back_with_the_level_and_is_told_of():
    class Restarts(Callback):
        counts: list[int] = []  # noqa: RUF012

        def on_runner_restart(self, algo, count):
            self.counts.append(count)

    with config(Restarts, num_env_runners=2).reporting(window_episodes=8).build() as algorithm:
        algorithm.set_env_attribute("level", 5)
        assert algorithm.train()["episode_return_min"] == 20.0
        os.kill(algorithm._runtime().state()["env_runner/1"].pid, signal.SIGKILL)
        row = algorithm.train()
    assert (row["runner_restarts"], row["episode_return_min"]) == (1, 20.0) and Restarts.counts == [1]


@pytest.mark.slow
def test_runners_that_nobody_waits_for_are_changed_and_listened_to_as_well():
    made = IMPALAConfig().environment(Levels).reporting(progress="none").callbacks([Curriculum, InRunner])
    made.env_runners(num_env_runners=2, num_envs_per_env_runner=2, rollout_fragment_length=6)
    with made.training(updates_per_iteration=10).build() as algorithm:
        rows = [algorithm.train() for _ in range(5)]
        assert [row["custom/level"] for row in rows] == [0, 1, 1, 2, 2]
        # Every episode was played at one level, which InRunner asserts; the newest one is reached.
        assert rows[-1]["episode_return_max"] == 8.0
        # The second runner, whose environments are 2 and 3, may begin late: then it makes up for that.
        until(lambda: rows[-1]["custom/index"] > 1.0 or rows.append(algorithm.train()))


def test_what_a_checkpoint_cannot_hold_is_refused_at_the_call():
    with config().build() as algorithm:
        with pytest.raises(ConfigError, match=r"set_task of the environments cannot be changed: .* as checkpoints"):
            algorithm.call_envs("set_task", object())
        algorithm.call_envs("set_task", np.int64(2))
        assert algorithm.get_state()["runners"]["env_changes"] == [["call", "set_task", [2]]]


# Errors ---------------------------------------------------------------------------------------------------------------


class Broken(Callback):
    """Raises at one point, from the third iteration on where there is one."""

    def __init__(self, point):
        self.point = point

    def maybe(self, point):
        if point == self.point:
            raise ZeroDivisionError("oh no")


def raising(point):
    def method(self, *arguments):
        if point != "on_train_result" or arguments[1]["iteration"] == 3:
            self.maybe(point)

    return method


POINTS = [name for name in vars(Callback) if name.startswith("on_")]
for _point in POINTS:
    setattr(Broken, _point, raising(_point))


HERE = [point for point in POINTS if point not in ("on_restore", "on_runner_restart")]


@pytest.mark.parametrize(
    "point, num_env_runners", [*((point, 0) for point in HERE), ("on_env_created", 1), ("on_episode_end", 1)]
)
def test_an_error_travels_with_the_name_of_the_callback_and_the_point(tmp_path, point, num_env_runners):
    made = config({"class": Broken, "kwargs": {"point": point}}, num_env_runners=num_env_runners)
    with pytest.raises(ZeroDivisionError, match="oh no") as caught, made.evaluation(interval=1).build(tmp_path) as algo:
        algo.fit()
    assert f"in the callback Broken.{point}()" in "\n".join(caught.value.__notes__)


def test_a_run_that_a_callback_ended_goes_on_from_its_checkpoint(tmp_path):
    breaking = config({"class": Broken, "kwargs": {"point": "on_train_result"}})
    with pytest.raises(ZeroDivisionError), breaking.build(tmp_path / "run") as algorithm:
        algorithm.fit()
    with config().build(tmp_path / "run") as algorithm:
        algorithm.restore(tmp_path / "run")
        assert algorithm.iteration == 2
        algorithm.fit()
    assert [row["iteration"] for row in read_metrics(tmp_path / "run" / "metrics.jsonl")] == [1, 2, 3, 4]


def test_an_error_on_a_rebuilt_environment_is_not_the_environment_s(tmp_path):
    class OnceMore(Callback):
        seen = 0

        def on_env_created(self, env, index):
            OnceMore.seen += 1
            assert OnceMore.seen <= 2, "a third one"

    breaking = config(OnceMore, kwargs={"breaks": 2})
    with breaking.build() as algorithm, pytest.raises(AssertionError, match="a third one"):
        algorithm.train()
    assert OnceMore.seen == 3


# Configuration --------------------------------------------------------------------------------------------------------

MODULE = """
from rlx import Callback

class Patience(Callback):
    def __init__(self, iterations=2):
        self.iterations = iterations

    def on_train_result(self, algo, metrics):
        metrics["custom/patience"] = self.iterations
        if metrics["iteration"] == self.iterations:
            algo.request_stop("patience is over")

number = 3
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "patient.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield "patient"
    sys.modules.pop("patient", None)


def test_yaml_takes_import_paths_with_and_without_arguments(module):
    text = "algorithm: ppo\ncallbacks: [patient:Patience, {class: patient:Patience, kwargs: {iterations: 7}}]\n"
    made = PPOConfig.from_yaml(text)
    assert PPOConfig.from_yaml(made.to_yaml()) == made and "patient:Patience" in repr(made)
    assert made == PPOConfig().callbacks(
        ["patient:Patience", {"class": "patient:Patience", "kwargs": {"iterations": 7}}]
    )
    jsonschema.validate(yaml.safe_load(text), PPOConfig.json_schema())
    jsonschema.validate(made.to_dict(), PPOConfig.json_schema())
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"callbacks": [3]}, PPOConfig.json_schema())
    assert "  classes: ['patient:Patience', {class: 'patient:Patience', kwargs: {iterations: 7}}]" in made.to_yaml()
    assert "patient" not in sys.modules  # reading a config imports nothing
    with made.environment(Levels).build() as algorithm:
        assert [callback.iterations for callback in algorithm.callbacks._all] == [2, 7]


def test_a_run_of_the_command_line_stops_at_the_callback_s_word_and_resumes(module, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = """
        algorithm: ppo
        environment: {id: CartPole-v1}
        env_runners: {num_envs_per_env_runner: 2, rollout_fragment_length: 8}
        training: {minibatch_size: 16}
        callbacks: [patient:Patience]
        stop: {iterations: 5}
        """
    (tmp_path / "tiny.yaml").write_text(textwrap.dedent(text))
    assert main(["train", "tiny.yaml", "--run-dir", "run"]) == 0
    printed = capsys.readouterr().out
    assert "stopped  patience is over\n" in printed and "rlx train --resume run\n" in printed
    assert main(["train", "--resume", "run", "--set", "callbacks=[]"]) == 0
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [row.get("custom/patience") for row in rows] == [2, 2, None, None, None]
    capsys.readouterr()
    assert main(["eval", "run", "--episodes", "1"]) == 0


def test_the_command_line_names_the_callback_that_made_a_mistake(module, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "patient.py").write_text(
        MODULE.replace('algo.request_stop("patience is over")', 'algo.call_envs("set_task", {1})')
    )
    text = "algorithm: ppo\nenvironment: {id: CartPole-v1}\ncallbacks: [patient:Patience]\nstop: {iterations: 3}\n"
    (tmp_path / "tiny.yaml").write_text(text)
    assert main(["train", "tiny.yaml", "--run-dir", "run"]) == 2
    printed = capsys.readouterr().err
    assert "rlx: error: set_task of the environments cannot be changed" in printed
    assert "\nin the callback Patience.on_train_result()\n" in printed


@pytest.mark.parametrize(
    "written, sentence",
    [
        ("patient:Patence", r"names \"patient:Patence\"; patient has no Patence\. Did you mean Patience\?"),
        ("nowhere:Patience", r"there is no module nowhere on the Python path\."),
        ("patient:number", r"it is of type int, and must be a class"),
        ("Patience", r"names \"Patience\"; write pkg\.module:Name"),
        ("here:test.<locals>.Local", r"A local class can only be passed in Python\."),
        (3, r"callbacks\.classes is .*each must be a class, an import path"),
        ({"name": "patient:Patience"}, r"callbacks\.classes is .*each must be a class, an import path"),
        ({"class": "patient:Patience", "kwargs": {"x": {1: 2}}}, r"it may hold only plain data"),
    ],
)
def test_what_is_no_callback_is_one_sentence(module, written, sentence):
    with pytest.raises(ConfigError, match=sentence):
        PPOConfig().environment(Levels).callbacks([written]).validate()


def test_what_makes_no_callback_is_refused_at_the_start():
    with pytest.raises(ConfigError, match=r"callbacks: .*:Levels made a Levels, not a rlx\.Callback\."):
        config(Levels).build()
    with pytest.raises(
        ConfigError, match=r"callbacks: .*:Report cannot be made with {'nme': 3}: got an unexpected keyw"
    ):
        config(report(nme=3)).build()


def test_two_callbacks_of_a_class_have_states_of_their_own(tmp_path):
    with config(Curriculum, Curriculum).build() as algorithm:
        first, second = algorithm.callbacks._all
        first.level, second.level = 4, 5
        saved = algorithm.save(tmp_path / "saved")
    state = json.loads((saved / "state.json").read_text())["content"]["state"]["callbacks"]
    assert state == {"Curriculum": {"level": 4}, "Curriculum#2": {"level": 5}}
    with config(Curriculum, Curriculum).build() as again:
        again.restore(saved)
        assert [callback.level for callback in again.callbacks._all] == [4, 5]


def test_a_state_without_its_callback_is_told(tmp_path, caplog):
    with config(Curriculum).build() as algorithm:
        saved = algorithm.save(tmp_path / "saved")
    with config().build() as again:
        again.restore(saved)
    assert "holds the state of a callback Curriculum, which this run does not have" in caplog.text
