"""Runs in which the model talks with an environment: a game of several turns, and a tool."""

import re

import numpy as np
import pytest
import torch

from rlx.envs import calculator, guess
from rlx.errors import ConfigError, EnvError
from rlx.metrics import read_metrics
from rlx.text.text_env import TextEnv

DIGITS = [*"0123456789"]
AHEAD = {"training.max_age": 1, "token_runners.num_token_runners": 1}


def of_guesses(tiny_text, algorithm="grpo", **sections):
    made = tiny_text(algorithm, generation={"max_new_tokens": 1, "stop": DIGITS}, **sections)
    made.model(tokenizer="rlx.envs.guess:tokenizer").prompts("rlx.envs.guess:rows", kwargs={"limit": 9})
    made.set("reward.function", None)
    made.environment("rlx.envs.guess:Guess", max_turns=4)
    return made


class OfWords(TextEnv):
    """An environment as it is written in haste."""

    def reply(self, text):
        return "1"


def test_a_reply_that_is_a_text_is_told_how_to_be_one(tiny_text, caplog):
    made = of_guesses(tiny_text).environment(OfWords)
    with made.build() as algorithm:
        algorithm.sample()
    said = "reply() of OfWords returned '1'; it must return a Reply of rlx.text.text_env, as in return Reply(text)\n"
    assert said in caplog.text


@pytest.fixture
def computed():
    def without_times(row):
        return {name: value for name, value in row.items() if not name.startswith(("time/", "env_steps_per_s"))}

    return without_times


def test_the_learner_finds_what_the_runners_drew_between_answers_of_the_environment(tiny_text):
    """Ratios of the first update are 1, and answers of the environment do not count."""
    with of_guesses(tiny_text).training(minibatch_sequences=None).build() as algorithm:
        row = algorithm.train()
        rollout, batch = algorithm.rollout, algorithm._batch
        found = algorithm.learners
    assert abs(row["learner/kl"]) < 1e-9 and row["learner/clip_fraction"] == 0
    made = rollout.completions
    assert made.drawn.sum() == batch.mask.sum() == row["env_steps"] < len(made.tokens)
    answers = {algorithm.tokenizer.decode([token]) for token in made.tokens[~made.drawn]}
    assert answers == {"<", ">"}
    assert row["episode_length_mean"] == pytest.approx(made.drawn.sum() / 24)
    assert found.version == 1


def test_the_score_is_what_the_environment_gave(tiny_text):
    """Every conversation is played again by hand."""
    with of_guesses(tiny_text).build() as algorithm:
        algorithm.train()
        rollout = algorithm.rollout
    tokenizer = algorithm.tokenizer
    made = rollout.completions
    texts = ["".join(tokenizer.convert_ids_to_tokens(tokens)) for tokens in made.split(made.tokens)]
    found = 0
    for text, score, stopped in zip(texts, rollout.score, rollout.completions.stopped, strict=True):
        guesses, answers = text[::2], text[1::2]
        if score:
            assert score == pytest.approx(1 - 0.1 * (len(guesses) - 1)) and stopped
            for guess_, answer in zip(guesses, answers, strict=False):
                assert (answer == "<") == (guess_ > guesses[-1])
            found += 1
        else:
            assert len(guesses) == 4 or guesses[-1] not in DIGITS
    assert 0 < found < 24
    rewards = rollout.batch.reward.sum(1)
    torch.testing.assert_close(rewards, torch.from_numpy(rollout.score))


def test_all_samples_of_a_prompt_play_for_the_same_number(tiny_text):
    numbers = []

    class Noted(guess.Guess):
        def begin(self):
            text = super().begin()
            numbers.append(self.number)
            return text

    made = of_guesses(tiny_text).environment(Noted)
    with made.build() as algorithm:
        algorithm.train()
    assert len(numbers) == 24 and len(set(numbers)) > 2
    assert all(len(set(numbers[4 * group : 4 * group + 4])) == 1 for group in range(6))


@pytest.mark.slow
def test_where_environments_and_runners_are_makes_no_difference_while_they_wait_for_the_learner(tiny_text, computed):
    """With max_age=0, to the bit; processes are sent weights, that is all."""
    rows = []
    for count in (0, 2):
        made = of_guesses(tiny_text).training(max_age=0).generation(exact=True).environment(num_env_actors=count)
        with made.token_runners(num_token_runners=count).build() as algorithm:
            rows.append([computed(algorithm.train()) for _ in range(2)])
    assert {row.pop("sync_bytes") > 0 for row in rows[1]} == {True} != {row.pop("sync_bytes") > 0 for row in rows[0]}
    assert rows[0] == rows[1]


