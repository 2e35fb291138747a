"""Runs on text whose token runners work while the learner learns: ages, what is learned from, deaths, resume."""

import os
import signal
import threading
import time
from collections import Counter
from typing import ClassVar

import numpy as np
import pytest
import torch

from rlx.callbacks import Callback
from rlx.errors import ConfigError
from rlx.generation.request import Request
from rlx.metrics import read_metrics
from rlx.policy_distance import old_policy
from rlx.text_building import threads_of
from rlx.trajectory import Batch

pytestmark = pytest.mark.usefixtures("shared_processes")

RUNNERS = {"num_token_runners": 2, "torch_threads": 1}


def asynchronous(tiny_text, algorithm="grpo", max_age=2, runners=None, **sections):
    made = tiny_text(algorithm, token_runners=RUNNERS | (runners or {}), **sections).training(max_age=max_age)
    return made.prompts(kwargs={"split": "rl", "limit": 500}, shuffle=False)


class Notes(Callback):
    """Which prompts each iteration learned from."""

    taken: ClassVar[list[list[int]]] = []

    def on_sample_end(self, algorithm, trajectory):
        rollout = algorithm.rollout
        Notes.taken.append([prompt.index for prompt in rollout.prompts[::4]])


@pytest.fixture
def notes():
    Notes.taken = []
    return Notes


@pytest.mark.parametrize(
    "max_age, num_learners, given, of_runner, of_learner",
    [(0, 0, None, 4, 8), (1, 0, None, 2, 2), (1, 2, None, 2, 2), (0, 2, None, 4, 4), (1, 0, 3, 3, 3)],
)
def test_who_computes_at_once_shares_the_cores(
    max_age, num_learners, given, of_runner, of_learner, tiny_text, monkeypatch
):
    monkeypatch.setattr("rlx.building.cpu_count", lambda: 8.0)
    made = asynchronous(tiny_text, max_age=max_age, runners={"torch_threads": given})
    settings = made.learners(num_learners=num_learners, torch_threads=given).settings
    assert (threads_of(settings, "runners"), threads_of(settings, "learners")) == (of_runner, of_learner)


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["grpo", "rlhf_ppo"])
def test_no_token_is_older_than_it_may_be_and_every_prompt_is_learned_from_once(algorithm, tiny_text, notes):
    made = asynchronous(tiny_text, algorithm).callbacks([notes])
    with made.build() as run:
        rows = [run.train() for _ in range(12)]
        ahead = run.rollouts.get_state()["ahead"]
    assert [row["age_max"] for row in rows[:1]] == [0]
    assert max(row["age_max"] for row in rows) <= 2 and rows[-1]["age_mean"] > 0
    numbers = [number for taken in notes.taken for number in taken]
    assert len(numbers) == len(set(numbers)) == 12 * 6
    assert sorted(numbers + ahead["open"]) == list(range(ahead["next"]))
    assert rows[-1]["dropped_env_steps"] == 0


@pytest.mark.slow
def test_a_run_that_was_killed_goes_on_with_what_was_not_learned_from(tiny_text, notes, tmp_path):
    """Nothing is counted twice, and nothing is lost: not even what was under way."""
    made = asynchronous(tiny_text).callbacks([notes]).checkpointing(interval=1)
    with made.copy().stop(iterations=5).build(run_dir=tmp_path / "run") as first:
        first.fit()
    with made.copy().stop(iterations=10).build(run_dir=tmp_path / "run") as second:
        second.restore(tmp_path / "run")
        second.fit()
        ahead = second.rollouts.get_state()["ahead"]
    numbers = [number for taken in notes.taken for number in taken]
    assert len(numbers) == len(set(numbers)) == 10 * 6
    assert sorted(numbers + ahead["open"]) == list(range(ahead["next"]))
    rows = read_metrics(tmp_path / "run/metrics.jsonl")
    assert [row["iteration"] for row in rows] == list(range(1, 11))
    assert max(row["age_max"] for row in rows) <= 2


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
def test_runners_that_are_lost_again_and_again_cost_no_sample(number, tiny_text, notes):
    made = asynchronous(tiny_text).callbacks([notes]).fault_tolerance(max_restarts=10, generate_timeout_s=3.0)
    with made.build() as run:
        stop = threading.Event()

        def strike():
            """One of the runners after every third iteration."""
            struck = 0
            while not stop.wait(0.01):
                if run.iteration >= 3 * (struck + 1) and struck < 3:
                    state = run._runtime().state()[f"token_runner/{struck % 2}"]
                    if state.status == "alive":
                        os.kill(state.pid, number)
                        struck += 1

        thread = threading.Thread(target=strike)
        thread.start()
        try:
            started = time.monotonic()
            while run.iteration < 16 or (run.runner_restarts < 3 and time.monotonic() < started + 60):
                row = run.train()
        finally:
            stop.set()
            thread.join()
    assert row["runner_restarts"] == 3
    counts = Counter(number for taken in notes.taken for number in taken)
    assert set(counts.values()) == {1}
    assert row["age_max"] <= 2


@pytest.mark.slow
def test_a_runner_that_raises_ends_the_run_with_its_own_error(tiny_text):
    with asynchronous(tiny_text).build() as run:
        run.train()
        run.rollouts._arrivals._maker._make_request = lambda number: Request((99,), n=4)
        with pytest.raises(ConfigError, match="token id 99, but the model's vocabulary has ids from 0 to 12"):
            for _ in range(5):
                run.train()


def test_runners_in_the_driver_cannot_work_ahead(tiny_text):
    made = tiny_text("grpo").training(max_age=1)
    with pytest.raises(
        ConfigError, match=r"max_age=1 has token runners work while learners do.*num_token_runners to 1"
    ):
        made.build()


# The correction ---------------------------------------------------------------------------------------------------


class Training:
    """The settings that matter here."""

    def __init__(self, max_age=1, importance_cap=2.0):
        self.max_age, self.importance_cap = max_age, importance_cap


LOGP = torch.tensor([[-1.0, -2.0, -3.0]], dtype=torch.float64)
OLD = torch.tensor([[-1.5, -1.0, -3.0]], dtype=torch.float64)
NEW = torch.tensor([[-1.2, -1.1, -2.9]], dtype=torch.float64, requires_grad=True)


def test_ratios_are_taken_to_the_policy_before_the_update_and_weights_make_up_for_the_rest():
    """Weights old / drawn by hand: exp(-0.5), exp(1) cut to 2, 1."""
    old, importance = old_policy(NEW, Batch(logp=LOGP, old_logp=OLD), Training())
    assert old is not NEW and torch.equal(old, OLD)
    torch.testing.assert_close(importance, torch.tensor([[np.exp(-0.5), 2.0, 1.0]], dtype=torch.float64))
    assert torch.equal(
        old_policy(NEW, Batch(logp=LOGP, old_logp=OLD), Training(importance_cap=None))[1], torch.ones(1, 3)
    )
