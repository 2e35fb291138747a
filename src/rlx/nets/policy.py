"""Policy: encoders, an action distribution and a value head in one module. No optimizer, no environment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rlx.errors import ConfigError
from rlx.nets.actions import ActionLayout
from rlx.nets.custom import Custom, build_custom
from rlx.nets.distributions import Distribution, distribution_for, mask_head
from rlx.nets.encoders import build_encoder, orthogonal_linear
from rlx.nets.observation import ObservationLayout, Space
from rlx.nets.recurrent import Memory
from rlx.nets.threads import one_torch_thread
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
        return self._heads(*self._encode(obs), obs)

    def evaluate(self, minibatch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Return logp of the minibatch's actions, entropy and value, with gradients.

        All three are [N], or [S, L] where the rows of the minibatch are sequences.
        """
        action = minibatch.action
        leading = action.shape[: action.dim() - self.distribution.action_axes]
        head, value = self(minibatch.obs.flatten(0, len(leading) - 1))
        logp, entropy = self.distribution.logp_and_entropy(head.view(*leading, head.shape[-1]), action)
        return logp, entropy, value.view(leading)

    def _encode(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        """Return what the action head and the value head read."""
        inputs = obs if self.masked is None else self.masked.inputs(obs)
        features = self.encoder(inputs)
        return features, features if self.value_encoder is None else self.value_encoder(inputs)

    def _heads(self, features: Tensor, value_features: Tensor, obs: Tensor) -> tuple[Tensor, Tensor]:
        """Return the head, without what the mask in `obs` forbids, and the value; all with the same leading axes."""
        head, value = self.action_head(features), self.value_head(value_features).squeeze(-1)
        legal = None if self.masked is None else self.masked.mask(obs)
        return head if legal is None else mask_head(head, legal), value


class CustomPolicy(Policy):
    """A user's network that makes heads and values itself."""

    def __init__(self, network: nn.Module, distribution: Distribution, layout: ObservationLayout) -> None:
        nn.Module.__init__(self)
        self.network = network
        self.distribution = distribution
        self.masked = layout if layout.mask_size else None

    def forward(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        """Return the distribution's head [N, head_size], masked where a choice is illegal, and V(obs) [N]."""
        head, value = self.network(obs)
        legal = None if self.masked is None else self.masked.mask(obs)
        return head if legal is None else mask_head(head, legal), value


class RecurrentPolicy(Policy):
    """A policy with a memory between the encoder and the heads; the value function has its own where its encoder is.

    The state is one vector an environment, float32 [B, state_size], zero where an episode begins.
    """

    def __init__(self, *parts: Any, memory: Memory, value_memory: Memory | None, sequence_length: int) -> None:
        super().__init__(*parts)
        self.memory = memory
        self.value_memory = value_memory
        self.sequence_length = sequence_length
        self._sizes = [part.state_size for part in (memory, value_memory) if part is not None]

    @property
    def state_size(self) -> int:
        """Numbers in the state of one environment."""
        return sum(self._sizes)

    def forward(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        """Return the head and V(obs) as if an episode began with each of obs [N]."""
        return self.step(obs, torch.zeros(len(obs), self.state_size, device=obs.device))[:2]

    def step(self, obs: Tensor, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the head [B, head_size], V(obs) [B] and the state [B, state_size] that obs leaves behind."""
        features, value_features = self._encode(obs)
        states = state.split(self._sizes, -1)
        y, after = self.memory.step(features, states[0])
        if self.value_memory is None:
            return *self._heads(y, y, obs), after
        value_y, value_after = self.value_memory.step(value_features, states[1])
        return *self._heads(y, value_y, obs), torch.cat([after, value_after], -1)

    def evaluate(self, minibatch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Return logp, entropy and value, all [S, L], of sequences with `first` [S, L] and `state` [S, state_size]."""
        features, value_features = (
            part.unflatten(0, minibatch.first.shape) for part in self._encode(minibatch.obs.flatten(0, 1))
        )
        states = minibatch.state.split(self._sizes, -1)
        y = value_y = self.memory(features, states[0], minibatch.first)
        if self.value_memory is not None:
            value_y = self.value_memory(value_features, states[1], minibatch.first)
        head, value = self._heads(y, value_y, minibatch.obs)
        logp, entropy = self.distribution.logp_and_entropy(head, minibatch.action)
        return logp, entropy, value


def build_policy(
    observation_space: Space,
    action_space: Space,
    *,
    hidden: Sequence[int] = (64, 64),
    activation: str = "tanh",
    encoder: str = "auto",
    share_encoder: bool | str = "auto",
    precision: str = "float32",
    custom: Custom | None = None,
    custom_kwargs: Mapping[str, Any] | None = None,
    log_std_init: float = 0.0,
    memory: str = "none",
    memory_size: int = 128,
    sequence_length: int = 32,
    seed: int = 0,
) -> Policy:
    """Return a policy for an environment's spaces; it reads the rows of `ObservationLayout`.

    share_encoder: "auto" shares it where there are images, as convolutions are most of the work. custom: a user's
    network, see `rlx.nets.custom`. With `memory` "lstm" or "gru" it is a RecurrentPolicy, to be trained on sequences of
    at most `sequence_length`.

    Initialisation as in PPO's reference implementations: orthogonal with gain sqrt(2), 0.01 for the action
    head (so that the first actions are near uniform), 1 for the value head, zero biases. Equal seeds make equal
    weights, bit for bit, however many threads this process uses.
    """
    generator = torch.Generator().manual_seed(seed)
    layout = ObservationLayout(observation_space)
    distribution = distribution_for(ActionLayout(action_space), log_std_init)
    is_shared = bool(layout.images) if share_encoder == "auto" else bool(share_encoder)

    def make_encoder() -> tuple[nn.Module, int | None]:
        if custom is None:
            return build_encoder(layout, encoder, hidden, activation, generator, precision)
        return build_custom(custom, custom_kwargs or {}, layout, action_space, distribution.head_size)

    # Layers draw their default initialisation from the global generator: leave that alone.
    with torch.random.fork_rng(devices=[]), one_torch_thread():
        torch.manual_seed(seed)  # of what a user brings
        features, size = make_encoder()
        if size is None:
            if memory != "none":
                raise ConfigError(
                    f"model.memory={memory} needs an encoder, and model.custom makes a whole policy; give it the "
                    "attribute features_size and let it return features, or set model.memory=none."
                )
            return CustomPolicy(features, distribution, layout)
        width = size if memory == "none" else memory_size
        action_head = orthogonal_linear(width, distribution.head_size, 0.01, generator)
        value_encoder = None if is_shared else make_encoder()[0]
        value_head = orthogonal_linear(width, 1, 1.0, generator)
        parts = (features, action_head, value_encoder, value_head, distribution, layout)
        if memory == "none":
            return Policy(*parts)
        memories = [Memory(memory, size, memory_size, generator) for _ in range(1 if is_shared else 2)]
    value_memory = None if is_shared else memories[1]
    return RecurrentPolicy(*parts, memory=memories[0], value_memory=value_memory, sequence_length=sequence_length)
