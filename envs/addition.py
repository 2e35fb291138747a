"""Two-digit addition in characters, the smallest task for GRPO and PPO with a reward that is simply right or wrong.

    prompt "37+58="    answer "95"        reward 1 for exactly that, else 0

All 10,000 ordered pairs of 00 to 99 are split into "sft", "rl" and "eval", the same way in every process. Both orders
of a pair are in one split: who has learned 58+37 was never asked 37+58 in an evaluation that counts as held out. The
answer is written as one writes it, so it has one to three digits, and the model has to end it by itself.

As sources:  rlx.envs.addition:rows with {"split": "rl"}, the reward rlx.envs.addition:reward, the tokenizer
rlx.envs.addition:tokenizer. `random_reward` and `shuffled_reward` are controls that nothing can be learned from.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from rlx.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

ALPHABET = "0123456789+="
SPLITS = {"eval": 0.1, "sft": 0.3, "rl": 0.6}
"""Each split's share of the pairs."""

NUMBERS = 100
LONGEST_ANSWER = 3


def rows(
    split: Literal["sft", "rl", "eval"] = "rl",
    seed: int = 0,
    wrong_share: float = 0.0,
    copies: int = 1,
    limit: int | None = None,
) -> list[dict[str, str]]:
    """Return a split's rows, shuffled by `seed`, which does not change what is in which split.

    A row has "prompt" and "answer"; of "sft" it has the "completion" to learn as well, in a share `wrong_share` of them
    the answer with one digit replaced. copies: every pair stands in so many rows, each right or wrong by itself: one
    row's wrong digit can be learned by heart, those of many cannot. limit: only so many rows.
    """
    if split not in SPLITS:
        raise ConfigError(f'addition has no split "{split}"; there are {", ".join(SPLITS)}.')
    if not 0 <= wrong_share <= 1 or (wrong_share and split != "sft"):
        raise ConfigError(f'wrong_share is {wrong_share}; it is 0 to 1, and of the split "sft" alone.')
    rng = np.random.default_rng([seed, 1])
    if copies < 1:
        raise ConfigError(f"copies is {copies}; every pair stands in at least one row.")
    pairs = _pairs(split) * copies
    pairs = [pairs[index] for index in rng.permutation(len(pairs))][:limit]
    made = [{"prompt": f"{a:02}+{b:02}=", "answer": str(a + b)} for a, b in pairs]
    if split == "sft":
        wrong = set(rng.permutation(len(made))[: round(wrong_share * len(made))].tolist())
        for index, row in enumerate(made):
            row["completion"] = _with_a_wrong_digit(row["answer"], rng) if index in wrong else row["answer"]
    return made


def reward(prompts: Sequence[str], completions: Sequence[str], records: Sequence[Mapping[str, Any]]) -> list[float]:
    """Return 1 where a completion is the answer, character for character, else 0."""
    answers = [record["answer"] for record in records]
    return [float(completion == answer) for completion, answer in zip(completions, answers, strict=True)]


def random_reward(prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
    """Return 0 or 1 at random, whatever the completion: a control. The same batch gets the same numbers."""
    return _rng(prompts, completions).integers(2, size=len(completions)).astype(float).tolist()


def shuffled_reward(
    prompts: Sequence[str], completions: Sequence[str], records: Sequence[Mapping[str, Any]]
) -> list[float]:
    """Return `reward`'s scores, each given to another sample of the batch at random: a control."""
    return _rng(prompts, completions).permutation(reward(prompts, completions, records)).tolist()


def tokenizer() -> PreTrainedTokenizerFast:
    """Return the tokenizer: 13 tokens, EOS and `ALPHABET`."""
    from rlx.text.tokenizers import character_tokenizer  # rows and rewards need no transformers, which takes seconds

    return character_tokenizer(ALPHABET)


def split_of(pairs: Sequence[tuple[int, int]], split: str) -> list[tuple[int, int]]:
    """Return the pairs that are in a split of SPLITS, the same ones in every process."""
    order = np.random.default_rng(0).permutation(len(pairs))
    start = 0
    for name, share in SPLITS.items():
        count = round(share * len(pairs))
        if name == split:
            return [pairs[index] for index in order[start : start + count]]
        start += count
    raise KeyError(split)


def _with_a_wrong_digit(answer: str, rng: np.random.Generator) -> str:
    place = int(rng.integers(len(answer)))
    lowest = int(place == 0 and len(answer) > 1)  # no number begins with 0
    others = [digit for digit in map(str, range(lowest, 10)) if digit != answer[place]]
    return answer[:place] + others[rng.integers(len(others))] + answer[place + 1 :]


def _pairs(split: str) -> list[tuple[int, int]]:
    chosen = split_of([(a, b) for a in range(NUMBERS) for b in range(a, NUMBERS)], split)
    return [pair for a, b in chosen for pair in dict.fromkeys([(a, b), (b, a)])]


def _rng(prompts: Sequence[str], completions: Sequence[str]) -> np.random.Generator:
    """Return a generator that depends on the whole batch, so that no sample's own text decides its number."""
    return np.random.default_rng(zlib.crc32("\n".join([*prompts, *completions]).encode()))
