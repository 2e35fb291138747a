"""Preferences over what a model of docstrings writes, and the gold score as a metric.

`rows` is a source for reward models and DPO: the model of a run completes prompts, and the gold score of
`rlx.envs.docstrings` says which of two completions is preferred. `Gold` shows in a run that learns from a reward model
what people never see there: how good its completions are in truth.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from rlx.callbacks import Callback
from rlx.envs import docstrings  # pyright: ignore[reportMissingImports] - it does not know package-dir
from rlx.errors import ConfigError
from rlx.metrics import Metrics
from rlx.text_inference import load_text_policy


def rows(
    run: str,
    split: docstrings.Split = "train",
    prompts: int = 1500,
    prompt_characters: int = 24,
    samples_per_prompt: int = 4,
    smallest_gap: float = 0.1,
    seed: int = 0,
    max_new_tokens: int = 48,
) -> list[dict[str, Any]]:
    """Return preference rows (`rlx.envs.docstrings.pairs`) of completions by the model of a run on text.

    run: its folder. prompts: so many of the split, drawn by `seed`, which the completions depend on as well. A prompt
    whose best and worst completion are less than `smallest_gap` apart gives no row.
    """
    asked = [row["prompt"] for row in docstrings.rows(split, 128, prompt_characters)]
    if not 0 < prompts <= len(asked):
        raise ConfigError(f"prompts is {prompts}; the split {split} has 1 to {len(asked)}.")
    chosen = np.random.default_rng([seed, 3]).permutation(len(asked))[:prompts]
    texts = [asked[int(index)] for index in chosen]
    made = load_text_policy(run).generate(texts, samples_per_prompt, seed * len(asked), max_new_tokens=max_new_tokens)
    return docstrings.pairs(dict(zip(texts, made, strict=True)), smallest_gap)


class Gold(Callback):
    """The gold score of each iteration's completions and its parts: custom/gold, custom/gold_words, ..."""

    def on_train_result(self, algo: Any, metrics: Metrics) -> None:
        """Score what was sampled."""
        texts = algo.rollout.texts
        metrics["custom/gold"] = float(np.mean([docstrings.score(text) for text in texts]))
        parts = [docstrings.features(text) for text in texts]
        metrics |= {f"custom/gold_{name}": float(np.mean([part[name] for part in parts])) for name in parts[0]}
