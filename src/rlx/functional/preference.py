"""Losses of preference pairs, per pair: P pairs of a chosen and a rejected sequence."""

from torch import Tensor
from torch.nn.functional import logsigmoid


def sequence_logp(logp: Tensor, mask: Tensor, mean: bool = False) -> Tensor:
    """Return the log-probability of each sequence, [...], the sum over its counted tokens: from two [..., L].

    With `mean` it is divided by their number. What stands at positions that do not count is not looked at.
    """
    total = logp.masked_fill(~mask, 0).sum(-1)
    return total / mask.sum(-1).clamp(min=1) if mean else total


def pairwise_loss(chosen: Tensor, rejected: Tensor, margin: float | Tensor = 0.0) -> Tensor:
    """Return -log sigmoid(chosen - rejected - margin) of scores [P] (Ouyang et al. 2022, arXiv:2203.02155, eq. 1).

    `margin`, a number or [P], is by how much the better one shall win (Touvron et al. 2023, arXiv:2307.09288, eq. 2).
    """
    return -logsigmoid(chosen - rejected - margin)


def log_ratio_margin(chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor) -> Tensor:
    """Return log(policy / reference) of the chosen sequence less that of the rejected one, [P].

    Arguments are log-probabilities of whole completions, sums over their tokens, [P]; no gradient is meant to flow
    through the reference's. Times beta it is the margin between DPO's implicit rewards.
    """
    return (chosen - ref_chosen) - (rejected - ref_rejected)


def dpo(
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    beta: float,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Return -log sigmoid(beta * margin), [P], of sequences' log-probabilities [P] (see `log_ratio_margin`).

    Rafailov et al. 2023, arXiv:2305.18290, eq. 7. `label_smoothing` is the share of pairs that are believed to be the
    wrong way round: conservative DPO (Mitchell 2023, "A note on DPO with noisy preferences").
    """
    logit = beta * log_ratio_margin(chosen, rejected, ref_chosen, ref_rejected)
    return -(1 - label_smoothing) * logsigmoid(logit) - label_smoothing * logsigmoid(-logit)


def ipo(chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, beta: float) -> Tensor:
    """Return (margin - 1 / (2 beta))^2, [P] (Azar et al. 2023, arXiv:2310.12036, eq. 17, whose tau is beta).

    The paper writes the log-probabilities of whole completions. Codebases, TRL among them, take means over tokens, so
    that one beta suits completions of any length: `sequence_logp(..., mean=True)`.
    """
    return (log_ratio_margin(chosen, rejected, ref_chosen, ref_rejected) - 1 / (2 * beta)).square()
