"""Every family against its own full forward pass, and against transformers' own generate()."""

import logging

import numpy as np
import pytest
import torch
from torch import nn

from rlx.errors import ConfigError
from rlx.generation.generator import Generator
from rlx.generation.request import Request

FAMILIES = [
    *("gpt2", "llama", "llama, dynamic rope", "qwen2", "qwen2, window", "qwen3", "gemma", "gemma2", "gemma3_text"),
    *("mistral", "mistral, window", "phi", "phi3"),
]
CASES = [(family, attention) for family in FAMILIES for attention in ("sdpa", "eager")]
CASES.remove(("gemma2", "sdpa"))  # refused by transformers: its soft cap on attention is eager's
TOLERANCE = 4e-6
"""Logits are about 2, where a step of float32 is 2.4e-7; the largest difference measured here was 9.5e-7."""


@pytest.fixture(autouse=True)
def quiet_transformers():
    """generate() of transformers logs what its defaults are."""
    logging.getLogger("transformers").setLevel(logging.ERROR)


@pytest.mark.parametrize(("family", "attention"), CASES)
def test_sampled_tokens_have_the_logp_of_a_full_forward_pass(build, forward_logp, ragged, family, attention):
    """Rows of all lengths up to 24, through windows of 8 and past them, refilled in 5 slots."""
    model = build(family, attention)
    requests = [Request(prompt, n=2, max_new_tokens=20, seed=i) for i, prompt in enumerate(ragged(9))]
    for request, completions in zip(requests, Generator(model, max_slots=5).generate(requests), strict=True):
        for completion in completions:
            expected = forward_logp(model, request.prompt, completion.tokens)
            np.testing.assert_allclose(completion.logp, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(("family", "attention"), CASES)
def test_greedy_tokens_are_those_of_transformers_generate(build, ragged, greedy, family, attention):
    model = build(family, attention)
    prompts = ragged(6)
    found = Generator(model).generate([Request(prompt, max_new_tokens=20) for prompt in prompts], greedy)
    for prompt, (completion,) in zip(prompts, found, strict=True):
        row = torch.tensor([prompt])
        expected = model.generate(
            row,
            attention_mask=torch.ones_like(row),
            do_sample=False,
            max_new_tokens=20,
            eos_token_id=None,
            pad_token_id=0,
        )
        np.testing.assert_array_equal(completion.tokens, expected[0, len(prompt) :].numpy())
        assert not completion.logp.any() and not completion.stopped


def test_a_hybrid_model_decodes_with_the_mask_of_each_kind_of_layer(build, forward_logp, ragged):
    """The window matters here: the same weights with a window as long as the context give other log-probabilities."""
    model, wide = build("gemma3_text"), build("gemma3_text", sliding_window=128)
    (request,) = [Request(ragged(1, 1)[0] * 20, max_new_tokens=16)]
    ((completion,),) = Generator(model).generate([request])
    near = forward_logp(model, request.prompt, completion.tokens)
    far = forward_logp(wide, request.prompt, completion.tokens)
    assert np.abs(near - far).max() > 1e-2
    np.testing.assert_allclose(completion.logp, near, rtol=0, atol=TOLERANCE)


def test_gpt2_generates_up_to_its_last_position_and_no_further(build, forward_logp):
    model = build("gpt2", n_positions=16)
    generator = Generator(model)
    requests = [Request([5] * 13, max_new_tokens=9), Request([5], max_new_tokens=9), Request([5] * 15)]
    found = generator.generate(requests)
    assert [len(completions[0].tokens) for completions in found] == [3, 9, 1]
    assert not found[0][0].stopped
    expected = forward_logp(model, requests[0].prompt, found[0][0].tokens)
    np.testing.assert_allclose(found[0][0].logp, expected, rtol=0, atol=TOLERANCE)
    with pytest.raises(
        ConfigError, match=r"request 1: the prompt has 16 tokens, but .* have 16 at most; shorten it to 15"
    ):
        generator.generate([Request([5]), Request([5] * 16)])


def test_a_soft_cap_on_logits_is_part_of_the_law(build, forward_logp):
    """The head of Gemma 2 caps its logits; a head applied by hand would forget that."""
    model, uncapped = build("gemma2", final_logit_softcapping=0.5), build("gemma2", final_logit_softcapping=None)
    request = Request([3, 4, 5], max_new_tokens=12)
    ((completion,),) = Generator(model).generate([request])
    expected = forward_logp(model, request.prompt, completion.tokens)
    np.testing.assert_allclose(completion.logp, expected, rtol=0, atol=TOLERANCE)
    assert np.abs(expected - forward_logp(uncapped, request.prompt, completion.tokens)).max() > 0.05


LONGROPE = {
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": [1.0] * 4,
        "long_factor": [3.0] * 4,
        "original_max_position_embeddings": 32,
    },
    "original_max_position_embeddings": 32,
}


def test_longrope_stays_before_its_switch(build, forward_logp):
    model = build("phi3", **LONGROPE)
    generator = Generator(model)
    assert generator.architecture.context == 32
    before = model.model.rotary_emb.inv_freq.clone()
    requests = [Request([7] * 20, max_new_tokens=50), Request([7], max_new_tokens=5)]
    found = generator.generate(requests)
    assert [len(completions[0].tokens) for completions in found] == [12, 5]
    for request, (completion,) in zip(requests, found, strict=True):
        expected = forward_logp(model, request.prompt, completion.tokens)
        np.testing.assert_allclose(completion.logp, expected, rtol=0, atol=TOLERANCE)
    assert torch.equal(model.model.rotary_emb.inv_freq, before)
    with pytest.raises(ConfigError, match=r"max_length is 64, but .* 'phi3' with longrope .* past 32 tokens"):
        Generator(model, max_length=64)
    with pytest.raises(ConfigError, match="the prompt has 32 tokens"):
        generator.generate([Request([7] * 32)])


REFUSED = {
    "mamba": "layers of type linear_attention",
    "llama4_text": "layers of type chunked_attention",
    "bloom": "its forward pass fails with ValueError",  # it makes position biases of a mask of two dimensions
    "gpt_neo": "its logits are off by",  # its local attention goes by the cache's length, not by the mask
}


@pytest.mark.parametrize("family", REFUSED)
def test_a_model_that_would_be_wrong_is_refused(build, family):
    with pytest.raises(ConfigError, match=REFUSED[family]):
        Generator(build(family))


def test_layers_that_share_keys_and_values_are_refused(build):
    model = build("llama")
    model.config.num_kv_shared_layers = 2
    with pytest.raises(ConfigError, match="share keys and values"):
        Generator(model)


def test_a_model_without_a_head_is_refused(build):
    with pytest.raises(ConfigError, match="no language model head"):
        Generator(build("llama").model)


class Wrong(nn.Module):
    """Adds to the logits of everything that has a cache."""

    def __init__(self, head):
        super().__init__()
        self.head = head

    def forward(self, hidden):
        return self.head(hidden) + (hidden.shape[1] == 1)


def test_logits_that_differ_by_a_constant_from_the_forward_pass_are_found_out(build):
    model = build("llama")
    model.lm_head = Wrong(model.lm_head)
    with pytest.raises(ConfigError, match=r"its logits are off by 1 of"):
        Generator(model)
