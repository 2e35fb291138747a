"""The containers that experience travels in: a time-major `Trajectory` and a flat `Batch`.

A Trajectory is what a runner collected, as numpy arrays; a Batch is what a learner consumes, as tensors.
Axes: T time, B environments (or sequences), N = T * B flat samples.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor


@dataclass
class Trajectory:
    """T steps of B environments, as collected. Arrays are never written to after the runner returned them."""

    obs: np.ndarray
    """[T, B, *obs_shape] float32 (already normalised, as the policy saw it) or uint8 for images."""
    action: np.ndarray
    """[T, B] int64 for Discrete, [T, B, A] float32 for Box: as sampled, before any clipping towards the env."""
    logp: np.ndarray
    """[T, B] float32: log-probability of `action` under the policy that acted."""
    value: np.ndarray
    """[T, B] float32: V(obs[t])."""
    next_value: np.ndarray
    """[T, B] float32: V of the observation that followed action[t], before any reset; 0 where terminated."""
    reward: np.ndarray
    """[T, B] float32: the reward that followed action[t]; scaled if reward normalisation is on."""
    terminated: np.ndarray
    """[T, B] bool: the episode ended in a terminal state after action[t]."""
    truncated: np.ndarray
    """[T, B] bool: the episode was cut (a time limit, say) after action[t]; next_value bootstraps it."""
    mask: np.ndarray
    """[T, B] bool: False where the row is no transition (the reset step of a NEXT_STEP vector environment)."""
    weights_version: np.ndarray
    """[T, B] int64: version of the weights that chose action[t]."""

    def tensors(self) -> Batch:
        """Return every field as a tensor [T, B, ...]: writable, of this trajectory's memory where that is writable."""
        return Batch(**{field.name: _tensor(getattr(self, field.name)) for field in fields(self)})

    @staticmethod
    def concatenate(parts: list[Trajectory]) -> Trajectory:
        """Join trajectories of equal length along the B axis, in the order given."""
        if len(parts) == 1:
            return parts[0]
        names = [field.name for field in fields(Trajectory)]
        return Trajectory(**{name: np.concatenate([getattr(p, name) for p in parts], axis=1) for name in names})


def _tensor(array: np.ndarray) -> Tensor:
    # A tensor cannot be read-only: one of another process' memory would let an assignment crash this process.
    return torch.from_numpy(array if array.flags.writeable else array.copy())


class Batch:
    """Named tensors that share their leading axes; `batch.obs` reads a field.

    A plain holder: it slices and shuffles all fields alike and knows no algorithm. Learners take it flat: [N].
    """

    def __init__(self, **tensors: Tensor) -> None:
        self.tensors = tensors

    def __getattr__(self, name: str) -> Tensor:
        try:
            return self.__dict__["tensors"][name]
        except KeyError:
            raise AttributeError(
                f"this batch has no field {name!r}; it has {sorted(self.__dict__.get('tensors', ()))}"
            ) from None

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))

    def map(self, function) -> Batch:
        """Return a batch with `function` applied to every tensor."""
        return Batch(**{name: function(tensor) for name, tensor in self.tensors.items()})

    def flatten(self, *names: str, **more: Tensor) -> Batch:
        """Return the fields `names` and the tensors `more` with their leading [T, B] folded into [N]."""
        chosen = {name: self.tensors[name] for name in names} | more
        return Batch(**{name: tensor.flatten(0, 1) for name, tensor in chosen.items()})

    def take(self, index: Tensor) -> Batch:
        """Return the rows at `index` [M] (a copy)."""
        return self.map(lambda tensor: tensor.index_select(0, index))

    def split(self, size: int) -> Iterator[Batch]:
        """Yield consecutive slices (views) of `size` rows; the last may be shorter."""
        for start in range(0, len(self), size):
            yield self.map(lambda tensor, a=start: tensor[a : a + size])
