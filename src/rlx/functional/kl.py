"""Estimators of KL(p || q) from samples of p (Schulman 2020, "Approximating KL divergence"), and its controller.

`logp` is of the sample under p, the policy that sampled; `other_logp` under q. How far an update has gone:
`k3(logp, new_logp)`, p being the old policy. A penalty on leaving a reference: `k1(logp, ref_logp)`, p being the
policy that generated.

In a reward, k1 is the exact choice: it is unbiased, and the policy gradient does the rest. In a loss, with p the policy
that learns, the derivative by its `logp` counts and not the value: only k2 has the gradient of KL(p || q) on average.
That of k1 is zero, and that of k3 belongs to KL(q || p); GRPO uses k3 all the same (Shao et al. 2024,
arXiv:2402.03300, eq. 4), and near q the two agree.
"""

from torch import Tensor


def k1(logp: Tensor, other_logp: Tensor) -> Tensor:
    """Return log(p / q) per sample: unbiased, high variance, may be negative."""
    return logp - other_logp


def k2(logp: Tensor, other_logp: Tensor) -> Tensor:
    """Return log(p / q)^2 / 2 per sample: biased, low variance, never negative; its gradient is unbiased."""
    return (logp - other_logp).square() / 2


def k3(logp: Tensor, other_logp: Tensor) -> Tensor:
    """Return r - 1 - log(r) with r = q / p, per sample: unbiased, low variance, never negative."""
    log_ratio = other_logp - logp
    return log_ratio.exp() - 1 - log_ratio


def next_kl_coef(coef: float, kl: float, target: float, steps: int, horizon: int) -> float:
    """Return the coefficient of the KL penalty after an update whose mean KL a sequence was `kl`, in nats.

    coef * (1 + clip(kl / target - 1, -0.2, 0.2) * steps / horizon)    (Ziegler et al. 2019, arXiv:1909.08593, 2.2)

    `target`, above 0, is in nats a sequence as well. `steps` is the number of sequences of the update, `horizon` that
    over which the coefficient may change by a fifth. An update of more than `horizon` sequences counts as one of
    `horizon`, so that the coefficient stays positive.
    """
    error = min(max(kl / target - 1, -0.2), 0.2)
    return coef * (1 + error * min(steps / horizon, 1))
