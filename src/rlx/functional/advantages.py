"""Credit assignment over time-major [T, B] arrays."""

import torch
from torch import Tensor


def gae(
    reward_T_B: Tensor,
    value_T_B: Tensor,
    next_value_T_B: Tensor,
    terminated_T_B: Tensor,
    truncated_T_B: Tensor,
    gamma: float,
    lambda_: float,
) -> tuple[Tensor, Tensor]:
    """Return generalized advantages and value targets, both [T, B] (Schulman et al. 2016, arXiv:1506.02438, eq. 16).

    delta_t = r_t + gamma * V(s_{t+1}) * (1 - terminated_t) - V(s_t)
    A_t     = delta_t + gamma * lambda * (1 - done_t) * A_{t+1},    done = terminated or truncated

    next_value_T_B[t] is V of the observation that followed step t, before any reset: a truncated step
    bootstraps from it, a terminated one does not, and neither lets the recursion cross into the next episode.
    """
    delta_T_B = reward_T_B + gamma * next_value_T_B * ~terminated_T_B - value_T_B
    decay_T_B = gamma * lambda_ * (~(terminated_T_B | truncated_T_B)).to(delta_T_B.dtype)
    advantage_B = torch.zeros_like(delta_T_B[0])
    backwards = []
    for delta_B, decay_B in zip(reversed(delta_T_B.unbind(0)), reversed(decay_T_B.unbind(0)), strict=True):
        advantage_B = torch.addcmul(delta_B, decay_B, advantage_B)
        backwards.append(advantage_B)
    advantage_T_B = torch.stack(backwards[::-1])
    return advantage_T_B, advantage_T_B + value_T_B
