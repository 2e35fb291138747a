"""Advantages of samples that are compared with one another: S sequences, in groups that answer the same prompt."""

from typing import Literal

import torch
from torch import Tensor

Baseline = Literal["mean", "leave_one_out", "batch_mean", "none"]
Scale = Literal["group_std", "batch_std", "none"]


def group_advantage(
    score_S: Tensor,
    group: int | Tensor,
    *,
    baseline: Baseline = "mean",
    scale: Scale = "group_std",
    mask_S: Tensor | None = None,
    epsilon: float = 1e-4,
) -> Tensor:
    """Return how much better each sample scored than its group, [S], in the dtype of `score_S` [S].

    group       the size of groups that stand row after row, or [S] integers: rows of equal number are one group
    baseline    what is subtracted: "mean" of the group, of its other samples ("leave_one_out"), of the whole batch
                ("batch_mean"), or nothing
    scale       what it is then divided by: the standard deviation of the group or of the batch, or nothing
    epsilon     is added to that deviation
    mask_S      [S] bool: samples where it is False count nowhere, whatever their score, and get 0

    GRPO: mean, group_std (Shao et al. 2024, arXiv:2402.03300, section 4.1.2). Dr. GRPO: mean, none (Liu et al. 2025,
    arXiv:2503.20783, section 3). RLOO: leave_one_out, none (Ahmadian et al. 2024, arXiv:2402.14740).
    REINFORCE++: batch_mean, batch_std (Hu et al. 2025, arXiv:2501.03262).

    Deviations are of a sample (division by n - 1). Where all scores are equal there is no deviation to divide by, and
    the result is exactly 0 with every baseline but "none". So it is for a sample that is alone in its group.
    """
    score_S, counted_S = _counted(score_S, mask_S)
    rows_G_N, place_S = _groups(score_S, group)
    score_G_N, counted_G_N = score_S[rows_G_N.clamp(min=0)], counted_S[rows_G_N.clamp(min=0)] & (rows_G_N >= 0)
    whole_batch = (score_S[None], counted_S[None])

    if baseline == "none":
        advantage_S = score_S
    elif baseline == "batch_mean":
        advantage_S = _centred(*whole_batch)[0]
    else:
        centred_G_N = _centred(score_G_N, counted_G_N)
        if baseline == "leave_one_out":  # x - mean of the others = (x - mean of all) * n / (n - 1)
            count_G_1 = counted_G_N.sum(1, keepdim=True)
            centred_G_N = centred_G_N * count_G_1 / (count_G_1 - 1).clamp(min=1)
        advantage_S = centred_G_N.flatten()[place_S]

    if scale == "group_std":
        deviation_S = _deviation(score_G_N, counted_G_N).expand(score_G_N.shape).flatten()[place_S]
        advantage_S = _divided(advantage_S, deviation_S, epsilon)
    elif scale == "batch_std":
        advantage_S = _divided(advantage_S, _deviation(*whole_batch)[0], epsilon)
    return advantage_S.masked_fill(~counted_S, 0)


def has_spread(score_S: Tensor, group: int | Tensor, mask_S: Tensor | None = None) -> Tensor:
    """Return [S] bool: whether the counted scores of the sample's group differ; where not, there is nothing to learn.

    DAPO keeps only such groups (Yu et al. 2025, arXiv:2503.14476, eq. 11). A sample that does not count gets False.
    """
    score_S, counted_S = _counted(score_S, mask_S)
    rows_G_N, place_S = _groups(score_S, group)
    counted_G_N = counted_S[rows_G_N.clamp(min=0)] & (rows_G_N >= 0)
    from_lowest_G_N = _from_lowest(score_S[rows_G_N.clamp(min=0)], counted_G_N)
    return (from_lowest_G_N > 0).any(1, keepdim=True).expand(rows_G_N.shape).flatten()[place_S] & counted_S


def _counted(score_S: Tensor, mask_S: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the scores, 0 where they do not count, and where they do."""
    counted_S = torch.ones_like(score_S, dtype=torch.bool) if mask_S is None else mask_S
    return score_S.masked_fill(~counted_S, 0), counted_S


def _groups(score_S: Tensor, group: int | Tensor) -> tuple[Tensor, Tensor]:
    """Return the rows of each group, [G, N] with -1 after the last of a smaller one, and each row's place in that."""
    samples = len(score_S)
    if isinstance(group, int):
        if group < 1 or samples % group:
            raise ValueError(
                f"{samples} samples cannot be split into groups of {group}; let the number of samples be a multiple of "
                "the size, or give each sample the number of its group."
            )
        rows_S = torch.arange(samples, device=score_S.device)
        return rows_S.view(-1, group), rows_S
    _, number_S, count_G = group.unique(return_inverse=True, return_counts=True)
    order_S = number_S.argsort(stable=True)
    first_G = count_G.cumsum(0) - count_G
    largest = int(count_G.max()) if samples else 1
    rank_S = torch.arange(samples, device=score_S.device) - first_G[number_S[order_S]]
    place_S = torch.empty_like(order_S)
    place_S[order_S] = number_S[order_S] * largest + rank_S
    rows = torch.full((len(count_G) * largest,), -1, device=score_S.device)
    rows[place_S] = torch.arange(samples, device=score_S.device)
    return rows.view(-1, largest), place_S


def _from_lowest(score_G_N: Tensor, counted_G_N: Tensor) -> Tensor:
    """Return scores above their group's lowest: exactly 0 where all are equal, which score - mean need not be."""
    lowest_G_1 = score_G_N.masked_fill(~counted_G_N, torch.inf).amin(1, keepdim=True)
    return (score_G_N - lowest_G_1).masked_fill(~counted_G_N, 0)


def _centred(score_G_N: Tensor, counted_G_N: Tensor) -> Tensor:
    above_G_N = _from_lowest(score_G_N, counted_G_N)
    mean_G_1 = above_G_N.sum(1, keepdim=True) / counted_G_N.sum(1, keepdim=True).clamp(min=1)
    return (above_G_N - mean_G_1).masked_fill(~counted_G_N, 0)


def _deviation(score_G_N: Tensor, counted_G_N: Tensor) -> Tensor:
    """Return each group's standard deviation, [G, 1], without bias in its square."""
    freedom_G_1 = (counted_G_N.sum(1, keepdim=True) - 1).clamp(min=1)
    return (_centred(score_G_N, counted_G_N).square().sum(1, keepdim=True) / freedom_G_1).sqrt()


def _divided(advantage_S: Tensor, deviation_S: Tensor, epsilon: float) -> Tensor:
    return torch.where(deviation_S > 0, advantage_S / (deviation_S + epsilon), advantage_S)
