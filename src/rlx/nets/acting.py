"""How a policy acts during a rollout: one fragment at a time, in numpy, from noise drawn up front.

`acting_for(policy)` picks the way: `NumpyActing` for small multilayer perceptrons on the CPU, where building
tensors costs more than the arithmetic (5 to 7 times), else `TorchActing`, which runs any policy.
Both draw the same noise from the same generator and agree to rounding.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch

from rlx.nets.distributions import Distribution
from rlx.nets.numpy_mlp import NumpyPolicy
from rlx.nets.policy import Policy


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

    def value(self, obs_N: np.ndarray) -> np.ndarray:
        """Return V(obs), float32 [N]."""
        ...

    def best(self, obs_B: np.ndarray) -> np.ndarray:
        """Return the most probable actions."""
        ...


def acting_for(policy: Policy) -> Acting:
    """Return the fastest way for `policy` to act."""
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


class TorchActing:
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
        head, value = self.policy(self._tensor(obs_B))
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
    def value(self, obs_N: np.ndarray) -> np.ndarray:
        """Return V(obs) [N]."""
        return self.policy(self._tensor(obs_N))[1].cpu().numpy()

    @torch.inference_mode()
    def best(self, obs_B: np.ndarray) -> np.ndarray:
        """Return the most probable actions."""
        return self.policy.distribution.mode(self.policy(self._tensor(obs_B))[0]).cpu().numpy()

    def _tensor(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.device)


class NumpyActing:
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
        return logp_T_B, self.value(obs_T_B.reshape(-1, obs_T_B.shape[-1])).reshape(obs_T_B.shape[:2])

    def value(self, obs_N: np.ndarray) -> np.ndarray:
        """Return V(obs) [N]."""
        return self.policy.value(obs_N)

    def best(self, obs_B: np.ndarray) -> np.ndarray:
        """Return the most probable actions."""
        return self.policy.choose(self.policy.head(obs_B))
