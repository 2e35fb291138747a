"""Attention that reads only tokens that are there, by a stand-in for torch's varlen_attn: indices, windows, layout.

The kernel itself needs a GPU, see test_gpu.py.
"""

import inspect

import numpy as np
import pytest
import torch

from rlx.generation import static_step
from rlx.generation.attention import attend
from rlx.generation.cache import SlotLayer
from rlx.generation.generator import Generator
from rlx.generation.ragged import NEEDED, Note, Ragged
from rlx.generation.request import Request, Sampling
from rlx.generation.slots import _packs
from rlx.nets.varlen import installed, kernel_for
from tests.generation.recording import Recording
from tests.nets.varlen import Varlen

FAMILIES = [
    *("gpt2", "llama", "llama, dynamic rope", "qwen2", "qwen2, window", "qwen3", "gemma", "gemma3_text", "mistral"),
    *("mistral, window", "phi", "phi3"),
]
SMALL = {"vocab_size": 16, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}


@pytest.fixture
def varlen(monkeypatch):
    """Have the generator find the stand-in where a GPU's would be, in small shapes."""
    kernel = Varlen()
    monkeypatch.setattr("rlx.generation.slots.kernel_for", lambda *_: kernel)
    monkeypatch.setattr(static_step, "FEWEST_ROWS", 2)
    return kernel


def assert_alike(found, expected, bound=2e-6):
    for a, b in zip(found, expected, strict=True):
        for one, other in zip(a, b, strict=True):
            np.testing.assert_array_equal(one.tokens, other.tokens)
            np.testing.assert_allclose(one.logp, other.logp, rtol=0, atol=bound)


@pytest.mark.parametrize("captured", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_gives_what_masks_give(build, ragged, varlen, monkeypatch, family, captured):
    """Prompts shorter and longer than the windows of 8, packed; decoding into and past them, refills in 5 slots."""
    if captured:
        monkeypatch.setattr("rlx.generation.generator.capture_for", lambda device: Recording())
    model = build(family)
    requests = [Request(prompt, n=2, max_new_tokens=6 + 7 * (i % 3), seed=i) for i, prompt in enumerate(ragged(9))]
    expected = Generator(model, max_slots=5, static_step=False).generate(requests)
    assert varlen.calls == 0
    generator = Generator(model, max_slots=5, static_step=True)
    of_trial = varlen.calls
    assert of_trial == 3 * 3  # a prefill of two prompts and two steps, in three layers
    assert_alike(generator.generate(requests), expected)
    assert varlen.calls > of_trial
    keys = generator._slots["generate"][1]._cache.slot_layers[0].keys
    assert keys.transpose(1, 2).is_contiguous()


def test_prompts_that_are_packed_later_go_beside_those_that_live(build, varlen):
    """Six slots: the first sample goes on while the others end together, and five prompts at a time come after them."""
    model = build("llama")
    requests = [Request([3 + i] * (1 + i), max_new_tokens=24 if i == 0 else 5, seed=i) for i in range(16)]
    packs, update = [], SlotLayer._update_packed

    def watched(self, key_states, value_states):
        packs.append((int(self.plan.slot.min()), len(set(self.plan.slot.tolist()))))
        return update(self, key_states, value_states)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SlotLayer, "_update_packed", watched)
        found = Generator(model, max_slots=6, static_step=True).generate(requests)
    assert (1, 5) in packs
    assert_alike(found, Generator(model, max_slots=6).generate(requests))


def test_slots_that_grow_keep_their_layout_and_what_stands_in_them(build, varlen):
    results = []
    for way, length in ((True, None), (False, 128)):
        generation = Generator(build("mistral, window"), static_step=way).open(Sampling(), length=length, limit=24)
        generation.add([Request([7] * 3, n=2, max_new_tokens=24), Request([8] * 9, n=2, max_new_tokens=24)])
        for _ in range(5):
            assert not generation.step()
        generation.add([Request([9] * 60, n=2, max_new_tokens=24)], 2)
        keys, ended = generation._slots._cache.slot_layers[0].keys, {}
        assert keys.transpose(1, 2).is_contiguous() == way
        while generation.is_busy:
            ended |= {(request, sample): completion for request, sample, completion in generation.step()}
        results.append([[ended[request, sample] for sample in range(2)] for request in range(3)])
    assert_alike(*results)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "mistral, window"])
def test_the_masks_that_come_along_are_right_alone(build, ragged, varlen, monkeypatch, family):
    """As for layers whose keys lose their note: a mask keeps packed prompts apart, and hides what is not used."""
    monkeypatch.setattr(Note, "attend", lambda self, query, scaling: None)
    model, requests = build(family), [Request(prompt, max_new_tokens=9) for prompt in ragged(6)]
    found, expected = (Generator(model, static_step=way).generate(requests) for way in (True, False))
    assert_alike(found, expected)
    assert varlen.calls == 0


