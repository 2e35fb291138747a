"""The plain formulas against torch.distributions, and samples against their probabilities."""

import numpy as np
import pytest
import torch
from torch import distributions

from rlx.nets.acting import draw_noise
from rlx.nets.distributions import Categorical, DiagonalGaussian


def heads(size: int, count: int = 50) -> torch.Tensor:
    return 2 * torch.randn(count, size, generator=torch.Generator().manual_seed(0))


def gaussian(size: int) -> DiagonalGaussian:
    """Return a Gaussian whose dimensions have different deviations."""
    family = DiagonalGaussian(size, log_std_init=-0.5)
    with torch.no_grad():
        family.log_std.add_(torch.linspace(-1, 1, size))
    return family


def test_categorical_agrees_with_torch_distributions():
    head = heads(5)
    oracle = distributions.Categorical(logits=head)
    action = torch.arange(50) % 5
    logp, entropy = Categorical(5).logp_and_entropy(head, action)
    torch.testing.assert_close(logp, oracle.log_prob(action))
    torch.testing.assert_close(entropy, oracle.entropy())
    assert torch.equal(Categorical(5).logp(head, action), logp)
    assert torch.equal(Categorical(5).mode(head), oracle.mode)


def test_categorical_stays_finite_for_an_action_that_is_almost_impossible():
    logp, entropy = Categorical(2).logp_and_entropy(torch.tensor([[0.0, -200.0]]), torch.tensor([1]))
    assert logp.item() == pytest.approx(-200) and entropy.item() == pytest.approx(0)


def test_gaussian_agrees_with_torch_distributions():
    head, family = heads(3), gaussian(3)
    oracle = distributions.Independent(distributions.Normal(head, family.log_std.exp()), 1)
    action = head + torch.randn(50, 3, generator=torch.Generator().manual_seed(1))
    logp, entropy = family.logp_and_entropy(head, action)
    torch.testing.assert_close(logp, oracle.log_prob(action))
    torch.testing.assert_close(entropy, oracle.entropy())
    assert torch.equal(family.logp(head, action), logp)
    assert torch.equal(family.mode(head), head)


def test_gumbel_noise_samples_the_softmax_probabilities():
    """Pearson's statistic of 40,000 draws; 18.5 is the 99.9 % quantile of chi-square with 4 degrees of freedom."""
    count, family, head = 40_000, Categorical(5), torch.tensor([2.0, 1.0, 0.0, -1.0, -2.0])
    noise = torch.from_numpy(draw_noise(family, count, 1, np.random.default_rng(0))).flatten(0, 1)
    observed = torch.bincount(family.sample(head.expand(count, 5), noise), minlength=5)
    expected = count * head.softmax(-1)
    assert ((observed - expected).square() / expected).sum().item() < 18.5


def test_normal_noise_samples_the_mean_and_deviation():
    """Bounds are five standard errors of the mean (s / sqrt n) and of the deviation (s / sqrt 2n)."""
    count, family, head = 40_000, gaussian(3), torch.tensor([1.0, -2.0, 0.5])
    noise = torch.from_numpy(draw_noise(family, count, 1, np.random.default_rng(0))).flatten(0, 1)
    action = family.sample(head.expand(count, 3), noise)
    std = family.log_std.detach().exp()
    assert ((action.mean(0) - head).abs() < 5 * std / count**0.5).all()
    assert ((action.std(0) - std).abs() < 5 * std / (2 * count) ** 0.5).all()


@pytest.mark.parametrize("family", [Categorical(4), DiagonalGaussian(4, 0.0)])
def test_noise_is_float32_repeats_with_the_seed_and_is_finite(family):
    first, again = (draw_noise(family, 5, 3, np.random.default_rng(7)) for _ in range(2))
    assert first.shape == (5, 3, 4) and first.dtype == np.float32
    assert np.array_equal(first, again) and np.isfinite(first).all()
