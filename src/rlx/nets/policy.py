"""Policy: encoders, an action distribution and a value head in one module. No optimizer, no environment."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from gymnasium import spaces
from torch import Tensor, nn

from rlx.nets.distributions import Categorical, DiagonalGaussian
from rlx.nets.encoders import build_encoder, orthogonal_linear
from rlx.trajectory import Batch


class Policy(nn.Module):
    """pi(action | obs) and V(obs). With `value_encoder` None both heads read the same features."""

    def __init__(
        self,
        encoder: nn.Module,
        action_head: nn.Linear,
        value_encoder: nn.Module | None,
        value_head: nn.Linear,
        distribution: Categorical | DiagonalGaussian,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.action_head = action_head
        self.value_encoder = value_encoder
        self.value_head = value_head
        self.distribution = distribution

    def forward(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        """Return the distribution's head [N, head_size] and V(obs) [N]."""
        features = self.encoder(obs)
        value_features = features if self.value_encoder is None else self.value_encoder(obs)
        return self.action_head(features), self.value_head(value_features).squeeze(-1)

    def evaluate(self, minibatch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Return logp of the minibatch's actions, entropy and value, with gradients.

        All three are [N], or [S, L] where the rows of the minibatch are sequences.
        """
        action = minibatch.action
        leading = action.shape[: action.dim() - self.distribution.action_axes]
        head, value = self(minibatch.obs.flatten(0, len(leading) - 1))
        logp, entropy = self.distribution.logp_and_entropy(head.view(*leading, head.shape[-1]), action)
        return logp, entropy, value.view(leading)


def build_policy(
    observation_space: spaces.Box,
    action_space: spaces.Space[Any],
    *,
    hidden: Sequence[int] = (64, 64),
    activation: str = "tanh",
    encoder: str = "auto",
    share_encoder: bool = False,
    log_std_init: float = 0.0,
    seed: int = 0,
) -> Policy:
    """Return a policy for an encoded observation space and a Discrete or Box action space.

    Initialisation as in PPO's reference implementations: orthogonal with gain sqrt(2), 0.01 for the action
    head (so that the first actions are near uniform), 1 for the value head, zero biases.
    """
    generator = torch.Generator().manual_seed(seed)
    distribution: Categorical | DiagonalGaussian
    if isinstance(action_space, spaces.Discrete):
        distribution = Categorical(int(action_space.n))
    else:
        assert isinstance(action_space, spaces.Box) and action_space.shape
        distribution = DiagonalGaussian(int(torch.Size(action_space.shape).numel()), log_std_init)
    shape = observation_space.shape
    with torch.random.fork_rng(devices=[]):  # layers draw their default init from the global generator: leave it alone
        features, size = build_encoder(shape, encoder, hidden, activation, generator)
        action_head = orthogonal_linear(size, distribution.head_size, 0.01, generator)
        value_encoder = None if share_encoder else build_encoder(shape, encoder, hidden, activation, generator)[0]
        value_head = orthogonal_linear(size, 1, 1.0, generator)
    return Policy(features, action_head, value_encoder, value_head, distribution)
