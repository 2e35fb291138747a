"""Language models come from a folder or a configuration, go back to a folder, and fail in one sentence."""

import pytest
import torch

from rlx.errors import ConfigError
from rlx.nets.flat import FlatParameters
from rlx.nets.language_model import export_language_model, load_language_model
from rlx.nets.transformer import TransformerPolicy

TOKENS = torch.arange(10)[None] * 3


def test_weights_are_fixed_by_the_seed_and_nothing_else_is_drawn(language_model_configs):
    config = language_model_configs["llama"]
    torch.manual_seed(5)
    state = torch.get_rng_state()
    one, same, other = (load_language_model(config=config, seed=seed, lora={"r": 2}) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    logits = [model(input_ids=TOKENS).logits for model in (one, same, other)]
    assert torch.equal(logits[0], logits[1]) and not torch.equal(logits[0], logits[2])
    adapters = [dict(model.named_parameters()) for model in (one, same)]
    assert all(torch.equal(adapters[0][name], adapters[1][name]) for name in adapters[0])
    assert not any(module.training for module in one.modules())


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "gemma2"])
@pytest.mark.parametrize("lora", [None, {"r": 2}])
def test_an_exported_model_is_loaded_by_transformers_with_identical_logits(
    language_model_configs, tmp_path, family, lora
):
    """GPT-2's and Gemma's heads are their embeddings; the learner's buffer is under all of them."""
    from transformers import AutoModelForCausalLM

    model = load_language_model(config=language_model_configs[family], seed=1, lora=lora)
    policy = TransformerPolicy(model)
    flat = FlatParameters(policy)
    flat.data += 0.1 * torch.randn(flat.data.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        learned = model(input_ids=TOKENS).logits
        export_language_model(policy, None, tmp_path)
        assert torch.equal(model(input_ids=TOKENS).logits, learned), "the policy is left as it was"
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path)(input_ids=TOKENS).logits
        if lora is None:
            assert torch.equal(loaded, learned)
        else:  # the sum of base and adapter is rounded once, in the weights
            torch.testing.assert_close(loaded, learned, rtol=1e-5, atol=1e-5)
        again = load_language_model(path=str(tmp_path))(input_ids=TOKENS).logits
    assert torch.equal(again, loaded)
    assert not (tmp_path / "adapter_config.json").exists()


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize("lora", [None, {"r": 2}])
def test_on_the_device_meta_a_policy_has_its_sizes_and_no_weights(language_model_configs, tmp_path, family, lora):
    """Of a configuration and of a folder; what is learned, tied embeddings and kinds of numbers included."""

    def parameters():
        policy = TransformerPolicy(
            load_language_model(config=language_model_configs[family], lora=lora, dtype="bfloat16"),
            value="separate",
            value_model=load_language_model(path=str(tmp_path)),
        )
        return [(name, p.shape, p.dtype, p.requires_grad) for name, p in policy.named_parameters()], policy

    export_language_model(load_language_model(config=language_model_configs["qwen3"]), None, tmp_path)
    with torch.device("meta"):
        sizes, empty = parameters()
    assert sizes == parameters()[0]
    assert {parameter.device.type for parameter in empty.parameters()} == {"meta"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "either a path"),
        ({"path": "x", "config": {"model_type": "llama"}}, "either a path"),
        ({"path": "/nowhere/at/all"}, "there is no folder /nowhere/at/all"),
        ({"path": "a b"}, "'a b' is neither a folder nor a hub id"),
        ({"config": {"model_type": "lama"}}, "'lama'.*Did you mean 'llama'"),
        ({"config": {"hidden_size": 8}}, "model_type None"),
        ({"config": {"model_type": "llama", "hidden_sizes": 8}}, "'hidden_sizes' is no setting.*'hidden_size'"),
        ({"config": {"model_type": "llama", "hidden_size": 10, "num_attention_heads": 3}}, "hidden size .10. is not a"),
        ({"config": {"model_type": "llama"}, "dtype": "float8"}, "dtype 'float8' is none of float32"),
    ],
)
def test_what_cannot_be_made_is_refused_in_one_sentence(options, message):
    with pytest.raises(ConfigError, match=message) as error:
        load_language_model(**options)
    assert "\n" not in str(error.value)


def test_an_unknown_hub_id_is_refused_at_once_where_the_hub_is_out_of_reach(monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match="no such model was downloaded before"):
        load_language_model(path="nobody/nothing")


def test_a_folder_without_a_model_or_with_a_torn_one_is_named(language_model_configs, tmp_path):
    with pytest.raises(ConfigError, match=r"holds no config\.json"):
        load_language_model(path=str(tmp_path))
    export_language_model(load_language_model(config=language_model_configs["llama"]), None, tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ConfigError, match="cannot be loaded as a causal language model"):
        load_language_model(path=str(tmp_path))


@pytest.mark.parametrize("lora", [{"rank": 3}, {"target_modules": "nothing_there"}])
def test_settings_of_an_adapter_that_do_not_fit_are_shown(language_model_configs, lora):
    with pytest.raises(ConfigError, match="lora settings"):
        load_language_model(config=language_model_configs["llama"], lora=lora)
