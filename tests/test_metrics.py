"""Metrics: the episode window, the clock, the file and who reads it."""

import json
import time

import pytest

from rlx.config import load_config
from rlx.errors import CheckpointError
from rlx.metrics import METRICS, Clock, EpisodeWindow, JsonlWriter, TensorBoardWriter, read_metrics


def test_every_metric_has_a_description_of_one_sentence_or_more():
    assert all(text.endswith(".") for text in METRICS.values())


def test_the_names_of_the_window_and_the_clock_are_in_the_schema():
    assert {*EpisodeWindow(3).summary(), *Clock().summary()} <= METRICS.keys()


SMALL_PPO = """
algorithm: ppo
environment: {id: CartPole-v1}
env_runners: {num_env_runners: 0, num_envs_per_env_runner: 2, rollout_fragment_length: 16}
training: {minibatch_size: 16, epochs: 1}
"""


def test_every_metric_of_a_ppo_iteration_is_in_the_schema_and_the_other_way_round(tmp_path):
    """time/evaluation_s is measured by `fit`, around the evaluation; the others are of Atari runs and of IMPALA."""
    (tmp_path / "small.yaml").write_text(SMALL_PPO)
    algorithm = load_config(tmp_path / "small.yaml").build()
    try:
        metrics = algorithm.train() | algorithm.evaluate(1)
    finally:
        algorithm.close()
    assert metrics.keys() | {"time/evaluation_s", "frames", "learner/rho_clip_fraction"} == METRICS.keys()


def test_the_window_holds_the_last_episodes_only():
    window = EpisodeWindow(3)
    window.add([(100.0, 9), (1.0, 2)])
    assert not window.is_full
    window.add([(2.0, 4), (6.0, 6)])
    assert window.is_full
    assert window.summary() == {
        "episode_return_mean": 3.0,
        "episode_return_min": 1.0,
        "episode_return_max": 6.0,
        "episode_length_mean": 4.0,
    }


def test_an_empty_window_says_null_rather_than_zero():
    assert set(EpisodeWindow(3).summary().values()) == {None}


def test_a_window_continues_from_its_state():
    window, again = EpisodeWindow(3), EpisodeWindow(3)
    window.add([(5.0, 1), (7.0, 3)])
    again.add([(-1.0, 1)])
    again.set_state(json.loads(json.dumps(window.get_state())))
    assert again.summary() == window.summary() and not again.is_full


def test_the_parts_of_the_clock_add_up_to_the_iteration():
    clock = Clock()
    for _ in range(2):
        with clock.measure("learn_s"):
            time.sleep(0.005)
    time.sleep(0.01)  # of which the next lines account for 6 ms
    clock.add(env_s=0.002, inference_s=0.001)
    clock.add(env_s=0.003)
    summary = clock.summary()
    assert summary["time/env_s"] == pytest.approx(0.005)
    assert (summary["time/learn_s"] or 0) >= 0.01
    parts = [value for name, value in summary.items() if name != "time/iteration_s"]
    assert sum(value or 0 for value in parts) == pytest.approx(summary["time/iteration_s"])


def test_an_unknown_part_of_the_clock_is_an_error():
    with pytest.raises(KeyError, match="envs_s"):
        Clock().add(envs_s=1.0)


def test_what_is_written_is_read_back_line_by_line(tmp_path):
    file, rows = tmp_path / "metrics.jsonl", [{"iteration": 1, "learner/loss": 0.5}, {"iteration": 2, "age_max": None}]
    writer = JsonlWriter(file)
    for number, row in enumerate(rows, 1):
        writer.write(row)
        assert len(read_metrics(file)) == number, "a line reaches the file at once"
    writer.close()
    JsonlWriter(file).close()
    assert read_metrics(file) == rows, "opening again appends"


@pytest.mark.parametrize("torn_at", range(1, 14))
def test_a_last_line_torn_by_a_crash_is_left_out(tmp_path, torn_at):
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"iteration": 1}\n' + '{"iteration": 2}\n'[:torn_at])
    assert read_metrics(file) == [{"iteration": 1}]


def test_a_torn_line_in_the_middle_is_an_error(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"iteration": 1\n{"iteration": 2}\n')
    with pytest.raises(CheckpointError, match=r"metrics.jsonl:1 is no JSON"):
        read_metrics(file)


def test_tensorboard_gets_every_metric_that_has_a_value(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    writer = TensorBoardWriter(tmp_path)
    writer.write({"iteration": 1, "env_steps": 64, "learner/loss": 0.5, "episode_return_mean": None})
    writer.close()
    events = accumulator.EventAccumulator(str(tmp_path)).Reload()
    assert set(events.Tags()["scalars"]) == {"iteration", "env_steps", "learner/loss"}
    (event,) = events.Scalars("learner/loss")
    assert (event.step, event.value) == (64, 0.5)
