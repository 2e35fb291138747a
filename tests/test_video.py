"""Films of evaluation episodes: real files, and one sentence at the start where there can be none."""

import logging
import subprocess
import sys

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces

from rlx import Callback
from rlx.algorithms.ppo import PPOConfig
from rlx.cli import main
from rlx.errors import ConfigError, EnvError, MissingExtra


class Dark(gymnasium.Env):
    """Episodes of 4 steps; renders nothing."""

    observation_space = spaces.Box(-1.0, 1.0, (1,), np.float32)
    action_space = spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        self.steps = 0
        return np.zeros(1, np.float32), {}

    def step(self, action):
        self.steps += 1
        return np.zeros(1, np.float32), 1.0, False, self.steps == 4, {}

    def render(self):
        return None


class Lit(Dark):
    """Renders a square that is the brighter, the later in the episode."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 5}  # noqa: RUF012

    def __init__(self, render_mode=None):
        self.render_mode = render_mode

    def render(self):
        return None if self.render_mode is None else np.full((32, 32, 3), 50 * self.steps, np.uint8)


class Broken(Dark):
    def render(self):
        raise NotImplementedError("no pictures")


class Counts(Callback):
    evaluations = 0

    def on_evaluate_start(self, algo):
        Counts.evaluations += 1


def config(env, **evaluation):
    made = PPOConfig().environment(env).reporting(progress="none").training(epochs=1, minibatch_size=8)
    made.env_runners(num_envs_per_env_runner=1, rollout_fragment_length=8).stop(iterations=4)
    return made.evaluation(**{"interval": 2, "num_episodes": 3, "video": 2} | evaluation)


def frames_of(film):
    """Return the frames [N, 32, 32, 3] of a film; imageio's own reader leaves pipes open."""
    imageio_ffmpeg = pytest.importorskip("imageio_ffmpeg")
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-i", film, "-f", "rawvideo", "-pix_fmt", "rgb24", "-"]
    raw = subprocess.run(command, capture_output=True, check=True, timeout=60).stdout
    return np.frombuffer(raw, np.uint8).reshape(-1, 32, 32, 3)


@pytest.mark.parametrize("env", [Lit, f"{__name__}:Lit"], ids=["class", "path"])
def test_every_evaluation_is_recorded_in_the_run_folder(tmp_path, env, monkeypatch):
    monkeypatch.setattr(Counts, "evaluations", 0)
    with config(env).callbacks(Counts).build(tmp_path / "run") as algorithm:
        metrics = algorithm.fit()
    assert metrics["evaluation/episodes"] == 3 and Counts.evaluations == 2
    films = sorted((tmp_path / "run" / "videos").iterdir())
    assert [film.name for film in films] == ["iteration-000002.mp4", "iteration-000004.mp4"]
    # Two episodes: a frame for the reset and one for each step.
    assert [round(frame.mean() / 50) for frame in frames_of(films[1])] == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    "env, sentence",
    [
        (Dark, r"render\(\) returned None; make the environment with render_mode='rgb_array'\."),
        (
            Broken,
            r"^the environment cannot be recorded, as rendering it raised NotImplementedError\('no pictures'\)\.$",
        ),
    ],
)
def test_an_environment_without_pictures_is_told_before_the_run_begins(tmp_path, env, sentence):
    pytest.importorskip("imageio_ffmpeg")
    with config(env).build(tmp_path / "run") as algorithm, pytest.raises(EnvError, match=sentence):
        algorithm.fit()
    assert algorithm.iteration == 0 and not (tmp_path / "run").exists()


def test_a_missing_encoder_is_told_before_the_run_begins(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    with (
        config(Lit).build(tmp_path / "run") as algorithm,
        pytest.raises(MissingExtra, match=r"pip install 'rlx\[video"),
    ):
        algorithm.fit()


def test_without_a_run_folder_nothing_is_recorded_and_that_is_said(caplog):
    with config(Lit).build() as algorithm, caplog.at_level(logging.WARNING, "rlx"):
        algorithm.fit()
    assert algorithm.iteration == 4
    assert caplog.text.count("evaluation.video has no effect without a run folder") == 1


def test_videos_without_evaluations_are_refused():
    with pytest.raises(ConfigError, match=r"evaluation\.video=2 records nothing, as evaluation\.interval=0"):
        config(Lit, interval=0).validate()


@pytest.mark.slow
def test_a_run_of_the_command_line_films_cartpole(tmp_path, monkeypatch):
    reader = pytest.importorskip("imageio.v2").get_reader
    monkeypatch.chdir(tmp_path)
    changes = ["evaluation.interval=1", "evaluation.video=1", "stop.iterations=1"]
    assert main(["train", "ppo", "--run-dir", "run", *(word for one in changes for word in ("--set", one))]) == 0
    with reader("run/videos/iteration-000001.mp4") as film:
        assert film.get_meta_data()["size"] == (600, 400) and film.count_frames() > 8
