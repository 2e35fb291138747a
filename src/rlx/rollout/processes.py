"""Scalar environments in several processes: each worker is an actor that steps its share of them in place.

What a step exchanges lies in memory that the runner and the workers map; the call that wakes a worker carries
nothing. Seeds, failures, changes and the state are those of `InPlaceEnvs`, which every worker runs over its share, so
both give the same rows bit for bit, and each can go on from a state of the other.
"""

from __future__ import annotations

import logging
import mmap
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, pairwise
from typing import Any

import gymnasium
import numpy as np

from rlx import actors
from rlx.errors import ActorDied, ActorError, CallTimeout
from rlx.nets.observation import Space
from rlx.rollout.deadline import EnvTimeout
from rlx.rollout.env_changes import Changes
from rlx.rollout.failures import Failures
from rlx.rollout.hooks import EnvHooks
from rlx.rollout.in_place import FAILED, NO_FINALS, InPlaceEnvs, State, Step, check_state, episode_seed
from rlx.rollout.spaces import layouts

log = logging.getLogger(__name__)

START_TIMEOUT_S = 120.0
CLOSE_TIMEOUT_S = 5.0
RENEWAL_CALLS = 3
"""close, __init__ and reset: what a worker may spend on one environment that fails, beside the steps of all."""
EPISODE_ENDED, STEP_FAILED = 1, 2
"""Values of `StepMemory.outcome`; 0 is an ordinary step."""
ALIGNMENT = 64
LISTS = ("episode", "rebuilds", "length", "changes")
"""Parts of the state that hold an item for each environment."""

Row = tuple[tuple[int, ...], np.dtype[Any]]
MakeEnvs = Callable[[int], list[gymnasium.Env[Any, Any]]]
"""make(count) returns so many new environments."""


