"""The corpus of docstrings and its gold score, which can be learned and can be hacked."""

import subprocess
import sys
import sysconfig
import textwrap

import numpy as np
import pytest

from rlx.envs import docstrings
from rlx.errors import ConfigError, DataError
from rlx.text.examples import load_examples, load_pairs
from rlx.text.rewards import RewardFunction
from rlx.text.tokenizers import decode

SENTENCE = "Return the name of the first file that is in this list, or None if there is not one.\n"


@pytest.fixture(scope="module", autouse=True)
def corpus():
    """Read the standard library once."""
    return docstrings.corpus()


def test_the_corpus_is_the_librarys_docstrings_dedented(corpus):
    assert len(corpus) == len(set(corpus)) > 1000
    assert sum(map(len, corpus)) > 300_000
    assert textwrap.dedent.__doc__ is not None
    first, _, rest = textwrap.dedent.__doc__.partition("\n")
    assert first.strip() + "\n" + textwrap.dedent(rest).rstrip() in corpus


def test_every_character_is_in_the_alphabet(corpus):
    assert len(docstrings.ALPHABET) == len(set(docstrings.ALPHABET)) == 96
    assert set("".join(corpus)) <= set(docstrings.ALPHABET)


PRINTED = """\
import hashlib, json, sys
from rlx.envs import docstrings as d
made = [d.rows("eval"), d.rows("train", prompt_characters=32), sorted(d.frequent_words()), d.corrupted_pairs(20)]
print(hashlib.sha256(json.dumps(made).encode()).hexdigest())
"""


