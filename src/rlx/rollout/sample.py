"""Sample: what one call of `EnvRunner.sample`, or of a whole group's, returns."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from statistics import fmean
from typing import Any

from rlx.rollout.normalizers import RunningMoments, State
from rlx.trajectory import Trajectory


@dataclass
class Sample:
    """What one call of `sample` returns."""

    trajectory: Trajectory
    episodes: list[tuple[float, int]]
    """Sum of unscaled rewards and number of transitions of each episode that ended, in order of their end."""
    obs_moments: RunningMoments | None
    """Moments of the fragment's raw observations; None unless they are normalised."""
    return_moments: RunningMoments | None
    """Moments of the fragment's discounted returns; None unless rewards are normalised."""
    env_s: float
    """Seconds inside the environments."""
    inference_s: float
    """Seconds inside the policy."""
    busy_s: float
    """Seconds inside `sample`."""
    stepped_one_by_one: bool
    """Whether the environments' seconds add up: they are scalar ones in a loop."""
    env_failures: int
    """Failures of environments (an exception, a hang) since the sample before."""
    runner_restarts: int = 0
    """Of several runners: how often one was started again since the sample before."""
    wait_s: float = 0.0
    """Of several runners: seconds that the slowest was busy longer than the mean."""
    transfer_s: float = 0.0
    """Of runners in other processes: seconds of the call during which the slowest was not busy."""
    episode_metrics: dict[str, list[float]] = field(default_factory=dict)
    """What callbacks measured of the episodes that ended, by name."""
    dropped_steps: int = 0
    """Of runners that nobody waits for: transitions dropped from a full queue since the sample before."""

    @property
    def env_steps(self) -> int:
        """Number of transitions."""
        return int(self.trajectory.mask.sum())

    def get_state(self) -> State:
        """Return the sample as plain values and arrays."""
        state = {field.name: getattr(self, field.name) for field in fields(self)}
        moments = {name: None if state[name] is None else state[name].get_state() for name in MOMENTS}
        return {**state, **moments, "trajectory": self.trajectory.arrays()}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Sample:
        """Return the sample that `get_state` described."""
        moments = {name: None if state[name] is None else RunningMoments.from_state(state[name]) for name in MOMENTS}
        episodes = [(float(return_), int(length)) for return_, length in state["episodes"]]
        return cls(**{**state, **moments, "trajectory": Trajectory(**state["trajectory"]), "episodes": episodes})

    @classmethod
    def join(cls, samples: Sequence[Sample], trajectory: Trajectory, wall_s: float) -> Sample:
        """Return what several runners have collected as one, without their moments, after a wait of `wall_s` seconds.

        Where they were at work before it, their seconds are scaled down to those of the wait.
        """
        busy_s = [sample.busy_s for sample in samples]
        env_s, inference_s = fmean(sample.env_s for sample in samples), fmean(sample.inference_s for sample in samples)
        wait_s, transfer_s = max(busy_s) - fmean(busy_s), max(0.0, wall_s - max(busy_s))
        share = min(1.0, wall_s / max(1e-9, env_s + inference_s + wait_s + transfer_s))
        return cls(
            trajectory=trajectory,
            episodes=[episode for sample in samples for episode in sample.episodes],
            obs_moments=None,
            return_moments=None,
            env_s=share * env_s,
            inference_s=share * inference_s,
            busy_s=fmean(busy_s),
            stepped_one_by_one=samples[0].stepped_one_by_one,
            env_failures=sum(sample.env_failures for sample in samples),
            wait_s=share * wait_s,
            transfer_s=share * transfer_s,
            episode_metrics=_joined(sample.episode_metrics for sample in samples),
        )


MOMENTS = ("obs_moments", "return_moments")


def _joined(metrics: Iterable[dict[str, list[float]]]) -> dict[str, list[float]]:
    joined: dict[str, list[float]] = {}
    for part in metrics:
        for name, values in part.items():
            joined.setdefault(name, []).extend(values)
    return joined
