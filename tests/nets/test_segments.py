"""Packed rows attend by segments: the numbers of padded rows, by sdpa and by the kernel, and no mask of all by all."""

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rlx.nets import varlen
from rlx.nets.language_model import load_language_model
from rlx.nets.segments import NAME, Segments, attend
from rlx.nets.transformer import TransformerPolicy
from rlx.trajectory import Batch
from tests.nets.varlen import Varlen

FAMILIES = ["gpt2", "llama", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "mistral", "phi", "phi3"]
EAGER = "gemma2"
"""Its scores are capped, which sdpa cannot do."""


def ragged(lengths: tuple[int, ...] = (9, 2, 2, 1, 11, 5, 5, 5), width: int = 11) -> Batch:
    generator = torch.Generator().manual_seed(0)
    obs, action = (torch.randint(0, 40, (len(lengths), width), generator=generator) for _ in range(2))
    length = torch.tensor(lengths)
    mask = (torch.arange(width) < length[:, None]) & (torch.arange(width) >= 1)
    return Batch(obs=obs, action=action, length=length, mask=mask)


def outputs_and_gradient(policy: TransformerPolicy, rows: Batch) -> list[Tensor]:
    new_logp, entropy, _ = policy.evaluate(rows)
    loss = (new_logp * torch.linspace(-1, 1, new_logp.numel()).view_as(new_logp)).sum() + 0.1 * entropy.sum()
    parameters = [p for p in policy.parameters() if p.requires_grad]
    return [new_logp, entropy, loss, *torch.autograd.grad(loss, parameters, materialize_grads=True)]


def make_policy(config: dict[str, Any], layout: Any, **options: Any) -> TransformerPolicy:
    model = load_language_model(config=config, seed=1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3 if parameter.ndim > 1 else 1)
    return TransformerPolicy(model.double(), layout=layout, **options)


@pytest.mark.parametrize("way", [None, Varlen()])
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_rows_have_the_loss_and_the_gradient_of_padded_ones(language_model_configs, family, way, monkeypatch):
    """In float64, but for the norms and the rotary tables; in some families layers see four tokens back at most."""
    monkeypatch.setattr(varlen, "kernel_for", lambda *_: way)
    monkeypatch.setattr(varlen, "takes_heads", lambda *_: True)
    padded, packed = (make_policy(language_model_configs[family], layout) for layout in ("padded", "packed"))
    of_trial = 0 if way is None else way.calls
    results = [outputs_and_gradient(policy, ragged()) for policy in (padded, packed)]
    for expected, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-6)
    if way is not None:
        layers = packed.trunk.config.num_hidden_layers
        assert way.calls - of_trial == (0 if family == EAGER else layers), "packed rows, and only those"


@pytest.mark.parametrize("way", [None, Varlen()])
def test_a_window_of_two_is_a_position_and_the_one_before_it(way, monkeypatch):
    """With queries of zeros a position's result is the mean of what it sees."""
    monkeypatch.setattr(varlen, "kernel_for", lambda *_: way)
    monkeypatch.setattr(varlen, "takes_heads", lambda *_: True)
    value = torch.tensor([1.0, 10.0, 100.0, 1000.0, 5.0]).view(1, 1, 5, 1)
    zeros, plan = torch.zeros(1, 1, 5, 1), Segments([4, 1], [2, None], torch.device("cpu"))
    expected = [[1, 5.5, 55, 550, 5], [1, 5.5, 37, 277.75, 5]]
    for layer in range(2):
        module: Any = SimpleNamespace(layer_idx=layer, is_causal=True)
        mixed, weights = attend(module, zeros, zeros, value, None, rlx_segments=plan)
        assert weights is None and mixed.shape == (1, 5, 1, 1)
        assert mixed.flatten().tolist() == pytest.approx(expected[layer])


