"""Chat messages as text, by the tokenizer's own template: what a model reads before it answers, and what it answers.

Messages are dicts with "role" and "content", as Hugging Face data sets hold them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from rlx.errors import ConfigError, DataError

Messages = Sequence[Mapping[str, Any]]


def is_chat(value: Any) -> bool:
    """Return whether a value of a row is messages rather than a text."""
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def check_messages(messages: Any, place: str) -> Messages:
    """Return messages as they are; DataError where they are none."""
    if not is_chat(messages) or not messages:
        raise DataError(f"{place} must be a list of at least one message, and is {messages!r:.80}.")
    for number, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise DataError(
                f'message {number} of {place} is {message!r:.80}; a message is an object with "role" and "content".'
            )
        if message.get("content") is None and not message.get("tool_calls"):
            raise DataError(f'message {number} of {place} has no "content"; its keys are {sorted(message)}.')
    return messages


def render(tokenizer: PreTrainedTokenizerBase, messages: Messages, place: str, *, answer_follows: bool) -> str:
    """Return messages as the text that the model was trained on; `answer_follows`: up to where its answer begins."""
    if tokenizer.chat_template is None:
        name = f' "{tokenizer.name_or_path}"' if tokenizer.name_or_path else ""
        raise ConfigError(
            f"{place} holds messages, and the tokenizer{name} has no chat template; set model.tokenizer to one that "
            "has, as of a model for chat or of a pkg.module:function that sets its chat_template, or give texts in "
            'place of messages ("prompt", "completion").'
        )
    try:
        text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=answer_follows)  # type: ignore[arg-type]
    except Exception as error:  # templates raise what they like: raise_exception(...), missing keys
        raise DataError(f"the chat template refuses {place}: {error}.") from error
    assert isinstance(text, str)
    return text


def answers(
    tokenizer: PreTrainedTokenizerBase, messages: Messages, place: str, first: int = 0
) -> list[tuple[str, bool]]:
    """Return a conversation's text in pieces (text, whether it is an answer); joined they are all of it.

    An answer is a message of the assistant, from message `first` on. It begins where generation would begin, so a
    template's opening belongs to what is before.
    DataError where the template writes a turn differently once others follow, since then nobody can tell.
    """
    whole = render(tokenizer, messages, place, answer_follows=False)
    pieces: list[tuple[str, bool]] = []
    done = 0
    for number, message in enumerate(messages):
        if number < first or message["role"] != "assistant":
            continue
        before = render(tokenizer, messages[:number], place, answer_follows=True) if number else ""
        last = number == len(messages) - 1
        after = whole if last else render(tokenizer, messages[: number + 1], place, answer_follows=False)
        if not (whole.startswith(before) and whole.startswith(after) and done <= len(before) <= len(after)):
            raise DataError(
                f"the chat template writes message {number} of {place} differently when others follow it, so its "
                "tokens cannot be told apart; end the conversation with it, one row for each answer."
            )
        pieces += [(whole[done : len(before)], False), (whole[len(before) : len(after)], True)]
        done = len(after)
    return [piece for piece in [*pieces, (whole[done:], False)] if piece[0]]
