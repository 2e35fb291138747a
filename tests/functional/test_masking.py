"""Reductions that count only what the mask counts."""

import math

import pytest
import torch

from rlx.functional.masking import explained_variance, sample_weight, standardize, weighted_sum


def random_case(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return 3 + 5 * torch.randn(7, 4, generator=generator), torch.rand(7, 4, generator=generator) < 0.6


def test_a_weighted_sum_with_sample_weights_is_the_mean_over_counted_samples():
    values, mask = random_case()
    assert 0 < mask.sum() < mask.numel()
    torch.testing.assert_close(weighted_sum(values, sample_weight(mask)), values[mask].mean())


def test_sample_weights_are_zero_where_nothing_is_counted():
    weight = sample_weight(torch.zeros(3, dtype=torch.bool))
    assert weight.tolist() == [0, 0, 0]
    assert sample_weight(torch.zeros(0, dtype=torch.bool)).tolist() == []


def test_standardize_gives_mean_zero_and_deviation_one_over_counted_samples():
    values, mask = random_case()
    result = standardize(values, mask)[mask]
    assert result.mean().item() == pytest.approx(0, abs=1e-6)
    assert result.std(correction=0).item() == pytest.approx(1, abs=1e-6)


def test_standardize_by_hand_ignores_the_masked_sample():
    """1 and 3 have mean 2 and population deviation 1."""
    mask = torch.tensor([True, False, True])
    assert standardize(torch.tensor([1.0, 1000.0, 3.0]), mask)[mask].tolist() == pytest.approx([-1, 1])


def test_standardize_of_one_sample_or_equal_samples_is_zero():
    assert standardize(torch.tensor([5.0]), torch.tensor([True])).tolist() == [0]
    only_one = standardize(torch.tensor([5.0, 9.0]), torch.tensor([True, False]))
    assert only_one[0].item() == 0 and only_one.isfinite().all()
    assert standardize(torch.full((4,), 7.0), torch.ones(4, dtype=torch.bool)).tolist() == [0, 0, 0, 0]


def test_explained_variance_is_one_for_a_perfect_critic_and_zero_for_a_constant_one():
    returns, mask = random_case()
    garbage = returns.where(mask, 1e6)
    assert explained_variance(garbage, returns, mask).item() == pytest.approx(1)
    assert explained_variance(torch.zeros_like(returns), returns, mask).item() == pytest.approx(0, abs=1e-6)
    # Twice the deviation from the mean: the error has the variance of the returns themselves.
    assert explained_variance(2 * returns, returns, mask).item() == pytest.approx(0, abs=1e-5)
    assert explained_variance(-returns, returns, mask).item() == pytest.approx(-3, abs=1e-5)


def test_what_stands_outside_the_mask_changes_no_bit():
    values, mask = random_case()
    poisoned = values.where(mask, math.nan)
    assert torch.equal(standardize(poisoned, mask), standardize(values, mask))
    assert standardize(values, mask)[~mask].abs().max().item() == 0
    other = values.flip(0)
    clean = explained_variance(values, other, mask)
    assert clean.isfinite() and torch.equal(explained_variance(poisoned, other.where(mask, math.inf), mask), clean)


def test_the_order_of_rows_does_not_matter_to_standardize():
    values, mask = random_case()
    order = torch.randperm(7, generator=torch.Generator().manual_seed(3))
    shuffled = standardize(values.double()[order], mask[order])
    torch.testing.assert_close(shuffled, standardize(values.double(), mask)[order], rtol=0, atol=1e-7)
