"""What a model from a configuration takes from its tokenizer, and what its exported folder says of it."""

import pytest

from rlx.nets.language_model import export_language_model
from rlx.text_models import build_model, build_tokenizer, stop_tokens
from rlx.text_sections import TextModelSection
from rlx.text_settings import TextSettings

SIZES = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
LLAMA = {"model_type": "llama", "max_position_embeddings": 16} | SIZES


def exported(folder, **config):
    """Return the model section of who goes on with a new model of the addition's 13 characters: token 0 is EOS."""
    section = TextModelSection(config=LLAMA | config, tokenizer="rlx.envs.addition:tokenizer")
    tokenizer = build_tokenizer(section)
    export_language_model(build_model(section, len(tokenizer), seed=0), tokenizer, folder)
    return TextModelSection(path=str(folder))


def test_a_new_model_ends_where_its_tokenizer_does_and_not_at_its_family_s_default(tmp_path):
    """LlamaConfig ends at token 2, which is the digit 1 here: a model that was exported never wrote it again."""
    section = exported(tmp_path / "model")
    assert stop_tokens(TextSettings(model=section), build_tokenizer(section)) == {0}


def test_what_a_config_says_of_its_ends_is_kept(tmp_path):
    section = exported(tmp_path / "model", eos_token_id=[0, 12])
    assert stop_tokens(TextSettings(model=section), build_tokenizer(section)) == {0, 12}


@pytest.mark.parametrize("name", ["bos_token_id", "pad_token_id"])
def test_a_token_that_the_tokenizer_has_not_is_none(name):
    section = TextModelSection(config=LLAMA, tokenizer="rlx.envs.addition:tokenizer")
    assert getattr(build_model(section, 13, seed=0).config, name) is None
