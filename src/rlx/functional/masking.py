"""Reductions that count only the samples that are experience."""

import torch
from torch import Tensor


def weighted_sum(values: Tensor, weight: Tensor) -> Tensor:
    """Return sum(values * weight), a scalar; with `sample_weight`'s weights it is the mean over counted samples."""
    return torch.dot(values.flatten(), weight.flatten())


def sample_weight(mask: Tensor) -> Tensor:
    """Return each sample's share of the mean, float32: mask / mask.sum(). All zero where nothing is counted."""
    counted = mask.to(torch.float32)
    return counted / counted.sum().clamp(min=1)


def standardize(values: Tensor, mask: Tensor, epsilon: float = 1e-8) -> Tensor:
    """Return values with mean 0 and standard deviation 1 over the samples where mask is true, and 0 elsewhere.

    The population deviation (division by the count) is used, so a single sample gives 0 rather than NaN.
    """
    weight = sample_weight(mask).to(values.dtype)
    values = values.masked_fill(~mask, 0)
    centred = (values - weighted_sum(values, weight)).masked_fill(~mask, 0)
    return centred / (weighted_sum(centred.square(), weight).sqrt() + epsilon)


def explained_variance(value: Tensor, return_: Tensor, mask: Tensor) -> Tensor:
    """Return 1 - var(return - value) / var(return) over counted samples: 1 is a perfect critic, 0 a constant one."""
    weight = sample_weight(mask).to(return_.dtype)

    def variance(x: Tensor) -> Tensor:
        x = x.masked_fill(~mask, 0)  # a NaN would survive the weight 0
        return weighted_sum((x - weighted_sum(x, weight)).square(), weight)

    return 1 - variance(return_ - value) / variance(return_).clamp(min=1e-12)
