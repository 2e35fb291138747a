"""What a run computes depends on its settings and its seed only: not on interruptions, processes or what is watched."""

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from rlx.algorithms.ppo import PPOConfig
from rlx.checkpoint import list_checkpoints, load_checkpoint
from rlx.cli import main
from rlx.metrics import read_metrics

DEADLINE_S = 60.0

CARTPOLE = {
    "environment": "{id: CartPole-v1}",
    "env_runners": "{num_envs_per_env_runner: 4, rollout_fragment_length: 32}",
    "training": "{epochs: 8, minibatch_size: 16, lr: {start: 1.0e-3, end: 0.0, env_steps: 4000}}",
    "checkpointing": "{interval: 3, keep: 2}",
    "reporting": "{progress: none}",
}
PENDULUM = CARTPOLE | {
    "environment": "{id: Pendulum-v1, normalize_obs: true, normalize_reward: true}",
    "env_runners": "{num_envs_per_env_runner: 3, rollout_fragment_length: 90}",
    "training": "{epochs: 4, minibatch_size: 32, target_kl: 0.05}",
}


@pytest.fixture(autouse=True)
def at_home(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def write(sections: dict[str, str], **changes: str) -> None:
    lines = [f"{name}: {value}" for name, value in ({"algorithm": "ppo"} | sections | changes).items()]
    Path("config.yaml").write_text("\n".join(lines) + "\n")


def rows(run: str | Path) -> list[dict]:
    return [learned(row) for row in read_metrics(Path(run) / "metrics.jsonl")]


def learned(row: dict) -> dict:
    """Return what the run computed: all but times, evaluations and who collected."""
    watched = ("time/", "evaluation/", "env_steps_per_s", "num_env_runners")
    return {name: value for name, value in row.items() if not name.startswith(watched)}


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "rlx.cli", "train", *arguments]


def state(run: str) -> dict:
    """Return the newest checkpoint as flat values, without times."""
    flat = {}

    def walk(node, path):
        if isinstance(node, dict | list):
            for name, value in node.items() if isinstance(node, dict) else enumerate(node):
                walk(value, f"{path}/{name}")
        else:
            flat[path] = node

    walk(load_checkpoint(list_checkpoints(Path(run) / "checkpoints")[-1]), "")
    return {path: value for path, value in flat.items() if path != "/total_s" and not path.startswith("/config/stop")}


def assert_same_state(first: dict, second: dict) -> None:
    assert first.keys() == second.keys()
    for path in first:
        np.testing.assert_array_equal(first[path], second[path], err_msg=path)


# Interruptions ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sections", [CARTPOLE, PENDULUM], ids=["native", "in place, normalised"])
def test_two_halves_make_the_same_metrics_and_the_same_state_as_the_whole(sections):
    write(sections)
    assert main(["train", "config.yaml", "--run-dir", "whole", "--set", "stop.iterations=10"]) == 0
    assert main(["train", "config.yaml", "--run-dir", "halves", "--set", "stop.iterations=5"]) == 0
    assert main(["train", "--resume", "halves", "--set", "stop.iterations=10"]) == 0
    assert len(rows("whole")) == 10
    assert rows("whole") == rows("halves")
    assert_same_state(state("whole"), state("halves"))


KILLED = {
    "native 1": (CARTPOLE, 1, {}),
    "native 2": (CARTPOLE, 2, {}),
    "in place, normalised": (PENDULUM, 4, {}),
    "2 env runners": (
        PENDULUM,
        5,
        {"env_runners": "{num_env_runners: 2, num_envs_per_env_runner: 2, rollout_fragment_length: 90}"},
    ),
    "2 learners": (
        CARTPOLE,
        6,
        {"learners": "{num_learners: 2}", "training": "{epochs: 2, minibatch_size: 32, lr: 1.0e-3}"},
    ),
    "memory": (CARTPOLE, 7, {"model": "{hidden: [8], memory: lstm, memory_size: 8, sequence_length: 12}"}),
}


@pytest.mark.slow
@pytest.mark.parametrize("sections, seed, changes", KILLED.values(), ids=KILLED)
def test_a_killed_run_goes_on_as_if_it_had_not_been(sections, seed, changes):
    """SIGKILL at a random moment, and once more after a resume; then to the end in a third process."""
    moments = random.Random(seed)
    write(sections, runtime=f"{{seed: {seed}}}", stop="{iterations: 30}", **changes)
    assert main(["train", "config.yaml", "--run-dir", "whole"]) == 0
    kill_after(command("config.yaml", "--run-dir", "killed"), Path("killed"), moments.randint(1, 12))
    kill_after(command("--resume", "killed"), Path("killed"), moments.randint(14, 22))
    assert main(["train", "--resume", "killed"]) == 0
    assert len(rows("whole")) == 30
    assert rows("killed") == rows("whole")
    assert_same_state(state("whole"), state("killed"))


def kill_after(arguments: list[str], run: Path, iterations: int) -> None:
    """Start a run and SIGKILL it some time after it has logged so many iterations."""
    with subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + DEADLINE_S
        file = run / "metrics.jsonl"
        while not (file.exists() and file.read_bytes().count(b"\n") >= iterations):
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < deadline
            time.sleep(0.002)
        process.kill()
    assert process.returncode == -signal.SIGKILL


