"""The model that is generated with stays as it is, and is always the newest."""

import copy

import numpy as np
import pytest
import torch

from rlx.generation.attention import NAME
from rlx.generation.generator import Generator
from rlx.generation.request import Request
from rlx.generation.twin import Twin

REQUESTS = [Request([1, 2, 3], n=3, max_new_tokens=6), Request([4] * 9, max_new_tokens=6)]


def state(model):
    """Return what must not change: modes, config, attention, buffers, hooks."""
    return {
        "training": [module.training for module in model.modules()],
        "config": copy.deepcopy(model.config.to_dict()),
        "attention": [getattr(m.config, "_attn_implementation", None) for m in model.modules() if hasattr(m, "config")],
        "hooks": [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()],
        "grad": [(parameter.requires_grad, parameter.grad) for parameter in model.parameters()],
        "buffers": {name: buffer.clone() for name, buffer in model.named_buffers()},
        "buffer ids": [id(buffer) for buffer in model.buffers()],
        "parameter ids": [id(parameter) for parameter in model.parameters()],
    }


@pytest.mark.parametrize("family", ["gpt2", "llama", "llama, dynamic rope", "gemma3_text", "phi3"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_generating_leaves_the_model_as_it_was(build, family, attention):
    model = build(family, attention).train()
    before = state(model)
    Generator(model).generate(REQUESTS)
    after = state(model)
    buffers = before.pop("buffers"), after.pop("buffers")
    assert before == after
    assert all(torch.equal(buffers[0][name], buffers[1][name]) for name in buffers[0])
    assert all(before["training"])
    model(input_ids=torch.tensor([[1, 2]]), labels=torch.tensor([[1, 2]])).loss.backward()  # no inference tensor stuck


def test_dropout_of_a_model_in_training_is_not_in_the_generator(build, same):
    model = build("gpt2", resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5)
    expected = Generator(model).generate(REQUESTS)
    assert same(expected, Generator(model.train()).generate(REQUESTS))


def test_weights_changed_in_place_count_from_the_next_generate_on(build, same):
    model = build("llama")
    generator = Generator(model)
    old = generator.generate(REQUESTS)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    new = generator.generate(REQUESTS)
    assert not same(old, new)
    assert same(new, Generator(model).generate(REQUESTS))


def test_parameters_that_live_in_a_new_memory_count_too(build, same):
    """A learner that lays all parameters out in one flat buffer gives the Parameter objects other data."""
    model = build("llama")
    generator = Generator(model)
    generator.generate(REQUESTS)
    for parameter in model.parameters():
        parameter.data = parameter.data * 1.1
    assert same(generator.generate(REQUESTS), Generator(model).generate(REQUESTS))


def test_other_parameter_objects_count_too(build, same):
    model, other = build("llama"), build("llama", initializer_range=0.05)
    generator = Generator(model)
    with torch.no_grad():
        other.model.norm.weight.mul_(2)
    model.model.norm.weight = other.model.norm.weight
    assert same(generator.generate(REQUESTS), Generator(model).generate(REQUESTS))


def test_a_model_that_changes_its_precision_is_followed(build, same):
    model = build("llama")
    generator = Generator(model)
    generator.generate(REQUESTS)
    model.double()
    assert same(generator.generate(REQUESTS), Generator(model).generate(REQUESTS))


def test_a_twin_shares_parameters_and_keeps_its_own_rotary_tables(build):
    model = build("llama")
    model.register_buffer("saved", torch.zeros(2))
    twin = Twin(model).model()
    pairs = zip(model.parameters(), twin.parameters(), strict=True)
    assert all(one is other for one, other in pairs)
    assert twin.lm_head is not model.lm_head and twin.config is not model.config
    assert twin.model.rotary_emb.inv_freq is not model.model.rotary_emb.inv_freq
    assert torch.equal(twin.model.rotary_emb.inv_freq, model.model.rotary_emb.inv_freq)
    assert twin.saved is model.saved


def test_tied_weights_stay_tied(build):
    model = build("llama", tie_word_embeddings=True)
    twin = Twin(model).model()
    assert twin.lm_head.weight is twin.model.embed_tokens.weight is model.model.embed_tokens.weight


def test_attention_that_takes_no_mask_is_replaced_in_the_twin_alone(build):
    model = build("llama")
    model.config._attn_implementation = "flash_attention_2"
    twin = Twin(model).model()
    assert twin.config._attn_implementation == NAME == twin.model.layers[0].self_attn.config._attn_implementation
    assert model.config._attn_implementation == "flash_attention_2"


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft's own call
def test_an_adapter_is_part_of_the_model(build, forward_logp, same):
    """A LoRA adapter whose second half is not zero: it counts while it is switched on, and its updates do."""
    peft = pytest.importorskip("peft")
    plain = build("llama")
    expected_without = Generator(plain).generate(REQUESTS)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "lm_head"], lora_dropout=0.5)
    model = peft.get_peft_model(plain, config)
    generator = Generator(model.train())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    before = state(model)
    found = generator.generate(REQUESTS)
    after = state(model)
    buffers = before.pop("buffers"), after.pop("buffers")
    assert before == after and buffers[0].keys() == buffers[1].keys()
    assert not same(found, expected_without)
    model.eval()
    for request, completions in zip(REQUESTS, found, strict=True):
        for one in completions:
            expected = forward_logp(model, request.prompt, one.tokens)
            np.testing.assert_allclose(one.logp, expected, rtol=0, atol=4e-6)
