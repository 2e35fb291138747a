"""Reward functions: what they may return, and who is blamed for what they may not."""

import logging
import math
import sys
import threading

import cloudpickle
import numpy as np
import pytest
import torch

from rlx.errors import ConfigError, RewardError
from rlx.text.rewards import RewardFunction

PROMPTS = ["1+1=", "2+2=", "3+3="]
COMPLETIONS = ["2", "bad", "6"]
RECORDS = [{"answer": "2"}, {"answer": "4"}, {"answer": "6"}]


def right(prompts, completions, records):
    return [float(completion == record["answer"]) for completion, record in zip(completions, records, strict=True)]


def lengths(prompts, completions, scale=1):
    return [scale * len(completion) for completion in completions]


def raises(prompts, completions):
    return [1 / (completion != "bad") for completion in completions]


def hangs(prompts, completions):
    while "bad" in completions:
        pass
    return [1.0] * len(completions)


def exits(prompts, completions):
    return sys.exit(3) if "bad" in completions else [1.0] * len(completions)


def drops(prompts, completions):
    return [1.0 for completion in completions if completion != "bad"]


def says(value):
    return lambda prompts, completions: [value if completion == "bad" else 1.0 for completion in completions]


def scored(function, **settings):
    settings = {"timeout_s": 30} | settings
    return RewardFunction(function, **settings).score(PROMPTS, COMPLETIONS, RECORDS, indices=[10, 11, 12])


FAILURES = {
    "raises": (raises, "raised ZeroDivisionError: division by zero", 30),
    "hangs": (hangs, "took longer than 0.2 s", 0.2),
    "exits": (exits, "called sys.exit(3)", 30),
    "leaves one out": (drops, "returned 0 scores for 1 samples", 30),
    "nan": (says(math.nan), "returned nan, which is no finite number,", 30),
    "infinite": (says(math.inf), "returned inf, which is no finite number,", 30),
    "infinite in float32": (says(1e39), "returned 1e+39, which is no finite number,", 30),
    "none": (says(None), "returned None, which is no finite number,", 30),
    "text": (says("1.0"), "returned '1.0', which is no finite number,", 30),
    "list": (says([1.0]), "returned [1.0], which is no finite number,", 30),
}


@pytest.mark.parametrize("kind", FAILURES)
def test_a_failure_names_its_sample_and_stops(kind):
    function, said, timeout_s = FAILURES[kind]
    with pytest.raises(RewardError) as raised:
        scored(function, timeout_s=timeout_s)
    assert f" {said} for prompt 11 '2+2=' with the completion 'bad'; " in str(raised.value)


@pytest.mark.parametrize("kind", FAILURES)
def test_a_failure_is_masked_and_the_rest_is_kept(kind, caplog):
    function, said, timeout_s = FAILURES[kind]
    scores = scored(function, timeout_s=timeout_s, on_error="mask")
    assert scores.score.tolist() == [1, 0, 1] and scores.mask.tolist() == [True, False, True]
    assert list(scores.failures) == [1] and said in str(scores.failures[1])
    assert "1 of 3 samples are masked: the reward function " in caplog.text and said in caplog.text


def test_the_traceback_is_told_once_and_the_cure_only_to_who_has_not_chosen_it(caplog):
    with pytest.raises(RewardError, match=r"correct it, or set reward\.on_error=mask to go on without such samples\.$"):
        scored(raises)
    reward = RewardFunction(raises, on_error="mask")
    for _ in range(3):
        failure = reward.score(["2+2="], ["bad"], [{}]).failures[0]
    assert str(failure).endswith("with the completion 'bad'.")
    assert [record.exc_info is not None for record in caplog.records] == [True, False, False]
    assert caplog.text.count("Traceback") == 1


@pytest.mark.parametrize(
    "make", [list, tuple, np.array, torch.tensor, iter, lambda scores: np.array(scores, bool), np.float16]
)
def test_scores_may_come_in_any_sequence(make):
    scores = scored(lambda prompts, completions, records: make(right(prompts, completions, records)))
    assert scores.score.dtype == np.float32 and scores.score.tolist() == [1, 0, 1]
    assert scores.mask.all() and not scores.failures


