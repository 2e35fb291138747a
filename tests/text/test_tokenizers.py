"""Tokenizers: of characters, loaded from folders, and what ends a completion."""

import pytest
from tokenizers import processors
from transformers import AutoTokenizer, GenerationConfig

from rlx.errors import ConfigError, DataError
from rlx.text.tokenizers import (
    character_tokenizer,
    check_same_ids,
    check_vocabulary,
    decode,
    encode,
    encode_continuation,
    encode_start,
    end_id,
    load_tokenizer,
    stop_ids,
)

ODD = "a b\n\t\"'\\#▁Ġ€ 文🙂="


def test_a_character_is_a_token_and_comes_back(tmp_path):
    tokenizer = character_tokenizer(ODD.replace(" ", "") + " ")
    tokens = encode(tokenizer, ODD, "here")
    assert len(tokens) == len(ODD) and decode(tokenizer, tokens) == ODD and 0 not in tokens
    tokenizer.save_pretrained(tmp_path)
    for loaded in (load_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)):
        assert encode(loaded, ODD, "here") == tokens and decode(loaded, tokens) == ODD
        assert (loaded.eos_token_id, loaded.pad_token_id, len(loaded)) == (0, None, len(ODD))


def test_characters_are_numbered_in_the_order_of_the_alphabet(digits):
    assert encode(digits, "0+9=", "here") == [1, 11, 10, 12]
    assert encode(digits, "1<eos>", "here") == [2, 0]


def test_a_character_without_a_token_is_named(digits):
    with pytest.raises(DataError, match=r"a\.jsonl:3 has characters that the tokenizer has no token for: '\\n', 'x'\."):
        encode(digits, "1x+\n", "a.jsonl:3")


def test_a_tokenizer_reads_for_a_model_if_every_id_of_the_models_own_is_the_same_token(digits, tmp_path):
    of_model = character_tokenizer("0123456789+=")
    of_model.add_special_tokens({"additional_special_tokens": ["<reserved>"]})
    digits.chat_template = "{{ messages[0].content }}"
    digits.add_special_tokens({"additional_special_tokens": ["<call>", "<answer>"]})  # the first in place of <reserved>
    check_same_ids(digits, of_model, "model")
    check_same_ids(of_model, character_tokenizer("0123456789"), "model")
    check_same_ids(character_tokenizer("0123456789"), of_model, "model")
    for alphabet, said in (
        ("0123456789=+", "id 11 for '=', and in the tokenizer of model it is 12"),
        ("0123456789+-", "id 12 for '-', and in the tokenizer of model that is '='"),
    ):
        with pytest.raises(ConfigError, match=said):
            check_same_ids(character_tokenizer(alphabet), of_model, "model")


@pytest.mark.parametrize("alphabet", ["", "abca"])
def test_an_alphabet_holds_every_character_once(alphabet):
    with pytest.raises(ConfigError, match="must hold every character once"):
        character_tokenizer(alphabet)


def test_a_completion_is_decoded_without_the_stop_token_at_its_end_only(digits):
    assert decode(digits, [2, 3, 0], {0}) == "12"
    assert decode(digits, [2, 3, 12], {12}) == "12"
    assert decode(digits, [12, 2, 3], {12}) == "=12"
    assert decode(digits, [0], {0}) == decode(digits, [], {0}) == ""


def test_texts_with_spaces_before_punctuation_come_back_as_they_were(merged):
    text = "It is , in fact , n't  so ."
    assert decode(merged, encode(merged, text, "here")) == text


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (None, {0}),
        (GenerationConfig(), {0}),
        (GenerationConfig(eos_token_id=3), {0, 3}),
        (GenerationConfig(eos_token_id=[3, 5]), {0, 3, 5}),
        ({"eos_token_id": [3, 5]}, {0, 3, 5}),
        ({}, {0}),
    ],
)
def test_every_end_of_tokenizer_and_model_stops(digits, config, expected):
    assert stop_ids(digits, config) == expected


def test_stop_ids_by_hand_stand_beside_the_others(digits):
    assert stop_ids(digits, GenerationConfig(eos_token_id=3), given=[12]) == {0, 3, 12}
    with pytest.raises(ConfigError, match=r"stop ids \[-1, 13\] are no tokens of the tokenizer, which has 0 to 12\."):
        stop_ids(digits, given=[13, 12, -1])


