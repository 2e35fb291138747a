"""Action distributions as plain formulas on tensors.

torch.distributions validates, broadcasts and builds objects on every call: on small nets that is a fifth of a
training step. All families draw their samples from noise that the caller made, so that a seeded generator
outside of torch fixes every action: `gumbel_size` standard Gumbel values, then `noise_size - gumbel_size` normal ones.
Of an action of several parts, log-probability and entropy are the sums over its parts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from rlx.nets.actions import ActionLayout

HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)
ILLEGAL = -1e9
"""The logit of a choice that must not be taken: probability 0 in float32, and yet no gradient becomes NaN."""


def distribution_for(actions: ActionLayout, log_std_init: float = 0.0) -> Distribution:
    """Return the distribution of an action's row; standard deviations start at exp(log_std_init)."""
    if actions.is_discrete:
        return Categorical(actions.sizes[0])
    if not actions.num_floats:
        return MultiCategorical(actions.sizes)
    gaussian = DiagonalGaussian(actions.num_floats, log_std_init)
    return Composite(MultiCategorical(actions.sizes), gaussian) if actions.sizes else gaussian


def mask_head(head: Tensor, legal: Tensor) -> Tensor:
    """Return `head` [..., n] with no probability left for the choices of which `legal` [..., m] is 0; m <= n."""
    if legal.shape[-1] < head.shape[-1]:  # means of floats stand behind the logits
        legal = functional.pad(legal, (0, head.shape[-1] - legal.shape[-1]), value=1.0)
    return head.masked_fill(legal == 0, ILLEGAL)


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

    @property
    def gumbel_size(self) -> int:
        """Number of them that are Gumbel."""
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


class MultiCategorical(nn.Module):
    """One of sizes[k] choices for each part k; `head` [N, sum of sizes] are logits, an action is int64 [N, K].

    All parts are computed at once: logits are laid out as [N, K, largest size], with ILLEGAL where a part is shorter.
    """

    action_axes = 1
    """Number of axes of one action."""

    def __init__(self, sizes: Sequence[int]) -> None:
        super().__init__()
        self.sizes = tuple(sizes)
        self.longest = max(self.sizes)
        self.is_even = len(set(self.sizes)) == 1
        column = np.arange(self.longest)
        firsts = np.cumsum(self.sizes) - self.sizes
        index = np.where(column < np.array(self.sizes)[:, None], firsts[:, None] + column, self.head_size)
        self.index: Tensor
        self.register_buffer("index", torch.from_numpy(index.ravel()), persistent=False)

    @property
    def head_size(self) -> int:
        """Number of outputs that the policy network needs."""
        return sum(self.sizes)

    @property
    def noise_size(self) -> int:
        """Number of noise values that one action needs."""
        return self.head_size

    @property
    def gumbel_size(self) -> int:
        """Number of them that are Gumbel."""
        return self.head_size

    def sample(self, head: Tensor, noise: Tensor) -> Tensor:
        """Return actions [N, K]; `noise` [N, sum of sizes] is standard Gumbel (Gumbel-max trick)."""
        return self.parts(head + noise).argmax(-1)

    def mode(self, head: Tensor) -> Tensor:
        """Return the most probable actions [N, K]."""
        return self.parts(head).argmax(-1)

    def logp(self, head: Tensor, action: Tensor) -> Tensor:
        """Return log-probabilities [N] of `action`."""
        return self.parts(head).log_softmax(-1).gather(-1, action.unsqueeze(-1)).squeeze(-1).sum(-1)

    def logp_and_entropy(self, head: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        """Return log-probabilities and entropies, both [N]."""
        logp_all = self.parts(head).log_softmax(-1)
        logp = logp_all.gather(-1, action.unsqueeze(-1)).squeeze(-1).sum(-1)
        return logp, -(logp_all.exp() * logp_all).sum((-2, -1))

    def parts(self, head: Tensor) -> Tensor:
        """Return the logits as [N, K, largest size]."""
        if not self.is_even:
            head = functional.pad(head, (0, 1), value=ILLEGAL).index_select(-1, self.index)
        return head.unflatten(-1, (len(self.sizes), self.longest))


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

    @property
    def gumbel_size(self) -> int:
        """Number of them that are Gumbel."""
        return 0

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


class Composite(nn.Module):
    """Integers and floats together: a MultiCategorical of the first ones and a DiagonalGaussian of the others.

    `head` [N, logits + floats]; an action is float32 [N, K + floats], its K integers stored as floats.
    """

    action_axes = 1
    """Number of axes of one action."""

    def __init__(self, integers: MultiCategorical, floats: DiagonalGaussian) -> None:
        super().__init__()
        self.integers, self.floats = integers, floats

    @property
    def head_size(self) -> int:
        """Number of outputs that the policy network needs."""
        return self.integers.head_size + self.floats.head_size

    @property
    def noise_size(self) -> int:
        """Number of noise values that one action needs."""
        return self.head_size

    @property
    def gumbel_size(self) -> int:
        """Number of them that are Gumbel."""
        return self.integers.head_size

    def sample(self, head: Tensor, noise: Tensor) -> Tensor:
        """Return actions; `noise` [N, noise_size] is standard Gumbel, then standard normal."""
        (logits, mean), (gumbel, normal) = self._split(head), self._split(noise)
        return torch.cat([self.integers.sample(logits, gumbel), self.floats.sample(mean, normal)], -1)

    def mode(self, head: Tensor) -> Tensor:
        """Return the most probable integers beside the mean floats."""
        logits, mean = self._split(head)
        return torch.cat([self.integers.mode(logits), self.floats.mode(mean)], -1)

    def logp(self, head: Tensor, action: Tensor) -> Tensor:
        """Return the sums [N] of log-probabilities and log-densities of `action`."""
        return self.logp_and_entropy(head, action)[0]

    def logp_and_entropy(self, head: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        """Return log-probabilities and entropies, both [N]."""
        logits, mean = self._split(head)
        count = len(self.integers.sizes)
        logp, entropy = self.integers.logp_and_entropy(logits, action[..., :count].long())
        log_density, float_entropy = self.floats.logp_and_entropy(mean, action[..., count:])
        return logp + log_density, entropy + float_entropy

    def _split(self, values: Tensor) -> tuple[Tensor, Tensor]:
        return values[..., : self.gumbel_size], values[..., self.gumbel_size :]


Distribution = Categorical | MultiCategorical | DiagonalGaussian | Composite
