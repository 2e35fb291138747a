"""Deaths and hangs of a run's own processes, with real kills: the run goes on, says so, and leaves nothing behind."""

import contextlib
import os
import random
import signal
import threading
import time
from pathlib import Path

import psutil
import pytest

from rlx.algorithms.ppo import PPOConfig
from rlx.errors import ActorDied
from rlx.fitting import iterate
from rlx.learner.learner_group import LearnersLost
from rlx.metrics import read_metrics

DEADLINE_S = 60.0


@pytest.fixture(autouse=True)
def nothing_is_left():
    memory = set(os.listdir("/dev/shm"))
    yield
    _, alive = psutil.wait_procs(psutil.Process().children(recursive=True), timeout=3)
    assert not alive
    assert set(os.listdir("/dev/shm")) <= memory


def config(num_env_runners=0, num_learners=0, **fault_tolerance):
    made = PPOConfig().environment("CartPole-v1").reporting(progress="none").checkpointing(interval=3)
    made.env_runners(num_env_runners=num_env_runners, num_envs_per_env_runner=4, rollout_fragment_length=32)
    made.training(epochs=2, minibatch_size=32).learners(num_learners=num_learners)
    return made.fault_tolerance(**fault_tolerance)


def computed(row):
    """Return what a run computes: all but times, and how often something was started again."""
    watched = ("time/", "env_steps_per_s", "learner_restarts", "runner_restarts")
    return {name: value for name, value in row.items() if not name.startswith(watched)}


def pid_of(algorithm, name):
    return algorithm._runtime().state()[name].pid


class Strike:
    """Sends a signal to an actor as soon as it runs `method`, from a thread beside the training."""

    def __init__(self, algorithm, name, method, number):
        self.algorithm, self.name, self.method, self.number = algorithm, name, method, number
        self.hit = False
        self.thread = threading.Thread(target=self.run)

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *exc_info):
        self.thread.join()

    def run(self):
        deadline = time.monotonic() + DEADLINE_S
        while time.monotonic() < deadline and not self.hit:
            state = self.algorithm._runtime().state()[self.name]
            if state.status == "alive" and state.method == self.method:
                os.kill(state.pid, self.number)
                self.hit = True


