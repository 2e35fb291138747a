"""RunnerGroup: one or many EnvRunners behind one `sample`, and the global normaliser they feed."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from time import monotonic, perf_counter
from typing import Any, Literal

import numpy as np

from rlx.actors import Resources, Restart, Runtime
from rlx.errors import ActorDied, CheckpointError, Infeasible
from rlx.nets.observation import Space
from rlx.rollout.arrivals import Arrivals
from rlx.rollout.env_changes import Changes, EnvChange, changes_from_state, changes_to_state, with_change
from rlx.rollout.env_runner import BuildPolicy, EnvRunner
from rlx.rollout.first_ready import FirstReadyRunner, make_runner
from rlx.rollout.free_cpus import FreeCpus
from rlx.rollout.normalizers import Normalizer, RewardScaler, State
from rlx.rollout.runner_actors import Call, RunnerActors
from rlx.rollout.sample import Sample
from rlx.rollout.vector import EnvSource
from rlx.trajectory import Trajectory

log = logging.getLogger("rlx")

ADVICE_AFTER_SAMPLES = 5


class RunnerGroup:
    """Collects with `num_runners` EnvRunners in processes of their own, or with one in this process if it is 0.

    With "auto" there are as many as there are CPUs, less `kept_cpus`: see `FreeCpus`. On a cluster they become more
    when a node joins, with the smallest free numbers, and fewer when theirs leaves; `begin` and `arrive` see to it.

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
        num_runners: int | Literal["auto"] = 0,
        kept_cpus: int = 0,
        num_envs: int,
        runtime: Callable[[], Runtime] | None = None,
        start_timeout_s: float = 60.0,
        sample_timeout_s: float = 120.0,
        restart: Restart | None = None,
        reward_clip: float = 10.0,
        **runner_options: Any,
    ) -> None:
        self._reward_clip = reward_clip
        self._normalizer = Normalizer()
        self.env_changes: Changes = ()
        self._wall_s = self._alone_s = 0.0
        self._samples = 0
        self._local: EnvRunner | FirstReadyRunner | None = None
        self._actors: RunnerActors | None = None
        self._free_cpus: FreeCpus | None = None
        self._told: int | None = None  # how many runners, in the log
        self._arrivals: Arrivals | None = None
        self._begun: list[Call] = []
        self._waiting: list[Sample] = []  # a fragment that was collected and not yet taken
        if num_runners == 0:
            self._local = make_runner(env, num_envs, build_policy, **runner_options)
            self._spaces = self._local.spaces()
        else:
            assert runtime is not None, "runners in processes of their own need a runtime"
            self._runtime = runtime()
            self._actors = RunnerActors(self._runtime, start_timeout_s, sample_timeout_s, restart)
            self._made_of = (env, num_envs, build_policy), runner_options
            claims: list[Resources | None] = [None] if num_runners == "auto" else [None] * num_runners
            if num_runners == "auto":
                self._free_cpus = FreeCpus(self._runtime, kept_cpus)
                claims = self._free_cpus.take(0) or claims
            try:
                for claim in claims:
                    self._spawn(claim)
                self._spaces: Any = self._actors.start()
                self._follow()
            except BaseException:
                self.close()
                raise

    @property
    def num_runners(self) -> int:
        """How many runners in processes of their own there are now."""
        return 0 if self._actors is None else len(self._actors)

    def spaces(self) -> tuple[Space, Space]:
        """Return the observation and action space of one environment."""
        return self._spaces

    def publish(self, version: int, weights: np.ndarray) -> None:
        """Have every runner act with `weights` (flat float32) and the merged statistics from its next sample on.

        The changes of the environments go with them.
        """
        state = self._normalizer.get_state()
        if self._local is not None:
            self._local.set_weights(version, weights, state)
            self._local.change_envs(self.env_changes)
        else:
            value = {"weights": weights, "normalizer": state, "env_changes": self.env_changes}
            self._remote.publish(version, value)

    def change_envs(self, change: EnvChange) -> None:
        """Have all environments changed, with the next `publish`; those made later are changed so, too."""
        self.env_changes = with_change(self.env_changes, change)

    def keep_cpus(self, count: int) -> None:
        """From now on leave so many CPUs to others, with "auto"; those who have claimed theirs need none of these."""
        if self._free_cpus is not None:
            self._free_cpus.keep(count)

    def begin(self, num_steps: int) -> None:
        """Have the runners, which must be in processes of their own, collect the fragment that `sample` returns next.

        What is published meanwhile they act with in the one after that.
        """
        self._follow()
        self._begun = [self._remote.ask_to_sample(number, num_steps) for number in self._remote.numbers]

    @property
    def has_begun(self) -> bool:
        """Whether the next fragment is being collected, or waits."""
        return bool(self._begun or self._waiting)

    def sample(self, num_steps: int) -> Sample:
        """Return `num_steps` steps of every environment, joined along B in the order of the runners.

        That is the fragment that has begun, where one has.
        """
        started = perf_counter()
        samples = [self._local.sample(num_steps)] if self._local is not None else self._collect(num_steps)
        wall_s = perf_counter() - started
        self._wall_s += wall_s
        self._alone_s += _seconds_of_one_process(samples)
        self._samples += 1
        joined = self._join(samples, Trajectory.concatenate([sample.trajectory for sample in samples]), wall_s)
        if self._local is not None:
            joined.transfer_s = 0.0
        return joined

    def arrive(self, num_steps: int, per_batch: int | None = None, **limits: Any) -> Sample:
        """Return the fragments of `num_steps` steps that the next runners finish, joined along B in their order.

        per_batch: how many; None: as many as there are runners. All runners go on meanwhile, and after it, within the
        limits of `Arrivals`; `used` says that one more may be collected. The runners must be in processes of their own.
        """
        if self._arrivals is None:
            self._arrivals = Arrivals(self._remote, num_steps, **limits)
        arrival = None
        while arrival is None:
            self._follow()
            arrival = self._arrivals.take(per_batch or self.num_runners)
        joined = self._join(arrival.samples, arrival.trajectory, arrival.waited_s)
        joined.dropped_steps = self._arrivals.take_dropped()
        return joined

    def used(self) -> None:
        """Say that what has arrived last has been learned from."""
        if self._arrivals is not None:
            self._arrivals.used()

    @property
    def ahead(self) -> int:
        """Fragments being collected, or waiting, that `arrive` has not returned and `used` not freed; 0 without it."""
        return 0 if self._arrivals is None else self._arrivals.ahead

    def _join(self, samples: Sequence[Sample], trajectory: Trajectory, wall_s: float) -> Sample:
        for sample in samples:
            self._normalizer.merge(sample.obs_moments, sample.return_moments)
        if self._normalizer.returns is not None:
            trajectory.reward = RewardScaler(self._normalizer.returns, self._reward_clip)(trajectory.reward)
        joined = Sample.join(samples, trajectory, wall_s)
        if self._actors is not None:
            joined.runner_restarts = self._actors.take_restarts()
        return joined

    def _collect(self, num_steps: int) -> list[Sample]:
        while not self._waiting:  # all that has begun may be lost, with the machines
            if not self._begun:
                self.begin(num_steps)
            self._finish()
        samples, self._waiting = self._waiting, []
        return samples

    def _finish(self) -> None:
        """Wait for what has begun."""
        begun, self._begun = self._begun, []
        if begun:
            self._waiting = self._remote.gather(begun)

    def _spawn(self, claim: Resources | None) -> None:
        actors, (arguments, options) = self._remote, self._made_of
        number = actors.free_number()
        options = {**options, "first_env_index": number * arguments[1]}
        actors.spawn(f"env_runner/{number}", arguments, options, claim)

    def _follow(self) -> None:
        """Give up the runners of nodes that are gone, start others where nodes have joined, let in who has started.

        Waits for runners where none is left.
        """
        actors, free = self._remote, self._free_cpus
        if free is None:
            return
        ends = monotonic() + self._runtime.system_timeout_s
        while free.have_changed or actors.starting or not len(actors):
            if self._arrivals is not None:
                self._arrivals.pause()
            actors.give_up_lost()
            if free.have_changed:
                for claim in free.take(len(actors) + actors.starting):
                    with suppress(Infeasible):  # that node has left again
                        self._spawn(claim)
            if len(actors):
                actors.admit()
                break
            if actors.starting:
                self._spaces = actors.start() or self._spaces
            elif not free.wait(ends - monotonic()):
                raise ActorDied(
                    "all env runners were lost with their nodes, and no node with a free CPU has joined the cluster "
                    f"within {self._runtime.system_timeout_s:g} s; start one with `rlx start`, and resume the run."
                )
        if len(actors) != self._told:
            log.info("env_runners.num_env_runners=auto: now %d, one for each free CPU", len(actors))
            self._told = len(actors)

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
        """Return the state of every runner and of the normaliser, as plain values and arrays.

        After `arrive` it is None of a runner that is far behind the others; resumed, that one begins new episodes.
        """
        if self._local is not None:
            runners, calls = [self._local.get_state()], []
        else:
            if self._arrivals is not None:
                self._arrivals.pause()
            self._finish()
            # Free-running ones do not wait for each other, here neither: a resumed run is not exact in any case.
            runners = self._remote.get_state(of_all=self._arrivals is None)
            calls = list(self._remote.calls)
        return {
            "runners": runners,
            "calls": calls,
            "waiting": [sample.get_state() for sample in self._waiting],
            "normalizer": self._normalizer.get_state(),
            "env_changes": changes_to_state(self.env_changes),
        }

    def set_state(self, state: State) -> None:
        """Continue where `get_state` was called; the weights and statistics reach the runners with `publish`."""
        saved = state["runners"]
        if self._free_cpus is None and len(saved) != max(1, self.num_runners):
            raise CheckpointError(
                f"the state holds {len(saved)} env runners and this group has {max(1, self.num_runners)}; "
                "resume with the num_env_runners of the saved run."
            )
        if self._local is not None:
            self._local.set_state(saved[0])
        else:
            calls = state["calls"]
            if self._arrivals is not None:
                self._arrivals.forget()
            self._remote.forget(self._begun)
            self._begun, self._waiting = [], [Sample.from_state(one) for one in state.get("waiting", ())]
            self._remote.set_state(saved, [calls] * len(saved) if isinstance(calls, int) else calls)
            self._tell_of_others({number for number, one in enumerate(saved) if one is not None})
        self._normalizer = Normalizer.from_state(state["normalizer"])
        self.env_changes = changes_from_state(state.get("env_changes", ()))

    def _tell_of_others(self, saved: set[int]) -> None:
        now = set(self._remote.numbers)
        if self._free_cpus is not None and saved != now:
            log.info(
                "%d env runners were saved and there are %d: of %d the unfinished episodes are lost, %d begin new ones",
                *(len(saved), len(now), len(saved - now), len(now - saved)),
            )

    def close(self) -> None:
        """Release the environments and end the runners' processes; closing twice is fine."""
        if self._local is not None:
            self._local.close()
        if self._arrivals is not None:
            self._arrivals.pause()
        if self._actors is not None:
            self._actors.close()

    @property
    def _remote(self) -> RunnerActors:
        assert self._actors is not None
        return self._actors


def _seconds_of_one_process(samples: Sequence[Sample]) -> float:
    """Return an estimate of the time that one process would need for the work of all runners.

    Environments stepped one by one take the sum of their times. A native vector environment and a network take
    hardly longer for a larger batch.
    """
    add_up = sum if samples[0].stepped_one_by_one else max
    return add_up(s.env_s for s in samples) + max(s.busy_s - s.env_s for s in samples)
