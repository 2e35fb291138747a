"""Running statistics of observations and returns, and what they scale.

Statistics are frozen while a fragment is collected. Each runner returns the moments of its fragment; the
RunnerGroup merges them, in runner order, into the one global `Normalizer` and sends its state with the
next weights. So a restarted runner counts nothing twice, and one runner equals many.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

State = dict[str, Any]

# As in SB3's and gymnasium's normalisers: keeps a constant feature finite.
EPSILON = 1e-8


class RunningMoments:
    """Count, mean and sum of squared deviations (`m2`) of samples of one shape, in float64."""

    def __init__(self, shape: tuple[int, ...] = ()) -> None:
        self.count = 0
        self.mean = np.zeros(shape)
        self.m2 = np.zeros(shape)

    @property
    def variance(self) -> np.ndarray:
        """The population variance; 1 while there are no samples."""
        return self.m2 / self.count if self.count else np.ones_like(self.mean)

    def update(self, sample_N: np.ndarray) -> None:
        """Add samples [N, *shape]."""
        if len(sample_N) == 0:
            return
        batch = RunningMoments()
        batch.count = len(sample_N)
        batch.mean = sample_N.mean(0, dtype=np.float64)
        batch.m2 = np.square(sample_N - batch.mean).sum(0)
        self.merge(batch)

    def merge(self, other: RunningMoments) -> None:
        """Add what `other` has seen (Chan, Golub and LeVeque 1979)."""
        if other.count == 0:
            return
        total = self.count + other.count
        delta = other.mean - self.mean
        self.mean = self.mean + delta * (other.count / total)
        self.m2 = self.m2 + other.m2 + np.square(delta) * (self.count * other.count / total)
        self.count = total

    def get_state(self) -> State:
        """Return the state as plain values and arrays; of scalars, as floats."""
        mean, m2 = (x.item() if np.ndim(x) == 0 else x.copy() for x in (self.mean, self.m2))
        return {"count": self.count, "mean": mean, "m2": m2}

    @classmethod
    def from_state(cls, state: State) -> RunningMoments:
        """Return the moments that `get_state` described."""
        moments = cls()
        moments.count = int(state["count"])
        moments.mean, moments.m2 = np.array(state["mean"]), np.array(state["m2"])
        return moments


class ObsNormalizer:
    """Maps observations to zero mean and unit variance, then clips; with empty moments it only clips.

    moments None stands for observations that are not normalised: they pass as they are. select: returns, as a view,
    the numbers in observations that the moments are of; None: all of them.
    """

    def __init__(
        self, moments: RunningMoments | None, clip: float, select: Callable[[np.ndarray], np.ndarray] | None = None
    ) -> None:
        self.clip = clip
        self.select = select or (lambda obs_N: obs_N)
        self.is_identity = moments is None
        moments = moments or RunningMoments()
        self.mean = moments.mean
        self.scale = 1.0 / np.sqrt(moments.variance + EPSILON) if moments.count else np.ones(())

    def __call__(self, obs_N: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        """Return observations [N, *shape] of the same dtype, in `out` if given, which may be obs_N itself."""
        if self.is_identity:
            return obs_N
        selected_N = self.select(obs_N)
        normalized = selected_N - self.mean  # in float64: a large mean would eat float32's digits
        normalized *= self.scale
        np.minimum(np.maximum(normalized, -self.clip, out=normalized), self.clip, out=normalized)
        if out is None:
            out = np.empty_like(obs_N)
        if selected_N.nbytes < obs_N.nbytes:
            np.copyto(out, obs_N)  # the rest passes as it is
        self.select(out)[...] = normalized
        return out


class DiscountedReturn:
    """The discounted return so far of each environment's running episode: what the reward scale is measured on."""

    def __init__(self, num_envs: int, gamma: float) -> None:
        self.gamma = gamma
        self.return_B = np.zeros(num_envs)

    def moments(self, reward_T_B: np.ndarray, done_T_B: np.ndarray, mask_T_B: np.ndarray) -> RunningMoments:
        """Return the moments of a fragment's discounted returns; masked rows do not count."""
        return_T_B = np.empty(reward_T_B.shape)
        for t in range(len(reward_T_B)):
            # A masked row belongs to no episode; one that failed before it leaves nothing behind.
            self.return_B = np.where(mask_T_B[t], self.return_B * self.gamma + reward_T_B[t], 0.0)
            return_T_B[t] = self.return_B
            self.return_B[done_T_B[t]] = 0.0
        moments = RunningMoments()
        moments.update(return_T_B[mask_T_B])
        return moments


class RewardScaler:
    """Divides rewards by the standard deviation of the discounted return, then clips; the mean stays.

    Subtracting a mean would change which policy is best; dividing does not (as VecNormalize and baselines do).
    """

    def __init__(self, moments: RunningMoments, clip: float) -> None:
        self.scale = float(1.0 / np.sqrt(moments.variance + EPSILON))
        self.clip = clip

    def __call__(self, reward: np.ndarray) -> np.ndarray:
        """Return scaled float32 rewards of the same shape."""
        return np.clip(reward * self.scale, -self.clip, self.clip).astype(np.float32)


class Normalizer:
    """The global statistics of a run: of observations and of discounted returns, each None until first seen."""

    def __init__(self) -> None:
        self.obs: RunningMoments | None = None
        self.returns: RunningMoments | None = None

    def merge(self, obs: RunningMoments | None, returns: RunningMoments | None) -> None:
        """Add one runner's fragment."""
        self.obs = _merged(self.obs, obs)
        self.returns = _merged(self.returns, returns)

    def get_state(self) -> State:
        """Return the state as plain values and arrays."""
        return {"obs": self.obs and self.obs.get_state(), "returns": self.returns and self.returns.get_state()}

    @classmethod
    def from_state(cls, state: State | None) -> Normalizer:
        """Return the normaliser that `get_state` described; an empty one for None."""
        normalizer = cls()
        for name, moments in (state or {}).items():
            setattr(normalizer, name, moments and RunningMoments.from_state(moments))
        return normalizer


def _merged(total: RunningMoments | None, part: RunningMoments | None) -> RunningMoments | None:
    if part is None:
        return total
    total = total or RunningMoments()
    total.merge(part)
    return total