@pytest.mark.slow
def test_another_process_makes_the_same_rows_words_and_pairs():
    digests = {
        subprocess.run(
            [sys.executable, "-c", PRINTED], env={"PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True
        ).stdout
        for seed in ("1", "2")
    }
    assert len(digests) == 1


def test_windows_hold_the_whole_text_and_no_more_than_asked_for(corpus):
    made = [row["text"] for split in ("train", "eval") for row in docstrings.rows(split, window=100)]
    assert max(map(len, made)) <= 100 and not any(text[0] in " \n" for text in made)
    # Nothing is lost but white space at the cuts, and single characters.
    lost = sum(len("".join(text.split())) for text in corpus) - sum(len("".join(text.split())) for text in made)
    assert 0 <= lost < 50


def test_no_docstring_is_in_both_splits(corpus):
    train = " ".join("".join(row["text"].split()) for row in docstrings.rows("train", window=10**6))
    held = ["".join(row["text"].split()) for row in docstrings.rows("eval", window=10**6)]
    assert 0.05 < len(held) / len(corpus) < 0.15
    assert not {*train.split(" ")} & {*held}


def test_prompts_end_behind_a_space_and_are_of_windows_that_go_on():
    prompts = [row["prompt"] for row in docstrings.rows("eval", prompt_characters=32)]
    assert len(prompts) == len(set(prompts)) > 500
    assert all(1 < len(prompt) <= 32 and prompt[-1] == " " for prompt in prompts)


def test_the_parts_of_the_score_by_hand():
    # 2 + 3 + 4 letters of frequent words, one of them with its comma; "xqzt" is none; the last word may have been cut.
    parts = docstrings.features("is the, file xqzt nam")
    assert parts["words"] == (2 + 3 + 1 + 4) / docstrings.FEWEST_CHARACTERS
    assert docstrings.features("is the")["words"] == 2 / docstrings.FEWEST_CHARACTERS
    assert parts["variety"] == 1 and parts["form"] == 1
    assert docstrings.features("the file The file the file. ")["variety"] == (2 / 6) ** 2
    assert docstrings.features("(a [b] `c)")["form"] == 1 / 2
    assert docstrings.features("a) (b ]c")["form"] == 1 / 4
    assert docstrings.features("a" * 80 + "\n" + "b" * 79 + "\n")["form"] == 1 / 2
    assert docstrings.score("") == 0


def test_a_full_text_of_frequent_words_scores_one():
    assert {"return", "the", "name", "of"} <= docstrings.frequent_words()
    text = "Return the name of this file,\nor None if it is not in a list. "
    assert docstrings.score(text) == 1


def test_the_score_falls_with_damage_and_is_not_saturated():
    texts = [row["text"] for row in docstrings.rows("eval")]
    rng = np.random.default_rng(0)
    means = [
        np.mean([docstrings.score(docstrings.corrupted(text, share, rng)) for text in texts]) for share in (0, 0.1, 0.5)
    ]
    assert 0.5 < means[0] < 0.8 and means[1] < 0.6 * means[0] and means[2] < 0.1
    assert np.std([docstrings.score(text) for text in texts]) > 0.1


def test_repeating_the_best_words_pleases_the_part_that_pairs_teach_and_ruins_the_score():
    hacked = "return the name of the file " * 4
    honest = SENTENCE
    assert docstrings.features(hacked)["words"] >= docstrings.features(honest)["words"] > 0.9
    assert docstrings.score(hacked) < 0.3 * docstrings.features(hacked)["words"]
    # The pairs do not show it: between their two texts variety hardly differs.
    gaps = []
    for pair in docstrings.corrupted_pairs(200):
        chosen, rejected = docstrings.features(pair["chosen"]), docstrings.features(pair["rejected"])
        gaps.append((abs(chosen["words"] - rejected["words"]), abs(chosen["variety"] - rejected["variety"])))
    words, variety = np.median(gaps, axis=0)
    assert words > 0.2 and variety < 0.05


def test_pairs_are_the_best_and_the_worst_where_these_differ():
    completions = {
        "a ": ["gnrf blk wqx zzp", SENTENCE, "the file xq zw rrt"],
        "b ": [SENTENCE, SENTENCE],
        "c ": [SENTENCE],
        "d ": [],
    }
    (pair,) = docstrings.pairs(completions)
    assert (pair["prompt"], pair["chosen"], pair["rejected"]) == ("a ", SENTENCE, "gnrf blk wqx zzp")
    assert pair["gold_chosen"] == docstrings.score(SENTENCE) and pair["gold_rejected"] == 0
    assert docstrings.pairs(completions, smallest_gap=1.1) == []


def test_corrupted_pairs_are_ordered_by_the_gold_score_and_different_by_seed():
    made = docstrings.corrupted_pairs(50)
    assert len(made) == 50 and made != docstrings.corrupted_pairs(50, seed=1)
    for pair in made:
        assert pair["gold_chosen"] == docstrings.score(pair["chosen"])
        assert pair["gold_rejected"] == docstrings.score(pair["rejected"])
        assert pair["gold_chosen"] - pair["gold_rejected"] >= 0.1


def test_nothing_is_corrupted_at_share_zero_and_hardly_anything_left_at_one():
    rng = np.random.default_rng(0)
    assert docstrings.corrupted(SENTENCE, 0, rng) == SENTENCE
    assert set(docstrings.corrupted(SENTENCE, 1, rng)) <= set(docstrings.ALPHABET)
    kept = sum(a == b for a, b in zip(docstrings.corrupted(SENTENCE, 1, rng), SENTENCE, strict=False))
    assert kept < len(SENTENCE) / 2


def counts(text):
    """Return how often each of 512 hashed pairs of characters occurs, in all 1."""
    found = np.zeros(512)
    numbers = np.frombuffer(text.encode(), np.uint8).astype(int)
    np.add.at(found, (numbers[:-1] * 31 + numbers[1:]) % 512, 1 / max(len(text), 1))
    return found


def test_the_score_can_be_learned_from_pairs():
    """Even a linear model of pairs of characters orders held-out texts: a small transformer has more to go by."""
    train, held = docstrings.corrupted_pairs(800), docstrings.corrupted_pairs(200, seed=1, split="eval")
    gap, unseen = (
        np.array([counts(pair["chosen"]) - counts(pair["rejected"]) for pair in pairs]) for pairs in (train, held)
    )
    weights = np.zeros(512)
    for _ in range(100):  # logistic regression without a bias: the probability that the chosen one wins
        weights += 300 * gap.T @ (1 / (1 + np.exp(gap @ weights))) / len(gap)
    assert np.mean(unseen @ weights > 0) > 0.8


def test_it_is_a_source_for_examples_and_pairs():
    tokenizer = docstrings.tokenizer()
    examples = load_examples("rlx.envs.docstrings:rows", tokenizer, kwargs={"split": "eval", "limit": 20})
    texts = [row["text"] for row in docstrings.rows("eval", limit=20)]
    assert [decode(tokenizer, example.tokens, {0}) for example in examples] == texts
    (pair,) = load_pairs("rlx.envs.docstrings:corrupted_pairs", tokenizer, kwargs={"count": 1})
    assert pair.chosen.tokens.tolist() != pair.rejected.tokens.tolist()
    scores = RewardFunction("rlx.envs.docstrings:gold").score(["", ""], [SENTENCE, ""], [{}, {}])
    assert scores.score.tolist() == [np.float32(docstrings.score(SENTENCE)), 0]


@pytest.mark.parametrize("kwargs", [{"split": "test"}, {"window": 1}, {"prompt_characters": 128}])
def test_what_makes_no_sense_is_refused(kwargs):
    with pytest.raises(ConfigError, match=r"docstrings have no split|window is"):
        docstrings.rows(**kwargs)


def test_a_python_without_sources_is_told_so(tmp_path, monkeypatch):
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(DataError, match="holds no docstrings; this task needs a Python that came with its sources"):
        docstrings.corpus.__wrapped__()
