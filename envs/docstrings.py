"""The whole of RLHF with a known truth: a character model of the docstrings of Python's standard library.

Texts come from the source files of the running Python, read and not imported, so nothing is downloaded and every
machine with the same Python has the same ones. `gold` is the truth that people's judgement stands for in real RLHF:
preferences are made by it, a reward model learns from these, a policy from the reward model, and in the end the gold
score tells what the policy really became.

The gold score of a completion, 0 to 1, is a product of three shares:

    words     of its visible characters, how many are letters of words (or the punctuation behind one) that the corpus
              uses often; at least `FEWEST_CHARACTERS` of them count, so that little text earns little
    variety   of its words, how many are different, squared: who reads a word again learns nothing, and is annoyed
    form      1 / (1 + brackets and backticks without a partner + lines over `LONGEST_LINE` characters)

Why this one:
- It is learnable. What a small character model writes varies in spelling above all, so `words` decides nearly every
  pair, and whoever was trained to predict the next character has in its hidden states how likely each one was.
- It can be hacked. What a model samples seldom repeats itself, so in the pairs `variety` hardly differs, and a reward
  model does not learn that it matters. A policy that maximises the learned score alone ends at the few words that are
  liked best, again and again: the learned score is then at its highest, and the product small.
- A product, since a mean would let two perfect parts pay for the one that was given up.
- It is not saturated: texts of the corpus score 0.54 on average, with a deviation of 0.2, since names and examples are
  no frequent words; with a tenth of their characters damaged they score 0.27.

As sources: rlx.envs.docstrings:rows with {"split": ...}, the reward rlx.envs.docstrings:gold, the tokenizer
rlx.envs.docstrings:tokenizer; `pairs` and `corrupted_pairs` make preferences.
"""

from __future__ import annotations

import ast
import re
import sysconfig
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from rlx.errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

ALPHABET = "\n" + "".join(map(chr, range(32, 127)))
"""Line break and printable ASCII: 96 characters. Docstrings with any other one are left out."""
HELD_OUT = 10
"""One docstring in so many is in the split "eval"."""
FREQUENT_WORDS = 1000
FEWEST_CHARACTERS = 40
LONGEST_LINE = 79

Split = Literal["train", "eval"]

_WORD = re.compile(r"[A-Za-z]+")
_BRACKETS = {")": "(", "]": "[", "}": "{"}


@lru_cache(maxsize=1)
def corpus() -> tuple[str, ...]:
    """Return the docstrings of the modules that stand directly in the standard library's folder, each once.

    In the order of the files and of their lines, dedented, ASCII. DataError where Python came without its sources.
    """
    folder = Path(sysconfig.get_path("stdlib"))
    found: dict[str, None] = {}
    for file in sorted(folder.glob("*.py")):
        for node in _documented(ast.parse(file.read_bytes())):
            text = (ast.get_docstring(node) or "").strip()
            if text and set(text) <= set(ALPHABET):
                found[text] = None
    if not found:
        raise DataError(f"{folder} holds no docstrings; this task needs a Python that came with its sources.")
    return tuple(found)


def rows(
    split: Split = "train", window: int = 128, prompt_characters: int | None = None, limit: int | None = None
) -> list[dict[str, str]]:
    """Return a split's texts in windows of at most `window` characters, each from a line's begin to a line's end.

    A row has "text"; with `prompt_characters` it has "prompt" in its place, the first so many characters up to the end
    of a word, and the space behind it, of windows that go on after that. No docstring is in both splits. limit: only so
    many rows.
    """
    if split not in ("train", "eval"):
        raise ConfigError(f'docstrings have no split "{split}"; there are train and eval.')
    if window < 2 or (prompt_characters is not None and not 1 < prompt_characters < window):
        raise ConfigError(f"window is {window} and prompt_characters {prompt_characters}; 1 < prompt < window.")
    held_out = [zlib.crc32(text.encode()) % HELD_OUT == 0 for text in corpus()]
    texts = [text for text, is_held in zip(corpus(), held_out, strict=True) if is_held == (split == "eval")]
    windows = [part for text in texts for part in _windows(text, window)]
    if prompt_characters is None:
        return [{"text": part} for part in windows][:limit]
    starts = [_start(part, prompt_characters) for part in windows]
    return [{"prompt": start} for start in dict.fromkeys(starts) if start][:limit]


