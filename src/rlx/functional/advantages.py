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
    advantage_T_B = discounted_sum(delta_T_B, decay_T_B)
    return advantage_T_B, advantage_T_B + value_T_B


def token_gae(
    reward_S_L: Tensor, value_S_L: Tensor, mask_S_L: Tensor, gamma: float, lambda_: float
) -> tuple[Tensor, Tensor]:
    """Return advantages and value targets of tokens, both [S, L], as `gae` does, one sequence a row.

    A step goes from one counted token to the next counted one: what stands before, between and after them (a prompt,
    the answer of a tool, padding) is passed over, whatever is in it, and gets 0. Nothing follows a row's last counted
    token, where its score stands; a value that shall follow it is added to that reward, times gamma. With values of 0
    and lambda 1 the advantages are the discounted rewards to come, REINFORCE's.
    """
    reward_S_L, value_S_L = reward_S_L.masked_fill(~mask_S_L, 0), value_S_L.masked_fill(~mask_S_L, 0)
    next_value_S, next_advantage_S = torch.zeros_like(value_S_L[:, 0]), torch.zeros_like(value_S_L[:, 0])
    backwards = []
    columns = zip(reward_S_L.unbind(1), value_S_L.unbind(1), mask_S_L.unbind(1), strict=True)
    for reward_S, value_S, counted_S in reversed(list(columns)):
        delta_S = reward_S + gamma * next_value_S - value_S
        advantage_S = delta_S + gamma * lambda_ * next_advantage_S
        next_value_S = torch.where(counted_S, value_S, next_value_S)
        next_advantage_S = torch.where(counted_S, advantage_S, next_advantage_S)
        backwards.append(advantage_S)
    advantage_S_L = torch.stack(backwards[::-1], 1).masked_fill(~mask_S_L, 0)
    return advantage_S_L, advantage_S_L + value_S_L


def vtrace(
    logp_T_B: Tensor,
    new_logp_T_B: Tensor,
    reward_T_B: Tensor,
    value_T_B: Tensor,
    next_value_T_B: Tensor,
    terminated_T_B: Tensor,
    truncated_T_B: Tensor,
    gamma: float | Tensor,
    lambda_: float = 1.0,
    rho_clip: float = 1.0,
    c_clip: float = 1.0,
    pg_rho_clip: float | None = 1.0,
) -> tuple[Tensor, Tensor]:
    """Return V-trace targets and policy-gradient advantages, both [T, B] (Espeholt et al. 2018, arXiv:1802.01561).

    rho_t   = min(rho_clip, pi / mu),   c_t = lambda * min(c_clip, pi / mu),   pi / mu = exp(new_logp - logp)
    delta_t = rho_t * (r_t + gamma * V(s_{t+1}) * (1 - terminated_t) - V(s_t))
    vs_t    = V(s_t) + delta_t + gamma * c_t * (1 - done_t) * (vs_{t+1} - V(s_{t+1}))
    A_t     = min(pg_rho_clip, pi / mu) * (r_t + gamma * vs_{t+1} * (1 - terminated_t) - V(s_t))

    logp is of the joint action under the policy that acted, new_logp under the one that learns; value and next_value
    are of the one that learns, next_value[t] before any reset. Where an episode ends, and at the last step, vs_{t+1}
    is next_value[t]. With pg_rho_clip None the advantages are not weighted, for losses that have the ratio in them.
    No gradient flows through what is returned.
    """
    with torch.no_grad():
        ratio_T_B = (new_logp_T_B - logp_T_B).exp()
        discount_T_B = gamma * (~terminated_T_B).to(value_T_B.dtype)
        goes_on_T_B = ~(terminated_T_B | truncated_T_B)
        delta_T_B = ratio_T_B.clamp(max=rho_clip) * (reward_T_B + discount_T_B * next_value_T_B - value_T_B)
        decay_T_B = discount_T_B * goes_on_T_B * (lambda_ * ratio_T_B.clamp(max=c_clip))
        above_T_B = discounted_sum(delta_T_B, decay_T_B)  # vs - V
        vs_T_B = value_T_B + above_T_B
        next_vs_T_B = torch.cat([torch.where(goes_on_T_B[:-1], vs_T_B[1:], next_value_T_B[:-1]), next_value_T_B[-1:]])
        advantage_T_B = reward_T_B + discount_T_B * next_vs_T_B - value_T_B
        return vs_T_B, advantage_T_B if pg_rho_clip is None else ratio_T_B.clamp(max=pg_rho_clip) * advantage_T_B


def next_values(value_T_B: Tensor, stored_T_B: Tensor, done_T_B: Tensor) -> Tensor:
    """Return V of the observation after each step, [T, B]: `value_T_B` one step on, where that is the same episode.

    At its end, and at the last step, only the policy that acted has seen what followed: `stored_T_B`, its own value.
    """
    return torch.cat([torch.where(done_T_B[:-1], stored_T_B[:-1], value_T_B[1:]), stored_T_B[-1:]])


def discounted_sum(step_T_B: Tensor, decay_T_B: Tensor) -> Tensor:
    """Return x [T, B] with x_t = step_t + decay_t * x_{t+1}, and zero after the last step."""
    sum_B = torch.zeros_like(step_T_B[0])
    backwards = []
    for step_B, decay_B in zip(reversed(step_T_B.unbind(0)), reversed(decay_T_B.unbind(0)), strict=True):
        sum_B = torch.addcmul(step_B, decay_B, sum_B)
        backwards.append(sum_B)
    return torch.stack(backwards[::-1])
