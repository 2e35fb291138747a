"""Examples and pairs: which tokens, which of them are trained, and where they stand in a Batch."""

import pytest
import torch

from rlx.errors import DataError
from rlx.text.examples import collate, collate_pairs, load_examples, load_pairs
from rlx.text.prompts import load_prompts
from rlx.text.tokenizers import decode

TWO, FOUR, SIX = "What is two plus two?", "It is four.", "six"
ASKED = [{"role": "system", "content": "Hello"}, {"role": "user", "content": TWO}]
ANSWERED = [*ASKED, {"role": "assistant", "content": FOUR}]
LONGER = [*ANSWERED, {"role": "user", "content": "plus two?"}, {"role": "assistant", "content": SIX}]
OPENING = "<|im_start|>assistant\n"


def trained_text(tokenizer, example):
    """Return the trained stretches of an example as texts, special tokens included."""
    stretches, inside = [], False
    for token, trained in zip(example.tokens, example.trained, strict=True):
        if trained:
            stretches = stretches if inside else [*stretches, []]
            stretches[-1].append(int(token))
        inside = bool(trained)
    return [tokenizer.decode(stretch, clean_up_tokenization_spaces=False) for stretch in stretches]


def test_a_completion_and_its_end_are_trained_and_its_prompt_is_not(digits):
    (example,) = load_examples([{"prompt": "1+2=", "completion": "3"}], digits)
    assert example.tokens.tolist() == [2, 11, 3, 12, 4, 0]
    assert example.trained.tolist() == [False, False, False, False, True, True]
    (whole,) = load_examples([{"prompt": "1+2=", "completion": "3"}], digits, train_prompt=True)
    assert whole.trained.tolist() == [False, True, True, True, True, True]


def test_a_text_is_trained_but_for_its_first_token(digits, spaced):
    (example,) = load_examples([{"text": "123"}], digits)
    assert (example.tokens.tolist(), example.trained.tolist()) == ([2, 3, 4, 0], [False, True, True, True])
    (behind_bos,) = load_examples([{"text": "four"}], spaced)
    assert behind_bos.tokens[0] == spaced.bos_token_id and behind_bos.trained[1:].all()
    assert decode(spaced, behind_bos.tokens, {1}) == "four"


def test_an_end_that_is_there_already_is_not_doubled(digits):
    (example,) = load_examples([{"prompt": "1", "completion": "2<eos>"}], digits)
    assert example.tokens.tolist() == [2, 3, 0]
    (other_end,) = load_examples([{"prompt": "1", "completion": "2="}], digits, stops={0, 12})
    assert other_end.tokens.tolist() == [2, 3, 12]


def test_an_empty_completion_teaches_to_end_at_once(digits):
    (example,) = load_examples([{"prompt": "1=", "completion": ""}], digits)
    assert (example.tokens.tolist(), example.trained.tolist()) == ([2, 12, 0], [False, False, True])


def test_a_tokenizer_without_an_end_ends_with_the_stop_id_that_is_given(digits):
    digits.eos_token = None
    (example,) = load_examples([{"prompt": "1", "completion": "2"}], digits, stops={12})
    assert example.tokens.tolist() == [2, 3, 12]


def test_every_answer_of_a_conversation_is_trained_up_to_its_stop_token(merged):
    (example,) = load_examples([{"messages": LONGER}], merged)
    assert trained_text(merged, example) == [FOUR + "<|im_end|>", SIX + "<|im_end|>"]
    # The line break that the template puts behind the last answer is left out: nothing is generated after a stop.
    assert merged.decode(example.tokens) == merged.apply_chat_template(LONGER, tokenize=False).removesuffix("\n")


def test_an_answer_is_learned_behind_the_tokens_that_a_prompt_has(merged):
    (example,) = load_examples([{"messages": ANSWERED}], merged)
    (prompt,) = load_prompts([{"messages": ASKED}], merged)
    size = len(prompt.tokens)
    assert tuple(example.tokens[:size]) == prompt.tokens
    assert not example.trained[:size].any() and example.trained[size:].all()


