"""RunnerGroup: one or many EnvRunners behind one `sample`, and the global normaliser they feed."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from statistics import mean
from time import perf_counter
from typing import Any, TypeVar

import numpy as np
from gymnasium import spaces

from rlx.actors import ActorHandle, Err, Group, GroupFuture, Runtime
from rlx.errors import ActorError, CallTimeout, CheckpointError
from rlx.rollout.env_runner import BuildPolicy, EnvRunner, Sample
from rlx.rollout.normalizers import Normalizer, RewardScaler, State
from rlx.rollout.spaces import Space, encoded_observation_space
from rlx.rollout.vector import EnvSource
from rlx.trajectory import Trajectory

log = logging.getLogger(__name__)

T = TypeVar("T")

CLOSE_TIMEOUT_S = 5.0
BUSY_CLOSE_TIMEOUT_S = 0.5
ADVICE_AFTER_SAMPLES = 5


class RunnerGroup:
    """Collects with `num_runners` EnvRunners in processes of their own, or with one in this process if it is 0.

    Runner r owns the environments r * num_envs and on, counted over the whole group, so what it collects depends on
    the seed and its number only. `runtime` returns the actor runtime; it is asked only if num_runners > 0, and
    stays the caller's to close. sample_timeout_s bounds every wait for a runner, start_timeout_s its start.
    """

    def __init__(
        self,
        env: EnvSource,
        build_policy: BuildPolicy,
        *,
        num_runners: int = 0,
        num_envs: int,
        runtime: Callable[[], Runtime] | None = None,
        start_timeout_s: float = 60.0,
        sample_timeout_s: float = 120.0,
        reward_clip: float = 10.0,
        **runner_options: Any,
    ) -> None:
        self.num_runners = num_runners
        self._reward_clip = reward_clip
        self._normalizer = Normalizer()
        self._wall_s = self._alone_s = 0.0
        self._samples = 0
        self._local: EnvRunner | None = None
        self._actors: _RunnerActors | None = None
        if num_runners == 0:
            self._local = EnvRunner(env, num_envs, build_policy, **runner_options)
            self._spaces = self._local.spaces()
        else:
            assert runtime is not None, "runners in processes of their own need a runtime"
            self._actors = _RunnerActors(runtime(), sample_timeout_s)
            try:
                for index in range(num_runners):
                    first = {"first_env_index": index * num_envs}
                    self._actors.spawn(f"env_runner/{index}", (env, num_envs, build_policy), runner_options | first)
                self._spaces = self._actors.start(start_timeout_s)
            except BaseException:
                self.close()
                raise

    def spaces(self) -> tuple[Space, Space]:
        """Return the observation and action space of one environment."""
        return self._spaces

    def policy_spaces(self) -> tuple[spaces.Box, Space]:
        """Return the observation space that the policy sees, and the action space."""
        return encoded_observation_space(self._spaces[0]), self._spaces[1]

    def publish(self, version: int, weights: np.ndarray) -> None:
        """Have every runner act with `weights` (flat float32) and the merged statistics from its next sample on."""
        state = self._normalizer.get_state()
        if self._local is not None:
            self._local.set_weights(version, weights, state)
        else:
            self._remote.publish(version, weights, state)

    def sample(self, num_steps: int) -> Sample:
        """Return `num_steps` steps of every environment, joined along B in the order of the runners."""
        started = perf_counter()
        samples = [self._local.sample(num_steps)] if self._local is not None else self._remote.sample(num_steps)
        wall_s = perf_counter() - started
        busy_s = [sample.busy_s for sample in samples]
        self._wall_s += wall_s
        self._alone_s += _seconds_of_one_process(samples)
        self._samples += 1
        for sample in samples:
            self._normalizer.merge(sample.obs_moments, sample.return_moments)
        trajectory = Trajectory.concatenate([sample.trajectory for sample in samples])
        if self._normalizer.returns is not None:
            trajectory.reward = RewardScaler(self._normalizer.returns, self._reward_clip)(trajectory.reward)
        return Sample(
            trajectory=trajectory,
            episodes=[episode for sample in samples for episode in sample.episodes],
            obs_moments=None,
            return_moments=None,
            env_s=mean(sample.env_s for sample in samples),
            inference_s=mean(sample.inference_s for sample in samples),
            busy_s=mean(busy_s),
            stepped_one_by_one=samples[0].stepped_one_by_one,
            env_failures=sum(sample.env_failures for sample in samples),
            wait_s=max(busy_s) - mean(busy_s),
            transfer_s=0.0 if self._local is not None else max(0.0, wall_s - max(busy_s)),
        )

    def advice(self) -> str | None:
        """Return a sentence if runners in processes of their own do not pay here, else None."""
        if self.num_runners == 0 or self._samples < ADVICE_AFTER_SAMPLES or self._wall_s < self._alone_s:
            return None
        return (
            f"collecting with {self.num_runners} env runners takes {1e3 * self._wall_s / self._samples:.1f} ms a "
            f"fragment, and one process would take about {1e3 * self._alone_s / self._samples:.1f} ms: "
            "set env_runners.num_env_runners=0, or collect longer fragments."
        )

    def normalizer_state(self) -> State:
        """Return the merged statistics, as `evaluate` and a trained policy need them."""
        return self._normalizer.get_state()

    def get_state(self) -> State:
        """Return the state of every runner and of the normaliser, as plain values and arrays."""
        runners = [self._local.get_state()] if self._local is not None else self._remote.get_state()
        return {"runners": runners, "normalizer": self._normalizer.get_state()}

    def set_state(self, state: State) -> None:
        """Continue where `get_state` was called; the weights and statistics reach the runners with `publish`."""
        saved = state["runners"]
        if len(saved) != max(1, self.num_runners):
            raise CheckpointError(
                f"the state holds {len(saved)} env runners and this group has {max(1, self.num_runners)}; "
                "resume with the num_env_runners of the saved run."
            )
        if self._local is not None:
            self._local.set_state(saved[0])
        else:
            self._remote.set_state(saved)
        self._normalizer = Normalizer.from_state(state["normalizer"])

    def close(self) -> None:
        """Release the environments and end the runners' processes; closing twice is fine."""
        if self._local is not None:
            self._local.close()
        if self._actors is not None:
            self._actors.close()

    @property
    def _remote(self) -> _RunnerActors:
        assert self._actors is not None
        return self._actors


