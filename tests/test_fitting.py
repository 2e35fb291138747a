"""The limits that end a run after an evaluation, and the signals that do."""

import io
import logging
import signal

import pytest

from rlx.algorithms.ppo import PPOConfig
from rlx.algorithms.sft import SFTConfig
from rlx.errors import ConfigError
from rlx.interrupts import deferred_interrupt

LLAMA = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
LLAMA |= {"num_attention_heads": 2, "max_position_embeddings": 16}


def ppo(**stop):
    """Every return of CartPole-v1 is between 1 and 500."""
    c = PPOConfig().environment("CartPole-v1").env_runners(num_envs_per_env_runner=2, rollout_fragment_length=16)
    return c.training(minibatch_size=32).evaluation(interval=2, num_episodes=2).reporting(progress="none").stop(**stop)


def test_the_first_evaluation_that_reaches_the_goal_ends_the_run():
    with ppo(evaluation_return_mean=1.0, iterations=9).build() as algo:
        mean = algo.fit()["evaluation/episode_return_mean"]
        assert algo.iteration == 2
        assert algo.stop_reason == f"evaluation/episode_return_mean {mean:.3g} reached 1"


def test_a_goal_that_no_evaluation_reaches_leaves_the_other_limits():
    with ppo(evaluation_return_mean=501.0, iterations=3).build() as algo:
        algo.fit()
        assert (algo.iteration, algo.stop_reason) == (3, "iterations 3 reached 3")


def test_evaluations_that_measure_a_loss_have_no_return_to_reach():
    rows = [{"prompt": "1+1=", "completion": "2"}]
    config = SFTConfig().model(config=LLAMA, tokenizer="rlx.envs.addition:tokenizer").data(rows)
    config.learners(torch_threads=1).evaluation(interval=1, source=rows).stop(evaluation_return_mean=0.4)
    with (
        config.reporting(progress="none").build() as algo,
        pytest.raises(ConfigError, match=r"evaluation_return_mean=0\.4 needs evaluations with a return"),
    ):
        algo.fit()


@pytest.mark.parametrize("number, said", [(signal.SIGINT, "press Ctrl-C again"), (signal.SIGTERM, "SIGTERM: stopping")])
def test_a_signal_is_answered_in_its_own_words(number, said, caplog):
    with deferred_interrupt() as interrupted:
        assert not interrupted()
        signal.raise_signal(number)
        assert interrupted()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(number)
    assert [said in message for message in caplog.messages] == [True]


class PressedWhileWriting(io.RawIOBase):
    """A file whose first line is still being written when Ctrl-C comes."""

    def __init__(self):
        self.lines = []

    def writable(self):
        return True

    def write(self, data):
        self.lines.append(bytes(data).decode())
        if len(self.lines) == 1:
            signal.raise_signal(signal.SIGINT)
        return len(data)


def test_a_signal_in_the_middle_of_a_line_of_the_log_is_answered_after_that_line(capsys):
    file = PressedWhileWriting()
    handler = logging.StreamHandler(io.TextIOWrapper(io.BufferedWriter(file), write_through=True))
    logging.getLogger("rlx").addHandler(handler)
    try:
        with deferred_interrupt() as interrupted:
            logging.getLogger("rlx").warning("a line")
            assert interrupted()
    finally:
        logging.getLogger("rlx").removeHandler(handler)
    assert [line.strip()[:28] for line in file.lines] == ["a line", "stopping after this iteratio"]
    assert "Traceback" not in capsys.readouterr().err  # logging prints there what its own handlers raise