def test_prompt_and_completion_may_be_messages(merged):
    (whole,) = load_examples([{"messages": ANSWERED}], merged)
    for prompt in (ASKED, TWO):
        (example,) = load_examples([{"prompt": prompt, "completion": ANSWERED[-1:]}], merged)
        assert trained_text(merged, example) == trained_text(merged, whole) == [FOUR + "<|im_end|>"]
    # An answer within the prompt is not the completion.
    (last,) = load_examples([{"prompt": LONGER[:-1], "completion": LONGER[-1:]}], merged)
    assert trained_text(merged, last) == [SIX + "<|im_end|>"]


def test_a_template_that_closes_an_answer_with_nothing_gets_the_end(merged):
    merged.chat_template = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    merged.chat_template += "{% if add_generation_prompt %}assistant: {% endif %}"
    (example,) = load_examples([{"messages": ANSWERED}], merged)
    assert trained_text(merged, example) == [FOUR + "\n<|im_end|>"]


def test_a_template_that_rewrites_earlier_answers_is_refused_but_for_the_last_one(merged, thinking):
    merged.chat_template = thinking
    (example,) = load_examples([{"messages": ANSWERED}], merged)
    assert trained_text(merged, example) == [f"<think></think>{FOUR}<|im_end|>"]
    with pytest.raises(DataError, match=r"writes message 2 of list\[0\] differently when others follow it"):
        load_examples([{"messages": LONGER}], merged)
    (last,) = load_examples([{"prompt": LONGER[:-1], "completion": LONGER[-1:]}], merged)
    assert trained_text(merged, last) == [f"<think></think>{SIX}<|im_end|>"]


def test_rows_are_shifted_padded_and_carry_their_lengths(digits):
    examples = load_examples([{"prompt": "1+2=", "completion": "3"}, {"prompt": "9", "completion": ""}], digits)
    batch = collate(examples)
    assert batch.obs.tolist() == [[2, 11, 3, 12, 4], [10, 0, 0, 0, 0]]
    assert batch.action.tolist() == [[11, 3, 12, 4, 0], [0, 0, 0, 0, 0]]
    assert batch.mask.tolist() == [[False, False, False, True, True], [True, False, False, False, False]]
    assert batch.length.tolist() == [5, 1]
    assert (batch.obs.dtype, batch.mask.dtype, batch.length.dtype) == (torch.int64, torch.bool, torch.int64)


def test_pairs_share_their_prompt_and_stand_side_by_side(digits):
    rows = [
        {"prompt": "1=", "chosen": "1", "rejected": "23"},
        {"prompt": "4=", "chosen": "", "rejected": "5", "margin": 0.5},
    ]
    batch = collate_pairs(load_pairs(rows, digits))
    assert batch.obs.tolist() == [[[2, 12, 2, 0], [2, 12, 3, 4]], [[5, 12, 0, 0], [5, 12, 6, 0]]]
    assert batch.action.tolist() == [[[12, 2, 0, 0], [12, 3, 4, 0]], [[12, 0, 0, 0], [12, 6, 0, 0]]]
    assert batch.mask.int().tolist() == [[[0, 1, 1, 0], [0, 1, 1, 1]], [[0, 1, 0, 0], [0, 1, 1, 0]]]
    assert batch.length.tolist() == [[3, 4], [2, 3]] and batch.margin.tolist() == [0, 0.5]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": ASKED, "chosen": ANSWERED[-1:], "rejected": LONGER[-1:]},
        {"chosen": ANSWERED, "rejected": [*ASKED, LONGER[-1]]},
        {"prompt": TWO, "chosen": ANSWERED, "rejected": [*ASKED, LONGER[-1]]},
    ],
)
def test_pairs_of_messages_are_answers_or_whole_conversations(merged, row):
    (pair,) = load_pairs([row], merged)
    assert trained_text(merged, pair.chosen) == [FOUR + "<|im_end|>"]
    assert trained_text(merged, pair.rejected) == [SIX + "<|im_end|>"]
    size = len(load_prompts([{"messages": ASKED}], merged)[0].tokens)
    assert pair.chosen.tokens[:size].tolist() == pair.rejected.tokens[:size].tolist()


