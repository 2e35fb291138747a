"""A transformer policy evaluates what the model's own forward pass says, in any layout, and nothing off the mask."""

import copy
from functools import partial

import pytest
import torch
from torch import nn

from rlx.errors import ConfigError, RlxError
from rlx.nets.flat import FlatParameters
from rlx.nets.language_model import load_language_model
from rlx.nets.transformer import TransformerPolicy, decoder_layers
from rlx.trajectory import Batch

FAMILIES = ["gpt2", "llama", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "mistral", "phi", "phi3"]


def sharp(model: nn.Module) -> nn.Module:
    """Return the model with weights so large that its choices are far from uniform; norms and biases are moved too."""
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(3)
            else:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def make_rows(count: int = 7, seed: int = 0) -> Batch:
    """Return ragged rows of up to 11 positions; the first positions of a row, its prompt, are masked."""
    generator = torch.Generator().manual_seed(seed)
    length = torch.randint(2, 12, (count,), generator=generator)
    length[0] = 11
    tokens = torch.randint(0, 40, (count, 12), generator=generator)
    tokens[3:, :3] = tokens[2, :3]  # the samples of one prompt
    position = torch.arange(11)
    prompt = torch.randint(0, 2, (count, 1), generator=generator)
    prompt[2:] = 2
    mask = (position < length[:, None]) & (position >= prompt)
    return Batch(obs=tokens[:, :-1], action=tokens[:, 1:], mask=mask, length=length)


@pytest.fixture
def llama(language_model_configs):
    return sharp(load_language_model(config=language_model_configs["llama"], seed=1))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layout", ["padded", "packed", "shared"])
def test_log_probabilities_are_those_of_the_model_s_own_forward_pass(language_model_configs, family, layout):
    """Each row alone, unpadded, in float64; the eager attention of Gemma 2 has a softmax in float32."""
    tolerance = 1e-6 if family == "gemma2" else 1e-10
    model = sharp(load_language_model(config=language_model_configs[family], seed=1)).double()
    policy = TransformerPolicy(model, temperature=0.7, layout=layout)
    rows = make_rows()
    new_logp, entropy, value = policy.evaluate(rows)
    assert new_logp.shape == entropy.shape == value.shape == rows.mask.shape and not value.any()
    for row, length in enumerate(rows.length.tolist()):
        logits = model(input_ids=rows.obs[row : row + 1, :length]).logits[0]
        log_p = (logits / 0.7).log_softmax(-1)
        mask = rows.mask[row, :length]
        expected = log_p.gather(1, rows.action[row, :length, None]).squeeze(1) * mask
        torch.testing.assert_close(new_logp[row, :length], expected, rtol=tolerance, atol=tolerance)
        expected = -(log_p.exp() * log_p).sum(1) * mask
        torch.testing.assert_close(entropy[row, :length], expected, rtol=tolerance, atol=tolerance)
        assert not new_logp[row, length:].any() and not entropy[row, length:].any()


