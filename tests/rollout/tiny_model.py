"""A language model of 13 tokens with a context of 64, for runners in processes, which import it."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from rlx.nets.flat import FlatParameters

SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


def build_model():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=13, max_position_embeddings=64, **SIZES)).eval()


def weights(scale=1.0):
    return FlatParameters(build_model()).numpy().copy() * scale