def _seconds_of_one_process(samples: Sequence[Sample]) -> float:
    """Return an estimate of the time that one process would need for the work of all runners.

    Environments stepped one by one take the sum of their times. A native vector environment and a network take
    hardly longer for a larger batch.
    """
    add_up = sum if samples[0].stepped_one_by_one else max
    return add_up(s.env_s for s in samples) + max(s.busy_s - s.env_s for s in samples)


class _RunnerActors:
    """The runners in processes of their own."""

    def __init__(self, runtime: Runtime, timeout_s: float) -> None:
        self._runtime = runtime
        self._timeout_s = timeout_s
        self._handles: list[ActorHandle] = []
        self._published: GroupFuture[None] | None = None
        self._is_busy = False

    def spawn(self, name: str, arguments: tuple[Any, ...], options: Mapping[str, Any]) -> None:
        """Start one more runner; `start` waits for it."""
        self._handles.append(self._runtime.spawn(EnvRunner, *arguments, name=name, **options))

    def start(self, timeout_s: float) -> tuple[Space, Space]:
        """Return the environment's spaces, once every runner is up."""
        return self._group.spaces.call().values(timeout_s)[0]

    def publish(self, version: int, weights: np.ndarray, normalizer_state: State) -> None:
        """Send weights without waiting: a runner handles its calls in order, and `sample` looks at the outcome."""
        self._check_published()
        self._published = self._group.set_weights.call(version, weights, normalizer_state)

    def sample(self, num_steps: int) -> list[Sample]:
        """Return each runner's fragment."""
        self._is_busy = True
        future = self._group.sample.call(num_steps)
        self._check_published()
        try:
            samples = future.values(self._timeout_s)
        except CallTimeout as error:
            raise CallTimeout(
                f"{error} An environment hangs, or {num_steps} steps take longer than this: "
                "raise fault_tolerance.sample_timeout_s, or lower env_runners.rollout_fragment_length."
            ) from error
        self._is_busy = False
        return samples

    def get_state(self) -> list[State]:
        """Return each runner's state."""
        return self._group.get_state.call().values(self._timeout_s)

    def set_state(self, states: Sequence[State]) -> None:
        """Give each runner its state."""
        self._group.set_state.map(states).values(self._timeout_s)

    def close(self) -> None:
        """Close the environments as far as the runners still answer, then end the processes."""
        handles, self._handles = self._handles, []
        if not handles:
            return
        # An interrupted runner still collects, and who pressed Ctrl-C does not want to wait for it.
        timeout_s = BUSY_CLOSE_TIMEOUT_S if self._is_busy else CLOSE_TIMEOUT_S
        outcomes = self._runtime.group(handles).close.call().result(timeout_s)
        for handle, outcome in zip(handles, outcomes, strict=True):
            if isinstance(outcome, Err) and not isinstance(outcome.error, ActorError):
                log.warning("%s could not close its environments: %r", handle.name, outcome.error)
            self._runtime.kill(handle)

    @property
    def _group(self) -> Group:
        return self._runtime.group(self._handles)

    def _check_published(self) -> None:
        published, self._published = self._published, None
        if published is not None:
            published.values(self._timeout_s)
