"""How a policy acts during a rollout: one fragment at a time, in numpy, from noise drawn up front.

`acting_for(policy)` picks the way: `NumpyActing` for small multilayer perceptrons on the CPU, where building
tensors costs more than the arithmetic (5 to 7 times), else `TorchActing`, which runs any policy.
Both draw the same noise from the same generator and agree to rounding. A policy with a memory acts in a third way,
`RecurrentActing`, which carries a state for every environment from call to call.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch

from rlx.nets.distributions import Distribution
from rlx.nets.numpy_mlp import NumpyPolicy
from rlx.nets.policy import Policy, RecurrentPolicy

Steps = Sequence[tuple[int, int]]
"""(t, index of the environment) of some steps of a fragment."""


class Acting(Protocol):
    """A policy at work on a fragment of num_steps x num_envs; arrays are numpy, time-major."""

    def start(self, num_steps: int, num_envs: int, rng: np.random.Generator) -> None:
        """Draw the noise of a whole fragment."""

    def act(self, t: int, obs_B: np.ndarray) -> np.ndarray:
        """Return sampled actions as rows of the ActionLayout, [B, ...] int64 or float32."""
        ...

    def finish(self, obs_T_B: np.ndarray, action_T_B: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return log-probabilities and values of the fragment, both float32 [T, B]."""
        ...

    def value(self, obs_N: np.ndarray, after_N: Steps = ()) -> np.ndarray:
        """Return V(obs), float32 [N], of the observations that followed these steps of the fragment."""
        ...

    def best(self, obs_B: np.ndarray) -> np.ndarray:
        """Return the most probable actions."""
        ...

    state_B: np.ndarray | None = None
    """What the policy remembers of each environment, float32 [B, state_size]; None if it remembers nothing."""

    def forget(self, first_B: np.ndarray) -> None:
        """Empty the memory of the environments whose next observation begins an episode, where `first_B` is True."""

    def states(self) -> np.ndarray | None:
        """Return the fragment's `Trajectory.state`; None if the policy remembers nothing."""


def acting_for(policy: Policy) -> Acting:
    """Return the fastest way for `policy` to act."""
    if isinstance(policy, RecurrentPolicy):
        return RecurrentActing(policy)
    numpy_policy = NumpyPolicy.of(policy)
    return TorchActing(policy) if numpy_policy is None else NumpyActing(numpy_policy)


def draw_noise(distribution: Distribution, num_steps: int, num_envs: int, rng: np.random.Generator) -> np.ndarray:
    """Return the fragment's noise float32 [T, B, noise_size]: first the Gumbel values, then the normal ones."""
    gumbel_size = distribution.gumbel_size
    normal_size = distribution.noise_size - gumbel_size
    parts = []
    if gumbel_size:
        # -log of an exponential variate is Gumbel; the floor keeps a zero draw finite.
        exponential = rng.standard_exponential((num_steps, num_envs, gumbel_size), dtype=np.float32)
        parts.append(-np.log(np.maximum(exponential, np.float32(1e-30))))
    if normal_size:
        parts.append(rng.standard_normal((num_steps, num_envs, normal_size), dtype=np.float32))
    return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=-1)