def gold(prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
    """Return the gold score of each completion; the prompt goes for nothing."""
    return [score(completion) for completion in completions]


def score(text: str) -> float:
    """Return the gold score of a text, 0 to 1."""
    parts = features(text)
    return parts["words"] * parts["variety"] * parts["form"]


def features(text: str) -> dict[str, float]:
    """Return the three shares that the gold score is the product of: words, variety, form.

    A word that the text ends with may have been cut, so it counts neither way.
    """
    text = re.sub(r"[A-Za-z]+\Z", "", text)
    visible = sum(not character.isspace() for character in text)
    known = 0
    words = []
    for found in _WORD.finditer(text):
        words.append(found[0].lower())
        if words[-1] in frequent_words():
            known += len(found[0]) + (text[found.end() : found.end() + 1] in {".", ",", ";", ":"})
    faults = _unmatched(text) + sum(len(line) > LONGEST_LINE for line in text.splitlines())
    return {
        "words": known / max(visible, FEWEST_CHARACTERS),
        "variety": (len(set(words)) / len(words)) ** 2 if words else 1.0,
        "form": 1 / (1 + faults),
    }


@lru_cache(maxsize=1)
def frequent_words() -> frozenset[str]:
    """Return the most frequent words of the corpus, in small letters; of single letters only "a" and "i"."""
    counts = Counter(word for text in corpus() for word in _WORD.findall(text.lower()) if len(word) > 1 or word in "ai")
    return frozenset(word for word, _ in counts.most_common(FREQUENT_WORDS))  # of equal ones those that come first


def pairs(completions_by_prompt: Mapping[str, Sequence[str]], smallest_gap: float = 0.1) -> list[dict[str, Any]]:
    """Return preference rows: for each prompt the best and the worst of its completions by the gold score.

    A prompt whose two are less than `smallest_gap` apart gives none: nobody could tell them apart. A row has "prompt",
    "chosen", "rejected", and both scores as "gold_chosen" and "gold_rejected".
    """
    made = []
    for prompt, completions in completions_by_prompt.items():
        ranked = sorted((score(completion), completion) for completion in completions)
        if len(ranked) > 1 and ranked[-1][0] - ranked[0][0] >= smallest_gap:
            made.append(_pair(prompt, ranked[-1], ranked[0]))
    return made


def corrupted_pairs(
    count: int, seed: int = 0, window: int = 128, prompt_characters: int = 32, split: Split = "train"
) -> list[dict[str, Any]]:
    """Return preference rows made without a model: the corpus' own continuations, each damaged twice.

    They are what `pairs` would return for `count` prompts with two completions, damaged by shares drawn at random, so
    some are as they were and some are hardly text any more; ones that do not differ by 0.1 are drawn again.
    """
    rng = np.random.default_rng([seed, 2])
    windows = [row["text"] for row in rows(split, window)]
    texts = [(start, text[len(start) :]) for text in windows if (start := _start(text, prompt_characters))]
    made: list[dict[str, Any]] = []
    for _ in range(100 * count):
        if len(made) == count:
            return made
        prompt, rest = texts[int(rng.integers(len(texts)))]
        made += pairs({prompt: [corrupted(rest, float(rng.random() ** 2), rng) for _ in range(2)]})
    raise ConfigError(f"only {len(made)} of {count} pairs differ enough; the windows of {window} characters are short.")


def corrupted(text: str, share: float, rng: np.random.Generator) -> str:
    """Return a text with a share of its characters, none to all, replaced, doubled, dropped or swapped."""
    characters = list(text)
    for at in np.flatnonzero(rng.random(len(characters)) < share):
        match int(rng.integers(4)):
            case 0:
                characters[at] = ALPHABET[int(rng.integers(len(ALPHABET)))]
            case 1:
                characters[at] *= 2
            case 2:
                characters[at] = ""
            case _ if at:
                characters[at - 1], characters[at] = characters[at], characters[at - 1]
    return "".join(characters)


def tokenizer() -> PreTrainedTokenizerFast:
    """Return the tokenizer: 97 tokens, EOS and `ALPHABET`."""
    from rlx.text.tokenizers import character_tokenizer  # rows and rewards need no transformers, which takes seconds

    return character_tokenizer(ALPHABET)


def _documented(tree: ast.Module) -> list[ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]:
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = [node for node in ast.walk(tree) if isinstance(node, kinds)]
    return sorted(found, key=lambda node: getattr(node, "lineno", 0))


def _windows(text: str, size: int) -> list[str]:
    """Return a text in parts of whole lines, as many as fit; a line that is longer is cut at a space."""
    parts: list[str] = []
    rest = text
    while len(rest) > size:
        end = next((at for mark in ("\n", " ") if (at := rest.rfind(mark, 1, size + 1)) > 0), size)
        parts.append(rest[:end])
        rest = rest[end:].lstrip("\n ")
    return [part for part in [*parts, rest] if len(part) > 1]


def _start(text: str, characters: int) -> str:
    """Return a text's first characters up to a space between words; "" where there is none, or nothing after it."""
    end = text.rfind(" ", 0, characters) + 1
    return text[:end] if end and len(text) > end else ""


def _unmatched(text: str) -> int:
    """Return how many brackets and backticks have no partner."""
    still_open: list[str] = []
    unmatched = text.count("`") % 2
    for character in text:
        if character in _BRACKETS.values():
            still_open.append(character)
        elif character in _BRACKETS:
            if still_open and still_open[-1] == _BRACKETS[character]:
                still_open.pop()
            else:
                unmatched += 1
    return unmatched + len(still_open)


def _pair(prompt: str, best: tuple[float, str], worst: tuple[float, str]) -> dict[str, Any]:
    return {
        "prompt": prompt,
        "chosen": best[1],
        "rejected": worst[1],
        "gold_chosen": best[0],
        "gold_rejected": worst[0],
    }
