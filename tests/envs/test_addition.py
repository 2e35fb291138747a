"""Two-digit addition: what is held out, what is wrong on purpose, what is rewarded."""

from collections import Counter

import numpy as np
import pytest

from rlx.envs import addition
from rlx.errors import ConfigError
from rlx.text.examples import load_examples
from rlx.text.prompts import load_prompts
from rlx.text.rewards import RewardFunction
from rlx.text.tokenizers import decode


def pairs(split, **kwargs):
    return [tuple(map(int, row["prompt"].rstrip("=").split("+"))) for row in addition.rows(split, **kwargs)]


def test_the_splits_are_all_ten_thousand_pairs_each_once():
    every = [pair for split in addition.SPLITS for pair in pairs(split)]
    assert sorted(every) == [(a, b) for a in range(100) for b in range(100)]


def test_no_pair_is_held_out_in_one_order_and_trained_in_the_other():
    unordered = [{frozenset(pair) for pair in pairs(split)} for split in addition.SPLITS]
    assert not (unordered[0] & unordered[1] or unordered[0] & unordered[2] or unordered[1] & unordered[2])


def test_the_splits_have_their_shares():
    for split, share in addition.SPLITS.items():
        assert len(pairs(split)) == pytest.approx(share * 10_000, rel=0.01)


def test_answers_are_sums_and_labels_are_right():
    for row in addition.rows("sft"):
        a, b = row["prompt"][:2], row["prompt"][3:5]
        assert row == {"prompt": f"{a}+{b}=", "answer": str(int(a) + int(b)), "completion": row["answer"]}
    assert set(addition.rows("rl")[0]) == {"prompt", "answer"}


@pytest.mark.parametrize("share", [0.3, 1.0])
def test_as_many_labels_are_wrong_as_was_asked_for(share):
    rows = addition.rows("sft", wrong_share=share)
    wrong = [row for row in rows if row["completion"] != row["answer"]]
    assert len(wrong) == round(share * len(rows))
    for row in wrong:
        assert str(int(row["completion"])) == row["completion"] and len(row["completion"]) == len(row["answer"])
        assert sum(a != b for a, b in zip(row["completion"], row["answer"], strict=True)) == 1
    assert Counter(row["answer"] for row in rows) == Counter(row["answer"] for row in addition.rows("sft"))


def test_copies_of_a_pair_are_right_or_wrong_each_by_itself():
    rows = addition.rows("sft", wrong_share=0.5, copies=20)
    counts = Counter(row["prompt"] for row in rows)
    assert set(counts.values()) == {20} and len(counts) == len(addition.rows("sft"))
    right = Counter(row["prompt"] for row in rows if row["completion"] == row["answer"])
    assert 0.08 < np.std([right[prompt] / 20 for prompt in counts]) < 0.14  # of a fair coin: 0.112
    wrong = {row["completion"] for row in rows if row["prompt"] == rows[0]["prompt"]} - {rows[0]["answer"]}
    assert len(wrong) > 3


def test_the_seed_shuffles_and_never_moves_a_pair_to_another_split():
    assert pairs("eval", seed=1) != pairs("eval", seed=2)
    assert sorted(pairs("eval", seed=1)) == sorted(pairs("eval", seed=2))
    assert addition.rows("sft", 5, 0.3) == addition.rows("sft", 5, 0.3)
    assert pairs("eval", seed=1, limit=10) == pairs("eval", seed=1)[:10]


def test_the_reward_is_one_for_the_answer_and_nothing_else():
    completions = ["95", "95 ", "095", "9", "", "59", "95"]
    records = [{"answer": "95"}] * 6 + [{"answer": "59"}]
    scores = RewardFunction("rlx.envs.addition:reward").score(["37+58="] * 7, completions, records)
    assert scores.score.tolist() == [1, 0, 0, 0, 0, 0, 0]


def test_the_controls_do_not_depend_on_the_completion():
    prompts, records = ["p"] * 1000, [{"answer": "1"}] * 1000
    completions = ["1"] * 300 + ["2"] * 700
    shuffled = addition.shuffled_reward(prompts, completions, records)
    assert sum(shuffled) == 300 and sum(shuffled[:300]) == pytest.approx(90, abs=40)  # five deviations
    drawn = addition.random_reward(prompts, completions)
    assert set(drawn) == {0, 1} and sum(drawn) == pytest.approx(500, abs=80)
    assert drawn == addition.random_reward(prompts, completions)
    assert drawn != addition.random_reward(prompts, completions[::-1])


def test_it_is_a_source_for_examples_and_prompts():
    tokenizer = addition.tokenizer()
    examples = load_examples("rlx.envs.addition:rows", tokenizer, kwargs={"split": "sft", "limit": 50})
    rows = addition.rows("sft", limit=50)
    assert [decode(tokenizer, one.tokens, {0}) for one in examples] == [row["prompt"] + row["answer"] for row in rows]
    assert all(one.trained.tolist() == [False] * 6 + [True] * (len(one) - 6) for one in examples)
    prompts = load_prompts("rlx.envs.addition:rows", tokenizer, kwargs={"split": "eval", "limit": 50})
    assert {len(prompt.tokens) for prompt in prompts} == {6}
    assert (
        max(len(row["answer"]) for split in addition.SPLITS for row in addition.rows(split)) == addition.LONGEST_ANSWER
    )


@pytest.mark.parametrize(
    "kwargs", [{"split": "test"}, {"split": "sft", "wrong_share": 1.5}, {"wrong_share": 0.3}, {"copies": 0}]
)
def test_what_makes_no_sense_is_refused(kwargs):
    with pytest.raises(ConfigError, match=r"addition has no split|wrong_share is|copies is"):
        addition.rows(**kwargs)
