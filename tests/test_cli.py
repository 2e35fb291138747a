"""The command line, run for real: every command, its exit code and what it prints."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from PIL import Image, ImageSequence

import rlx
from rlx.cli import main
from rlx.config import load_config
from rlx.metrics import read_metrics

CONFIG = """\
# A run that takes a fraction of a second.
algorithm: ppo
environment: {id: CartPole-v1}
env_runners: {num_envs_per_env_runner: 4, rollout_fragment_length: 32}
training: {epochs: 1, minibatch_size: 64}
evaluation: {num_episodes: 3}
checkpointing: {interval: 2}
reporting: {progress: none}
stop: {iterations: 3}
"""

BROKEN_ENVS = """\
import gymnasium, numpy as np

class NanAtStepTen(gymnasium.Env):
    observation_space = gymnasium.spaces.Box(-1, 1, (2,), np.float32)
    action_space = gymnasium.spaces.Discrete(2)
    steps = 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.zeros(2, np.float32), {}

    def step(self, action):
        self.steps += 1
        return np.full(2, np.nan if self.steps == 10 else 0, np.float32), 0.0, False, False, {}

class Raises(NanAtStepTen):
    def step(self, action):
        raise ZeroDivisionError("a bug in the environment")
"""


@pytest.fixture(autouse=True)
def at_home(tmp_path_factory, monkeypatch):
    """A working directory with a config in it; what a command changes in this process is put back."""
    monkeypatch.chdir(tmp_path_factory.mktemp("home"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    Path("tiny.yaml").write_text(CONFIG)


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    """The folder of a finished run, to look at only."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "tiny.yaml").write_text(CONFIG)
    run = folder / "finished"
    assert main(["train", str(folder / "tiny.yaml"), "--run-dir", str(run)]) == 0
    return run


# Training -------------------------------------------------------------------------------------------------------