# Env runners -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
def test_a_run_goes_on_when_a_runner_is_killed_or_stopped_in_a_sample(number, tmp_path):
    # Fragments that take long enough to be struck in their middle.
    made = config(num_env_runners=2, sample_timeout_s=2.0).env_runners(rollout_fragment_length=400)
    made.stop(iterations=6)
    with made.build(run_dir=tmp_path / "run") as algorithm, Strike(algorithm, "env_runner/1", "sample", number) as one:
        algorithm.fit()
    assert one.hit
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [row["iteration"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert (rows[-1]["runner_restarts"], rows[-1]["learner_restarts"]) == (1, 0)
    assert all(row["age_max"] == 0 for row in rows)
    reason = "was killed by SIGKILL" if number == signal.SIGKILL else "has not answered within 2 s"
    text = (tmp_path / "run" / "logs" / "driver.log").read_text()
    assert f"{reason}" in text and text.count("was started again and begins new episodes") == 1


def test_a_run_resumes_exactly_from_a_checkpoint_after_a_restart(tmp_path):
    with config(num_env_runners=2).build() as algorithm:
        algorithm.train()
        os.kill(pid_of(algorithm, "env_runner/0"), signal.SIGKILL)
        assert algorithm.train()["runner_restarts"] == 1
        saved = algorithm.save(tmp_path / "saved")
        expected = [algorithm.train() for _ in range(3)]
    with config(num_env_runners=2).build() as again:
        again.restore(saved)
        rows = [again.train() for _ in range(3)]
    assert [computed(row) for row in rows] == [computed(row) for row in expected]
    assert rows[-1]["runner_restarts"] == 1


def test_the_budget_of_a_runner_ends_the_run_with_advice():
    with config(num_env_runners=1, max_restarts=1).build() as algorithm:
        algorithm.train()
        os.kill(pid_of(algorithm, "env_runner/0"), signal.SIGKILL)
        assert algorithm.train()["runner_restarts"] == 1
        os.kill(pid_of(algorithm, "env_runner/0"), signal.SIGKILL)
        with pytest.raises(ActorDied, match=r"^env_runner/0 \(pid \d+\) was killed by SIGKILL(.|\n)*max_restarts\.$"):
            algorithm.train()


@pytest.mark.slow
def test_a_run_whose_runners_are_killed_at_random_still_learns():
    # A short window keeps the pauses before restarts short, too.
    made = config(num_env_runners=2, max_restarts=1000, restart_window_s=0.5).runtime(seed=1)
    made.env_runners(num_envs_per_env_runner=4, rollout_fragment_length=128)
    made.training(epochs=10, minibatch_size=128, lr=1e-3).stop(env_steps=150_000, episode_return_mean=300.0)
    moments, ended = random.Random(3), threading.Event()
    with made.build() as algorithm:

        def kill_now_and_then():
            # By steps and not by time: on a slow machine no episode would live for 300 steps.
            strike = 2_000
            while not ended.wait(0.01):
                if algorithm.env_steps < strike:
                    continue
                strike += moments.randrange(1_000, 6_000)
                state = algorithm._runtime().state()[f"env_runner/{moments.randrange(2)}"]
                if state.status == "alive":
                    with contextlib.suppress(ProcessLookupError):  # the last kill is not noticed yet
                        os.kill(state.pid, signal.SIGKILL)

        killer = threading.Thread(target=kill_now_and_then)
        killer.start()
        try:
            metrics = algorithm.fit()
        finally:
            ended.set()
            killer.join()
        assert algorithm.stop_reason.startswith("episode_return_mean")
    assert metrics["runner_restarts"] >= 5


# Learners --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def undisturbed():
    with config(num_learners=2).build() as algorithm:
        return [computed(algorithm.train()) for _ in range(8)]


@pytest.mark.parametrize(
    "victim, number",
    [
        ("learner/1", signal.SIGKILL),
        ("learner/0", signal.SIGKILL),
        pytest.param("learner/1", signal.SIGSTOP, marks=pytest.mark.slow),
    ],
)
def test_a_run_goes_on_from_its_checkpoint_when_a_learner_dies_or_hangs(victim, number, undisturbed, tmp_path, caplog):
    made = config(num_learners=2, update_timeout_s=3.0).stop(iterations=4)
    with made.build(run_dir=tmp_path / "run") as algorithm:
        algorithm.fit()
        with Strike(algorithm, victim, "update", number) as strike:
            train_to(algorithm, tmp_path / "run", 8)
        assert strike.hit
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [computed(row) for row in rows] == undisturbed
    assert rows[-1]["learner_restarts"] == 1
    assert "The learners are started again, and the run goes back to iteration" in caplog.text
    if number == signal.SIGSTOP:
        assert "update() has not answered within 3 s" in caplog.text


def train_to(algorithm, run, iterations):
    """Fit on: what `rlx train --resume` does in a new process, in this one."""
    while algorithm.iteration < iterations:
        try:
            iterate(algorithm)
        except LearnersLost as lost:  # in a checkpoint; `fit` goes back as well
            algorithm.saves.go_back(lost)


def test_without_a_run_folder_the_state_to_go_back_to_is_in_memory(undisturbed):
    with config(num_learners=2, num_env_runners=0).build() as algorithm:
        rows = {}
        for number in range(1, 30):
            metrics = algorithm.train()
            rows[metrics["iteration"]] = computed(metrics)
            if number == 5:
                os.kill(pid_of(algorithm, "learner/1"), signal.SIGKILL)
            elif number == 6:
                assert metrics["iteration"] == 4  # the state was kept after iteration 3
            if metrics["iteration"] == 8:
                break
        assert metrics["learner_restarts"] == 1
    assert [rows[number] for number in range(1, 9)] == undisturbed


def test_learners_that_die_between_two_calls_never_pass_off_new_weights_as_trained():
    with config(num_learners=1).build() as algorithm:
        algorithm.train()
        weights = algorithm.learners.weights()
        os.kill(pid_of(algorithm, "learner/0"), signal.SIGKILL)
        with pytest.raises(ActorDied):
            algorithm.evaluate(1)
        with pytest.raises(ActorDied):
            algorithm.learners.weights()
        assert algorithm.train()["iteration"] == 1  # from the state kept at the start
        assert (algorithm.learners.weights() == weights).all()


def test_the_budget_of_the_learners_ends_the_run_with_advice():
    with config(num_learners=2, max_restarts=1).build() as algorithm:
        algorithm.train()
        os.kill(pid_of(algorithm, "learner/1"), signal.SIGKILL)
        assert algorithm.train()["learner_restarts"] == 1
        os.kill(pid_of(algorithm, "learner/1"), signal.SIGKILL)
        with pytest.raises(ActorDied, match=r"learner/1 \(pid \d+\) was killed by SIGKILL(.|\n)*max_restarts\.$"):
            algorithm.train()


# Logs ------------------------------------------------------------------------------------------------------------


def talkative():
    import gymnasium

    print("a line of the environment")
    return gymnasium.make("CartPole-v1")


def test_what_actors_print_is_in_the_run_folder(tmp_path):
    made = config(num_env_runners=2).environment(talkative).stop(iterations=1)
    with made.build(run_dir=tmp_path / "run") as algorithm:
        algorithm.fit()
    logs = tmp_path / "run" / "logs"
    assert {path.name for path in logs.iterdir()} == {"driver.log", "env_runner.0.log", "env_runner.1.log"}
    assert "a line of the environment" in (logs / "env_runner.1.log").read_text()
    assert not list(Path("/dev/shm").glob("rlx*"))
