"""Interrupts and deaths, with real signals on real processes: a sentence and an exit code, never a hang or a stray."""

import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch

from rlx.algorithms.ppo import PPOConfig
from rlx.checkpoint import list_checkpoints, load_checkpoint
from rlx.metrics import read_metrics

DEADLINE_S = 60.0
GONE_S = 3.0
"""Longest time for the children of a process that ended to end, too."""

CONFIG = """\
algorithm: ppo
environment: {id: CartPole-v1}
env_runners: {num_envs_per_env_runner: 4, rollout_fragment_length: 32}
training: {epochs: 1, minibatch_size: 64}
reporting: {progress: none}
checkpointing: {interval: 3}
stop: {iterations: 1000000}
"""

SLOW_ENV = """\
import pathlib
import time
import gymnasium

def make():
    return SlowSteps(gymnasium.make("CartPole-v1"))

def make_slowly():
    pathlib.Path("making").touch()
    time.sleep(60)

class SlowSteps(gymnasium.Wrapper):
    def step(self, action):
        pathlib.Path("stepping").touch()
        time.sleep(0.5)
        return super().step(action)
"""


@pytest.fixture(autouse=True)
def at_home(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("config.yaml").write_text(CONFIG)
    Path("slow_env_of_test_system.py").write_text(SLOW_ENV)


def until(is_true: Callable[[], object], process: subprocess.Popen) -> None:
    """Poll until it is true; fail if the process ends before, or after DEADLINE_S."""
    deadline = time.monotonic() + DEADLINE_S
    while not is_true():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)


class Training:
    """`rlx train` in a process group of its own, as a terminal starts it."""

    def __init__(self, *changes: str) -> None:
        words = [word for change in changes for word in ("--set", change)]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "rlx.cli", "train", "config.yaml", "--run-dir", "run", *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.children: list[psutil.Process] = []

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        with self.process:
            if self.process.poll() is None:
                os.killpg(self.process.pid, signal.SIGKILL)

    def wait_for(self, is_true: Callable[[], object]) -> None:
        until(is_true, self.process)
        self.children = psutil.Process(self.process.pid).children(recursive=True)

    def wait_for_iterations(self, count: int) -> None:
        file = Path("run/metrics.jsonl")
        self.wait_for(lambda: file.exists() and file.read_bytes().count(b"\n") >= count)

    def press_ctrl_c(self) -> None:
        os.killpg(self.process.pid, signal.SIGINT)

    def ending(self, within_s: float) -> tuple[int, str]:
        """Return exit code and stderr of a process that ends in time, and whose children do."""
        err = self.process.communicate(timeout=within_s)[1]
        _, alive = psutil.wait_procs(self.children, timeout=GONE_S)
        assert not alive
        return self.process.returncode, err


MODES = {
    "driver": ([], 0),
    "2 env runners": (["env_runners.num_env_runners=2"], 3),
    "2 learners": (["learners.num_learners=2"], 3),
}
"""What is set, and the number of processes that it takes beside the driver: two actors and their forkserver."""


@pytest.mark.slow
@pytest.mark.parametrize("changes, num_children", MODES.values(), ids=MODES)
def test_the_first_ctrl_c_ends_the_run_after_the_iteration_with_a_checkpoint(changes, num_children):
    with Training(*changes) as training:
        training.wait_for_iterations(4)
        assert len(training.children) == num_children
        training.press_ctrl_c()
        code, err = training.ending(within_s=10)
    last = read_metrics(Path("run/metrics.jsonl"))[-1]["iteration"]
    assert code == 130 and "Traceback" not in err
    assert err.endswith(f"rlx: interrupted after iteration {last}; to go on: rlx train --resume run\n")
    assert load_checkpoint(list_checkpoints(Path("run/checkpoints"))[-1])["iteration"] == last


@pytest.mark.slow
@pytest.mark.parametrize("num_env_runners", [0, 2])
def test_the_second_ctrl_c_ends_the_run_at_once(num_env_runners):
    """An iteration takes 32 x 4 x 0.5 s here, and in_place has the first step be one of an iteration."""
    slow = ["environment.id=slow_env_of_test_system:make", "environment.vectorization=in_place"]
    with Training(*slow, f"env_runners.num_env_runners={num_env_runners}") as training:
        training.wait_for(Path("stepping").exists)
        training.press_ctrl_c()
        assert training.process.stderr is not None
        while "press Ctrl-C again to stop at once" not in training.process.stderr.readline():
            assert training.process.poll() is None
        training.press_ctrl_c()
        code, err = training.ending(within_s=20)
    assert code == 130 and "Traceback" not in err
    assert err.endswith("rlx: the run can go on from its last checkpoint: rlx train --resume run\n")