def test_without_an_end_a_tokenizer_is_refused_unless_it_is_given(digits):
    digits.eos_token = None
    with pytest.raises(
        ConfigError, match="the tokenizer has no EOS token, and the model's generation config names none"
    ):
        stop_ids(digits, GenerationConfig())
    with pytest.raises(ConfigError, match="has no EOS token"):
        stop_ids(digits, given=[])
    assert stop_ids(digits, GenerationConfig(eos_token_id=4)) == stop_ids(digits, given=[4]) == {4}


def test_an_example_ends_with_the_tokenizers_own_end_where_that_stops(digits):
    assert end_id(digits, {0, 7, 3}) == 0
    assert end_id(digits, {7, 3}) == 3


def test_a_vocabulary_that_does_not_fit_the_model_names_both_numbers(digits):
    check_vocabulary(digits, 13)
    check_vocabulary(digits, 64)
    with pytest.raises(ConfigError, match="has 13 tokens and the model 12 embeddings; "):
        check_vocabulary(digits, 12)


def test_a_text_begins_with_bos_where_the_tokenizer_puts_one_and_ends_with_no_eos(spaced, merged):
    bare = encode(spaced, "four plus two", "here")
    assert encode_start(spaced, "four plus two", "here") == [0, *bare]
    assert encode_start(spaced, "", "here") == [0]
    assert encode_start(merged, "four", "here") == encode(merged, "four", "here") and encode_start(merged, "", "") == []
    both = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)])
    spaced.backend_tokenizer.post_processor = both
    assert encode_start(spaced, "four plus two", "here") == [0, *bare]
    assert encode_start(spaced, "", "here") == [0]


def test_a_continuation_leaves_the_tokens_before_it_as_they_are(spaced, merged):
    for tokenizer in (spaced, merged):
        for before, after in [("It is", " four, and four"), ("It is ", "four"), ("Hel", "lo there!"), ("Hello", "")]:
            tokens = encode_start(tokenizer, before, "here")
            more = encode_continuation(tokenizer, before, tokens, after, "here")
            assert decode(tokenizer, [*tokens, *more]) == before + after, (before, after)


def test_a_tokenizer_that_begins_texts_with_a_space_adds_none_in_the_middle(spaced):
    before = encode_start(spaced, "It is", "here")
    assert decode(spaced, [*before, *encode(spaced, ", and", "here")]) == "It is , and"  # what it would do
    assert decode(spaced, [*before, *encode_continuation(spaced, "It is", before, ", and", "here")]) == "It is, and"


def test_a_tokenizer_is_made_by_an_import_path():
    assert len(load_tokenizer("rlx.envs.addition:tokenizer")) == 13
    with pytest.raises(ConfigError, match=r"rlx\.envs\.addition:rows made a list; it must make a tokenizer"):
        load_tokenizer("rlx.envs.addition:rows")


def test_a_folder_without_a_tokenizer_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r'there is no folder "\./missing" \(in /'):
        load_tokenizer("./missing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match='no tokenizer can be loaded from the folder "empty": ') as raised:
        load_tokenizer("empty")
    assert "\n" not in str(raised.value)
    (tmp_path / "empty" / "tokenizer.json").write_text('{"version": "1.0", "mod')
    (tmp_path / "empty" / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    with pytest.raises(ConfigError, match='no tokenizer can be loaded from the folder "empty": '):
        load_tokenizer("empty")


def test_a_model_that_nobody_knows_is_refused(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    asked = AutoTokenizer.from_pretrained
    only_here: list[bool] = []
    monkeypatch.setattr(
        *(AutoTokenizer, "from_pretrained"),
        lambda *path, **options: only_here.append(options["local_files_only"]) or asked(*path, **options),
    )
    for name in ("no-such/model", "no-such"):
        said = (
            f"there is no folder {name}, no such tokenizer was downloaded before, and .* give the folder of a tokenizer"
        )
        with pytest.raises(ConfigError, match=said) as raised:
            load_tokenizer(name)
        assert "\n" not in str(raised.value)
    assert only_here == [True, True]  # the hub's client would try for long