@pytest.mark.parametrize("layout", ["padded", "packed", "shared"])
def test_the_gradient_is_that_of_the_model_s_own_forward_pass(language_model_configs, layout):
    """Of GPT-2, which is float64 throughout where it is told to be; Llama's norms are not."""
    model = sharp(load_language_model(config=language_model_configs["gpt2"], seed=1)).double()
    policy, rows = TransformerPolicy(model, layout=layout), make_rows()
    new_logp, entropy, _ = policy.evaluate(rows)
    ours = torch.autograd.grad((new_logp + 0.1 * entropy).sum(), list(model.parameters()))
    log_p = model(input_ids=rows.obs).logits.log_softmax(-1)
    plain = log_p.gather(2, rows.action[..., None]).squeeze(2) - 0.1 * (log_p.exp() * log_p).sum(2)
    reference = torch.autograd.grad((plain * rows.mask).sum(), list(model.parameters()))
    for gradient, expected in zip(ours, reference, strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("layout", ["padded", "packed", "shared"])
def test_what_stands_where_nothing_counts_has_no_influence_by_a_bit(llama, layout):
    policy, rows = TransformerPolicy(llama, value="shared", layout=layout), make_rows()
    with torch.no_grad():
        policy.value_head.weight.normal_()
    dirty = Batch(**{name: tensor.clone() for name, tensor in rows.tensors.items()})
    within = torch.arange(11) < rows.length[:, None]
    dirty.tensors["obs"][~within] = 10**9
    dirty.tensors["action"][~rows.mask] = -(10**9)
    results = []
    for batch in (rows, dirty):
        outputs = policy.evaluate(batch)
        total = sum(output.sum() for output in outputs)
        results.append([*outputs, *torch.autograd.grad(total, list(policy.parameters()))])
    assert all(torch.equal(clean, other) for clean, other in zip(*results, strict=True))


def test_pairs_are_evaluated_as_the_rows_they_are(llama):
    policy, rows = TransformerPolicy(llama), make_rows(8)
    pairs = rows.map(lambda tensor: tensor.unflatten(0, (4, 2)))
    for of_pairs, of_rows in zip(policy.evaluate(pairs), policy.evaluate(rows), strict=True):
        assert of_pairs.shape == (4, 2, 11) and torch.equal(of_pairs.flatten(0, 1), of_rows)


def test_entropy_is_left_out_where_nobody_asks(llama):
    policy, rows = TransformerPolicy(llama), make_rows()
    new_logp, entropy, _ = policy.evaluate(rows, entropy=False)
    assert torch.equal(new_logp, policy.evaluate(rows)[0]) and not entropy.any() and not entropy.requires_grad


def test_rows_without_any_action_give_zeros(llama):
    rows = make_rows()
    rows.mask[:] = False
    for layout in ("padded", "packed", "shared"):
        assert not any(output.any() for output in TransformerPolicy(llama, layout=layout).evaluate(rows))


@pytest.mark.parametrize("kind", ["shared", "separate"])
def test_values_begin_at_zero_and_are_linear_in_the_trunk_s_last_states(language_model_configs, llama, kind):
    other = sharp(load_language_model(config=language_model_configs["qwen3"], seed=2)) if kind == "separate" else None
    policy, rows = TransformerPolicy(llama, value=kind, value_model=other), make_rows()
    assert not policy.evaluate(rows)[2].any()
    with torch.no_grad():
        policy.value_head.weight.normal_()
        policy.value_head.bias.fill_(0.5)
    states = (llama if other is None else other).model(input_ids=rows.obs).last_hidden_state
    expected = (states @ policy.value_head.weight[0] + 0.5) * rows.mask
    torch.testing.assert_close(policy.evaluate(rows)[2], expected, rtol=1e-5, atol=1e-5)


def test_a_value_net_of_its_own_leaves_the_language_model_alone_and_comes_after_it(language_model_configs, llama):
    other = load_language_model(config=language_model_configs["llama"], seed=2)
    policy, rows = TransformerPolicy(llama, value="separate", value_model=other), make_rows()
    with torch.no_grad():
        policy.value_head.weight.normal_()
    gradients = torch.autograd.grad(policy.evaluate(rows)[2].sum(), list(llama.parameters()), materialize_grads=True)
    assert not any(gradient.any() for gradient in gradients)
    flat = FlatParameters(policy)
    count = sum(parameter.numel() for parameter in llama.parameters())
    assert torch.equal(flat.data[:count], torch.cat([p.detach().reshape(-1) for p in llama.parameters()]))
    assert "value_model.lm_head.weight" not in flat.names, "nothing uses it"


def test_the_reference_is_frozen_and_says_what_the_model_said(llama):
    reference = copy.deepcopy(llama)
    policy, rows = TransformerPolicy(llama, temperature=1.3, reference=reference), make_rows()
    assert torch.equal(policy.ref_logp(rows), policy.evaluate(rows)[0])
    before = policy.ref_logp(rows)
    with torch.no_grad():
        for parameter in llama.parameters():
            parameter.mul_(1.1)
    assert torch.equal(policy.ref_logp(rows), before) and not torch.equal(policy.evaluate(rows)[0], before)
    assert not before.requires_grad and len(FlatParameters(policy).parameters) == len(list(llama.parameters()))


def test_with_an_adapter_only_it_is_learned_and_without_it_the_model_is_the_base_bit_for_bit(language_model_configs):
    config, rows = language_model_configs["llama"], make_rows()
    base = TransformerPolicy(load_language_model(config=config, seed=1))
    policy = TransformerPolicy(load_language_model(config=config, seed=1, lora={"r": 2}))
    flat = FlatParameters(policy)
    assert all("lora_" in name for name in flat.names)
    # q and o: 2 * 2 * (32 + 32); k and v: 2 * 2 * (32 + 16); gate, up and down: 3 * 2 * (32 + 48); of two layers.
    assert len(flat.data) == 2 * (2 * 2 * 64 + 2 * 2 * 48 + 3 * 2 * 80)
    flat.data.normal_(generator=torch.Generator().manual_seed(0))
    expected = base.evaluate(rows)[0]
    assert (policy.evaluate(rows)[0] - expected).abs().max() > 0.01
    assert torch.equal(policy.ref_logp(rows), expected)
    gradients = torch.autograd.grad(policy.evaluate(rows)[0].sum(), flat.parameters)
    assert all(gradient.any() for gradient in gradients), "the adapter is on again, and learned"


def test_dropout_is_off_unless_it_is_asked_for_and_then_on_with_gradients_only(language_model_configs):
    config = language_model_configs["gpt2"] | {"resid_pdrop": 0.5, "embd_pdrop": 0.5}
    rows = make_rows()
    quiet = TransformerPolicy(load_language_model(config=config, seed=1))
    assert torch.equal(quiet.evaluate(rows)[0], quiet.evaluate(rows)[0])
    noisy = TransformerPolicy(load_language_model(config=config, seed=1), dropout=True)
    assert not torch.equal(noisy.evaluate(rows)[0], noisy.evaluate(rows)[0])
    with torch.no_grad():
        assert torch.equal(noisy.evaluate(rows)[0], quiet.evaluate(rows)[0])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "again", "backend"),
    [("padded", False, "inductor"), ("packed", True, "aot_eager")],  # the second, without a C++ compiler, in a third
)
@pytest.mark.filterwarnings("ignore:The .grad attribute")  # of dynamo, which looks at inputs
def test_compiled_layers_give_the_same_gradient_from_one_graph_for_all(
    language_model_configs, layout, again, backend, monkeypatch
):
    """Three layers, two batches of unlike shapes: nothing is compiled for a second layer or batch."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    results, compiled = [], []
    for compile in (False, True):
        model = load_language_model(config=language_model_configs["llama"] | {"num_hidden_layers": 3}, seed=1)
        policy = TransformerPolicy(model, layout=layout, activation_checkpointing=again, compile=compile)
        torch._dynamo.utils.counters.clear()
        for count in (5, 7):
            rows = make_rows(count)
            total = policy.evaluate(rows)[0].square().sum()
            results.append(torch.autograd.grad(total, list(model.parameters())))
            compiled.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
        assert not any("forward" in vars(layer) for layer in decoder_layers(policy.trunk.decoder))
    for plain, ours in zip(results[:2], results[2:], strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5)
    assert compiled[:2] == [0, 0] and compiled[2] == compiled[3] > 0


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_activations_computed_again_give_the_same_gradient_and_are_not_kept(language_model_configs, family):
    rows, results, kept = make_rows(), [], []
    for again in (False, True):
        model = load_language_model(config=language_model_configs[family], seed=1)
        policy = TransformerPolicy(model, activation_checkpointing=again)
        sizes: list[int] = []

        def keep(tensor, sizes=sizes):
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            total = policy.evaluate(rows)[0].sum()
        kept.append(sum(sizes))
        results.append(torch.autograd.grad(total, list(model.parameters())))
        assert "forward" not in vars(next(iter(policy.trunk.decoder.children())))
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))
    assert kept[1] < 0.5 * kept[0]


def test_a_policy_without_a_reference_says_so(llama):
    with pytest.raises(RlxError, match="has no reference"):
        TransformerPolicy(llama).ref_logp(make_rows())


def test_a_value_model_and_its_kind_belong_together(llama):
    with pytest.raises(ConfigError, match="set both or neither"):
        TransformerPolicy(llama, value="separate")


def test_a_model_that_is_not_causal_is_refused():
    config = {"model_type": "bert", "hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
    model = load_language_model(config=config | {"intermediate_size": 16, "vocab_size": 40})
    with pytest.raises(ConfigError, match="bert"):
        TransformerPolicy(sharp(model))


def test_a_model_that_treats_its_logits_in_its_own_way_is_refused(llama):
    plain = llama.forward
    llama.forward = lambda **inputs: _with_logits(plain(**inputs), 2.0)
    with pytest.raises(ConfigError, match="something of its own with its logits"):
        TransformerPolicy(llama)


def _with_logits(output, factor):
    output.logits = output.logits * factor
    return output


def test_an_adapter_on_the_head_is_refused(language_model_configs):
    lora = {"r": 2, "target_modules": ["q_proj", "lm_head"]}
    with pytest.raises(ConfigError, match=r"lora\.target_modules"):
        TransformerPolicy(load_language_model(config=language_model_configs["llama"], lora=lora))
