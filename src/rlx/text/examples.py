"""Examples to learn from: tokens, which of them are trained, and rows of a Batch.

A Batch's rows are shifted here and nowhere else: position t holds the token that is read, `obs`, and the one that
follows it, `action`, so the logits of position t score action[t].
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from rlx.errors import DataError
from rlx.text.chat import answers, check_messages, is_chat
from rlx.text.prompts import advice_on_length, prompt_text, prompt_tokens
from rlx.text.sources import Rows, Source, read_rows
from rlx.text.tokenizers import encode, encode_continuation, encode_start, end_id, stop_ids
from rlx.trajectory import Batch

log = logging.getLogger(__name__)

TooLong = Literal["refuse", "drop", "cut"]
T = TypeVar("T", "Example", "Pair")


@dataclass(frozen=True, eq=False)
class Example:
    """One sequence."""

    index: int
    """Number of its row in the source, from 0."""
    tokens: np.ndarray
    """int64 [N], N >= 2."""
    trained: np.ndarray
    """bool [N]: whether the loss counts how well a token is predicted; never the first one, which nothing predicts."""

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True, eq=False)
class Pair:
    """Two answers to one prompt."""

    index: int
    """Number of its row in the source, from 0."""
    chosen: Example
    rejected: Example
    margin: float
    """By how much the chosen one should win at least; 0 where the row does not say."""

    def __len__(self) -> int:
        return max(len(self.chosen), len(self.rejected))


def load_examples(
    source: Source,
    tokenizer: PreTrainedTokenizerBase,
    *,
    stops: Collection[int] | None = None,
    train_prompt: bool = False,
    max_tokens: int | None = None,
    too_long: TooLong = "refuse",
    kwargs: Mapping[str, Any] | None = None,
) -> list[Example]:
    """Return the examples for supervised learning that a source (`read_rows`) holds, in its order.

    A row has one of
        "prompt" and "completion"   texts, or messages both; the completion and the EOS behind it are trained
        "messages"                  every answer of the assistant is trained, up to and with its stop token
        "text"                      all of it is trained, and the EOS behind it
    stops: the tokens that end an answer; default: the tokenizer's EOS. Where a text does not end with one already, the
        tokenizer's EOS is added, so that the model learns to stop.
    train_prompt: what is not an answer is trained as well.
    too_long: an example with more than max_tokens tokens is refused by its place, dropped, or cut, without an EOS then.
    """
    rows = read_rows(source, kwargs)
    ends = stops if stops is not None else stop_ids(tokenizer)
    examples = [_example(rows, index, tokenizer, ends, train_prompt) for index in range(len(rows))]
    empty = [index for index in range(len(rows)) if rows[index].get("completion") in ("", [])]
    _warn(rows, empty, 'have an empty "completion": what is learned from them is to end at once')
    if max_tokens is not None and too_long == "cut":
        examples = [_cut(example, rows, max_tokens) for example in examples]
    return _fitting(examples, rows, max_tokens, too_long)


def load_pairs(
    source: Source,
    tokenizer: PreTrainedTokenizerBase,
    *,
    stops: Collection[int] | None = None,
    max_tokens: int | None = None,
    too_long: Literal["refuse", "drop"] = "refuse",
    kwargs: Mapping[str, Any] | None = None,
) -> list[Pair]:
    """Return the preference pairs of a source (`read_rows`), in its order.

    A row has "prompt", "chosen", "rejected", all texts; or "chosen" and "rejected" are messages, whole conversations or
    just the answer to the messages "prompt". "margin" is a number and may be left out. stops and max_tokens are those
    of `load_examples`; a pair is as long as the longer of both.
    """
    rows = read_rows(source, kwargs)
    ends = stops if stops is not None else stop_ids(tokenizer)
    pairs = [_pair(rows, index, tokenizer, ends) for index in range(len(rows))]
    same = [pair.index for pair in pairs if np.array_equal(pair.chosen.tokens, pair.rejected.tokens)]
    empty = [index for index in range(len(rows)) if "" in (rows[index]["chosen"], rows[index]["rejected"])]
    _warn(rows, empty, 'have an empty "chosen" or "rejected": an answer that ends at once')
    if len(same) == len(pairs):
        raise DataError(f'"chosen" and "rejected" are the same in every row of {rows.name}; nothing can be learned.')
    _warn(rows, same, 'have the same "chosen" and "rejected": nothing is learned from them')
    return _fitting(pairs, rows, max_tokens, too_long)


def collate(examples: Sequence[Example]) -> Batch:
    """Return examples as rows: obs, action int64 [S, L], mask bool [S, L], length int64 [S].

    L is the longest example less one; a row's positions from its `length` on are zeros.
    """
    count, width = len(examples), max(map(len, examples)) - 1
    obs, action = np.zeros((2, count, width), np.int64)
    mask = np.zeros((count, width), bool)
    for row, example in enumerate(examples):
        end = len(example) - 1
        obs[row, :end], action[row, :end] = example.tokens[:-1], example.tokens[1:]
        mask[row, :end] = example.trained[1:]
    length = np.array([len(example) - 1 for example in examples], np.int64)
    arrays = {"obs": obs, "action": action, "mask": mask, "length": length}
    return Batch(**{name: torch.from_numpy(array) for name, array in arrays.items()})


def collate_pairs(pairs: Sequence[Pair]) -> Batch:
    """Return pairs as rows: obs, action, mask [P, 2, L], length [P, 2], margin float32 [P]; 0 chosen, 1 rejected."""
    flat = collate([example for pair in pairs for example in (pair.chosen, pair.rejected)])
    margin = torch.tensor([pair.margin for pair in pairs], dtype=torch.float32)
    return Batch(**{name: tensor.unflatten(0, (-1, 2)) for name, tensor in flat.tensors.items()}, margin=margin)


def _example(
    rows: Rows, index: int, tokenizer: PreTrainedTokenizerBase, ends: Collection[int], train_prompt: bool
) -> Example:
    row, place = rows[index], rows.place(index)
    if "completion" in row:
        prompt, completion = rows.value(index, "prompt"), row["completion"]
        if is_chat(prompt) or is_chat(completion):
            asked = _messages(prompt, "prompt", place)
            conversation = [*asked, *_messages(completion, "completion", place)]
            return _of_messages(conversation, len(asked), index, place, tokenizer, ends, train_prompt)
        text, from_chat = prompt_text(rows, index, tokenizer)
        before = prompt_tokens(text, from_chat, tokenizer, place)
        after = _ended(
            encode_continuation(tokenizer, text, before, rows.text(index, "completion"), place), tokenizer, ends
        )
        return _made(index, place, [(before, train_prompt), (after, True)])
    if "messages" in row:
        conversation = check_messages(row["messages"], f'"messages" in {place}')
        return _of_messages(conversation, 0, index, place, tokenizer, ends, train_prompt)
    if "text" in row:
        tokens = _ended(encode_start(tokenizer, rows.text(index, "text"), place), tokenizer, ends)
        return _made(index, place, [(tokens, True)])
    raise DataError(
        f'{place} has none of "completion", "messages" and "text" to learn from; its keys are {sorted(map(str, row))}.'
    )


def _pair(rows: Rows, index: int, tokenizer: PreTrainedTokenizerBase, ends: Collection[int]) -> Pair:
    row, place = rows[index], rows.place(index)
    chosen, rejected = rows.value(index, "chosen"), rows.value(index, "rejected")
    if is_chat(chosen) != is_chat(rejected):
        raise DataError(f'"chosen" and "rejected" in {place} must both be texts or both messages.')
    made = []
    if is_chat(chosen):
        conversations = [_conversation(row, key, place) for key in ("chosen", "rejected")]
        if list(conversations[0][:-1]) != list(conversations[1][:-1]):
            raise DataError(
                f'"chosen" and "rejected" in {place} differ before their last message; only that may differ.'
            )
        for conversation in conversations:
            first = len(conversation) - 1
            made.append(_of_messages(conversation, first, index, place, tokenizer, ends, train_prompt=False))
    else:
        rows.value(index, "prompt")
        text, from_chat = prompt_text(rows, index, tokenizer)
        before = prompt_tokens(text, from_chat, tokenizer, place)
        for key in ("chosen", "rejected"):
            after = encode_continuation(tokenizer, text, before, rows.text(index, key), place)
            made.append(_made(index, place, [(before, False), (_ended(after, tokenizer, ends), True)]))
    margin = row.get("margin")
    if margin is not None and not (isinstance(margin, int | float) and np.isfinite(margin)):
        raise DataError(f'"margin" in {place} is {margin!r}; it must be a finite number.')
    return Pair(index, made[0], made[1], float(margin or 0))


def _conversation(row: Mapping[str, Any], key: str, place: str) -> Sequence[Mapping[str, Any]]:
    """Return the whole conversation that "chosen" or "rejected" stands for."""
    messages = _messages(row[key], key, place)
    if messages[0]["role"] == "assistant":  # the answer alone
        if "prompt" not in row:
            raise DataError(f'"{key}" in {place} is an answer, and there is no "prompt" that it answers.')
        messages = [*_messages(row["prompt"], "prompt", place), *messages]
    if messages[-1]["role"] != "assistant":
        raise DataError(f'"{key}" in {place} does not end with a message of the assistant.')
    return messages


def _messages(value: Any, key: str, place: str) -> Sequence[Mapping[str, Any]]:
    if isinstance(value, str) and key == "prompt":
        return [{"role": "user", "content": value}]
    return check_messages(value, f'"{key}" in {place}')


def _of_messages(
    messages: Sequence[Mapping[str, Any]],
    first: int,
    index: int,
    place: str,
    tokenizer: PreTrainedTokenizerBase,
    ends: Collection[int],
    train_prompt: bool,
) -> Example:
    """Return a conversation as an example; the assistant's answers from message `first` on are trained."""
    pieces = answers(tokenizer, messages, place, first)
    if not any(answer for _, answer in pieces):
        raise DataError(f"{place} has no message of the assistant to learn from.")
    parts: list[tuple[list[int], bool]] = []
    text: str = ""
    tokens: list[int] = []
    for number, (piece, answer) in enumerate(pieces):
        if number == 0:
            new = encode(tokenizer, piece, place)
        else:
            new = encode_continuation(tokenizer, text, tokens, piece, place)
        last = number == len(pieces) - 1
        if answer:
            upto = _end(new, ends)
            closing, new = new[upto:], new[:upto]
            parts.append((_ended(new, tokenizer, ends) if last else new, True))
            if not last:
                parts.append((closing, train_prompt))
            tokens += new + closing
        else:
            parts.append((new, train_prompt))
            tokens += new
        text += piece
    return _made(index, place, parts)


