"""The plain formulas against torch.distributions, and samples against their probabilities."""

import numpy as np
import pytest
import torch
from torch import distributions

from rlx.nets.acting import draw_noise
from rlx.nets.distributions import Categorical, Composite, DiagonalGaussian, MultiCategorical, mask_head


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


@pytest.mark.parametrize("sizes", [(3,), (2, 2, 2), (3, 1, 5, 2)])
def test_a_multi_categorical_is_the_product_of_its_parts(sizes):
    family, head = MultiCategorical(sizes), heads(sum(sizes))
    parts = [distributions.Categorical(logits=logits) for logits in head.split(sizes, -1)]
    action = torch.stack([torch.arange(50) % size for size in sizes], -1)
    logp, entropy = family.logp_and_entropy(head, action)
    torch.testing.assert_close(logp, sum(part.log_prob(column) for part, column in zip(parts, action.T, strict=True)))
    torch.testing.assert_close(entropy, sum(part.entropy() for part in parts))
    assert torch.equal(family.logp(head, action), logp)
    assert torch.equal(family.mode(head), torch.stack([part.mode for part in parts], -1))
    torch.testing.assert_close(family.logp(head.view(5, 10, -1), action.view(5, 10, -1)), logp.view(5, 10))


def test_a_composite_is_the_product_of_integers_and_floats():
    family, head = Composite(MultiCategorical((3, 2)), gaussian(2)), heads(7)
    integers = torch.stack([torch.arange(50) % 3, torch.arange(50) % 2], -1)
    floats = head[:, 5:] + 0.5
    logp, entropy = family.logp_and_entropy(head, torch.cat([integers.float(), floats], -1))
    of_integers = family.integers.logp_and_entropy(head[:, :5], integers)
    of_floats = family.floats.logp_and_entropy(head[:, 5:], floats)
    torch.testing.assert_close(logp, of_integers[0] + of_floats[0])
    torch.testing.assert_close(entropy, of_integers[1] + of_floats[1])
    mode = family.mode(head)
    assert torch.equal(mode[:, :2], family.integers.mode(head[:, :5]).float()) and torch.equal(mode[:, 2:], head[:, 5:])


def test_gumbel_noise_samples_each_part_of_a_multi_categorical_alone():
    """Pearson's statistic of 40,000 draws of a pair; 20.5 is the 99.9 % quantile of chi-square with 5 degrees."""
    count, family, head = 40_000, MultiCategorical((2, 3)), torch.tensor([1.0, 0.0, -1.0, 0.5, 0.0])
    noise = torch.from_numpy(draw_noise(family, count, 1, np.random.default_rng(0))).flatten(0, 1)
    first, second = family.sample(head.expand(count, 5), noise).T
    observed = torch.bincount(first * 3 + second, minlength=6)
    expected = count * torch.outer(head[:2].softmax(-1), head[2:].softmax(-1)).flatten()
    assert ((observed - expected).square() / expected).sum().item() < 20.5


def test_the_noise_of_a_composite_is_gumbel_for_integers_and_normal_for_floats():
    """Gumbel's mean is Euler's constant and its variance pi^2 / 6; bounds are five standard errors of the mean."""
    noise = draw_noise(Composite(MultiCategorical((2,)), gaussian(1)), 40_000, 1, np.random.default_rng(0))[:, 0]
    assert np.abs(noise[:, :2].mean(0) - np.euler_gamma).max() < 5 * np.pi / 6**0.5 / 200
    assert abs(noise[:, 2].mean()) < 5 / 200 and abs(noise[:, 2].std() - 1) < 5 / 283


MASKED = [
    (Categorical(4), [[0, 1, 0, 1], [1, 1, 1, 1], [0, 0, 0, 1]]),
    (MultiCategorical((2, 3)), [[0, 1, 1, 0, 1], [1, 1, 1, 1, 1], [1, 0, 0, 0, 1]]),
    (Composite(MultiCategorical((2, 3)), DiagonalGaussian(2, 0.0)), [[0, 1, 1, 0, 1], [1] * 5, [1, 0, 0, 0, 1]]),
]


@pytest.mark.parametrize(("family", "masks"), MASKED)
def test_a_masked_choice_is_never_taken_counts_for_no_entropy_and_gets_no_gradient(family, masks):
    legal = torch.tensor(masks, dtype=torch.float32).repeat(1000, 1)
    raw = (20 * torch.randn(3000, family.head_size, generator=torch.Generator().manual_seed(0))).requires_grad_()
    head = mask_head(raw, legal)
    noise = torch.from_numpy(draw_noise(family, 3000, 1, np.random.default_rng(0))).flatten(0, 1)
    sizes = getattr(family, "integers", family)
    sizes = sizes.sizes if hasattr(sizes, "sizes") else (sizes.size,)
    for action in (family.sample(head, noise), family.mode(head)):
        columns = action.reshape(3000, -1)[:, : len(sizes)].long()
        for column, group in zip(columns.T, legal.split(sizes, -1), strict=True):
            assert (group.gather(-1, column[:, None]) == 1).all()
    logp, entropy = family.logp_and_entropy(head, family.sample(head, noise).detach())
    (gradient,) = torch.autograd.grad((logp + entropy).sum(), raw)
    assert gradient.isfinite().all() and logp.isfinite().all() and entropy.isfinite().all()
    assert not gradient[:, : legal.shape[1]][legal == 0].any() and gradient[:, : legal.shape[1]][legal == 1].any()


def test_the_entropy_is_that_of_the_legal_choices():
    head = mask_head(torch.zeros(1, 5), torch.tensor([[1.0, 1.0, 0.0, 1.0, 0.0]]))
    _, entropy = MultiCategorical((3, 2)).logp_and_entropy(head, torch.tensor([[0, 0]]))
    assert entropy.item() == pytest.approx(np.log(2) + np.log(1))
    illegal = Categorical(3).logp(mask_head(torch.zeros(1, 3), torch.tensor([[1.0, 0.0, 1.0]])), torch.tensor([1]))
    assert illegal.exp().item() == 0.0


@pytest.mark.parametrize(
    "family",
    [
        *(Categorical(4), DiagonalGaussian(4, 0.0), MultiCategorical((1, 3))),
        Composite(MultiCategorical((3,)), DiagonalGaussian(1, 0.0)),
    ],
)
def test_noise_is_float32_repeats_with_the_seed_and_is_finite(family):
    first, again = (draw_noise(family, 5, 3, np.random.default_rng(7)) for _ in range(2))
    assert first.shape == (5, 3, 4) and first.dtype == np.float32
    assert np.array_equal(first, again) and np.isfinite(first).all()
