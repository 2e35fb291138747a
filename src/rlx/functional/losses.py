"""Losses per sample, of any shape; the caller reduces them with `weighted_sum` (see masking and aggregation)."""

import torch
from torch import Tensor


def clipped_surrogate(
    ratio: Tensor,
    advantage: Tensor,
    clip_range: float | Tensor,
    clip_range_high: float | Tensor | None = None,
    dual_clip: float | None = None,
) -> Tensor:
    """Return PPO's pessimistic objective, negated, per sample (Schulman et al. 2017, arXiv:1707.06347, eq. 7).

    clip_range        the ratio's range is [1 - clip_range, 1 + clip_range]
    clip_range_high   its upper half, where that differs: "clip-higher" (Yu et al. 2025, arXiv:2503.14476, eq. 10)
    dual_clip         above 1: where the advantage is negative, the loss is at most dual_clip * |A|, so that a ratio
                      that has run away does not outweigh all else (Ye et al. 2020, arXiv:1912.09729)

    min(ratio A, clip(ratio) A) = min(ratio A, A + clip_range |A|): whatever the sign of A, only the bound on the
    side where a larger ratio pays can ever be the smaller one. The bound needs no gradient, which halves the graph.
    """
    if clip_range_high is None:
        room = clip_range * advantage.abs()
    else:
        room = torch.max(clip_range_high * advantage, -clip_range * advantage)
    loss = -torch.min(ratio * advantage, advantage + room)
    if dual_clip is None:
        return loss
    return torch.where(advantage < 0, torch.min(loss, -dual_clip * advantage), loss)


def cispo(new_logp: Tensor, ratio: Tensor, advantage: Tensor, max_ratio: float) -> Tensor:
    """Return -min(ratio, max_ratio) A log(new) per sample, the ratio without gradient.

    Every sample keeps a gradient, where `clipped_surrogate` has none beyond its range; only its weight is bounded
    (MiniMax 2025, arXiv:2506.13585, eq. 4 and 5, without a lower bound, as there). `max_ratio` is the bound itself, the
    paper's 1 + epsilon_high.
    """
    return -ratio.detach().clamp(max=max_ratio) * advantage * new_logp


def sequence_ratio(new_logp: Tensor, logp: Tensor, mask: Tensor) -> Tensor:
    """Return (new / old)^(1 / length) of each row's counted tokens, at all its positions: [S, L] from three [S, L].

    GSPO's importance ratio (Zheng et al. 2025, arXiv:2507.18071, eq. 7): the geometric mean of the tokens' ratios, so
    that a sequence is clipped as a whole. Its derivative by each counted new_logp is ratio / length (section 4.2). It
    is 1 in a row without a counted token, and what stands at positions that do not count is not looked at.
    """
    log_ratio = (new_logp - logp).masked_fill(~mask, 0)
    length = mask.sum(-1, keepdim=True).clamp(min=1)
    return (log_ratio.sum(-1, keepdim=True) / length).exp().expand(mask.shape)


def squared_error(value: Tensor, return_: Tensor) -> Tensor:
    """Return (value - return_)^2 per sample, without the factor 1/2 that some codebases fold in."""
    return (value - return_).square()


def clipped_squared_error(value: Tensor, return_: Tensor, old_value: Tensor, clip: float) -> Tensor:
    """Return the larger of the plain error and that of a value kept within `clip` of `old_value`, per sample.

    Rarely helps (Andrychowicz et al. 2021, arXiv:2006.05990, section 3.3), so it is off by default in PPO.
    """
    near = old_value + (value - old_value).clamp(-clip, clip)
    return torch.max(squared_error(value, return_), squared_error(near, return_))
