"""Guess the number: a game of several turns, the smallest task in which a language model has to use what it was told.

The model reads "?" and guesses a digit; the environment says "<" if the number is smaller, ">" if it is larger, and the
model guesses again. Who finds it gets 1, less `price` for every guess before that; who does not within the turns, 0. A
guess is one token, so the digits are the tokens that end a turn (`stop` in the settings):

    rlx train grpo_guess

As sources: rlx.envs.guess:rows, the environment rlx.envs.guess:Guess, the tokenizer rlx.envs.guess:tokenizer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from rlx.text.text_env import Reply, TextEnv

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

DIGITS = "0123456789"
ALPHABET = f"{DIGITS}?<>"


class Guess(TextEnv):
    """Holds a digit that the model is to find."""

    keeps_stops: ClassVar[bool] = True

    def __init__(self, tokenizer: PreTrainedTokenizerFast, stops: frozenset[int], price: float = 0.1) -> None:
        super().__init__(tokenizer, stops)
        self.price = price

    def begin(self) -> str:
        """Choose a number."""
        self.number, self.guesses = int(self.rng.integers(len(DIGITS))), 0
        return "?"

    def reply(self, text: str) -> Reply:
        """Compare a guess; what is no digit ends the game."""
        self.guesses += 1
        if text not in DIGITS or not text:
            return Reply(ends=True)
        if int(text) == self.number:
            return Reply(reward=1.0 - self.price * (self.guesses - 1), ends=True)
        return Reply("<" if self.number < int(text) else ">")


def rows(limit: int = 64) -> list[dict[str, str]]:
    """Return the prompts: all alike, as it is the seed of a conversation that chooses the number."""
    return [{"prompt": "?"}] * limit


def tokenizer() -> PreTrainedTokenizerFast:
    """Return the tokenizer: 14 tokens, EOS and `ALPHABET`."""
    from rlx.text.tokenizers import character_tokenizer

    return character_tokenizer(ALPHABET)
