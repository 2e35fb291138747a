"""A run folder: one process at a time, never overwritten, and rewound to its newest checkpoint."""

import json
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from rlx.algorithms.ppo import PPOConfig
from rlx.checkpoint import list_checkpoints
from rlx.errors import CheckpointError, ConfigError, EnvError
from rlx.inference import load_policy
from rlx.metrics import read_metrics
from rlx.run import Run, default_run_folder

HOLD = """
import sys
from pathlib import Path
from rlx.run import Run
run = Run.open(Path(sys.argv[1]))
print("holding", flush=True)
sys.stdin.read()
"""


def new_run(folder: Path) -> Run:
    return Run.create(folder, "algorithm: ppo\n", seed=3)


def test_a_new_run_records_its_settings_and_where_it_came_from(tmp_path):
    new_run(tmp_path / "deep" / "run").close()
    folder = tmp_path / "deep" / "run"
    assert (folder / "config.yaml").read_text() == "algorithm: ppo\n"
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["seed"] == 3 and manifest["command"] == sys.argv
    assert {"rlx", "torch", "gymnasium", "numpy"} <= manifest["versions"].keys()


def test_creating_a_run_over_an_existing_one_is_refused_with_the_cure(tmp_path):
    new_run(tmp_path).close()
    with pytest.raises(ConfigError, match=r"already holds a run; go on with `rlx train --resume"):
        new_run(tmp_path)
    assert (tmp_path / "config.yaml").read_text() == "algorithm: ppo\n"


def test_opening_a_folder_that_is_no_run_is_refused_and_leaves_it_alone(tmp_path):
    with pytest.raises(CheckpointError, match=r"is no run folder: it has no config\.yaml"):
        Run.open(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_second_process_is_refused_with_the_pid_of_the_first(tmp_path):
    run = new_run(tmp_path)
    second = subprocess.run(
        [sys.executable, "-c", HOLD, tmp_path], capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL
    )
    assert f"CheckpointError: {tmp_path} is in use by process {os.getpid()}; wait for it to end" in second.stderr
    run.close()


def test_a_killed_process_releases_the_run(tmp_path):
    new_run(tmp_path).close()
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with holder:
        assert holder.stdout is not None and holder.stdout.readline() == "holding\n"
        with pytest.raises(CheckpointError, match=f"in use by process {holder.pid};"):
            Run.open(tmp_path)
        holder.send_signal(signal.SIGKILL)
    Run.open(tmp_path).close()


def test_the_same_process_may_not_open_a_run_twice_but_again_after_closing(tmp_path):
    run = new_run(tmp_path)
    with pytest.raises(CheckpointError, match="in use by process"):
        Run.open(tmp_path)
    run.close()
    Run.open(tmp_path).close()


def test_saving_keeps_the_newest_and_the_best(tmp_path):
    run = new_run(tmp_path)
    for iteration in range(1, 7):
        run.save(iteration, {"iteration": iteration}, keep=2, best_iteration=3 if iteration >= 3 else None)
    run.close()
    assert [path.name for path in list_checkpoints(run.checkpoints)] == ["iter_000003", "iter_000005", "iter_000006"]


def test_rewinding_drops_later_rows(tmp_path):
    run = new_run(tmp_path)
    for iteration in range(1, 6):
        run.write_metrics({"iteration": iteration, "env_steps": 10 * iteration})
    run.close()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"iteration": 6, "env_')  # killed while it wrote

    run = Run.open(tmp_path)
    run.rewind(3)
    run.write_metrics({"iteration": 4, "env_steps": 40})
    run.close()
    assert [row["iteration"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]


def test_rewinding_without_metrics_changes_nothing(tmp_path):
    run = new_run(tmp_path)
    run.rewind(0)
    assert not (tmp_path / "metrics.jsonl").exists()
    run.close()


def test_what_rlx_logs_goes_to_the_run_s_log_until_it_is_closed(tmp_path):
    logger, run = logging.getLogger("rlx"), new_run(tmp_path)
    logger.warning("in the run")
    run.close()
    logger.warning("after the run")
    text = (tmp_path / "logs" / "driver.log").read_text()
    assert "WARNING in the run" in text and "after the run" not in text


def test_the_default_folder_names_algorithm_and_environment_and_is_new(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folders = []
    for _ in range(3):
        folders.append(default_run_folder("./my_algo.py", "ALE/Pong-v5"))
        folders[-1].mkdir(parents=True)
    assert len(set(folders)) == 3
    assert all(folder.parent == Path("runs") and folder.name.startswith("my_algo-ALE-Pong-v5-") for folder in folders)


def test_going_back_to_an_older_checkpoint_goes_back_in_the_metrics_too(tmp_path):
    config = (
        PPOConfig()
        .environment("CartPole-v1")
        .env_runners(num_envs_per_env_runner=2, rollout_fragment_length=16)
        .training(minibatch_size=32)
        .checkpointing(interval=2)
        .reporting(progress="none")
        .stop(iterations=6)
    )
    with config.build(tmp_path / "run") as algorithm:
        algorithm.fit()
        straight = [row["learner/loss"] for row in read_metrics(tmp_path / "run" / "metrics.jsonl")]
        algorithm.restore(tmp_path / "run" / "checkpoints" / "iter_000004")
        algorithm.fit()
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [row["iteration"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert [row["learner/loss"] for row in rows] == straight
    with pytest.raises(EnvError, match="is not finite"):
        load_policy(tmp_path / "run").act([0.0, 0.0, float("nan"), 0.0])
