"""Losses per sample; the caller reduces them with `weighted_sum` (see masking)."""

import torch
from torch import Tensor


def clipped_surrogate(ratio: Tensor, advantage: Tensor, clip_range: float | Tensor) -> Tensor:
    """Return PPO's pessimistic objective, negated, per sample (Schulman et al. 2017, arXiv:1707.06347, eq. 7).

    min(ratio A, clip(ratio) A) = min(ratio A, A + clip_range |A|): whatever the sign of A, only the bound on the
    side where a larger ratio pays can ever be the smaller one. The bound needs no gradient, which halves the graph.
    """
    return -torch.min(ratio * advantage, advantage + clip_range * advantage.abs())


def squared_error(value: Tensor, return_: Tensor) -> Tensor:
    """Return (value - return_)^2 per sample, without the factor 1/2 that some codebases fold in."""
    return (value - return_).square()


def clipped_squared_error(value: Tensor, return_: Tensor, old_value: Tensor, clip: float) -> Tensor:
    """Return the larger of the plain error and that of a value kept within `clip` of `old_value`, per sample.

    Rarely helps (Andrychowicz et al. 2021, arXiv:2006.05990, section 3.3), so it is off by default in PPO.
    """
    near = old_value + (value - old_value).clamp(-clip, clip)
    return torch.max(squared_error(value, return_), squared_error(near, return_))