@pytest.mark.parametrize("algorithm", ["grpo", "rlhf_ppo"])
def test_a_run_with_conversations_is_resumed_exactly(tiny_text, computed, tmp_path, algorithm):
    made = of_guesses(tiny_text, algorithm).prompts(samples_per_prompt=4)
    with made.copy().stop(iterations=4).build(run_dir=tmp_path / "whole") as whole:
        whole.fit()
    with made.copy().stop(iterations=2).build(run_dir=tmp_path / "parts") as first:
        first.fit()
    with made.copy().stop(iterations=4).build() as second:
        second.restore(tmp_path / "parts")
        rows = [computed(second.train()) for _ in range(2)]
    assert rows == [computed(row) for row in read_metrics(tmp_path / "whole/metrics.jsonl")[2:]]


def test_an_environment_that_fails_is_named_and_counted_and_its_sample_left_out(tiny_text, caplog):
    class Broken(guess.Guess):
        def reply(self, text):
            if self.number == 3:
                raise FloatingPointError("three")
            return super().reply(text)

    with of_guesses(tiny_text).environment(Broken).build() as algorithm:
        rows = [algorithm.train() for _ in range(3)]
        counts = algorithm.rollout.counts
    failures = rows[-1]["env_failures"]
    assert failures and failures % 4 == 0 and (~counts).sum() == failures - rows[-2]["env_failures"]
    assert (rows[-1]["reward_failures"], rows[-1]["age_max"]) == (0, 0)
    told = re.findall(r"(\d+) of 24 conversations were lost and are not learned from; the first, prompt \d+, sample 0: "
                      r"step\(\) raised FloatingPointError: three", caplog.text)  # fmt: skip
    lost = np.diff([0, *(row["env_failures"] for row in rows)])
    assert [int(count) for count in told] == [count for count in lost if count]  # a line for all of an iteration


def test_a_run_whose_environment_always_fails_ends(tiny_text):
    class Broken(guess.Guess):
        def begin(self):
            raise FloatingPointError("out of order")

    said = (
        r"^all 24 samples of each of 3 iterations in a row were lost, so nothing is learned; the last one: reset\(\) "
        r"raised FloatingPointError: out of order\.$"
    )
    with of_guesses(tiny_text).environment(Broken).stop(iterations=9).build() as algorithm:
        with pytest.raises(EnvError, match=said):
            algorithm.fit()
        assert algorithm.iteration == 2


def test_a_calculator_is_called_and_read(tiny_text):
    """A conversation in characters, by hand."""
    tokenizer = calculator.tokenizer()
    env = calculator.Calculator(tokenizer, frozenset([*tokenizer.encode("]"), tokenizer.eos_token_id]))
    prompt = tokenizer.encode("37*58=")
    tokens, _ = env.reset(seed=0, options={"prompt": prompt, "record": {"answer": "2146"}})
    assert tokens.tolist() == prompt
    tokens, *rest = env.step(np.array(tokenizer.encode("[37*58]")))
    assert tokenizer.decode(tokens) == "2146=" and rest == [0.0, False, False, {}]
    _, *rest = env.step(np.array([*tokenizer.encode("2146"), tokenizer.eos_token_id]))
    assert rest[:3] == [1.0, True, False]
    env.reset(seed=0, options={"prompt": prompt, "record": {"answer": "2146"}})
    _, reward, ended, *_ = env.step(np.array([*tokenizer.encode("[37*]"), tokenizer.eos_token_id]))
    assert (reward, ended) == (0.0, True)


def test_rows_of_the_calculator_share_no_product_between_splits():
    prompts = {split: {row["prompt"] for row in calculator.rows(split)} for split in calculator.SPLITS}
    assert sum(map(len, prompts.values())) == len(set.union(*prompts.values())) == 8100
    rows = calculator.rows("sft", wrong_share=0.5)
    right = sum(row["completion"] == f"[{row['prompt'][:-1]}]{row['answer']}={row['answer']}" for row in rows)
    assert right / len(rows) == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"environment.env": "rlx.envs.guess:Nothing"}, 'environment.env is "rlx.envs.guess:Nothing"'),
        ({"environment.kwargs": {"cost": 1}}, "cannot be made with {'cost': 1}: .*unexpected keyword argument 'cost'"),
        ({"environment.env": "rlx.envs.guess:rows"}, "made a list; it must be a gymnasium.Env"),
        (
            AHEAD,
            "max_age=1 .* environment.num_env_actors=0 with .*: set num_env_actors to 1 or more and engine to local",
        ),
        (
            AHEAD | {"environment.num_env_actors": 1, "runtime.engine": "inline"},
            "num_env_actors=1 .*engine=inline gives",
        ),
        ({"environment.env": None}, "at least one has to say what is good"),
    ],
)
def test_bad_environments_are_refused_before_the_start(tiny_text, changes, message):
    made = of_guesses(tiny_text)
    with pytest.raises(ConfigError, match=message):
        for name, value in changes.items():
            made.set(name, value)
        made.build()


def test_an_environment_without_a_reply_is_no_environment():
    with pytest.raises(TypeError, match="abstract"):
        TextEnv(guess.tokenizer())  # type: ignore[abstract]