@pytest.mark.slow
@pytest.mark.parametrize("vectorization", ["in_place", "processes"])
def test_ctrl_c_before_the_first_iteration_ends_the_command_at_once(vectorization):
    """No iteration is there to be finished while the environments are made, or measured."""
    slow = ["environment.id=slow_env_of_test_system:make_slowly", "environment.num_processes=2"]
    with Training(*slow, f"environment.vectorization={vectorization}") as training:
        training.wait_for(Path("making").exists)
        training.press_ctrl_c()
        code, err = training.ending(within_s=20)
    assert code == 130 and "Traceback" not in err and err.endswith("rlx: interrupted\n")


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["2 env runners", "2 learners"])
@pytest.mark.parametrize("victim", ["forkserver", "actor"])
def test_a_killed_child_ends_a_run_without_restarts_with_a_sentence(mode, victim):
    with Training(*MODES[mode][0], "fault_tolerance.max_restarts=0") as training:
        training.wait_for_iterations(4)
        forkserver, *others = sorted(training.children, key=lambda one: len(one.parents()))
        chosen = forkserver if victim == "forkserver" else others[-1]
        chosen.kill()
        code, err = training.ending(within_s=10)
    assert code == 1 and "Traceback" not in err
    assert "rlx: error: " in err and re.search(rf"\((process|pid) {chosen.pid}\) was killed by SIGKILL", err)
    assert err.endswith("rlx: the run can go on from its last checkpoint: rlx train --resume run\n")


def test_a_run_whose_reader_has_gone_goes_on():
    """As `rlx train 2>&1 | head -1` has it."""
    with Training("reporting.progress=plain", "stop.iterations=5") as training:
        assert training.process.stderr.readline()
        training.process.stderr.close()
        training.process.stdout.close()
        training.process.wait(DEADLINE_S)
    assert len(read_metrics(Path("run/metrics.jsonl"))) == 5
    assert load_checkpoint(list_checkpoints(Path("run/checkpoints"))[-1])["iteration"] == 5


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["2 env runners", "2 learners"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL, signal.SIGHUP])
def test_a_driver_that_is_ended_leaves_nothing_behind(mode, number):
    with Training(*MODES[mode][0]) as training:
        training.wait_for_iterations(4)
        training.process.send_signal(number)
        code, _ = training.ending(within_s=5)
    assert code != 0
    assert load_checkpoint(list_checkpoints(Path("run/checkpoints"))[-1])["iteration"] >= 3


# In Python -------------------------------------------------------------------------------------------------------


def small_config() -> PPOConfig:
    made = PPOConfig().environment("Pendulum-v1", normalize_obs=True, normalize_reward=True)
    made.env_runners(num_envs_per_env_runner=2, rollout_fragment_length=32)
    return made.training(epochs=4, minibatch_size=16)


class Interrupts:
    """A timer that raises KeyboardInterrupt in the main thread after random times."""

    def __init__(self, seed: int, longest_s: float) -> None:
        self.random, self.longest_s = random.Random(seed), longest_s

    def __enter__(self):
        def interrupt(number, frame):
            raise KeyboardInterrupt

        self.before = signal.signal(signal.SIGALRM, interrupt)
        # One that strikes inside a finalizer cannot be raised, and would strike again in pytest's report of it.
        self.hook, sys.unraisablehook = sys.unraisablehook, lambda _: None
        return self

    def arm(self) -> None:
        signal.setitimer(signal.ITIMER_REAL, self.random.uniform(1e-4, self.longest_s))

    def __exit__(self, *exc_info):
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, self.before)
        sys.unraisablehook = self.hook


