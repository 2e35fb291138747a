"""Action distributions as plain formulas on tensors.

torch.distributions validates, broadcasts and builds objects on every call: on small nets that is a fifth of a
training step. Both families draw their samples from noise that the caller made, so that a seeded generator
outside of torch fixes every action.
"""

import math

import torch
from torch import Tensor, nn

HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)


class Categorical(nn.Module):
    """One of `size` actions; `head` [N, size] are unnormalised log-probabilities, an action is int64 [N]."""

    action_axes = 0
    """Number of axes of one action."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    @property
    def head_size(self) -> int:
        """Number of outputs that the policy network needs."""
        return self.size

    @property
    def noise_size(self) -> int:
        """Number of noise values that one action needs."""
        return self.size

    def sample(self, head: Tensor, noise: Tensor) -> Tensor:
        """Return actions [N]; `noise` [N, size] is standard Gumbel (Gumbel-max trick)."""
        return (head + noise).argmax(-1)

    def mode(self, head: Tensor) -> Tensor:
        """Return the most probable actions [N]."""
        return head.argmax(-1)

    def logp(self, head: Tensor, action: Tensor) -> Tensor:
        """Return log-probabilities [N] of `action`."""
        return head.log_softmax(-1).gather(-1, action.unsqueeze(-1)).squeeze(-1)

    def logp_and_entropy(self, head: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        """Return log-probabilities and entropies, both [N]."""
        logp_all = head.log_softmax(-1)
        return logp_all.gather(-1, action.unsqueeze(-1)).squeeze(-1), -(logp_all.exp() * logp_all).sum(-1)


class DiagonalGaussian(nn.Module):
    """Independent normals around `head` [N, size]; the log standard deviation is one parameter a dimension.

    State-independent deviations are what PPO's reference implementations use for continuous control.
    Actions [N, size] are unbounded: whoever steps the env clips them towards it, and the unclipped one is stored.
    """

    action_axes = 1
    """Number of axes of one action."""

    def __init__(self, size: int, log_std_init: float) -> None:
        super().__init__()
        self.size = size
        self.log_std = nn.Parameter(torch.full((size,), float(log_std_init)))

    @property
    def head_size(self) -> int:
        """Number of outputs that the policy network needs."""
        return self.size

    @property
    def noise_size(self) -> int:
        """Number of noise values that one action needs."""
        return self.size

    def sample(self, head: Tensor, noise: Tensor) -> Tensor:
        """Return actions [N, size]; `noise` [N, size] is standard normal."""
        return head + self.log_std.exp() * noise

    def mode(self, head: Tensor) -> Tensor:
        """Return the mean actions [N, size]."""
        return head

    def logp(self, head: Tensor, action: Tensor) -> Tensor:
        """Return log-densities [N] of `action`."""
        scaled = (action - head) * (-self.log_std).exp()
        return -0.5 * scaled.square().sum(-1) - self.log_std.sum() - self.size * HALF_LOG_2PI

    def logp_and_entropy(self, head: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        """Return log-densities [N] and the entropies [N], which are the same for every state."""
        entropy = self.log_std.sum() + self.size * (0.5 + HALF_LOG_2PI)
        return self.logp(head, action), entropy.expand(action.shape[:-1])
