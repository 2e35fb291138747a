"""The chunked head is log_softmax: in values and gradients, whatever the chunk, and in little memory."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rlx.nets import chunked_head
from rlx.nets.chunked_head import LogitTransform, logp_and_entropy

CASES = {
    "plain": {},
    "temperature": {"temperature": 0.7},
    "bias": {"bias": True, "temperature": 1.3},
    "softcap": {"transform": LogitTransform(softcap=2.0), "temperature": 0.7},
    "scale": {"transform": LogitTransform(scale=0.25, softcap=1.5), "bias": True},
}


def plain(hidden, weight, target, bias=None, transform=None, temperature=1.0):
    """Return the same, written the usual way."""
    logits = hidden @ weight.T
    if bias is not None:
        logits = logits + bias
    if transform is not None:
        logits = logits * transform.scale
        if transform.softcap is not None:
            logits = torch.tanh(logits / transform.softcap) * transform.softcap
    log_p = torch.log_softmax(logits / temperature, -1)
    return log_p[torch.arange(len(target)), target], -(log_p.exp() * log_p).sum(-1)


def inputs(case, tokens, size, vocabulary, dtype):
    generator = torch.Generator().manual_seed(0)
    options = dict(CASES[case])
    shapes = [(tokens, size), (vocabulary, size)] + ([(vocabulary,)] if options.pop("bias", False) else [])
    leaves = [torch.randn(*shape, generator=generator, dtype=dtype).requires_grad_() for shape in shapes]
    target = torch.randint(0, vocabulary, (tokens,), generator=generator)
    return leaves, target, options


@pytest.fixture(params=["one chunk, kept", "chunks, kept", "chunks, computed again"])
def chunks(request, monkeypatch):
    """21 numbers a chunk are three tokens of a vocabulary of seven."""
    if request.param != "one chunk, kept":
        monkeypatch.setattr(chunked_head, "CHUNK_NUMBERS", 21)
    if request.param == "chunks, computed again":
        monkeypatch.setattr(chunked_head, "KEPT_NUMBERS", 0)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("dtype", "atol"), [(torch.float64, 1e-13), (torch.float32, 2e-6)])
def test_values_and_gradients_are_those_of_log_softmax(chunks, case, dtype, atol):
    leaves, target, options = inputs(case, 11, 5, 7, dtype)
    weights = torch.randn(2, 11, generator=torch.Generator().manual_seed(1), dtype=dtype)
    results = []
    for function in (logp_and_entropy, plain):
        hidden, weight, *bias = leaves
        outputs = function(hidden, weight, target, bias=bias[0] if bias else None, **options)
        total = sum((w * output).sum() for w, output in zip(weights, outputs, strict=True))
        results.append([*outputs, *torch.autograd.grad(total, leaves)])
    for ours, reference in zip(*results, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-5 if dtype == torch.float32 else 1e-12, atol=atol)


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_finite_differences(chunks, case):
    leaves, target, options = inputs(case, 5, 3, 7, torch.float64)

    def function(hidden, weight, bias=None):
        return logp_and_entropy(hidden, weight, target, bias=bias, **options)

    assert torch.autograd.gradcheck(function, leaves)


@pytest.mark.parametrize("used", [0, 1])
def test_one_output_alone_has_its_own_gradient(chunks, used):
    leaves, target, _ = inputs("plain", 11, 5, 7, torch.float64)
    ours, reference = (
        torch.autograd.grad(function(*leaves, target)[used].sum(), leaves) for function in (logp_and_entropy, plain)
    )
    for gradient, expected in zip(ours, reference, strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-13)


def test_two_choices_by_hand():
    """Logits 0 and ln 3 are probabilities 1/4 and 3/4; at temperature 0.5, logits 0 and ln 9, 1/10 and 9/10."""
    hidden, weight = torch.ones(2, 1, dtype=torch.float64), torch.tensor([[1.0], [3.0]], dtype=torch.float64).log()
    target = torch.tensor([0, 1])
    logp, entropy = logp_and_entropy(hidden, weight, target)
    assert logp.exp().tolist() == pytest.approx([0.25, 0.75])
    assert entropy.tolist() == pytest.approx([0.5623351446188083] * 2)
    logp, _ = logp_and_entropy(hidden, weight, target, temperature=0.5)
    assert logp.exp().tolist() == pytest.approx([0.1, 0.9])


def test_large_logits_overflow_nothing():
    hidden, weight = torch.tensor([[1000.0]]), torch.tensor([[1.0], [-1.0]])
    logp, entropy = logp_and_entropy(hidden, weight, torch.tensor([0]))
    assert logp.tolist() == [0.0] and entropy.tolist() == [0.0]


def test_half_precision_is_accumulated_in_float32():
    leaves, target, _ = inputs("plain", 11, 5, 7, torch.bfloat16)
    logp, entropy = logp_and_entropy(*leaves, target)
    assert logp.dtype == entropy.dtype == torch.float32
    (logp.sum() + entropy.sum()).backward()
    assert [leaf.grad.dtype for leaf in leaves] == [torch.bfloat16] * 2  # type: ignore[union-attr]


def test_no_tokens_give_empty_results():
    leaves, target, _ = inputs("plain", 0, 5, 7, torch.float32)
    logp, entropy = logp_and_entropy(*leaves, target)
    (logp.sum() + entropy.sum()).backward()
    assert len(logp) == 0 and not leaves[1].grad.any()  # type: ignore[union-attr]


MEASURE = Path(__file__).with_name("head_memory.py")


@pytest.mark.slow
def test_a_vocabulary_of_151_936_and_4096_tokens_stay_under_400_mb():
    """Counted: the peak resident memory of a process that evaluates and differentiates, less what it had before.

    Before are the model, its gradient buffer, and one evaluation of 8 tokens, which loads torch's kernels. The trunk's
    activations and the temporary gradients of embedding and head (39 MB each) are in what is counted. All logits at
    once would be 2490 MB.
    """
    measured = subprocess.run([sys.executable, str(MEASURE)], capture_output=True, text=True, timeout=280)
    assert measured.returncode == 0, measured.stderr
    megabytes = float(measured.stdout)
    assert 0 < megabytes < 400