class TorchActing(Acting):
    """Runs any policy under inference mode; values and heads come from the same forward pass as the action."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.device = next(policy.parameters()).device

    def start(self, num_steps: int, num_envs: int, rng: np.random.Generator) -> None:
        """Draw the noise of a whole fragment."""
        noise = draw_noise(self.policy.distribution, num_steps, num_envs, rng)
        self.noise_T_B = torch.from_numpy(noise).to(self.device)
        self.heads: list[torch.Tensor] = []
        self.values: list[torch.Tensor] = []

    @torch.inference_mode()
    def act(self, t: int, obs_B: np.ndarray) -> np.ndarray:
        """Return sampled actions."""
        head, value = self._look(obs_B)
        self.heads.append(head)
        self.values.append(value)
        return self.policy.distribution.sample(head, self.noise_T_B[t]).cpu().numpy()

    @torch.inference_mode()
    def finish(self, obs_T_B: np.ndarray, action_T_B: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return log-probabilities and values, both [T, B]."""
        action_N = self._tensor(action_T_B.reshape(-1, *action_T_B.shape[2:]))
        logp_N = self.policy.distribution.logp(torch.cat(self.heads), action_N)
        value_N = torch.cat(self.values)
        shape = obs_T_B.shape[:2]
        return logp_N.cpu().numpy().reshape(shape), value_N.cpu().numpy().reshape(shape)

    @torch.inference_mode()
    def value(self, obs_N: np.ndarray, after_N: Steps = ()) -> np.ndarray:
        """Return V(obs) [N]."""
        return self.policy(self._tensor(obs_N))[1].cpu().numpy()

    @torch.inference_mode()
    def best(self, obs_B: np.ndarray) -> np.ndarray:
        """Return the most probable actions."""
        return self.policy.distribution.mode(self._look(obs_B)[0]).cpu().numpy()

    def _look(self, obs_B: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Return head and value."""
        return self.policy(self._tensor(obs_B))

    def _tensor(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.device)


class RecurrentActing(TorchActing):
    """Runs a policy with a memory, which goes on from call to call until it is set, or `forget` empties it."""

    policy: RecurrentPolicy

    def start(self, num_steps: int, num_envs: int, rng: np.random.Generator) -> None:
        """Draw the noise of a whole fragment."""
        super().start(num_steps, num_envs, rng)
        self.before_B = self.state_B = self._state_of(num_envs)
        self.after: list[np.ndarray] = []  # what every step left behind, also the last one of an episode

    def act(self, t: int, obs_B: np.ndarray) -> np.ndarray:
        """Return sampled actions."""
        action_B = super().act(t, obs_B)
        self.after.append(self._state_of(len(obs_B)))
        return action_B

    @torch.inference_mode()
    def value(self, obs_N: np.ndarray, after_N: Steps = ()) -> np.ndarray:
        """Return V(obs) [N] with the memory as it was after these steps."""
        state_N = np.stack([self.after[t][index] for t, index in after_N])
        return self.policy.step(self._tensor(obs_N), self._tensor(state_N))[1].cpu().numpy()

    def forget(self, first_B: np.ndarray) -> None:
        """Empty the memory where `first_B` is True."""
        self.state_B = np.where(first_B[:, None], np.float32(0), self._state_of(len(first_B)))

    def states(self) -> np.ndarray:
        """Return the memory before each sequence, [C, B, state_size]; it goes for nothing where an episode begins.

        C sequences of the same length L, the fewest of at most policy.sequence_length steps: L = ceil(T / C).
        """
        num_steps = len(self.after)
        length = -(-num_steps // -(-num_steps // self.policy.sequence_length))
        return np.stack([self.before_B] + [self.after[t - 1] for t in range(length, num_steps, length)])

    def _look(self, obs_B: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        head, value, after = self.policy.step(self._tensor(obs_B), self._tensor(self._state_of(len(obs_B))))
        self.state_B = after.cpu().numpy()
        return head, value

    def _state_of(self, num_envs: int) -> np.ndarray:
        """Return the state, an empty one before the first call."""
        if self.state_B is None:
            return np.zeros((num_envs, self.policy.state_size), np.float32)
        return self.state_B


class NumpyActing(Acting):
    """Acts in numpy on views of the policy's parameters; values are computed once, for the whole fragment."""

    def __init__(self, policy: NumpyPolicy) -> None:
        self.policy = policy

    def start(self, num_steps: int, num_envs: int, rng: np.random.Generator) -> None:
        """Draw the noise of a whole fragment."""
        self.noise_T_B = draw_noise(self.policy.distribution, num_steps, num_envs, rng)
        self.head_T_B = np.empty((num_steps, num_envs, self.policy.distribution.head_size), np.float32)
        if not self.policy.is_discrete:
            self.noise_T_B *= self.policy.std()

    def act(self, t: int, obs_B: np.ndarray) -> np.ndarray:
        """Return sampled actions."""
        self.head_T_B[t] = head = self.policy.head(obs_B)
        return self.policy.choose(head + self.noise_T_B[t])

    def finish(self, obs_T_B: np.ndarray, action_T_B: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return log-probabilities and values, both [T, B]."""
        logp_T_B = self.policy.logp(self.head_T_B[: len(obs_T_B)], action_T_B)
        value_N = self.policy.value(obs_T_B.reshape(-1, obs_T_B.shape[-1]))
        return logp_T_B, value_N.reshape(obs_T_B.shape[:2])

    def value(self, obs_N: np.ndarray, after_N: Steps = ()) -> np.ndarray:
        """Return V(obs) [N]."""
        return self.policy.value(obs_N)

    def best(self, obs_B: np.ndarray) -> np.ndarray:
        """Return the most probable actions."""
        return self.policy.choose(self.policy.head(obs_B))