@pytest.mark.parametrize(
    "num_env_runners, num_learners, count", [(0, 0, 60), pytest.param(2, 0, 40, marks=pytest.mark.slow)]
)
def test_an_interrupt_at_any_moment_leaves_an_algorithm_that_trains_on(num_env_runners, num_learners, count):
    made = small_config().env_runners(num_env_runners=num_env_runners).learners(num_learners=num_learners)
    with made.build() as algorithm:
        per_iteration = algorithm.train()["env_steps"]
        started = time.perf_counter()  # the first iteration is slower than those that follow
        algorithm.train()
        longest_s = time.perf_counter() - started
        interrupted = 0
        with Interrupts(seed=1, longest_s=longest_s) as interrupts:
            for _ in range(count):
                try:
                    try:
                        interrupts.arm()
                        algorithm.train()
                    finally:  # it may come in here, too
                        signal.setitimer(signal.ITIMER_REAL, 0)
                except KeyboardInterrupt:
                    interrupted += 1
                    # Everything of the cut iteration is counted, or nothing.
                    assert algorithm.iteration * per_iteration == algorithm.env_steps
        assert interrupted >= count // 4
        finished = algorithm.iteration
        metrics = algorithm.train()
        assert metrics["iteration"] == finished + 1
        assert metrics["age_max"] == 0  # it acted with the weights that it learns with
        assert abs(metrics["learner/kl"]) < 1
        assert algorithm.evaluate(2)["evaluation/episodes"] == 2
        again = load_checkpoint(algorithm.save("after"))
        assert again["iteration"] == finished + 1
    assert not [child for child in psutil.Process().children(recursive=True) if child.status() != "zombie"]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_mode_of_torch_that_an_interrupt_left_on_stops_no_training(mode):
    """An interrupt between the lines of torch's no_grad() leaves gradients off in the whole process."""
    with small_config().build() as algorithm, mode():
        assert algorithm.train()["learner/grad_norm"] > 0


def test_an_interrupt_before_the_new_weights_are_published_is_made_good(monkeypatch):
    with small_config().build() as algorithm:
        algorithm.train()
        episodes = algorithm.window.get_state()
        with monkeypatch.context() as patch:
            patch.setattr(algorithm.runners, "publish", interrupted_call)
            with pytest.raises(KeyboardInterrupt):
                algorithm.train()
        assert (algorithm.iteration, algorithm.window.get_state()) == (1, episodes)
        metrics = algorithm.train()
        assert (metrics["iteration"], metrics["weights_version"], metrics["age_max"]) == (2, 3, 0)


def interrupted_call(*arguments):
    raise KeyboardInterrupt


SCRIPT = """\
import os, sys
import gymnasium, psutil
from rlx.algorithms.ppo import PPOConfig

class Scaled(gymnasium.Wrapper):
    def step(self, action):
        obs, reward, *rest = super().step(action)
        return obs, reward * SCALE, *rest

SCALE = 2.0

def make(limit=20):
    return Scaled(gymnasium.make("CartPole-v1", max_episode_steps=limit))

print("the top of the script")
algorithm = (
    PPOConfig().environment(make, kwargs={"limit": 10})
    .env_runners(num_env_runners=2, num_envs_per_env_runner=2, rollout_fragment_length=32)
    .learners(num_learners=int(sys.argv[1]))
    .training(epochs=1, minibatch_size=32).build()
)
metrics = algorithm.train()
print("trained", metrics["iteration"], metrics["episode_return_max"], metrics["learner/loss"])
print("children", *[child.pid for child in psutil.Process().children(recursive=True)])
if sys.argv[2] == "close":
    algorithm.close()
    print("closed", *[child.pid for child in psutil.Process().children(recursive=True)])
elif sys.argv[2] == "raise":
    raise SystemExit(7)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "how, num_learners, ending",
    [("file", 0, "close"), ("-c", 0, "leave"), ("stdin", 0, "leave"), ("file", 2, "leave"), ("file", 0, "raise")],
)
def test_a_script_without_a_main_guard_trains_with_actors_and_leaves_no_process(how, num_learners, ending):
    Path("script.py").write_text(SCRIPT)
    source = {"file": ["script.py"], "-c": ["-c", SCRIPT], "stdin": ["-"]}[how]
    done = subprocess.run(
        [sys.executable, *source, str(num_learners), ending],
        input=SCRIPT if how == "stdin" else "",
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
    )
    assert done.returncode == (7 if ending == "raise" else 0), done.stderr
    assert "Traceback" not in done.stderr
    lines = done.stdout.splitlines()
    assert lines.count("the top of the script") == 1
    assert lines[1].startswith("trained 1 20.0 ")  # 10 steps, of a reward of 2 each
    children = [int(word) for word in lines[2].split()[1:]]
    assert len(children) == 1 + 2 + num_learners
    if ending == "close":
        assert lines[3] == "closed"
    _, alive = psutil.wait_procs([psutil.Process(pid) for pid in children if psutil.pid_exists(pid)], timeout=GONE_S)
    assert not alive