def test_train_says_why_it_stopped_where_the_run_is_and_what_to_try_next(capsys):
    assert main(["train", "tiny.yaml", "--run-dir", "my run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "stopped  iterations 3 reached 3"
    assert re.fullmatch(r"return   [\d.]+, mean of the last 100 episodes \(min .*, max .*\); length [\d.]+", lines[1])
    env_steps = read_metrics(Path("my run/metrics.jsonl"))[-1]["env_steps"]
    assert re.fullmatch(rf"time     [\d.]+ s for {env_steps} env steps in 3 iterations", lines[2])
    assert lines[3:] == [
        "run      my run",
        "next     rlx eval 'my run'",
        "         rlx plot 'my run'",
        "         rlx train --resume 'my run' --set stop.iterations=6",
    ]
    assert len(read_metrics(Path("my run/metrics.jsonl"))) == 3


def test_the_commands_that_train_suggests_work(finished_run, capsys, tmp_path):
    run = tmp_path / "run"
    assert main(["train", "tiny.yaml", "--run-dir", str(run)]) == 0
    suggested = [line[9:].split() for line in capsys.readouterr().out.splitlines() if line[9:].startswith("rlx")]
    for command in suggested:
        assert main(command[1:]) == 0
    assert "iterations 6 reached 6" in capsys.readouterr().out
    assert [row["iteration"] for row in read_metrics(run / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]


def test_the_default_run_folder_is_named_after_algorithm_and_environment(capsys):
    assert main(["train", "tiny.yaml", "--set", "stop.iterations=1"]) == 0
    (folder,) = Path("runs").iterdir()
    assert re.fullmatch(r"ppo-CartPole-v1-\d{8}-\d{6}", folder.name)
    assert f"run      {folder}" in capsys.readouterr().out


def test_a_resumed_run_keeps_its_new_limit_and_says_so_when_it_is_reached_already(finished_run, capsys, tmp_path):
    run = tmp_path / "run"
    main(["train", "tiny.yaml", "--run-dir", str(run)])
    assert main(["train", "--resume", str(run), "--set", "stop.iterations=5"]) == 0
    capsys.readouterr()
    assert main(["train", "--resume", str(run)]) == 0
    assert capsys.readouterr().out.startswith("stopped  iterations 5 reached 5 before this session began\n")
    assert load_config(run / "config.yaml").settings.stop.iterations == 5


def test_resume_refuses_what_would_bend_the_curve_before_it_touches_anything(finished_run, capsys):
    before = {path: path.read_bytes() for path in finished_run.rglob("*") if path.is_file()}
    assert main(["train", "--resume", str(finished_run), "--set", "training.epochs=2"]) == 2
    assert capsys.readouterr().err == (
        f"rlx: error: {finished_run} was trained with other settings: training.epochs was 1 and would be 2. Only stop, "
        "reporting, checkpointing, fault_tolerance, evaluation, callbacks may change when a run goes on; leave the "
        "rest as it was, or start a new run.\n"
    )
    Path("other.yaml").write_text(CONFIG.replace("CartPole-v1", "Acrobot-v1"))
    assert main(["train", "other.yaml", "--resume", str(finished_run)]) == 2
    assert "environment.id was CartPole-v1 and would be Acrobot-v1" in capsys.readouterr().err
    assert before == {path: path.read_bytes() for path in finished_run.rglob("*") if path.is_file()}


def test_a_folder_that_holds_a_run_is_not_trained_into(finished_run, capsys):
    assert main(["train", "tiny.yaml", "--run-dir", str(finished_run)]) == 2
    assert f"{finished_run} already holds a run" in capsys.readouterr().err


def test_dry_run_prints_the_whole_config_and_makes_nothing(capsys):
    assert main(["train", "tiny.yaml", "--set", "training.lr=1e-4", "--dry-run"]) == 0
    Path("printed.yaml").write_text(capsys.readouterr().out)
    assert load_config("printed.yaml") == load_config("tiny.yaml", ["training.lr=1e-4"])
    assert sorted(path.name for path in Path().iterdir()) == ["printed.yaml", "tiny.yaml"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train"], "rlx train needs a CONFIG (see `rlx list`), or --resume RUN to go on with a run."),
        (["train", "nope.yaml"], 'there is no config "nope.yaml"'),
        (["train", "tiny.yaml", "--set", "training.clp=1"], "Did you mean training.clip_range?"),
        (["train", "tiny.yaml", "--set", "environment.id=CartPol-v1"], "Did you mean CartPole-v1"),
        (["train", "tiny.yaml", "--set", "stop.iterations=null"], "stop sets no limit"),
        (["train", "--resume", "nowhere"], "nowhere is no run folder: it has no config.yaml"),
        (["eval", "nowhere"], "nowhere does not exist"),
        (["plot", "nowhere"], "nowhere is no run folder"),
        (["config", "show", "nope"], 'there is no config "nope"'),
        (["config", "schema", "nope"], 'there is no algorithm "nope"; the shipped ones are appo, dpo, grpo'),
    ],
)
def test_bad_input_gets_a_sentence_and_exit_code_2(arguments, message, capsys):
    assert main(arguments) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith("rlx: error: ") and message in shown.err
    assert shown.out == ""
    assert not Path("runs").exists()


def test_a_run_that_fails_names_the_fault_and_the_way_on_and_exits_with_1(capsys):
    Path("broken_envs_of_test_cli.py").write_text(BROKEN_ENVS)  # found, as it lies in the working directory
    assert main(["train", "tiny.yaml", "--set", "environment.id=broken_envs_of_test_cli:NanAtStepTen"]) == 1
    lines = capsys.readouterr().err.splitlines()
    (run,) = Path("runs").iterdir()
    assert lines[-2].startswith("rlx: error: ") and "NanAtStepTen" in lines[-2]
    assert lines[-1] == f"rlx: the run can go on from its last checkpoint: rlx train --resume {run}"


def test_an_error_that_nobody_foresaw_keeps_its_traceback():
    Path("broken_envs_of_test_cli.py").write_text(BROKEN_ENVS)
    with pytest.raises(ZeroDivisionError, match="a bug in the environment"):
        main(["train", "tiny.yaml", "--set", "environment.id=broken_envs_of_test_cli:Raises"])


def test_an_interrupt_leaves_a_run_that_goes_on(capsys):
    command = [sys.executable, "-m", "rlx.cli", "train", "tiny.yaml", "--run-dir", "run", "--set"]
    process = subprocess.Popen(
        [*command, "stop.iterations=1000000", "--set", "reporting.progress=plain"], stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    while "iter " not in process.stderr.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    iteration = read_metrics(Path("run/metrics.jsonl"))[-1]["iteration"]
    assert err.splitlines()[-1] == (f"rlx: interrupted after iteration {iteration}; to go on: rlx train --resume run")
    assert main(["train", "--resume", "run", "--set", f"stop.iterations={iteration + 1}"]) == 0
    assert len(read_metrics(Path("run/metrics.jsonl"))) == iteration + 1


# The other commands ---------------------------------------------------------------------------------------------


def test_eval_prints_what_the_loaded_policy_scores(finished_run, capsys):
    assert main(["eval", str(finished_run), "--episodes", "4", "--seed", "7"]) == 0
    printed = dict(line.split() for line in capsys.readouterr().out.splitlines())
    expected = rlx.load_policy(finished_run).evaluate(4, seed=7)
    assert printed == {name.removeprefix("evaluation/"): f"{value:.5g}" for name, value in expected.items()}
    checkpoint = sorted((finished_run / "checkpoints").iterdir())[-1]
    assert main(["eval", str(checkpoint), "--episodes", "4", "--seed", "7"]) == 0
    assert dict(line.split() for line in capsys.readouterr().out.splitlines()) == printed


def test_eval_records_an_episode_as_a_gif(finished_run, capsys):
    assert main(["eval", str(finished_run), "--episodes", "1", "--video", "films/cartpole.gif"]) == 0
    length = float(capsys.readouterr().out.split("episode_length_mean")[1].split()[0])
    with Image.open("films/cartpole.gif") as film:
        assert film.size == (600, 400)
        durations = [frame.info["duration"] for frame in ImageSequence.Iterator(film)]
    # A frame per step and the first one, 50 in a second; equal neighbours are stored as one that lasts longer.
    assert sum(durations) == 20 * (length + 1)


def test_eval_records_an_episode_as_an_mp4(finished_run, capsys):
    reader = pytest.importorskip("imageio.v2").get_reader
    assert main(["eval", str(finished_run), "--episodes", "1", "--video", "cartpole.mp4"]) == 0
    length = float(capsys.readouterr().out.split("episode_length_mean")[1].split()[0])
    with reader("cartpole.mp4") as film:
        assert film.get_meta_data()["size"] == (600, 400)
        assert film.get_meta_data()["fps"] == 50.0
        assert film.count_frames() == length + 1


def test_eval_refuses_a_film_it_cannot_write_before_it_plays(finished_run, capsys):
    assert main(["eval", str(finished_run), "--video", "film.avi"]) == 2
    assert capsys.readouterr().err == (
        "rlx: error: film.avi is no video that rlx can write; end its name in .gif or .mp4.\n"
    )


def test_plot_writes_into_the_first_run_unless_told_otherwise(finished_run, capsys):
    assert main(["plot", str(finished_run), "--metric", "learner/entropy"]) == 0
    assert main(["plot", str(finished_run), "-o", "curve.svg"]) == 0
    assert capsys.readouterr().out == f"{finished_run / 'curve.png'}\ncurve.svg\n"
    assert (finished_run / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in Path("curve.svg").read_text()


def test_list_names_every_algorithm_and_config_with_a_line(capsys):
    assert main(["list"]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"^  ppo +PPO with a clipped surrogate", shown, re.M)
    for name in (path.stem for path in Path(rlx.__file__).parents[2].glob("configs/*.yaml")):
        assert re.search(rf"^  {name} +\w", shown, re.M)


def test_config_show_can_explain_every_setting(capsys):
    assert main(["config", "show", "tiny.yaml", "--set", "training.gamma=0.9", "--comments"]) == 0
    shown = capsys.readouterr().out
    assert "  # Discount of a reward one step later.\n  gamma: 0.9\n" in shown


def test_config_show_ends_with_the_network_in_comments(capsys):
    assert main(["config", "show", "tiny.yaml", "--set", "model.hidden=[32, 16]"]) == 0
    shown = capsys.readouterr().out
    assert yaml.safe_load(shown)["model"]["hidden"] == [32, 16]
    rows = {line.split()[1]: " ".join(line.split()[2:]) for line in shown.splitlines() if line.startswith("#")}
    assert rows["network"] == "for CartPole-v1: 1,427 parameters"  # 2 * 688 + 34 + 17
    assert rows["observation"] == "float32 [4]: 4 numbers" and rows["action"] == "int64 []: 1 of 2"
    assert rows["encoder"] == rows["value_encoder"] == "Linear 4 -> 32, Tanh, Linear 32 -> 16, Tanh 688"
    assert (rows["action_head"], rows["value_head"]) == ("Linear 16 -> 2 34", "Linear 16 -> 1 17")


def test_config_show_says_why_there_is_no_network(capsys):
    assert main(["config", "show", "tiny.yaml", "--set", "model.encoder=cnn"]) == 0
    assert "\n# network: none, because model.encoder=cnn needs images" in capsys.readouterr().out


def test_config_diff_compares_configs_with_runs(finished_run, capsys):
    Path("other.yaml").write_text(CONFIG.replace("epochs: 1", "epochs: 2") + "runtime: {seed: 5}\n")
    assert main(["config", "diff", str(finished_run), "other.yaml"]) == 0
    assert capsys.readouterr().out == "training.epochs  1 -> 2\nruntime.seed     0 -> 5\n"
    assert main(["config", "diff", "tiny.yaml", str(finished_run)]) == 0
    assert capsys.readouterr().out == f"tiny.yaml and {finished_run} set everything alike.\n"


def test_config_schema_is_json(capsys):
    assert main(["config", "schema", "ppo"]) == 0
    schema = json.loads(capsys.readouterr().out)
    assert set(schema["properties"]) >= {"algorithm", "environment", "training", "stop"}


@pytest.mark.parametrize("value", ["0", "-1", "many"])
def test_a_number_of_episodes_is_checked(value, capsys):
    with pytest.raises(SystemExit) as ending:
        main(["eval", "run", f"--episodes={value}"])
    assert ending.value.code == 2
    assert f"'{value}' is not a whole number above 0" in capsys.readouterr().err


def test_every_command_explains_itself_with_an_example(capsys):
    for command in (
        "train",
        "eval",
        "plot",
        "list",
        "config show",
        "config diff",
        "config schema",
        "start",
        "k8s render",
    ):
        with pytest.raises(SystemExit) as ending:
            main([*command.split(), "--help"])
        assert ending.value.code == 0
        assert f"example:\n  rlx {command}" in capsys.readouterr().out


# The process ----------------------------------------------------------------------------------------------------


def test_help_and_list_import_nothing_heavy():
    code = (
        "import sys\nfrom rlx.cli import main\n"
        "try:\n    main(sys.argv[1:])\nfinally:\n    print('loaded:', *sys.modules, file=sys.stderr)"
    )
    heavy = {"torch", "gymnasium", "matplotlib", "rich", "transformers"}
    for arguments, light in (
        (["--help"], heavy | {"numpy", "pydantic", "yaml"}),
        (["--version"], heavy),
        (["list"], heavy),
    ):
        shown = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=30)
        assert not light & set(shown.stderr.partition("loaded:")[2].split()), arguments


def test_a_reader_that_stops_reading_is_no_error():
    reading, writing = os.pipe()
    os.close(reading)
    process = subprocess.run(
        [sys.executable, "-m", "rlx.cli", "list"], stdout=writing, stderr=subprocess.PIPE, text=True, timeout=30
    )
    os.close(writing)
    assert (process.returncode, process.stderr) == (0, "")


def test_a_full_disk_behind_the_output_is_one_sentence():
    with open("/dev/full", "w") as full:
        process = subprocess.run(
            [sys.executable, "-m", "rlx.cli", "list"], stdout=full, stderr=subprocess.PIPE, timeout=30
        )
    assert process.returncode == 1
    assert process.stderr.decode() == "rlx: the output cannot be written: the disk is full; make room.\n"