def test_neighbours_of_one_length_run_together_and_rows_of_none_not_at_all():
    plan = Segments([3, 3, 0, 3, 1, 3], [None], torch.device("cpu"))
    assert plan.runs == [(3, 3), (1, 1), (1, 3)] and plan.longest == 3
    assert plan.starts.tolist() == [0, 3, 6, 9, 10, 13]


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_no_tensor_is_as_large_as_all_tokens_by_all_tokens(language_model_configs, family):
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), options=None):
            nonlocal largest
            made = function(*arguments, **(options or {}))
            largest = max([largest, *(leaf.numel() for leaf in tree_leaves(made) if isinstance(leaf, Tensor))])
            return made

    policy = make_policy(language_model_configs[family], "packed")
    rows = ragged((20,) * 60, width=20)
    with Watch():
        outputs_and_gradient(policy, rows)
    assert 0 < largest < 1200 * 1200 / 4


def test_layers_that_are_computed_again_find_the_segments_again(language_model_configs):
    config = language_model_configs["mistral"]
    kept, again = (make_policy(config, "packed", activation_checkpointing=twice) for twice in (False, True))
    for expected, ours in zip(*(outputs_and_gradient(policy, ragged()) for policy in (kept, again)), strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("takes_more", [True, False])
def test_a_model_that_hands_no_segments_on_gets_a_mask_as_before(language_model_configs, takes_more):
    padded = make_policy(language_model_configs["mistral"], "padded")
    model = make_policy(language_model_configs["mistral"], "padded").model
    plain = model.model.forward

    def without(input_ids=None, attention_mask=None, position_ids=None, use_cache=None, **more):
        known = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
        return plain(**known, use_cache=use_cache)

    def closed(
        input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, inputs_embeds=None, use_cache=None
    ):
        return without(input_ids, attention_mask, position_ids, use_cache)

    model.model.forward = without if takes_more else closed
    packed = TransformerPolicy(model, layout="packed")
    assert model.config._attn_implementation == "sdpa"
    for expected, ours in zip(*(outputs_and_gradient(policy, ragged()) for policy in (padded, packed)), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-6)


def test_nobody_else_s_attention_is_chosen_and_no_folder_names_it(language_model_configs, tmp_path):
    mine, other = (load_language_model(config=language_model_configs["llama"], seed=1) for _ in range(2))
    rows = ragged().obs
    before = mine(input_ids=rows).logits
    TransformerPolicy(mine, layout="packed")
    assert (mine.config._attn_implementation, other.config._attn_implementation) == (NAME, "sdpa")
    assert torch.equal(mine(input_ids=rows).logits, before), "whoever calls the model itself sees no difference"
    mine.save_pretrained(tmp_path)
    assert NAME not in (tmp_path / "config.json").read_text()


def test_the_kernel_is_for_half_precision_on_a_gpu():
    assert varlen.kernel_for(torch.device("cpu"), torch.bfloat16) is None
    assert varlen.takes_heads(8, 8) and varlen.takes_heads(256, 256)
    assert not any(varlen.takes_heads(*sizes) for sizes in [(12, 12), (264, 264), (64, 128)])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no GPU")
@pytest.mark.parametrize(("window", "key_heads"), list(itertools.product([None, 1, 4, 64], [1, 2, 4])))
def test_torch_s_kernel_sees_what_sdpa_sees(window, key_heads, monkeypatch):
    """In bfloat16, gradients too: the window's edge and the groups are as the documentation says."""
    generator = torch.Generator("cuda").manual_seed(0)
    plan = Segments([70, 3, 129, 1], [window], torch.device("cuda"))
    module: Any = SimpleNamespace(layer_idx=0, is_causal=True, num_key_value_groups=4 // key_heads)

    def draw(heads: int) -> Tensor:
        drawn = torch.randn(1, heads, 203, 64, generator=generator, device="cuda")
        return drawn.to(torch.bfloat16).requires_grad_()

    tensors = [draw(4), draw(key_heads), draw(key_heads)]
    kernel = varlen.kernel_for(torch.device("cuda"), torch.bfloat16)
    assert kernel is not None
    results = []
    for way in (kernel, None):
        monkeypatch.setattr(varlen, "kernel_for", lambda *_, way=way: way)
        mixed, _ = attend(module, *tensors, None, rlx_segments=plan)
        results.append([mixed, *torch.autograd.grad(mixed.float().square().sum(), tensors)])
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=0.05, atol=0.05)
