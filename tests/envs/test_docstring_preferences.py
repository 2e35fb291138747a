"""Preferences over completions of docstrings, and the gold score as a metric."""

import pytest

from rlx.algorithms.rlhf_ppo import RLHFPPOConfig
from rlx.envs import docstring_preferences, docstrings
from rlx.errors import ConfigError
from rlx.nets.language_model import export_language_model, load_language_model

MODEL = {
    "model_type": "llama",
    "vocab_size": 97,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return the folder of a small model that has learned nothing: its completions are characters at random."""
    made = tmp_path_factory.mktemp("model")
    export_language_model(load_language_model(config=MODEL, seed=1), docstrings.tokenizer(), made)
    return made


def test_rows_hold_the_best_and_the_worst_completion_by_the_gold_score(folder):
    made = docstring_preferences.rows(str(folder), "eval", 12, smallest_gap=0.0, max_new_tokens=32)
    prompts = {row["prompt"] for row in docstrings.rows("eval", prompt_characters=24)}
    assert len(made) == 12 and {row["prompt"] for row in made} <= prompts
    for row in made:
        assert row["gold_chosen"] == docstrings.score(row["chosen"])
        assert row["gold_rejected"] == docstrings.score(row["rejected"])
        assert row["gold_chosen"] >= row["gold_rejected"]
        assert len(row["chosen"]) <= 32
    assert any(row["gold_chosen"] > row["gold_rejected"] for row in made)
    assert docstring_preferences.rows(str(folder), "eval", 12, smallest_gap=0.0, max_new_tokens=32) == made


def test_a_pair_that_nobody_could_tell_apart_is_left_out(folder):
    assert not docstring_preferences.rows(str(folder), "eval", 12, smallest_gap=0.9, max_new_tokens=32)


def test_another_seed_asks_other_prompts(folder):
    first, second = (
        {row["prompt"] for row in docstring_preferences.rows(str(folder), "eval", 12, smallest_gap=0.0, seed=seed)}
        for seed in (0, 1)
    )
    assert len(first) == len(second) == 12 and len(first & second) < 6


def test_more_prompts_than_there_are_is_refused(folder):
    with pytest.raises(ConfigError, match=r"prompts is 5000; the split eval has 1 to \d+\."):
        docstring_preferences.rows(str(folder), "eval", 5000)


def test_the_gold_metric_is_the_mean_gold_score_of_the_iterations_completions(folder):
    """With the gold score itself as the reward, score_mean has to be the same number."""
    config = (
        RLHFPPOConfig()
        .model(str(folder))
        .prompts("rlx.envs.docstrings:rows", kwargs={"split": "eval", "prompt_characters": 16})
        .prompts(prompts_per_iteration=8, samples_per_prompt=2)
        .generation(max_new_tokens=40)
        .reward("rlx.envs.docstrings:gold")
        .learners(torch_threads=1)
        .callbacks(docstring_preferences.Gold)
    )
    with config.build() as algo:
        metrics = algo.train()
        parts = [docstrings.features(text) for text in algo.rollout.texts]
    assert metrics["custom/gold"] == pytest.approx(metrics["score_mean"], rel=1e-5)
    assert metrics["custom/gold"] > 0
    assert metrics["custom/gold_words"] == pytest.approx(sum(part["words"] for part in parts) / 16)
    assert metrics["custom/gold_form"] < 1