@pytest.mark.slow
def test_a_run_killed_while_it_saves_goes_on():
    """With a checkpoint after every iteration a kill hits a save in most cases; whatever it hits, nothing is lost."""
    write(CARTPOLE, stop="{iterations: 60}", checkpointing="{interval: 1, keep: 1}")
    assert main(["train", "config.yaml", "--run-dir", "whole"]) == 0
    kill_after(command("config.yaml", "--run-dir", "killed"), Path("killed"), 3)
    for iterations in (20, 40):
        kill_after(command("--resume", "killed"), Path("killed"), iterations)
    assert main(["train", "--resume", "killed"]) == 0
    assert rows("killed") == rows("whole")
    assert [path.name for path in Path("killed/checkpoints").iterdir()] != []


# What is watched -------------------------------------------------------------------------------------------------


def config(**changes):
    """A small CartPole config; `changes` by section."""
    made = PPOConfig().environment("CartPole-v1").env_runners(num_envs_per_env_runner=4, rollout_fragment_length=32)
    made.training(epochs=2, minibatch_size=32).reporting(progress="none")
    for section, settings in changes.items():
        getattr(made, section)(**settings)
    return made


def history(made, iterations: int = 6) -> list[dict]:
    with made.build() as algorithm:
        return [learned(algorithm.train()) for _ in range(iterations)]


def test_the_seed_decides_everything():
    first, again, other = (history(config(runtime={"seed": seed})) for seed in (0, 0, 1))
    assert first == again
    assert all(a["learner/loss"] != b["learner/loss"] for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize(
    "watching",
    [
        {"evaluation": "{interval: 1, num_episodes: 3}"},
        {"evaluation": "{interval: 2, num_episodes: 3, deterministic: false, seed: 7}"},
        {"reporting": "{progress: none, tensorboard: true}"},
        {"reporting": "{progress: plain, window_episodes: 100}"},
        {"reporting": "{progress: rich}"},
        {"checkpointing": "{interval: 1}"},
        {"checkpointing": "{interval: 0}"},
    ],
    ids=str,
)
@pytest.mark.parametrize("sections", [CARTPOLE, PENDULUM], ids=["CartPole", "Pendulum"])
def test_watching_a_run_does_not_change_it(watching, sections):
    if "tensorboard" in str(watching):
        pytest.importorskip("tensorboard")
    write(sections, stop="{iterations: 4}")
    assert main(["train", "config.yaml", "--run-dir", "plain"]) == 0
    write(sections, stop="{iterations: 4}", **watching)
    assert main(["train", "config.yaml", "--run-dir", "watched"]) == 0
    assert rows("plain") == rows("watched")


def test_evaluating_by_hand_does_not_change_what_follows():
    made = config(environment={"id": "Pendulum-v1", "normalize_obs": True, "normalize_reward": True})
    expected = history(made.copy())
    with made.build() as algorithm:
        watched = []
        for _ in range(6):
            first, second = algorithm.evaluate(2), algorithm.evaluate(2)
            assert first == second
            algorithm.get_state()
            watched.append(learned(algorithm.train()))
    assert watched == expected


# Where it runs ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("environment", ["CartPole-v1", "Pendulum-v1"])
def test_one_env_runner_in_a_process_is_the_driver_bit_for_bit(environment):
    changes = {"environment": {"id": environment, "normalize_obs": True, "normalize_reward": True}}
    in_driver = history(config(**changes))
    for engine in ("inline", "local"):
        changes |= {"env_runners": {"num_env_runners": 1}, "runtime": {"engine": engine}}
        assert history(config(**changes)) == in_driver


def test_two_env_runners_collect_the_same_on_every_engine():
    inline, local = (
        history(config(env_runners={"num_env_runners": 2}, runtime={"engine": engine}))
        for engine in ("inline", "local")
    )
    assert inline == local
    assert inline[0]["env_steps"] > 4 * 32


def test_two_env_runners_see_the_environments_that_one_would():
    """2 runners x 2 envs step the envs of 1 runner x 4: the episodes differ only by the noise of the actions."""
    with config(environment={"id": "Pendulum-v1"}).build() as one:
        expected = one.sample().obs[0]
    two = config(
        environment={"id": "Pendulum-v1"},
        env_runners={"num_env_runners": 2, "num_envs_per_env_runner": 2},
        runtime={"engine": "inline"},
    )
    with two.build() as algorithm:
        np.testing.assert_array_equal(algorithm.sample().obs[0], expected)


@pytest.mark.parametrize("environment", ["CartPole-v1", "Pendulum-v1"])
def test_two_learners_are_one_to_a_millionth(environment):
    """Half the batch each: stats and parameters, after updates of many steps."""
    parts = []
    for num_learners in (0, 2):
        made = config(environment={"id": environment}, learners={"num_learners": num_learners})
        with made.training(lr=1e-4).build() as algorithm:
            metrics = algorithm.train()
            parts.append((metrics, algorithm.learners.weights()))
    (one, weights), (two, other_weights) = parts
    np.testing.assert_allclose(other_weights, weights, rtol=0, atol=1e-6)
    for name in one:
        if name.startswith("learner/"):
            assert two[name] == pytest.approx(one[name], rel=1e-5, abs=1e-6), name
