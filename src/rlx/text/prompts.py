"""Prompts: rows with "prompt" or "messages" as tokens, ready to be completed."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from rlx.errors import DataError
from rlx.text.chat import check_messages, is_chat, render
from rlx.text.sources import Rows, Source, read_rows
from rlx.text.tokenizers import encode, encode_start

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prompt:
    """What a completion is asked for."""

    index: int
    """Number of its row in the source, from 0."""
    text: str
    """The prompt's text; of messages what the tokenizer's template makes of them."""
    tokens: tuple[int, ...]
    """What the model reads: at least one."""
    record: Mapping[str, Any]
    """The whole row, for the reward function."""


def load_prompts(
    source: Source,
    tokenizer: PreTrainedTokenizerBase,
    max_tokens: int | None = None,
    too_long: Literal["refuse", "drop"] = "refuse",
    kwargs: Mapping[str, Any] | None = None,
) -> list[Prompt]:
    """Return the prompts of a source (`read_rows`), in its order.

    A row has "prompt", a text or messages, or "messages"; if these end with the assistant's answer, the prompt is what
    is before it. max_tokens: a prompt with more is refused by its place, or dropped, and the log says how many were.
    """
    rows = read_rows(source, kwargs)
    prompts = [_prompt(rows, index, tokenizer) for index in range(len(rows))]
    if max_tokens is None:
        return prompts
    fitting = [prompt for prompt in prompts if len(prompt.tokens) <= max_tokens]
    if len(fitting) < len(prompts):
        longest = max(prompts, key=lambda prompt: len(prompt.tokens))
        what = (
            f"{len(prompts) - len(fitting)} of the {len(prompts)} prompts of {rows.name} have more than "
            f"{max_tokens} tokens; the longest, {rows.place(longest.index)}, has {len(longest.tokens)}"
        )
        if too_long == "refuse" or not fitting:
            first = next(prompt for prompt in prompts if len(prompt.tokens) > max_tokens)
            raise DataError(f"{what}, the first is {rows.place(first.index)}. {advice_on_length(bool(fitting))}")
        log.warning("%s. They are dropped.", what)
    return fitting


def advice_on_length(any_fits: bool) -> str:
    """Return what to do about rows that are too long."""
    return f"Raise the limit, or shorten {'or drop ' if any_fits else ''}them."


def prompt_text(rows: Rows, index: int, tokenizer: PreTrainedTokenizerBase) -> tuple[str, bool]:
    """Return the text of a row's prompt, and whether a chat template made it, which then puts BOS itself."""
    row, place = rows[index], rows.place(index)
    if "prompt" not in row and "messages" not in row:
        raise DataError(f'{place} has neither "prompt" nor "messages"; its keys are {sorted(map(str, row))}.')
    key = "prompt" if "prompt" in row else "messages"
    value = row[key]
    if key == "prompt" and not is_chat(value):
        return rows.text(index, key), False
    messages = check_messages(value, f'"{key}" in {place}')
    if messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    if not messages:
        raise DataError(f'"{key}" in {place} holds an answer and nothing that it answers.')
    return render(tokenizer, messages, place, answer_follows=True), True


def prompt_tokens(text: str, from_chat: bool, tokenizer: PreTrainedTokenizerBase, place: str) -> list[int]:
    """Return a prompt's tokens, at least one: a plain text behind BOS where the tokenizer puts one.

    place: what DataError calls it, as in "the prompt in rows.jsonl:3".
    """
    tokens = encode(tokenizer, text, place) if from_chat else encode_start(tokenizer, text, place)
    if not tokens:
        raise DataError(f"{place} is empty; it must have at least one token.")
    return tokens


def _prompt(rows: Rows, index: int, tokenizer: PreTrainedTokenizerBase) -> Prompt:
    text, from_chat = prompt_text(rows, index, tokenizer)
    tokens = prompt_tokens(text, from_chat, tokenizer, f"the prompt in {rows.place(index)}")
    return Prompt(index, text, tuple(tokens), rows[index])