def _end(tokens: Sequence[int], ends: Collection[int]) -> int:
    """Return how many tokens an answer has: up to its last stop token, which templates follow by a line break."""
    return max((at + 1 for at, token in enumerate(tokens) if token in ends), default=len(tokens))


def _ended(tokens: list[int], tokenizer: PreTrainedTokenizerBase, ends: Collection[int]) -> list[int]:
    return tokens if tokens and tokens[-1] in ends else [*tokens, end_id(tokenizer, ends)]


def _made(index: int, place: str, parts: Sequence[tuple[Sequence[int], bool]]) -> Example:
    tokens = np.array([token for part, _ in parts for token in part], np.int64)
    trained = np.array([is_trained for part, is_trained in parts for _ in part], bool)
    if len(tokens) < 2:
        raise DataError(f"{place} has {len(tokens)} tokens; it takes one to read and one to predict.")
    trained[0] = False
    return Example(index, tokens, trained)


def _cut(example: Example, rows: Rows, max_tokens: int) -> Example:
    if len(example) <= max_tokens:
        return example
    cut = Example(example.index, example.tokens[:max_tokens], example.trained[:max_tokens])
    if not cut.trained.any():
        raise DataError(
            f"nothing to learn is left of {rows.place(example.index)} when it is cut after {max_tokens} tokens: its "
            "prompt is that long. Raise the limit, or drop what is too long."
        )
    return cut


def _warn(rows: Rows, which: Sequence[int], fault: str) -> None:
    """Log which rows teach less than they seem to."""
    if which:
        count = f"{len(which)} of the {len(rows)} rows"
        log.warning("%s of %s %s; the first is %s.", count, rows.name, fault, rows.place(which[0]))


def _fitting(items: list[T], rows: Rows, max_tokens: int | None, too_long: TooLong) -> list[T]:
    fitting = items if max_tokens is None else [item for item in items if len(item) <= max_tokens]
    if len(fitting) == len(items):
        return items
    longest = max(items, key=len)
    what = (
        f"{len(items) - len(fitting)} of the {len(items)} rows of {rows.name} have more than {max_tokens} tokens; the "
        f"longest, {rows.place(longest.index)}, has {len(longest)}"
    )
    if too_long != "drop" or not fitting:
        first = next(item for item in items if len(item) > (max_tokens or 0))
        raise DataError(f"{what}, the first is {rows.place(first.index)}. {advice_on_length(bool(fitting))}")
    log.warning("%s. They are dropped.", what)
    return fitting