@dataclass
class StepMemory:
    """What a step exchanges: arrays [B, ...] in memory that several processes map."""

    action: np.ndarray
    """The policy's actions."""
    obs: np.ndarray
    final_obs: np.ndarray
    """The last observation of an episode that ended in this step."""
    reward: np.ndarray
    terminated: np.ndarray
    truncated: np.ndarray
    outcome: np.ndarray
    lives: np.ndarray
    episode: np.ndarray
    """Number of the running episode."""

    @classmethod
    def map(cls, fd: int, num_envs: int, obs: Row, action: Row) -> StepMemory:
        """Return the arrays in the file `fd`, which is made large enough; a row is (shape, dtype)."""
        scalars = {name: ((), np.dtype(kind)) for name, kind in SCALARS.items()}
        rows: dict[str, Row] = {"action": action, "obs": obs, "final_obs": obs, **scalars}
        sizes = [num_envs * int(np.prod(shape)) * dtype.itemsize for shape, dtype in rows.values()]
        starts = list(accumulate((-(-size // ALIGNMENT) * ALIGNMENT for size in sizes), initial=0))
        os.ftruncate(fd, starts[-1])
        memory = mmap.mmap(fd, starts[-1])
        arrays = {
            name: np.ndarray((num_envs, *shape), dtype, memory, start)
            for (name, (shape, dtype)), start in zip(rows.items(), starts, strict=False)
        }
        return cls(**arrays)

    def share(self, first: int, last: int) -> StepMemory:
        """Return the rows of the environments from `first` up to `last`."""
        return StepMemory(**{name: array[first:last] for name, array in vars(self).items()})


SCALARS = {
    "reward": "f8",
    "terminated": "?",
    "truncated": "?",
    "outcome": "u1",
    "lives": "i8",
    "episode": "i8",
}


class EnvWorker:
    """The actor: it owns the environments from `first` up to `last`, counted within the runner."""

    def __init__(
        self,
        make: MakeEnvs,
        first: int,
        last: int,
        name: str,
        seed: int,
        first_env_index: int,
        failures: dict[str, Any],
        counts_lives: bool,
        make_callbacks: Callable[[], Sequence[Any]] | None,
    ) -> None:
        self._failures = Failures(last - first, **failures)
        self._failures.watchdog.watch()
        self._hooks = None if make_callbacks is None else EnvHooks(make_callbacks)
        self._envs = InPlaceEnvs(
            make(last - first),
            *(name, seed, first_env_index + first),
            lambda: make(1)[0],
            self._failures,
            counts_lives,
            self._hooks,
        )
        self._first, self._last = first, last

    def describe(self) -> tuple[Space, Space, Row]:
        """Return the observation space, the action space, and a row of observations."""
        envs = self._envs
        return envs.observation_space, envs.action_space, (envs.obs_B.shape[1:], envs.obs_B.dtype)

    def attach(self, path: str, num_envs: int, obs: Row, action: Row) -> None:
        """Keep what a step exchanges in the memory at `path`."""
        fd = os.open(path, os.O_RDWR)
        try:
            self._memory = StepMemory.map(fd, num_envs, obs, action).share(self._first, self._last)
        finally:
            os.close(fd)
        m = self._memory
        self._envs.keep_in(m.obs, m.reward, m.terminated, m.truncated, m.lives, m.episode)

    def reset(self) -> int:
        """Begin a new episode everywhere; return the number of failures."""
        self._envs.reset()
        return self._failures.take_count()

    def step(self) -> tuple[int, list[tuple[int, dict[str, Any]]]] | None:
        """Take the actions in memory; return the number of failures and what hooks want to know, if any."""
        memory = self._memory
        final_obs = self._envs.step(memory.action)[4]
        for index, obs in final_obs.items():
            if obs is FAILED:
                memory.outcome[index] = STEP_FAILED
            else:
                memory.outcome[index], memory.final_obs[index] = EPISODE_ENDED, obs
        failures, infos = self._failures.take_count(), [] if self._hooks is None else self._hooks.take_infos()
        return (failures, infos) if failures or infos else None

    def step_at_random(self) -> None:
        """Take a random action in every environment; of a worker that only measures."""
        self._envs.step_at_random()

    def record(self, action_T_B: np.ndarray, done_T_B: np.ndarray) -> None:
        """As `InPlaceEnvs.record`."""
        self._envs.record(action_T_B, done_T_B)

    def change(self, changes: Changes) -> None:
        """As `InPlaceEnvs.change`."""
        self._envs.change(changes)

    def get_state(self) -> State:
        """As `InPlaceEnvs.get_state`."""
        return self._envs.get_state()

    def set_state(self, state: State) -> tuple[np.ndarray, int]:
        """As `InPlaceEnvs.set_state`, and the number of failures."""
        return self._envs.set_state(state), self._failures.take_count()

    def close(self) -> None:
        """Close the environments."""
        self._envs.close()


class ProcessEnvs:
    """B scalar environments in `num_processes` processes, which reset themselves in the step that ends an episode.

    A worker that dies, or is late, is a failure of its environments: another one begins new episodes in its place.
    """

    resets_on_next_step = False

    def __init__(
        self,
        make: MakeEnvs,
        num_envs: int,
        num_processes: int,
        name: str,
        seed: int,
        first_env_index: int,
        failures: Failures,
        counts_lives: bool = False,
        hooks: EnvHooks | None = None,
    ) -> None:
        self.name, self.num_envs = name, num_envs
        self._make, self._seed, self._first, self._failures = make, seed, first_env_index, failures
        self._counts_lives, self._hooks = counts_lives, hooks
        self._changes: Changes = ()
        self._steps_begun = self._workers_made = 0
        self._has_worked = False
        count = min(num_processes, num_envs)
        self._shares = list(pairwise(num_envs * worker // count for worker in range(count + 1)))
        self._runtime = actors.runtime("local", preload=("numpy", "gymnasium"))
        self._fd = os.memfd_create("rlx-envs", os.MFD_CLOEXEC)
        try:
            self._workers = [self._spawn(first, last) for first, last in self._shares]
            for worker in self._workers:
                worker.ready(START_TIMEOUT_S)
            self.observation_space, self.action_space, obs = self._workers[0].describe.call().result(START_TIMEOUT_S)
            self.layout, self.actions = layouts(self.observation_space, self.action_space, name)
            self._shape = (num_envs, obs, (self.actions.shape, np.dtype(self.actions.dtype)))
            self._memory = StepMemory.map(self._fd, *self._shape)
            for worker in self._workers:
                self._attach(worker)
        except BaseException:
            self.close()
            raise
        self.obs_B = self._memory.obs
        self.lives_B: np.ndarray | None = self._memory.lives if counts_lives else None
        self.begin_at(0)

    def begin_at(self, episode: int) -> None:
        """Take the episodes before number `episode` as done."""
        self._memory.episode[:] = episode - 1

    def change(self, changes: Changes) -> None:
        """Have each environment changed so when its next episode begins."""
        if changes != self._changes:
            self._changes = changes
            self._ask("change", [(changes,)] * len(self._workers))

    def reset(self) -> np.ndarray:
        """Return the first observations of a new episode in every environment."""
        self._count(self._ask("reset"))
        self._memory.outcome[:] = 0
        self._has_worked = True
        return self.obs_B

    def step(self, action_B: np.ndarray) -> Step:
        """Return what followed the policy's actions."""
        memory = self._memory
        memory.action[:] = action_B
        self._steps_begun += 1
        for answer, (first, _) in zip(self._ask("step"), self._shares, strict=True):
            if answer is not None:
                self._failures.count(answer[0])
                for index, info in answer[1]:
                    assert self._hooks is not None
                    self._hooks.keep(first + index, info)
        final_obs = NO_FINALS
        if memory.outcome.any():
            failed = memory.outcome == STEP_FAILED
            memory.reward[failed], memory.terminated[failed], memory.truncated[failed] = 0.0, False, False
            (unusual,) = memory.outcome.nonzero()
            final_obs = {int(i): FAILED if failed[i] else memory.final_obs[i].copy() for i in unusual}
            memory.outcome[:] = 0
        return memory.obs, memory.reward, memory.terminated, memory.truncated, final_obs

    def step_at_random(self) -> None:
        """Take a random action in every environment; where nothing but the time matters."""
        self._ask("step_at_random")

    def record(self, action_T_B: np.ndarray, done_T_B: np.ndarray) -> None:
        """Remember a fragment's actions, as far as their episodes still run, for `get_state`."""
        self._ask("record", [(action_T_B[:, first:last], done_T_B[:, first:last]) for first, last in self._shares])

    def get_state(self) -> State:
        """Return the state that `InPlaceEnvs` would have."""
        while not all(states := self._ask("get_state")):  # a worker was lost and has another state now
            pass
        actions = [state["action"] for state in states if len(state["action"])]
        joined = {key: [item for state in states for item in state[key]] for key in LISTS}
        return (
            states[0]
            | joined
            | {
                "action": np.concatenate(actions) if actions else np.zeros(0),
                "obs": np.concatenate([state["obs"] for state in states]),
            }
        )

    def set_state(self, state: State) -> np.ndarray:
        """Return a bool [B]: True where the running episode was restored, False where a new one had to begin."""
        check_state(state, self.num_envs)
        ends = [0, *accumulate(state["length"])]
        shares = [
            {
                **{key: value[first:last] if key in (*LISTS, "obs") else value for key, value in state.items()},
                "action": state["action"][ends[first] : ends[last]],
            }
            for first, last in self._shares
        ]
        answers = self._ask("set_state", [(share,) for share in shares], calls=ends[-1])
        self._count([None if answer is None else answer[1] for answer in answers])
        self._has_worked = True
        return np.concatenate(
            [
                np.zeros(last - first, bool) if answer is None else answer[0]
                for answer, (first, last) in zip(answers, self._shares, strict=True)
            ]
        )

    def close(self) -> None:
        """Close the environments and end the processes."""
        workers, self._workers = self._workers, []
        outcomes = self._runtime.group(workers).close.call().result(CLOSE_TIMEOUT_S)
        for outcome in outcomes:
            if isinstance(outcome, actors.Err) and not isinstance(outcome.error, ActorError):
                log.warning("%s could not close its environments: %r", self.name, outcome.error)
        self._runtime.close()
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _ask(self, method: str, arguments: Sequence[tuple[Any, ...]] | None = None, calls: int = 0) -> list[Any]:
        """Return each worker's answer; None where it was lost and another one stands in its place.

        calls: how many calls of environments it may take, beside one of each and what a failure costs.
        """
        rows = arguments or [()] * len(self._workers)
        futures = [getattr(worker, method).call(*row) for worker, row in zip(self._workers, rows, strict=True)]
        answers: list[Any] = []
        for worker, future in enumerate(futures):
            try:
                answers.append(future.result(self._patience_s(worker, calls)))
            except (ActorDied, CallTimeout) as error:
                if isinstance(error, CallTimeout) and future.done():
                    raise  # an environment's own
                self._recover(worker, error, method)
                answers.append(None)
        return answers

    def _patience_s(self, worker: int, calls: int) -> float | None:
        timeout_s = self._failures.watchdog.timeout_s
        first, last = self._shares[worker]
        return None if timeout_s is None else timeout_s * (last - first + RENEWAL_CALLS + calls)

    def _count(self, failures: Sequence[int | None]) -> None:
        self._failures.count(sum(number or 0 for number in failures))

    def _recover(self, worker: int, error: Exception, method: str) -> None:
        """Put a new worker in the place of one that was lost with `error`, or raise it."""
        first, last = self._shares[worker]
        where = f"the process of environments {self._first + first} to {self._first + last - 1} of {self.name}"
        if isinstance(error, CallTimeout):
            error = EnvTimeout(
                f"{where} has not answered {method}() for {self._patience_s(worker, 0):g} s, so that not even "
                "fault_tolerance.env_step_timeout_s can interrupt it; it is ended."
            )
        for index in range(first, last):
            episode = int(self._memory.episode[index])
            error.add_note(
                f"environment {self._first + index} was in the episode with seed "
                f"{episode_seed(self._seed, self._first + index, episode)}; its last action was "
                f"{self._memory.action[index]!r}"
            )
        if not self._has_worked:
            raise error  # a mistake, not a mishap
        renew = partial(self._renew, worker)
        self._failures.recover(error, renew, where=where, index=first, step=self._steps_begun)
        self._memory.outcome[first:last] = STEP_FAILED

    def _renew(self, worker: int) -> None:
        self._runtime.kill(self._workers[worker])
        made = self._workers[worker] = self._spawn(*self._shares[worker])
        made.ready(START_TIMEOUT_S)
        self._attach(made)
        made.change.call(self._changes).result(START_TIMEOUT_S)
        made.reset.call().result(START_TIMEOUT_S)

    def _spawn(self, first: int, last: int) -> actors.ActorHandle:
        self._workers_made += 1
        callbacks = None if self._hooks is None else self._hooks.make_callbacks
        options = (self.name, self._seed, self._first, self._failures.options, self._counts_lives, callbacks)
        return self._runtime.spawn(
            *(EnvWorker, self._make, first, last, *options), name=f"env_worker/{self._workers_made - 1}"
        )

    def _attach(self, worker: actors.ActorHandle) -> None:
        worker.attach.call(f"/proc/{os.getpid()}/fd/{self._fd}", *self._shape).result(START_TIMEOUT_S)
