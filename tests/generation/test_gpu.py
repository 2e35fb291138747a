"""What only a GPU can show: torch's own varlen_attn, and steps that are captured as CUDA graphs."""

import numpy as np
import pytest
import torch

from rlx.generation.generator import Generator
from rlx.generation.ragged import NEEDED
from rlx.generation.request import Request, Sampling
from rlx.nets.varlen import kernel_for
from tests.nets.varlen import Varlen

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no GPU"),
]
WIDE = {"hidden_size": 64, "head_dim": 16}


@pytest.mark.parametrize("window", [(-1, -1), (-1, 0), (3, 0)])
@pytest.mark.parametrize("decoding", [True, False])
def test_the_kernel_is_what_its_stand_in_says(window, decoding):
    """Slots of 32 of which 1 to 31 are used, or prompts one after another; 4 heads on 2 of keys."""
    kernel = kernel_for(torch.device("cuda"), torch.bfloat16, NEEDED)
    if kernel is None:
        pytest.skip("this torch has no varlen_attn with what is needed of it, or this GPU is too old for it")
    torch.manual_seed(0)
    lengths = torch.tensor([1, 31, 7, 16], dtype=torch.int32)
    ends = torch.cat([torch.zeros(1, dtype=torch.int32), lengths.cumsum(0).int()])
    slots = 32 * torch.arange(5, dtype=torch.int32)
    bounds = (torch.arange(5, dtype=torch.int32), slots) if decoding else (ends, ends)
    longest = (1, 32) if decoding else (31, 31)
    query = torch.randn(int(bounds[0][-1]), 4, 16).bfloat16()
    key, value = (torch.randn(int(bounds[1][-1]), 2, 16).bfloat16() for _ in range(2))
    options = {"scale": 0.3, "window_size": window, "enable_gqa": True}
    used = lengths if decoding else None
    expected = Varlen()(query, key, value, *bounds, *longest, seqused_k=used, **options)
    there = [one.cuda() for one in (query, key, value, *bounds)]
    found = kernel(*there, *longest, seqused_k=None if used is None else used.cuda(), **options)
    torch.testing.assert_close(found.cpu().float(), expected.float(), rtol=0, atol=0.03)


@pytest.mark.parametrize("family", ["gpt2", "llama", "llama, dynamic rope", "qwen3", "gemma2", "gemma3_text"])
def test_captured_steps_give_what_plain_ones_do(build, ragged, family):
    """In float32, by masks; refills, shared prompts, and weights that change in place and then move."""
    model = build(family).cuda()
    requests = [Request(prompt, n=2, max_new_tokens=6 + 7 * (i % 3), seed=i) for i, prompt in enumerate(ragged(9))]
    static, plain = (Generator(model, max_slots=5, static_step=way) for way in (None, False))
    for _ in range(3):
        for found, expected in zip(static.generate(requests), plain.generate(requests), strict=True):
            for one, other in zip(found, expected, strict=True):
                np.testing.assert_array_equal(one.tokens, other.tokens)
                np.testing.assert_allclose(one.logp, other.logp, rtol=0, atol=1e-4)
        for parameter in model.parameters():
            parameter.data.mul_(1.05)
            parameter.data = parameter.data.clone()


@pytest.mark.parametrize("law", [Sampling(1.2), Sampling(top_k=20, top_p=0.9, min_p=0.01), Sampling(temperature=0)])
@pytest.mark.parametrize("family", ["qwen3", "gemma3_text"])
def test_low_precision_has_the_logp_of_a_full_forward_pass(build, ragged, family, law):
    """With the kernel, through windows of 8 and past them. Greedy and cut laws: that they are drawn from at all."""
    model = build(family, **WIDE).bfloat16().cuda()
    requests = [Request(prompt, n=2, max_new_tokens=14, seed=i) for i, prompt in enumerate(ragged(9))]
    for request, completions in zip(requests, Generator(model).generate(requests, law), strict=True):
        for one in completions:
            assert len(one.tokens) == 14 and np.isfinite(one.logp).all()
            if law != Sampling(1.2):
                continue
            row = torch.tensor([[*request.prompt, *one.tokens.tolist()]], device="cuda")
            with torch.no_grad():
                logits = model(row).logits[0, len(request.prompt) - 1 : -1].float() / 1.2
            expected = logits.log_softmax(-1).cpu().gather(1, torch.from_numpy(one.tokens)[:, None])[:, 0]
            np.testing.assert_allclose(one.logp, expected.numpy(), rtol=0, atol=0.1)
