"""Scalar environments in several processes: each worker is an actor that steps its share of them in place.

What a step exchanges lies in memory that the runner and the workers map; the call that wakes a worker carries
nothing. Seeds, failures, changes and the state are those of `InPlaceEnvs`, which every worker runs over its share, so
both give the same rows bit for bit, and each can go on from a state of the other.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Sequence
from functools import partial
from itertools import accumulate, count, pairwise
from typing import Any

import numpy as np

from rlx import actors
from rlx.errors import ActorDied, ActorError, CallTimeout
from rlx.rollout.deadline import EnvTimeout
from rlx.rollout.env_changes import Changes
from rlx.rollout.env_worker import STEP_FAILED, EnvWorker, MakeEnvs, StepMemory
from rlx.rollout.failures import Failures
from rlx.rollout.hooks import EnvHooks
from rlx.rollout.in_place import FAILED, NO_FINALS, State, Step, check_state, episode_seed
from rlx.rollout.spaces import layouts

log = logging.getLogger(__name__)

START_TIMEOUT_S = 120.0
CLOSE_TIMEOUT_S = 5.0
ABANDON_TIMEOUT_S = 1.0
"""The same where not all environments were made: Ctrl-C should not wait for those that are slow to make."""
RENEWAL_CALLS = 3
"""close, __init__ and reset: what a worker may spend on one environment that fails, beside the steps of all."""
LISTS = ("episode", "rebuilds", "length", "changes")
"""Parts of the state that hold an item for each environment."""


class _SharedRuntime:
    """The actor runtime of all environments of this process; there is none while nobody has one."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._runtime: actors.Runtime | None = None
        self._users = 0

    def take(self) -> actors.Runtime:
        """Return the runtime, which is there until it is given back."""
        with self._lock:
            if self._runtime is None:
                self._runtime = actors.runtime("local", preload=("numpy", "torch", "gymnasium"))
            self._users += 1
            return self._runtime

    def give_back(self) -> None:
        """Close the runtime if nobody else has it."""
        with self._lock:
            self._users -= 1
            if self._users == 0 and self._runtime is not None:
                self._runtime.close()
                self._runtime = None


shared_runtime = _SharedRuntime()
_numbers = count()


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
        self._steps_begun = 0
        self._has_worked = False
        num_workers = min(num_processes, num_envs)
        self._shares = list(pairwise(num_envs * worker // num_workers for worker in range(num_workers + 1)))
        self._workers: list[actors.ActorHandle] = []
        self._runtime = shared_runtime.take()
        self._fd = os.memfd_create("rlx-envs", os.MFD_CLOEXEC)
        try:
            for first, last in self._shares:
                self._workers.append(self._spawn(first, last))
            for worker in self._workers:
                worker.ready(START_TIMEOUT_S)
            self.observation_space, self.action_space = self._workers[0].spaces.call().result(START_TIMEOUT_S)
            self.layout, self.actions = layouts(self.observation_space, self.action_space, name)
            rows = ((self.layout.shape, self.layout.dtype), (self.actions.shape, self.actions.dtype))
            self._memory_arguments = (num_envs, *rows)
            self._memory = StepMemory.map(self._fd, *self._memory_arguments)
            for worker in self._workers:
                self._attach(worker)
        except BaseException:
            self.close(ABANDON_TIMEOUT_S)
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

    def close(self, timeout_s: float = CLOSE_TIMEOUT_S) -> None:
        """Close the environments and end the processes, after timeout_s also of those that do not answer."""
        if self._fd < 0:
            return
        outcomes = self._runtime.group(self._workers).close.call().result(timeout_s)
        for worker, outcome in zip(self._workers, outcomes, strict=True):
            if isinstance(outcome, actors.Err) and not isinstance(outcome.error, ActorError):
                log.warning("%s could not close its environments: %r", self.name, outcome.error)
            self._runtime.kill(worker)
        os.close(self._fd)
        self._fd = -1
        shared_runtime.give_back()

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
        callbacks = None if self._hooks is None else self._hooks.make_callbacks
        options = (self.name, self._seed, self._first, self._failures.options, self._counts_lives, callbacks)
        return self._runtime.spawn(*(EnvWorker, self._make, first, last, *options), name=f"env_worker/{next(_numbers)}")

    def _attach(self, worker: actors.ActorHandle) -> None:
        worker.attach.call(f"/proc/{os.getpid()}/fd/{self._fd}", *self._memory_arguments).result(START_TIMEOUT_S)
