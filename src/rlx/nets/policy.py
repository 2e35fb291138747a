"""Policy: encoders, an action distribution and a value head in one module. No optimizer, no environment."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from rlx.nets.actions import ActionLayout
from rlx.nets.distributions import Distribution, distribution_for, mask_head
from rlx.nets.encoders import build_encoder, orthogonal_linear
from rlx.nets.observation import ObservationLayout, Space
from rlx.trajectory import Batch


class Policy(nn.Module):
    """pi(action | obs) and V(obs). With `value_encoder` None both heads read the same features.

    layout: how observations lie in rows; None stands for rows without a mask.
    """

    def __init__(
        self,
        encoder: nn.Module,
        action_head: nn.Linear,
        value_encoder: nn.Module | None,
        value_head: nn.Linear,
        distribution: Distribution,
        layout: ObservationLayout | None = None,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.action_head = action_head
        self.value_encoder = value_encoder
        self.value_head = value_head
        self.distribution = distribution
        self.masked = layout if layout is not None and layout.mask_size else None
        """The layout, if there are choices that may be illegal."""

    def forward(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        """Return the distribution's head [N, head_size], masked where a choice is illegal, and V(obs) [N]."""
        inputs, legal = (obs, None) if self.masked is None else (self.masked.inputs(obs), self.masked.mask(obs))
        features = self.encoder(inputs)
        value_features = features if self.value_encoder is None else self.value_encoder(inputs)
        head, value = self.action_head(features), self.value_head(value_features).squeeze(-1)
        return head if legal is None else mask_head(head, legal), value

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
    observation_space: Space,
    action_space: Space,
    *,
    hidden: Sequence[int] = (64, 64),
    activation: str = "tanh",
    encoder: str = "auto",
    share_encoder: bool = False,
    log_std_init: float = 0.0,
    seed: int = 0,
) -> Policy:
    """Return a policy for an environment's spaces; it reads the rows of `ObservationLayout`.

    Initialisation as in PPO's reference implementations: orthogonal with gain sqrt(2), 0.01 for the action
    head (so that the first actions are near uniform), 1 for the value head, zero biases.
    """
    generator = torch.Generator().manual_seed(seed)
    layout = ObservationLayout(observation_space)
    distribution = distribution_for(ActionLayout(action_space), log_std_init)
    with torch.random.fork_rng(devices=[]):  # layers draw their default init from the global generator: leave it alone
        features, size = build_encoder(layout, encoder, hidden, activation, generator)
        action_head = orthogonal_linear(size, distribution.head_size, 0.01, generator)
        value_encoder = None if share_encoder else build_encoder(layout, encoder, hidden, activation, generator)[0]
        value_head = orthogonal_linear(size, 1, 1.0, generator)
    return Policy(features, action_head, value_encoder, value_head, distribution, layout)