def test_rows_that_teach_nothing_are_counted_and_named(digits, caplog):
    pair, same = {"prompt": "1=", "chosen": "1", "rejected": "2"}, {"prompt": "1=", "chosen": "3", "rejected": "3"}
    load_pairs([pair, same, pair | {"rejected": ""}], digits)
    assert '1 of the 3 rows of list have the same "chosen" and "rejected": nothing is' in caplog.text
    assert "learned from them; the first is list[1]." in caplog.text
    assert 'have an empty "chosen" or "rejected": an answer that ends at once; the first is list[2].' in caplog.text
    with pytest.raises(DataError, match=r'"chosen" and "rejected" are the same in every row of list'):
        load_pairs([same], digits)
    load_examples([{"prompt": "1=", "completion": "1"}, {"prompt": "1=", "completion": ""}], digits)
    assert '1 of the 2 rows of list have an empty "completion"' in caplog.text
    caplog.clear()
    load_pairs([pair], digits)
    assert not caplog.text


def test_an_example_that_is_too_long_is_refused_dropped_or_cut(digits, caplog):
    rows = [{"prompt": "1=", "completion": "2345"}, {"prompt": "1=", "completion": "1"}]
    with pytest.raises(
        DataError, match=r"1 of the 2 rows of list have more than 4 tokens; the longest, list\[0\], has 7"
    ):
        load_examples(rows, digits, max_tokens=4)
    (kept,) = load_examples(rows, digits, max_tokens=4, too_long="drop")
    assert kept.index == 1 and "1 of the 2 rows of list have more than 4 tokens" in caplog.text
    cut, _ = load_examples(rows, digits, max_tokens=4, too_long="cut")
    assert cut.tokens.tolist() == [2, 12, 3, 4] and 0 not in cut.tokens
    with pytest.raises(DataError, match=r"the first is list\[0\]\. Raise the limit, or shorten them\.$"):
        load_examples(rows[:1], digits, max_tokens=4, too_long="drop")
    with pytest.raises(DataError, match=r"nothing to learn is left of list\[0\] when it is cut after 2 tokens"):
        load_examples(rows, digits, max_tokens=2, too_long="cut")


def test_a_pair_is_as_long_as_the_longer_answer(digits):
    rows = [{"prompt": "1=", "chosen": "1", "rejected": "123"}, {"prompt": "1=", "chosen": "1", "rejected": "1"}]
    assert [pair.index for pair in load_pairs(rows, digits, max_tokens=5, too_long="drop")] == [1]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "1"}, r'list\[0\] has none of "completion", "messages" and "text" to learn from; its keys are'),
        ({"completion": "1"}, r'list\[0\] has no "prompt"; its keys are "completion"'),
        ({"prompt": "1", "completion": 2}, r'"completion" in list\[0\] is 2 \(int\); it must be a text'),
        ({"messages": ASKED}, r"list\[0\] has no message of the assistant to learn from"),
        ({"text": ""}, r"list\[0\] has 1 tokens; it takes one to read and one to predict"),
    ],
)
def test_a_row_that_is_no_example_is_named(merged, row, message):
    with pytest.raises(DataError, match=message):
        load_examples([row], merged)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "1", "chosen": "2"}, r'list\[0\] has no "rejected"; its keys are "prompt", "chosen"'),
        ({"chosen": "1", "rejected": "2"}, r'list\[0\] has no "prompt"'),
        ({"prompt": "1", "chosen": "1", "rejected": ANSWERED}, "must both be texts or both messages"),
        ({"chosen": ANSWERED, "rejected": LONGER}, "differ before their last message"),
        (
            {"chosen": ANSWERED, "rejected": ASKED},
            'differ|"rejected" in .* does not end with a message of the assistant',
        ),
        ({"chosen": ANSWERED[-1:], "rejected": LONGER[-1:]}, 'is an answer, and there is no "prompt" that it answers'),
        ({"prompt": "1", "chosen": "1", "rejected": "2", "margin": float("nan")}, r'"margin" in list\[0\] is nan'),
        ({"prompt": "1", "chosen": "1", "rejected": "2", "margin": "3"}, r"\"margin\" in list\[0\] is '3'"),
    ],
)
def test_a_row_that_is_no_pair_is_named(merged, row, message):
    with pytest.raises(DataError, match=message):
        load_pairs([row], merged)
