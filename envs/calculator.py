"""Products of two-digit numbers with a calculator at hand: the smallest task in which a model has to call a tool.

    prompt "37*58="   the model calls "[37*58]", reads "2146=" and answers "2146"     reward 1 for exactly that, else 0

A call ends with "]" and an answer with EOS, so both are turns (`generation.stop: ["]"]`). What the tool answers is
read and not learned. Pairs are split into "sft", "rl" and "eval", the same way in every process. The rows of "sft" hold
a whole conversation as its completion; in a share `wrong_share` of them one digit of the call or of the answer is
wrong, so that a model that has learned from them errs by chance.

As sources: rlx.envs.calculator:rows, the environment rlx.envs.calculator:Calculator, the tokenizer
rlx.envs.calculator:tokenizer.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np

from rlx.envs.addition import SPLITS, split_of  # pyright: ignore[reportMissingImports] - it does not know package-dir
from rlx.errors import ConfigError
from rlx.text.text_env import Reply, TextEnv

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

ALPHABET = "0123456789*=[]"
CALL = re.compile(r"\[(\d{1,4})\*(\d{1,4})\]")


class Calculator(TextEnv):
    """Multiplies what it is asked to; says whether the answer is right."""

    keeps_stops: ClassVar[bool] = True

    def __init__(self, tokenizer: PreTrainedTokenizerFast, stops: frozenset[int], max_calls: int = 1) -> None:
        """max_calls: how often it may be asked."""
        super().__init__(tokenizer, stops)
        self.max_calls, self.calls = max_calls, 0

    def begin(self) -> None:
        """Begin with the row's own prompt."""
        self.calls = 0

    def reply(self, text: str) -> Reply:
        """Return the product that a turn asks for, or what the answer is worth; a call of any other form is one."""
        call = CALL.fullmatch(text)
        if call is None or self.calls == self.max_calls:
            return Reply(reward=float(text == self.record["answer"]), ends=True)
        self.calls += 1
        return Reply(f"{int(call[1]) * int(call[2])}=")


def rows(
    split: Literal["sft", "rl", "eval"] = "rl", wrong_share: float = 0.0, seed: int = 0, limit: int | None = None
) -> list[dict[str, str]]:
    """Return a split's rows, shuffled by `seed`: "prompt" and "answer", and of "sft" the "completion" to learn."""
    if split not in SPLITS:
        raise ConfigError(f'calculator has no split "{split}"; there are {", ".join(SPLITS)}.')
    rng = np.random.default_rng([seed, 2])
    pairs = _pairs(split)
    made: list[dict[str, str]] = []
    for index in rng.permutation(len(pairs))[:limit]:
        a, b = pairs[index]
        row = {"prompt": f"{a}*{b}=", "answer": str(a * b)}
        if split == "sft":
            row["completion"] = _conversation(a, b, rng, rng.random() < wrong_share)
        made.append(row)
    return made


def tokenizer() -> PreTrainedTokenizerFast:
    """Return the tokenizer: 15 tokens, EOS and `ALPHABET`."""
    from rlx.text.tokenizers import character_tokenizer

    return character_tokenizer(ALPHABET)


def _conversation(a: int, b: int, rng: np.random.Generator, is_wrong: bool) -> str:
    right = call = f"{a}*{b}"
    if is_wrong and rng.random() < 0.5:
        call = _with_a_wrong_digit(right, rng)
    first, second = map(int, call.split("*"))
    answer = product = str(first * second)
    if is_wrong and call == right:
        answer = _with_a_wrong_digit(product, rng)
    return f"[{call}]{product}={answer}"


def _with_a_wrong_digit(text: str, rng: np.random.Generator) -> str:
    places = [place for place, character in enumerate(text) if character.isdigit()]
    place = places[int(rng.integers(len(places)))]
    others = [digit for digit in "123456789" if digit != text[place]]
    return text[:place] + others[rng.integers(len(others))] + text[place + 1 :]


def _pairs(split: str) -> list[tuple[int, int]]:
    return split_of([(a, b) for a in range(10, 100) for b in range(10, 100)], split)
