"""Rows as prompts: texts and messages, and prompts that do not fit."""

import json

import pytest

from rlx.errors import ConfigError, DataError
from rlx.text.prompts import load_prompts
from rlx.text.tokenizers import decode

ASKED = [{"role": "user", "content": "What is two plus two?"}]
ANSWERED = [*ASKED, {"role": "assistant", "content": "four"}]
RENDERED = "<|im_start|>user\nWhat is two plus two?<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture
def file(tmp_path):
    """Write rows as lines of prompts.jsonl."""

    def write(*rows):
        path = tmp_path / "prompts.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return write


def test_a_prompt_has_its_text_its_tokens_and_its_row(digits, file):
    first, second = load_prompts(file({"prompt": "1+2=", "answer": 3}, {"prompt": "0="}), digits)
    assert (first.index, first.text, first.tokens) == (0, "1+2=", (2, 11, 3, 12))
    assert first.record == {"prompt": "1+2=", "answer": 3}
    assert (second.index, second.tokens) == (1, (1, 12))


@pytest.mark.parametrize("row", [{"messages": ASKED}, {"messages": ANSWERED}, {"prompt": ASKED, "answer": "four"}])
def test_messages_become_what_the_template_says_up_to_where_the_answer_begins(merged, row):
    (prompt,) = load_prompts([row], merged)
    assert prompt.text == RENDERED
    assert list(prompt.tokens) == merged.apply_chat_template(ASKED, add_generation_prompt=True, return_dict=False)
    assert prompt.record == row


def test_a_template_that_puts_bos_itself_gets_no_second_one(spaced):
    spaced.chat_template = "<s>{{ messages[0].content }}"
    assert load_prompts([{"messages": ASKED}], spaced)[0].tokens.count(spaced.bos_token_id) == 1
    assert load_prompts([{"prompt": "two"}], spaced)[0].tokens[0] == spaced.bos_token_id


def test_a_prompt_that_is_too_long_is_refused_by_file_and_number(digits, file):
    source = file({"prompt": "1="}, {"prompt": "1+1="}, {"prompt": "1+1+1="})
    assert len(load_prompts(source, digits, max_tokens=6)) == 3
    with pytest.raises(DataError) as raised:
        load_prompts(source, digits, max_tokens=3)
    assert str(raised.value) == (
        f"2 of the 3 prompts of {source} have more than 3 tokens; the longest, {source}:3, has 6, the first is "
        f"{source}:2. Raise the limit, or shorten or drop them."
    )


def test_prompts_that_are_too_long_are_dropped_and_the_log_counts_them(digits, file, caplog):
    source = file({"prompt": "1+1+1="}, {"prompt": "1="}, {"prompt": "1+1="})
    (kept,) = load_prompts(source, digits, max_tokens=3, too_long="drop")
    assert (kept.index, kept.text) == (1, "1=")
    assert "2 of the 3 prompts of " in caplog.text and "They are dropped." in caplog.text
    with pytest.raises(DataError, match="3 of the 3 prompts"):
        load_prompts(source, digits, max_tokens=1, too_long="drop")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "?"}, r'prompts\.jsonl:2 has neither "prompt" nor "messages"; its keys are \[\'question\'\]'),
        ({"prompt": ""}, r"the prompt in .*prompts\.jsonl:2 is empty"),
        ({"prompt": None}, r'"prompt" in .*prompts\.jsonl:2 is null; it must be a text'),
        ({"prompt": "two"}, r"prompts\.jsonl:2 has characters that the tokenizer has no token for: 'o', 't', 'w'"),
        ({"messages": []}, r'"messages" in .*prompts\.jsonl:2 must be a list of at least one message'),
        ({"messages": "1"}, r'"messages" in .*prompts\.jsonl:2 must be a list of at least one message'),
        ({"messages": ["hi"]}, r"message 0 of .*prompts\.jsonl:2 is 'hi'; a message is an object"),
        ({"messages": [{"role": "user", "text": "1"}]}, r'message 0 of .* has no "content"; its keys are'),
        ({"messages": ANSWERED[1:]}, r'"messages" in .*prompts\.jsonl:2 holds an answer and nothing that it answers'),
    ],
)
def test_a_row_that_is_no_prompt_is_named(digits, file, row, message):
    digits.chat_template = "{{ messages[0].content }}"
    with pytest.raises(DataError, match=message):
        load_prompts(file({"prompt": "1="}, row), digits)


def test_messages_need_a_template(digits, file):
    with pytest.raises(ConfigError, match=r"prompts\.jsonl:1 holds messages, and the tokenizer has no chat template"):
        load_prompts(file({"messages": ASKED}), digits)


def test_a_template_that_refuses_a_conversation_is_quoted(merged, file):
    merged.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(DataError, match=r"the chat template refuses .*prompts\.jsonl:1: roles must alternate\."):
        load_prompts(file({"messages": ASKED}), merged)


def test_a_prompt_is_read_back_as_it_was(merged):
    text = "Hello  there, \n\ttwo\n"
    assert decode(merged, load_prompts([{"prompt": text}], merged)[0].tokens) == text
