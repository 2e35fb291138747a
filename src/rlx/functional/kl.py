"""Estimators of KL(old || new) from samples of the old policy (Schulman 2020, "Approximating KL divergence")."""

from torch import Tensor


def k1(logp: Tensor, new_logp: Tensor) -> Tensor:
    """Return log(old / new) per sample: unbiased, high variance, may be negative."""
    return logp - new_logp


def k3(logp: Tensor, new_logp: Tensor) -> Tensor:
    """Return r - 1 - log(r) with r = new / old, per sample: unbiased, low variance, never negative."""
    log_ratio = new_logp - logp
    return log_ratio.exp() - 1 - log_ratio
