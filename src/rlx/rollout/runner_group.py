"""RunnerGroup: one or many EnvRunners behind one `sample`, and the global normaliser they feed."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from statistics import mean
from time import perf_counter
from typing import Any, TypeVar

import numpy as np
from gymnasium import spaces

from rlx.actors import ActorHandle, Err, Future, GroupFuture, Ok, Restart, Runtime
from rlx.errors import ActorDied, ActorError, CallTimeout, CheckpointError
from rlx.rollout.env_changes import Changes, EnvChange, changes_from_state, changes_to_state, with_change
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
STALLS_PER_TIMEOUT = 4
"""A call is looked at as a possible stall after the timeout divided by this."""


class RunnerGroup:
    """Collects with `num_runners` EnvRunners in processes of their own, or with one in this process if it is 0.

    Runner r owns the environments r * num_envs and on, counted over the whole group, so what it collects depends on
    the seed and its number only. `runtime` returns the actor runtime; it is asked only if num_runners > 0, and
    stays the caller's to close. sample_timeout_s bounds every wait for a runner, start_timeout_s its start.

    restart: how often a runner that dies, or is late, is started again. Only its own fragment is collected once more:
    it gets the newest weights and statistics and begins new episodes. ActorDied, with advice, when it may not be.
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
        restart: Restart | None = None,
        reward_clip: float = 10.0,
        **runner_options: Any,
    ) -> None:
        self.num_runners = num_runners
        self._reward_clip = reward_clip
        self._normalizer = Normalizer()
        self.env_changes: Changes = ()
        self._wall_s = self._alone_s = 0.0
        self._samples = 0
        self._local: EnvRunner | None = None
        self._actors: _RunnerActors | None = None
        if num_runners == 0:
            self._local = EnvRunner(env, num_envs, build_policy, **runner_options)
            self._spaces = self._local.spaces()
        else:
            assert runtime is not None, "runners in processes of their own need a runtime"
            self._actors = _RunnerActors(runtime(), start_timeout_s, sample_timeout_s, restart)
            try:
                for index in range(num_runners):
                    first = {"first_env_index": index * num_envs}
                    self._actors.spawn(f"env_runner/{index}", (env, num_envs, build_policy), runner_options | first)
                self._spaces = self._actors.start()
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
        """Have every runner act with `weights` (flat float32) and the merged statistics from its next sample on.

        The changes of the environments go with them.
        """
        state = self._normalizer.get_state()
        if self._local is not None:
            self._local.set_weights(version, weights, state)
            self._local.change_envs(self.env_changes)
        else:
            self._remote.publish(version, weights, state, self.env_changes)

    def change_envs(self, change: EnvChange) -> None:
        """Have all environments changed, with the next `publish`; those made later are changed so, too."""
        self.env_changes = with_change(self.env_changes, change)

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
            runner_restarts=0 if self._local is not None else self._remote.take_restarts(),
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
        calls = 0 if self._local is not None else self._remote.calls
        return {
            "runners": runners,
            "calls": calls,
            "normalizer": self._normalizer.get_state(),
            "env_changes": changes_to_state(self.env_changes),
        }

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
            self._remote.set_state(saved, int(state["calls"]))
        self._normalizer = Normalizer.from_state(state["normalizer"])
        self.env_changes = changes_from_state(state.get("env_changes", ()))

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
    """The runners in processes of their own: asks them all, and once more those that had to be started again."""

    def __init__(self, runtime: Runtime, start_timeout_s: float, timeout_s: float, restart: Restart | None) -> None:
        self._runtime = runtime
        self._start_timeout_s, self._timeout_s = start_timeout_s, timeout_s
        self._restart = restart
        self._channel = runtime.channel("policy")
        self._handles: list[ActorHandle] = []
        self._late: dict[str, str] = {}  # by name, in words: those that were ended because they did not answer
        self._restarts_taken = 0
        self._is_busy = False
        self.calls = 0
        """How often the runners were asked for what may begin episodes, in the whole run: see `EnvRunner.sample`."""

    def spawn(self, name: str, arguments: tuple[Any, ...], options: Mapping[str, Any]) -> None:
        """Start one more runner; `start` waits for it."""
        handle = self._runtime.spawn(
            *(_make_runner, *arguments),
            name=name,
            restart=self._restart,
            stall_after_s=self._timeout_s / STALLS_PER_TIMEOUT,
            policy_channel=self._channel,
            **options,
        )
        self._runtime.monitor(handle, on_restart=self._on_restart)
        self._handles.append(handle)

    def start(self) -> tuple[Space, Space]:
        """Return the environment's spaces, once every runner is up."""
        return self._ask("spaces", self._start_timeout_s, self._to_all)[0]

    def publish(self, version: int, weights: np.ndarray, normalizer_state: State, env_changes: Changes) -> None:
        """Have every sample that is asked for from now on begin with these weights; no runner is waited for."""
        value = {"weights": weights, "normalizer": normalizer_state, "env_changes": env_changes}
        self._channel.publish(value, version)

    def sample(self, num_steps: int) -> list[Sample]:
        """Return each runner's fragment."""
        self._is_busy = True
        try:
            samples = self._ask("sample", self._timeout_s, lambda: self._to_all(num_steps, self._count_call()))
        except CallTimeout as error:
            raise CallTimeout(
                f"{error} An environment hangs, or {num_steps} steps take longer than this: "
                "raise fault_tolerance.sample_timeout_s, or lower env_runners.rollout_fragment_length."
            ) from error
        self._is_busy = False
        return samples

    def take_restarts(self) -> int:
        """Return how many runners were started again since the last call."""
        total = sum(handle.incarnation for handle in self._handles)
        taken, self._restarts_taken = self._restarts_taken, total
        return total - taken

    def get_state(self) -> list[State]:
        """Return each runner's state."""
        return self._ask("get_state", self._timeout_s, lambda: self._to_all(self._count_call()))

    def set_state(self, states: Sequence[State], calls: int) -> None:
        """Give each runner its state."""
        self.calls = calls
        self._ask("set_state", self._timeout_s, lambda: [(state,) for state in states])

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

    def _to_all(self, *arguments: Any) -> list[tuple[Any, ...]]:
        return [arguments] * len(self._handles)

    def _count_call(self) -> int:
        self.calls += 1
        return self.calls - 1

    def _ask(self, method: str, timeout_s: float, arguments: Callable[[], Sequence[tuple[Any, ...]]]) -> list[Any]:
        """Return each runner's answer. Who dies or is late is asked again, with what `arguments` then returns for it.

        The second time has the start of a process within its deadline.
        """
        answers: dict[int, Any] = {}
        missing, patience_s = list(range(len(self._handles))), timeout_s
        while missing:
            rows = arguments()
            futures = [getattr(self._handles[index], method).call(*rows[index]) for index in missing]
            outcomes = GroupFuture(futures).result(patience_s)
            lost, failed = [], []
            for index, future, outcome in zip(missing, futures, outcomes, strict=True):
                if isinstance(outcome, Ok):
                    answers[index] = outcome.value
                elif self._is_lost(self._handles[index], future, outcome.error):
                    lost.append((index, future))
                else:
                    failed.append((self._handles[index].name, outcome.error))
            if failed:
                names, errors = zip(*failed, strict=True)
                errors[0].add_note(f"{method}() failed in {len(names)} of {len(futures)} actors: {', '.join(names)}")
                raise errors[0]
            for index, future in lost:
                if not future.done():
                    self._end_late(self._handles[index], future, patience_s)
            missing, patience_s = [index for index, _ in lost], self._start_timeout_s + timeout_s
        return [answers[index] for index in range(len(self._handles))]

    def _is_lost(self, handle: ActorHandle, future: Future[Any], error: BaseException) -> bool:
        """Return whether the call is lost with an incarnation that another one follows; ActorDied if none does."""
        if isinstance(error, CallTimeout) and not future.done():
            return self._restart is not None and future.method != "spaces"  # a start has one deadline
        if not isinstance(error, ActorDied):
            return False
        if self._runtime.state()[handle.name].status not in ("dead", "failed"):
            return True
        last = self._late.get(handle.name) or str(error.__cause__ or error)
        times = f"It was started again {handle.incarnation} times already; l" if handle.incarnation else "L"
        raise ActorDied(
            f"{last}\n{times}ower env_runners.num_envs_per_env_runner if memory is short, cure the environment, or "
            "raise fault_tolerance.max_restarts."
        ) from error

    def _end_late(self, handle: ActorHandle, future: Future[Any], timeout_s: float) -> None:
        self._late[handle.name] = f"{handle.name}.{future.method}() has not answered within {timeout_s:g} s."
        self._runtime.restart(handle)

    def _on_restart(self, handle: ActorHandle, error: BaseException) -> None:
        log.warning("%s It was started again and begins new episodes.", self._late.pop(handle.name, None) or error)


def _make_runner(*arguments: Any, **options: Any) -> EnvRunner | _FailedRunner:
    """Return a runner; where its making raises, that is an answer and not a death, for no restart would cure it."""
    try:
        return EnvRunner(*arguments, **options)
    except Exception as error:
        return _FailedRunner(error)


class _FailedRunner:
    """Answers every call with the error that kept the runner from being made."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    def __getattr__(self, method: str) -> Any:
        raise self._error
