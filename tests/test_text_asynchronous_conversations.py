"""Runs in which conversations go on while the learner learns: ages, what is learned from, deaths, resume."""

import os
import re
import signal
import threading
import time
from collections import Counter
from typing import ClassVar

import numpy as np
import pytest
import torch

from rlx.callbacks import Callback
from rlx.checkpoint import list_checkpoints, load_checkpoint
from rlx.envs import guess
from rlx.metrics import read_metrics

pytestmark = pytest.mark.usefixtures("shared_processes")

RUNNERS = {"num_token_runners": 2, "torch_threads": 1}
DIGITS = [*"0123456789"]


class Halting(guess.Guess):
    """Fails in all conversations about one number."""

    def reply(self, text):
        if self.number == 3:
            raise FloatingPointError("three")
        return super().reply(text)


def asynchronous(tiny_text, env="rlx.envs.guess:Guess", algorithm="grpo", **sections):
    made = tiny_text(algorithm, generation={"max_new_tokens": 1, "stop": DIGITS}, token_runners=RUNNERS, **sections)
    made.model(tokenizer="rlx.envs.guess:tokenizer").prompts("rlx.envs.guess:rows", kwargs={"limit": 1000})
    made.set("reward.function", None)
    return made.prompts(shuffle=False).training(max_age=2).environment(env, max_turns=4, num_env_actors=2)


class Notes(Callback):
    """Which prompts each iteration learned from, and how many of its samples it did not."""

    taken: ClassVar[list[list[int]]] = []
    lost: ClassVar[list[int]] = []

    def on_sample_end(self, algorithm, trajectory):
        rollout = algorithm.rollout
        Notes.taken.append([prompt.index for prompt in rollout.prompts[::4]])
        Notes.lost.append(int((~rollout.counts).sum()))


@pytest.fixture
def notes():
    Notes.taken, Notes.lost = [], []
    return Notes


def numbers_of(notes):
    return [number for taken in notes.taken for number in taken]


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["grpo", "rlhf_ppo"])
def test_ages_are_bounded_prompts_learned_from_once_and_what_failed_is_counted_once(
    algorithm, tiny_text, notes, caplog
):
    made = asynchronous(tiny_text, Halting, algorithm).callbacks([notes])
    made.evaluation(source="rlx.envs.guess:rows", kwargs={"limit": 9}, interval=3, num_rows=9)
    with made.build() as run:
        rows = [run.train() for _ in range(12)]
        ahead, batch, rollout = run.rollouts.get_state()["ahead"], run._batch, run.rollout
    assert rows[0]["age_max"] == 0 and max(row["age_max"] for row in rows) <= 2 and rows[-1]["age_mean"] > 0
    numbers = numbers_of(notes)
    assert len(numbers) == len(set(numbers)) == 12 * 6
    assert sorted(numbers + ahead["open"]) == list(range(ahead["next"]))
    assert rows[-1]["dropped_env_steps"] == 0
    assert rows[-1]["env_failures"] == sum(notes.lost) > 0 and sum(notes.lost) % 4 == 0
    told = re.findall(
        r"(\d+) of \d+ conversations were lost .*: step\(\) raised FloatingPointError: three", caplog.text
    )
    assert sum(map(int, told)) >= sum(notes.lost)  # and those of evaluations
    asked_to_learn = rollout.completions.drawn & np.repeat(rollout.counts, rollout.completions.length)
    assert batch.mask.sum() == asked_to_learn.sum()
    torch.testing.assert_close(batch.reward.sum(1), torch.from_numpy(rollout.score))


@pytest.mark.slow
def test_a_run_goes_on_with_the_conversations_that_were_not_learned_from(tiny_text, notes, tmp_path):
    made = asynchronous(tiny_text, Halting).callbacks([notes]).checkpointing(interval=1)
    with made.copy().stop(iterations=5).build(run_dir=tmp_path / "run") as first:
        first.fit()
    with made.copy().stop(iterations=10).build(run_dir=tmp_path / "run") as second:
        second.restore(tmp_path / "run")
        second.fit()
        ahead = second.rollouts.get_state()["ahead"]
    numbers = numbers_of(notes)
    assert len(numbers) == len(set(numbers)) == 10 * 6
    assert sorted(numbers + ahead["open"]) == list(range(ahead["next"]))
    rows = read_metrics(tmp_path / "run/metrics.jsonl")
    assert [row["iteration"] for row in rows] == list(range(1, 11))
    assert max(row["age_max"] for row in rows) <= 2
    assert rows[-1]["env_failures"] == sum(notes.lost)


