"""Small models of the families, and the oracle that every completion is held against: the model's own forward pass."""

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from rlx.generation.request import Sampling

VOCABULARY = 97
LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 128,
}
MIXED = ["sliding_attention", "full_attention", "sliding_attention"]
FAMILIES = {
    "gpt2": {"n_embd": 32, "n_layer": 3, "n_head": 4, "vocab_size": VOCABULARY, "n_positions": 64},
    "llama": LLAMA,
    "llama, dynamic rope": LLAMA | {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
    "qwen2": LLAMA,
    "qwen2, window": LLAMA | {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    "qwen3": LLAMA | {"head_dim": 16},
    "gemma": LLAMA | {"head_dim": 16},
    "gemma2": LLAMA | {"head_dim": 16, "sliding_window": 8},
    "gemma3_text": LLAMA | {"head_dim": 16, "sliding_window": 8, "layer_types": MIXED},
    "mistral": LLAMA | {"sliding_window": None},
    "mistral, window": LLAMA | {"sliding_window": 8},
    "phi": LLAMA,
    "phi3": LLAMA | {"pad_token_id": 0},
    # These are refused.
    "mamba": {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": VOCABULARY},
    "llama4_text": LLAMA | {"layer_types": ["chunked_attention"] * 3},
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4, "vocab_size": VOCABULARY},
    "gpt_neo": {
        "hidden_size": 32,
        "num_layers": 2,
        "num_heads": 4,
        "attention_types": [[["global", "local"], 1]],
        "window_size": 4,
        "vocab_size": VOCABULARY,
    },
}


@pytest.fixture
def build():
    """Return a function that builds a model with random weights: build("gpt2"), build("llama", vocab_size=7)."""

    def built(family="llama", attention=None, **changes):
        config = AutoConfig.for_model(family.partition(",")[0], **FAMILIES[family] | changes)
        torch.manual_seed(0)
        options = {} if attention is None else {"attn_implementation": attention}
        model = AutoModelForCausalLM.from_config(config, **options)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.normal_(std=0.1)
        return model.eval()

    return built


@pytest.fixture
def forward_logp():
    """Return a function: the log-probabilities of a completion by a full forward pass over its row alone, fp64 [C]."""

    def logp(model, prompt, tokens, temperature=1.0):
        row = torch.tensor([[*prompt, *tokens.tolist()]])
        with torch.no_grad():
            logits = model(input_ids=row, use_cache=False).logits[0, len(prompt) - 1 : -1]
        law = (logits.double() / temperature).log_softmax(-1)
        return law.gather(1, torch.from_numpy(tokens)[:, None])[:, 0].numpy()

    return logp


@pytest.fixture
def ragged():
    """Return a function: prompts of many lengths."""

    def prompts(count, longest=24, vocabulary=VOCABULARY, seed=0):
        rng = np.random.default_rng(seed)
        return [rng.integers(vocabulary, size=length).tolist() for length in rng.integers(1, longest + 1, count)]

    return prompts


@pytest.fixture
def same():
    """Return a function: whether two results of generate() are equal to the last bit."""

    def equal(one, other):
        pairs = [(a, b) for x, y in zip(one, other, strict=True) for a, b in zip(x, y, strict=True)]
        return all(
            np.array_equal(a.tokens, b.tokens) and np.array_equal(a.logp, b.logp) and a.stopped == b.stopped
            for a, b in pairs
        )

    return equal


@pytest.fixture
def greedy():
    return Sampling(temperature=0)
