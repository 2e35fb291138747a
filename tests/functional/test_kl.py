"""The estimators of KL against exact sums over a small vocabulary, value and gradient; the controller by hand."""

import pytest
import torch
from torch import Tensor

from rlx.functional.kl import k1, k2, k3, next_kl_coef


def two_policies(vocabulary: int = 8, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return the logits of the policy that learns, with gradient, and the log-probabilities of a reference."""
    generator = torch.Generator().manual_seed(seed)
    logits, ref_logits = torch.randn(2, vocabulary, generator=generator, dtype=torch.float64)
    return logits.requires_grad_(), ref_logits.log_softmax(0)


def exact_kl(logp: Tensor, other_logp: Tensor) -> Tensor:
    return (logp.exp() * (logp - other_logp)).sum()


def expected_gradient(estimator, logits: Tensor, ref_logp: Tensor) -> Tensor:
    """Return the mean gradient of the estimator in a loss: samples come from the policy, and no gradient from where."""
    logp = logits.log_softmax(0)
    return torch.autograd.grad((logp.exp().detach() * estimator(logp, ref_logp)).sum(), logits)[0]


def test_one_sample_by_hand():
    logp, ref_logp = torch.tensor(-1.0), torch.tensor(-1.5)
    assert k1(logp, ref_logp).item() == pytest.approx(0.5)
    assert k2(logp, ref_logp).item() == pytest.approx(0.125)
    assert k3(logp, ref_logp).item() == pytest.approx(0.106531, abs=5e-7)


@pytest.mark.parametrize("seed", range(5))
def test_k1_and_k3_are_unbiased(seed):
    logits, ref_logp = two_policies(seed=seed)
    logp = logits.detach().log_softmax(0)
    exact = exact_kl(logp, ref_logp).item()
    assert (logp.exp() * k1(logp, ref_logp)).sum().item() == pytest.approx(exact, rel=1e-12)
    assert (logp.exp() * k3(logp, ref_logp)).sum().item() == pytest.approx(exact, rel=1e-12)


def test_k2_is_biased():
    """p = (1/2, 1/2), q = (0.9, 0.1): KL is (log 5/9 + log 5) / 2, the mean of k2 (log^2 5/9 + log^2 5) / 4."""
    logp, other_logp = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.9, 0.1]).log()
    assert exact_kl(logp, other_logp).item() == pytest.approx(0.510826, abs=1e-6)
    assert (logp.exp() * k2(logp, other_logp)).sum().item() == pytest.approx(0.733946, abs=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_in_a_loss_only_k2_has_the_gradient_of_kl(seed):
    logits, ref_logp = two_policies(seed=seed)
    exact = torch.autograd.grad(exact_kl(logits.log_softmax(0), ref_logp), logits)[0]
    reverse = torch.autograd.grad(exact_kl(ref_logp, logits.log_softmax(0)), logits)[0]
    assert exact.abs().max() > 0.01
    torch.testing.assert_close(expected_gradient(k2, logits, ref_logp), exact, rtol=0, atol=1e-12)
    torch.testing.assert_close(expected_gradient(k1, logits, ref_logp), torch.zeros_like(exact), rtol=0, atol=1e-12)
    torch.testing.assert_close(expected_gradient(k3, logits, ref_logp), reverse, rtol=0, atol=1e-12)
    assert (reverse - exact).abs().max() > 0.01


@pytest.mark.parametrize("seed", range(5))
def test_in_a_reward_k1_has_the_gradient_of_kl(seed):
    """The policy gradient of a reward that is -k1 is that of -KL."""
    logits, ref_logp = two_policies(seed=seed)
    logp = logits.log_softmax(0)
    exact = torch.autograd.grad(exact_kl(logp, ref_logp), logits, retain_graph=True)[0]
    penalty = (logp.exp().detach() * k1(logp, ref_logp).detach() * logp).sum()
    torch.testing.assert_close(torch.autograd.grad(penalty, logits)[0], exact, rtol=0, atol=1e-12)


def test_samples_of_another_law_make_kl_negative():
    """Sampling sharpened (temperature 0.5) while the log-probabilities are those of temperature 1: k1 goes below 0."""
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0], dtype=torch.float64)
    logp, sharpened = logits.log_softmax(0), (logits / 0.5).softmax(0)
    flat = torch.full((4,), 0.25, dtype=torch.float64).log()
    assert (sharpened * k1(flat, logp)).sum().item() < 0 < (flat.exp() * k1(flat, logp)).sum().item()


def test_k2_and_k3_are_never_negative_and_zero_for_the_same_policy():
    logp = torch.linspace(-5, 0, 50, dtype=torch.float64)
    assert k3(logp, logp.flip(0)).min().item() >= 0
    assert k2(logp, logp.flip(0)).min().item() >= 0
    assert k1(logp, logp.flip(0)).min().item() < 0
    for estimator in (k1, k2, k3):
        assert estimator(logp, logp).abs().max().item() == 0


@pytest.mark.parametrize(
    ("kl", "steps", "coef"),
    [
        (9.0, 256, 0.2 * (1 + 0.2 * 0.0256)),  # half as much again as the target: the error is clipped to 0.2
        (6.3, 256, 0.2 * (1 + 0.05 * 0.0256)),
        (6.0, 256, 0.2),
        (5.4, 256, 0.2 * (1 - 0.1 * 0.0256)),
        (-1.0, 256, 0.2 * (1 - 0.2 * 0.0256)),  # an estimate may be negative
        (0.0, 10_000, 0.16),
        (0.0, 1_000_000, 0.16),  # never more than a fifth, or the coefficient could turn negative
    ],
)
def test_the_controller_by_hand(kl, steps, coef):
    assert next_kl_coef(0.2, kl, target=6.0, steps=steps, horizon=10_000) == pytest.approx(coef, rel=1e-12)


def test_the_controller_settles_where_kl_is_on_target():
    """A policy whose KL falls as the coefficient rises, kl = 1.2 / coef, ends at the target of 6 from either side."""
    for coef in (0.01, 5.0):
        for _ in range(2_000):
            coef = next_kl_coef(coef, 1.2 / coef, target=6.0, steps=500, horizon=10_000)
        assert 1.2 / coef == pytest.approx(6.0, rel=1e-3)
