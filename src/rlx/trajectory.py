"""The containers that experience travels in: a time-major `Trajectory` and a `Batch` of rows.

A Trajectory is what a runner collected, as numpy arrays; a Batch is what a learner consumes, as tensors.
Axes: T time, B environments, N = T * B flat samples, S sequences of L steps.
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
    """[T, B, *row_shape] float32 (already normalised, as the policy saw it) or uint8 where there are uint8 images: the
    rows of `rlx.nets.observation`."""
    action: np.ndarray
    """[T, B] int64 for Discrete, [T, B, A] float32 for Box, else the rows of `rlx.nets.actions`: as sampled, before any
    clipping towards the env."""
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
    first: np.ndarray
    """[T, B] bool: an episode begins with obs[t], so a memory is empty before it."""
    weights_version: np.ndarray
    """[T, B] int64: version of the weights that chose action[t]."""
    state: np.ndarray | None = None
    """[C, B, H] float32: what a policy with a memory remembered before the steps 0, L, 2 L, ..., L = ceil(T / C).

    It goes for nothing where `first` says that an episode begins."""

    def arrays(self) -> dict[str, np.ndarray]:
        """Return the fields by name, without those that are None."""
        every = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: array for name, array in every.items() if array is not None}

    def copy(self) -> Trajectory:
        """Return the same in memory of its own."""
        return Trajectory(**{name: array.copy() for name, array in self.arrays().items()})

    def tensors(self) -> Batch:
        """Return every field as a tensor [T, B, ...]: writable, of this trajectory's memory where that is writable."""
        return Batch(**{name: _tensor(array) for name, array in self.arrays().items()})

    @staticmethod
    def concatenate(parts: list[Trajectory]) -> Trajectory:
        """Join trajectories of equal length along the B axis, in the order given."""
        if len(parts) == 1:
            return parts[0]
        of_parts = [part.arrays() for part in parts]
        return Trajectory(**{name: np.concatenate([arrays[name] for arrays in of_parts], 1) for name in of_parts[0]})


def _tensor(array: np.ndarray) -> Tensor:
    # A tensor cannot be read-only: one of another process' memory would let an assignment crash this process.
    return torch.from_numpy(array if array.flags.writeable else array.copy())


class Batch:
    """Named tensors that share their leading axes; `batch.obs` reads a field.

    A plain holder: it slices and shuffles all fields alike and knows no algorithm. Learners take one whose rows are
    samples [N], as `flatten` makes it, or sequences [S, L], as `sequences` does.
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

    def sequences(self, length: int, *names: str, **more: Tensor) -> Batch:
        """Return the fields `names` and the tensors `more`, [T, B, ...], cut into rows [S, L, ...] of `length` steps.

        Row c * B + b holds the steps c * L and following of environment b, S = ceil(T / L) * B. Where T is no multiple
        of L the last rows end in zeros: name `mask`, which is False there. Of `state` [C, B, H] a row gets the one
        before its first step, [S, H].
        """
        chosen = {name: self.tensors[name] for name in names} | more
        state = chosen.pop("state", None)
        cut = {name: _cut(tensor, length) for name, tensor in chosen.items()}
        if state is not None:
            count = len(next(iter(cut.values()))) // state.shape[1]
            if count not in (1, len(state)):
                raise ValueError(f"a state is known before {len(state)} steps, and sequences of {length} need {count}.")
            cut["state"] = state[:count].flatten(0, 1)
        return Batch(**cut)

    def rows(self, *names: str, **more: Tensor) -> Batch:
        """Return what a policy evaluates: samples, or with a `state` the sequences that begin with it, and `first`."""
        if "state" not in self.tensors:
            return self.flatten(*names, **more)
        length = -(-len(self) // len(self.state))
        return self.sequences(length, *names, "first", "state", **more)

    def evaluable(self, *names: str, **more: Tensor) -> Batch:
        """Return of a batch of fragments [B, T, ...] what a policy evaluates: samples, or fragments for a memory."""
        if "state" not in self.tensors:
            return self.flatten(*names, **more)
        return Batch(**{name: self.tensors[name] for name in (*names, "first", "state")}, **more)

    def fragments(self, *names: str, **more: Tensor) -> Batch:
        """Return whole fragments as rows [B, T, ...], with `first` and the `state` that a memory begins them with."""
        memory = ("first", "state") if "state" in self.tensors else ()
        return self.sequences(len(self), *names, *memory, **more)

    def take(self, index: Tensor) -> Batch:
        """Return the rows at `index` [M] (a copy)."""
        return self.map(lambda tensor: tensor.index_select(0, index))

    def split(self, size: int) -> Iterator[Batch]:
        """Yield consecutive slices (views) of `size` rows; the last may be shorter."""
        for start in range(0, len(self), size):
            yield self.map(lambda tensor, a=start: tensor[a : a + size])


def _cut(tensor: Tensor, length: int) -> Tensor:
    """Return [T, B, ...] as rows [S, L, ...], with zeros after the last step."""
    steps, envs, *rest = tensor.shape
    count = -(-steps // length)
    if count * length > steps:
        tensor = torch.cat([tensor, tensor.new_zeros(count * length - steps, envs, *rest)])
    return tensor.reshape(count, length, envs, *rest).transpose(1, 2).reshape(count * envs, length, *rest)