def test_eager_attention_keeps_its_masks(build, ragged, varlen):
    """Gemma 2 caps its attention's scores, which no kernel here does."""
    model, requests = build("gemma2"), [Request(prompt, max_new_tokens=9) for prompt in ragged(6)]
    found, expected = (Generator(model, static_step=way).generate(requests) for way in (True, False))
    assert_alike(found, expected)
    assert varlen.calls == 0


def test_low_precision_attention_is_ragged_too(build, ragged, varlen, forward_logp):
    model = build("qwen3").bfloat16()
    requests = [Request(prompt, n=2, max_new_tokens=12, seed=i) for i, prompt in enumerate(ragged(5))]
    for request, completions in zip(requests, Generator(model, static_step=True).generate(requests), strict=True):
        for one in completions:
            expected = forward_logp(model, request.prompt, one.tokens)
            np.testing.assert_allclose(one.logp, expected, rtol=0, atol=0.05)
    assert varlen.calls > 0


def test_caches_computed_again_are_those_of_the_new_weights(build, varlen, forward_logp):
    """Of a generation in mid-sequence: its rows are packed into one."""
    model = build("llama", **SMALL)
    generation = Generator(model, static_step=True).open(Sampling(1.3), length=128, limit=12)
    requests = [Request(prompt, n=3, max_new_tokens=12, seed=i) for i, prompt in enumerate([[1, 2, 3], [4], [5] * 9])]
    generation.add(requests)
    for _ in range(5):
        generation.step()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.2)
    generation.refresh()
    ended = {}
    while generation.is_busy:
        ended |= {(request, number): completion for request, number, completion in generation.step()}
    for (request, _), completion in ended.items():
        expected = forward_logp(model, requests[request].prompt, completion.tokens, 1.3)
        np.testing.assert_allclose(completion.logp[5:], expected[5:], rtol=0, atol=1e-5)


def note_and_tensors(dtype=torch.float32, size=8):
    """Return a note of two sequences of one query each, of 3 and 5 used keys in slots of 6, and query, keys, values."""
    torch.manual_seed(0)
    keys, values = (torch.randn(2, 6, 2, size, dtype=dtype).transpose(1, 2) for _ in range(2))
    bounds = torch.arange(3, dtype=torch.int32)
    where = Ragged(Varlen(), torch.float32, bounds, 6 * bounds, 1, 6, torch.tensor([3, 5], dtype=torch.int32))
    flat = [one.transpose(1, 2).flatten(0, 1) for one in (keys, values)]
    return Note(where, *flat, None), torch.randn(2, 4, 1, size, dtype=dtype), keys, values


def layer():
    module = torch.nn.Module()
    module.num_key_value_groups = 2
    return module


@pytest.mark.parametrize("changed", ["nothing", "key", "dtype", "size", "bias"])
def test_what_the_kernel_does_not_know_is_served_by_the_mask(changed):
    """The same output by either way; who asks for more than the kernel knows gets it from the mask."""
    note, query, keys, values = note_and_tensors(
        torch.float64 if changed == "dtype" else torch.float32, 12 if changed == "size" else 8
    )
    mask = torch.zeros(2, 1, 1, 6, dtype=query.dtype)
    mask[0, ..., 3:] = mask[1, ..., 5:] = torch.finfo(query.dtype).min
    bias = torch.randn(2, 4, 1, 6, dtype=query.dtype) if changed == "bias" else None
    noted = note.on(keys[:])
    if changed == "key":
        noted = noted * 1.0
    found, weights = attend(layer(), query, noted, values, mask, scaling=0.3, sliding_window=None, position_bias=bias)
    doubled = [one.repeat_interleave(2, 1) for one in (keys, values)]
    expected = torch.nn.functional.scaled_dot_product_attention(
        query, *doubled, attn_mask=mask if bias is None else mask + bias, scale=0.3
    )
    torch.testing.assert_close(found, expected.transpose(1, 2))
    assert weights is None and note.ragged.kernel.calls == (1 if changed == "nothing" else 0)


def test_a_soft_cap_is_refused_and_not_forgotten():
    note, query, keys, values = note_and_tensors()
    with pytest.raises(ValueError, match="softcap"):
        attend(layer(), query, note.on(keys[:]), values, torch.zeros(2, 1, 1, 6), scaling=0.3, softcap=50.0)
    assert note.ragged.kernel.calls == 0


def test_prompts_are_packed_up_to_a_number_of_tokens(monkeypatch):
    monkeypatch.setattr("rlx.generation.slots.PREFILL_TOKENS", 10)
    assert _packs([4, 6, 1, 30, 2, 3]) == [(0, 2), (2, 3), (3, 4), (4, 6)]
    assert _packs([7]) == [(0, 1)]


def test_a_cpu_has_no_kernel_and_the_stand_in_takes_what_torch_does():
    assert kernel_for(torch.device("cpu"), torch.bfloat16) is None
    if installed(NEEDED):
        assert installed(inspect.signature(Varlen.__call__).parameters.keys() - {"self"})
