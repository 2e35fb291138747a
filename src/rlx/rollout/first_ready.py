"""Batches of whichever environments are ready first: several EnvRunners in the threads of one process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from itertools import pairwise
from time import perf_counter
from typing import Any

import numpy as np
import torch

from rlx.actors import Published
from rlx.actors.interface import AnyChannel
from rlx.errors import CheckpointError
from rlx.nets.observation import Space
from rlx.rollout.env_changes import Changes
from rlx.rollout.env_runner import BuildPolicy, EnvRunner
from rlx.rollout.normalizers import RunningMoments, State
from rlx.rollout.sample import Sample
from rlx.rollout.vector import EnvSource
from rlx.trajectory import Trajectory


def make_runner(*arguments: Any, **options: Any) -> EnvRunner | FirstReadyRunner:
    """Return what `vectorization` asks for."""
    return (FirstReadyRunner if options.get("vectorization") == "first_ready" else EnvRunner)(*arguments, **options)


class FirstReadyRunner:
    """An EnvRunner whose environments are shared out to processes that do not wait for each other.

    Each share has a process that steps it, and a thread that acts for it: while some are stepped, the policy acts for
    those that are ready. The thread is an EnvRunner of its own, so what is collected does not depend on who is ready
    when: it is, bit for bit, what as many env runners with these environments collect.
    """

    def __init__(
        self,
        env: EnvSource,
        num_envs: int,
        build_policy: BuildPolicy,
        *,
        vectorization: str = "first_ready",
        num_processes: int | None = None,
        num_cores: int = 1,
        first_env_index: int = 0,
        policy_channel: AnyChannel | None = None,
        **options: Any,
    ) -> None:
        count = min(num_envs, num_processes or num_cores)
        self._channel, self._published = policy_channel, None
        self._runners: list[EnvRunner] = []
        # torch keeps the number for each thread that calls it.
        limit = (torch.set_num_threads, (torch.get_num_threads(),))
        self._threads = ThreadPoolExecutor(count, "rlx-envs", *limit)
        try:
            for first, last in pairwise(num_envs * share // count for share in range(count + 1)):
                place = {"num_processes": 1, "first_env_index": first_env_index + first}
                self._runners.append(
                    EnvRunner(env, last - first, build_policy, vectorization="processes", **place, **options)
                )
        except BaseException:
            self.close()
            raise

    def spaces(self) -> tuple[Space, Space]:
        """Return the observation and action space of one environment."""
        return self._runners[0].spaces()

    def set_weights(self, version: int, weights: np.ndarray, normalizer_state: State | None = None) -> None:
        """As `EnvRunner.set_weights`."""
        for runner in self._runners:
            runner.set_weights(version, weights, normalizer_state)

    def change_envs(self, changes: Changes) -> None:
        """As `EnvRunner.change_envs`."""
        for runner in self._runners:
            runner.change_envs(changes)

    def sample(self, num_steps: int, call: int = 0) -> Sample:
        """As `EnvRunner.sample`."""
        started = perf_counter()
        self._take_newest()
        samples = self._in_threads(lambda runner: runner.sample(num_steps, call))
        wall_s = perf_counter() - started
        joined = Sample.join(samples, Trajectory.concatenate([sample.trajectory for sample in samples]), wall_s)
        joined.busy_s, joined.transfer_s = wall_s, 0.0
        joined.obs_moments = _merged([sample.obs_moments for sample in samples])
        joined.return_moments = _merged([sample.return_moments for sample in samples])
        return joined

    def get_state(self, call: int = 0) -> State:
        """As `EnvRunner.get_state`."""
        return {"shares": [runner.get_state(call) for runner in self._runners]}

    def set_state(self, state: State) -> None:
        """Continue where `get_state` was called."""
        saved = state.get("shares", ())
        if len(saved) != len(self._runners):
            raise CheckpointError(
                f"the saved environments were in {len(saved)} shares and this runner has {len(self._runners)}; resume "
                "with the environment.vectorization and num_processes of the saved run, on as many cores."
            )
        for runner, share in zip(self._runners, saved, strict=True):
            runner.set_state(share)

    def close(self) -> None:
        """Release the environments, their processes and the threads."""
        self._threads.shutdown(wait=False)  # who waits for an environment hears that its process has ended
        for runner in self._runners:
            runner.close()

    def _take_newest(self) -> None:
        published: Published | None = self._channel.latest() if self._channel is not None else None
        if published is not None and published is not self._published:
            self.set_weights(published.version, published.value["weights"], published.value["normalizer"])
            self.change_envs(published.value["env_changes"])
            self._published = published

    def _in_threads(self, sample: Callable[[EnvRunner], Sample]) -> list[Sample]:
        futures = [self._threads.submit(sample, runner) for runner in self._runners]
        try:
            return [future.result() for future in futures]
        except BaseException:
            wait(futures)  # nobody may step what the next call resets
            for runner in self._runners:
                runner.cut()
            raise


def _merged(moments: Sequence[RunningMoments | None]) -> RunningMoments | None:
    if moments[0] is None:
        return None
    merged = RunningMoments()
    for one in moments:
        assert one is not None
        merged.merge(one)
    return merged