def test_functions_of_two_arguments_and_with_settings_work():
    assert scored(lengths).score.tolist() == [1, 3, 1]
    assert scored(lengths, kwargs={"scale": 2}).score.tolist() == [2, 6, 2]
    assert scored("rlx.envs.addition:reward").score.tolist() == [1, 0, 1]


def test_the_original_exception_is_the_cause_with_its_traceback():
    with pytest.raises(RewardError) as raised:
        scored(raises)
    cause = raised.value.__cause__
    assert isinstance(cause, ZeroDivisionError) and cause.__traceback__ is not None


@pytest.mark.parametrize(
    ("returned", "said"),
    [(1.0, "returned 1.0, not a sequence of 1 scores"), ("ab", "returned 'ab' for 1 samples"), ({}, "returned {} for")],
)
def test_what_is_no_sequence_is_refused(returned, said):
    with pytest.raises(RewardError, match=f"{said} .*prompt 10 "):
        scored(lambda prompts, completions: returned)


def test_a_batch_that_fails_though_its_samples_do_not_is_said_so(caplog):
    def of_one(prompts, completions):
        (completion,) = completions
        return [len(completion)]

    with pytest.raises(
        RewardError, match=r"raised ValueError: .* for 3 samples together, and not for each of them alone"
    ):
        scored(of_one)
    one_score = (
        r"returned 1 score for 3 samples together, and not for each of them alone; it must return a score for every"
    )
    with pytest.raises(RewardError, match=one_score):
        scored(lambda prompts, completions: [1.0])
    scores = scored(of_one, on_error="mask")
    assert scores.score.tolist() == [1, 3, 1] and scores.mask.all()
    assert "The scores of the samples alone are taken" in caplog.text


def test_a_service_that_is_down_costs_a_few_deadlines_and_not_one_for_each_sample():
    calls = []
    answered = threading.Event()

    def waits(prompts, completions):
        calls.append(len(completions))
        answered.wait()

    reward = RewardFunction(waits, timeout_s=0.05, on_error="mask")
    scores = reward.score(["p"] * 100, ["c"] * 100, [{}] * 100)
    answered.set()
    assert calls == [100, 1, 1, 1, 1] and not scores.mask.any() and len(scores.failures) == 100
    assert "was not tried, since 4 samples of its batch took longer than 0.05 s" in str(scores.failures[99])


def test_what_a_function_does_to_its_arguments_changes_nothing_outside():
    def clears(prompts, completions, records):
        scores = [1.0] * len(prompts)
        records[0].clear()
        prompts.clear()
        completions.clear()
        return scores

    prompts, completions, records = list(PROMPTS), list(COMPLETIONS), [dict(record) for record in RECORDS]
    RewardFunction(clears).score(prompts, completions, records)
    assert (prompts, completions, records) == (PROMPTS, COMPLETIONS, RECORDS)


def test_it_travels_to_other_processes():
    there = cloudpickle.loads(cloudpickle.dumps(RewardFunction(lambda prompts, completions: [1.0] * len(prompts))))
    assert there.score(PROMPTS, COMPLETIONS, RECORDS).score.tolist() == [1, 1, 1]


def test_no_samples_need_no_call():
    assert len(RewardFunction(raises).score([], [], []).score) == 0


def test_a_long_text_is_shortened_in_a_message():
    with pytest.raises(RewardError, match=r"x\.\.\. \(100002 characters\)"):
        RewardFunction(says(math.nan)).score(["x" * 100_000], ["bad"], [{}])


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("no_such_module:reward", 'the reward function "no_such_module:reward": there is no module no_such_module'),
        ("rlx.envs.addition:rewrad", "module 'rlx.envs.addition' has no attribute 'rewrad'"),
        ("rlx.envs.addition:ALPHABET", "is of type str; it must be a function"),
        ("reward", '"reward" is no import path; write pkg.module:function'),
        (lambda completion: 0.0, r"cannot be called with \(prompts, completions, records\) or with"),
    ],
)
def test_what_cannot_be_called_is_refused_before_anything_runs(function, message):
    with pytest.raises(ConfigError, match=message):
        RewardFunction(function)


def test_a_whole_score_writes_nothing_to_the_log(caplog):
    with caplog.at_level(logging.DEBUG):
        scored(right)
    assert caplog.text == ""