@pytest.mark.slow
def test_failures_in_what_is_dropped_are_named_and_counted(tiny_text, caplog):
    with asynchronous(tiny_text).build() as run:
        run.train()
        arrivals = run.rollouts._arrivals
        with arrivals._changed:
            assert arrivals._changed.wait_for(lambda: arrivals._arrived, timeout=60)
            group = arrivals._arrived[0]
            group.conversations[1].failure = "it was lost"
            arrivals._drop([group])
        rows = [run.train() for _ in range(2)]
    assert [row["env_failures"] for row in rows] == [1, 1] and rows[0]["dropped_env_steps"] > 0
    assert caplog.text.count(f"the first, prompt {group.number}, sample 1: it was lost\n") == 1


GAME = """
from rlx.envs.guess import Guess

class Game(Guess):
    def begin(self):
        super().begin()  # the model reads the number of the prompt

def rows():
    return [{"prompt": f"{number}?"} for number in range(1000)]
"""
PASSING_ON = ("rlx.rollout.conversation_groups", "ConversationGroups._hear_answer")


@pytest.mark.slow
def test_a_driver_that_is_killed_among_conversations_loses_none_and_learns_from_none_twice(
    tiny_text, text_driver, tmp_path
):
    """In the midst of conversations, of an update and of a checkpoint; resumed each time."""
    made = asynchronous(tiny_text, "game:Game").prompts("game:rows", kwargs={}).checkpointing(interval=1)
    made.stop(iterations=8).reporting(samples_per_iteration=24)
    (tmp_path / "game.py").write_text(GAME)
    (tmp_path / "config.yaml").write_text(made.to_yaml())
    arguments, output = ["config.yaml", "--run-dir", "run"], tmp_path / "output.txt"
    for strike in (
        (*PASSING_ON, 250),
        ("rlx.learner.adam", "FlatAdam.step", 5),
        ("rlx.checkpoint", "_write_durably", 3),
    ):
        assert text_driver(tmp_path, ["train", *arguments], strike) == -9, (strike, output.read_text())
        arguments = ["--resume", "run"]
    assert text_driver(tmp_path, ["train", *arguments]) == 0, output.read_text()
    samples, rows = read_metrics(tmp_path / "run/samples.jsonl"), read_metrics(tmp_path / "run/metrics.jsonl")
    assert [row["iteration"] for row in rows] == list(range(1, 9)) and max(row["age_max"] for row in rows) <= 2
    counts = Counter((row["iteration"], int(row["prompt"].removesuffix("?"))) for row in samples)
    assert set(counts.values()) == {4} and len(counts) == 8 * 6
    numbers = [number for _, number in counts]
    ahead = load_checkpoint(list_checkpoints(tmp_path / "run/checkpoints")[-1])["rollouts"]["ahead"]
    assert sorted(numbers + list(ahead["open"])) == list(range(ahead["next"]))
    assert any(len(set(row["drawn"])) == 2 for row in samples if "drawn" in row)


@pytest.mark.slow
def test_an_iteration_that_is_broken_off_is_made_once_more_of_the_same_prompts(tiny_text, notes):
    with asynchronous(tiny_text).callbacks([notes]).build() as run:
        run.train()
        update, run.learners.update = run.learners.update, None
        with pytest.raises(TypeError):
            run.train()
        run.learners.update = update
        broken = notes.taken.pop()
        rows = [run.train() for _ in range(4)]
    assert set(broken) <= set(numbers_of(notes)) and max(Counter(numbers_of(notes)).values()) == 1
    assert rows[-1]["env_failures"] == 0  # environments are left, and used again


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
def test_runners_and_environments_that_are_lost_again_and_again_cost_no_prompt(number, tiny_text, notes, monkeypatch):
    monkeypatch.setattr("rlx.rollout.text_envs.MARGIN_S", 2.0)
    made = asynchronous(tiny_text).callbacks([notes]).environment(timeout_s=0.1)
    made.fault_tolerance(max_restarts=10, generate_timeout_s=3.0 if number == signal.SIGSTOP else 60.0)
    names = ["token_runner/0", "text_env/0", "token_runner/1", "text_env/1"]
    with made.build() as run:
        stop = threading.Event()

        def strike():
            """One of them after every third iteration."""
            struck = 0
            while not stop.wait(0.01) and struck < len(names):
                state = run._runtime().state()[names[struck]]
                if run.iteration >= 3 * (struck + 1) and state.status == "alive":
                    os.kill(state.pid, number)
                    struck += 1

        thread = threading.Thread(target=strike)
        thread.start()
        try:
            deadline = time.monotonic() + 90
            while run.iteration < 16 or (run.runner_restarts < 4 and time.monotonic() < deadline):
                row = run.train()
        finally:
            stop.set()
            thread.join()
    assert row["runner_restarts"] == 4 and row["age_max"] <= 2
    assert set(Counter(numbers_of(notes)).values()) == {1}
    assert row["env_failures"] == sum(notes.lost)
