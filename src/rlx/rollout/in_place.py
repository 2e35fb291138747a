"""Scalar gymnasium environments stepped in a loop in this process.

Every episode is reset with a seed made of (run seed, global index of the environment, episode number), so the
state of an environment is its episode number and the actions since: no environment has to be pickled.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any, NoReturn, SupportsFloat

import gymnasium
import numpy as np
from gymnasium import spaces

from rlx.errors import CheckpointError, EnvError
from rlx.nets.observation import MISFIT, ObservationLayout
from rlx.rollout.env_changes import Changes, apply_changes, changes_from_state, changes_to_state, covered
from rlx.rollout.failures import Failures
from rlx.rollout.hooks import EnvHooks, StepFunction
from rlx.rollout.spaces import layouts

log = logging.getLogger(__name__)

State = dict[str, Any]
Step = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[int, Any]]
"""obs_B (rows, after any reset), reward_B, terminated_B, truncated_B, and by index the final obs of ended episodes.

In place of a final obs stands FAILED where the step failed: it is no transition, obs_B is of another episode, and the
last one ended in nothing."""

NO_FINALS: dict[int, Any] = {}
FAILED = object()
RAISED = object()


def episode_seed(seed: int, env_index: int, episode: int) -> int:
    """Return the 31-bit seed of one episode: some environments take no larger one."""
    return int(np.random.SeedSequence([seed, env_index, episode]).generate_state(1)[0] >> 1)


def check_state(state: State, num_envs: int) -> None:
    """Raise CheckpointError unless `state` is of as many scalar environments, whichever process they were in."""
    if state["kind"] != "in_place" or len(state["obs"]) != num_envs:
        raise CheckpointError(
            f"the saved environments are {len(state['obs'])} of kind {state['kind']}, this runner has {num_envs} "
            "in_place; resume with the num_envs and vectorization of the saved run."
        )


class InPlaceEnvs:
    """B scalar environments that reset themselves in the step that ends an episode; arrays returned are reused.

    make: returns one more such environment, to take the place of one that failed.
    """

    resets_on_next_step = False

    def __init__(
        self,
        envs: list[gymnasium.Env[Any, Any]],
        name: str,
        seed: int,
        first_env_index: int,
        make: Callable[[], gymnasium.Env[Any, Any]],
        failures: Failures,
        counts_lives: bool = False,
        hooks: EnvHooks | None = None,
    ) -> None:
        self.name = name
        self.num_envs = len(envs)
        self.observation_space = envs[0].observation_space
        self.action_space = envs[0].action_space
        self.layout, self.actions = layouts(self.observation_space, self.action_space, name)
        self.obs_B = np.zeros((self.num_envs, *self.layout.shape), self.layout.dtype)
        self.envs = envs
        self.lives_B: np.ndarray | None = np.zeros(self.num_envs, np.int64) if counts_lives else None
        self._seed, self._first = seed, first_env_index
        self._make, self._failures, self._watchdog = make, failures, failures.watchdog
        self._steps: list[StepFunction] = [env.step for env in envs]
        self._hooks = hooks
        self._steps_begun = 0
        self._row_shape = self.layout.shape if self.layout.is_verbatim else None
        self._unchecked = set(range(self.num_envs))
        self._reward_B = np.zeros(self.num_envs)
        self._terminated_B = np.zeros(self.num_envs, bool)
        self._truncated_B = np.zeros(self.num_envs, bool)
        self._episode: list[int] | np.ndarray = [-1] * self.num_envs
        self._actions: list[list[np.ndarray]] = [[] for _ in envs]
        self._changes: Changes = ()  # for episodes that begin from now on
        self._changed: list[Changes] = [()] * self.num_envs  # what each environment has had
        for index in range(self.num_envs):
            self._introduce(index)

    def change(self, changes: Changes) -> None:
        """Have each environment changed so when its next episode begins."""
        if changes != self._changes:
            self._changes = changes

    def begin_at(self, episode: int) -> None:
        """Take the episodes before number `episode` as done."""
        self._episode[:] = [episode - 1] * self.num_envs

    def keep_in(
        self,
        obs_B: np.ndarray,
        reward_B: np.ndarray,
        terminated_B: np.ndarray,
        truncated_B: np.ndarray,
        lives_B: np.ndarray,
        episode_B: np.ndarray,
    ) -> None:
        """Before the first reset: write what a step returns, and the episodes' numbers, to these arrays."""
        self.obs_B, self._reward_B = obs_B, reward_B
        self._terminated_B, self._truncated_B = terminated_B, truncated_B
        self.lives_B = None if self.lives_B is None else lives_B
        self._episode = episode_B

    def reset(self) -> np.ndarray:
        """Return the first observations of a new episode in every environment."""
        for index in range(self.num_envs):
            self._begin_episode(index)
            self._actions[index] = []
        return self.obs_B

    def step(self, action_B: np.ndarray) -> Step:
        """Return what followed the policy's actions."""
        reward_B, terminated_B, truncated_B = self._reward_B, self._terminated_B, self._truncated_B
        final_obs = NO_FINALS
        self._steps_begun += 1
        for index, action in enumerate(self.actions.each(action_B)):
            try:
                reward, terminated, truncated = self.step_one(index, action)
            except Exception as error:
                self._recover(index, error)
                reward, terminated, truncated = 0.0, False, False
                final_obs = {**final_obs, index: FAILED}
            reward_B[index], terminated_B[index], truncated_B[index] = reward, terminated, truncated
            if terminated or truncated:
                final_obs = {**final_obs, index: self.obs_B[index].copy()}
                self._begin_episode(index)
        return self.obs_B, reward_B, terminated_B, truncated_B, final_obs

    def step_one(self, index: int, action: Any) -> tuple[float, bool, bool]:
        """Return reward, terminated and truncated of one environment's step; its observation goes to obs_B."""
        returned: Any = RAISED
        watchdog = self._watchdog
        try:
            try:
                watchdog.call = ("step", index)
                returned = self._steps[index](action)
            finally:
                watchdog.call = None
            obs, reward, terminated, truncated, info = returned
            if index in self._unchecked:
                self._check_step(index, returned)
            if self._row_shape is None:
                self.layout.encode(obs, self.obs_B[index])
            elif obs.shape == self._row_shape:
                self.obs_B[index] = obs
            else:
                raise ValueError("shape")  # would broadcast in silence
            if self.lives_B is not None:
                self.lives_B[index] = info["lives"]
            return float(reward), terminated, truncated
        except Exception as error:
            self._explain(error, index, "step", returned, f"with action {action!r}")

    def step_at_random(self) -> None:
        """Take a random action in every environment; where nothing but the time matters."""
        for index in range(self.num_envs):
            _, terminated, truncated = self.step_one(index, self.action_space.sample())
            if terminated or truncated:
                self._begin_episode(index)

    def reset_one(self, index: int, seed: int) -> None:
        """Begin an episode with `seed` in one environment; its observation goes to obs_B."""
        if self._changed[index] is not self._changes:
            self._change_one(index)
        returned: Any = RAISED
        try:
            returned = self._watchdog.run("reset", index, self.envs[index].reset, seed=seed)
            if not isinstance(returned, tuple):  # a bare array of two numbers would unpack
                raise TypeError("not a tuple")
            obs, info = returned
            self._check_obs(index, "reset", obs)
            if self.lives_B is not None:
                self.lives_B[index] = info["lives"]
        except Exception as error:
            self._explain(error, index, "reset", returned, f"with seed {seed}")

    def record(self, action_T_B: np.ndarray, done_T_B: np.ndarray) -> None:
        """Remember a fragment's actions, as far as their episodes still run, for `get_state`."""
        for index, actions in enumerate(self._actions):
            (ends,) = done_T_B[:, index].nonzero()
            if len(ends):
                actions.clear()
            actions.append(action_T_B[ends[-1] + 1 if len(ends) else 0 :, index].copy())

    def get_state(self) -> State:
        """Return episode numbers, the running episodes' actions (joined) and observations."""
        lengths = [sum(map(len, actions)) for actions in self._actions]
        chunks = [chunk for actions in self._actions for chunk in actions]
        joined = np.concatenate(chunks) if chunks else np.zeros(0)
        return {
            "kind": "in_place",
            "episode": [int(episode) for episode in self._episode],
            "rebuilds": list(self._failures.rebuilds),
            "length": lengths,
            "action": joined,
            "obs": self.obs_B.copy(),
            "changes": list(map(changes_to_state, self._changed)),
        }

    def set_state(self, state: State) -> np.ndarray:
        """Return a bool [B]: True where the running episode was restored, False where a new one had to begin."""
        check_state(state, self.num_envs)
        self._failures.rebuilds = list(state["rebuilds"])
        restored_B = np.ones(self.num_envs, bool)
        obs_B = saved_rows(state["obs"], self.layout)
        ends = np.cumsum(state["length"])
        newest = self._changes
        for index, end in enumerate(ends):
            self._changes = changes_from_state(state["changes"][index]) if "changes" in state else ()
            actions = state["action"][end - state["length"][index] : end]
            self._episode[index] = int(state["episode"][index]) - 1
            self._begin_episode(index)
            self._actions[index] = [actions.copy()] if len(actions) else []
            if not (self._replay(index, actions) and np.array_equal(self.obs_B[index], obs_B[index])):
                restored_B[index] = False
                self._begin_episode(index)
                self._actions[index] = []
        self._changes = newest
        if not restored_B.all():
            log.warning(
                "%s is not deterministic (replaying a seeded episode gave other observations): %d of %d environments "
                "begin a new episode, so this resume is not exact.",
                *(self.name, int((~restored_B).sum()), self.num_envs),
            )
        return restored_B

    def close(self) -> None:
        """Close every environment."""
        for env in self.envs:
            env.close()

    def _begin_episode(self, index: int) -> None:
        try:
            self._reset_to_next(index)
        except Exception as error:
            if self._episode[index] == 0 and not self._failures.rebuilds[index]:
                raise  # it has never worked: a mistake, not a mishap
            self._recover(index, error)

    def _reset_to_next(self, index: int) -> None:
        self._episode[index] += 1
        self.reset_one(index, episode_seed(self._seed, self._first + index, self._episode[index]))

    def _recover(self, index: int, error: Exception) -> None:
        """Begin an episode in a new environment in the place of one that failed with `error`, or raise it."""
        where = self._where(index)
        renew = partial(self._renew, index, where)
        self._failures.recover(error, renew, where=where, index=index, step=self._steps_begun)

    def _renew(self, index: int, where: str) -> None:
        self._make_anew(index, where)
        self._reset_to_next(index)

    def _make_anew(self, index: int, where: str) -> None:
        self._failures.close(self.envs[index].close, where, index)
        self.envs[index] = self._watchdog.run("__init__", index, self._make)
        self._unchecked.add(index)
        self._changed[index] = ()
        self._introduce(index)

    def _introduce(self, index: int) -> None:
        """Make a new environment known to those who step it, and who want to hear of it."""
        self._steps[index] = self.envs[index].step
        if self._hooks is not None:
            self._hooks.env_created(self.envs[index], self._first + index)
            self._steps[index] = self._hooks.watched(index, self.envs[index].step)

    def _change_one(self, index: int) -> None:
        where = self._where(index)
        if not covered(self._changed[index], self._changes):  # the run went back to before a change
            self._make_anew(index, where)
        arguments = (self._changes, self._changed[index], self.envs[index], where)
        self._watchdog.run("change", index, apply_changes, *arguments)
        self._changed[index] = self._changes

    def _replay(self, index: int, actions: np.ndarray) -> bool:
        for action in self.actions.each(actions) if len(actions) else ():
            try:
                _, terminated, truncated = self.step_one(index, action)
            except Exception as error:
                self._recover(index, error)
                return False
            if terminated or truncated:
                return False  # the saved episode went on here
        return True

    def _where(self, index: int) -> str:
        return f"{self.name}, environment {self._first + index}"

    def _check_step(self, index: int, returned: tuple[Any, ...]) -> None:
        obs, reward, terminated, truncated, _ = returned
        self._check_obs(index, "step", obs)
        if not isinstance(reward, SupportsFloat):
            raise EnvError(f"{self._where(index)}: step() returned the reward {reward!r}; gymnasium asks for a number.")
        for name, flag in (("terminated", terminated), ("truncated", truncated)):
            if not isinstance(flag, (bool, np.bool_)):
                raise EnvError(f"{self._where(index)}: step() returned {name} {flag!r}; gymnasium asks for a bool.")
        self._unchecked.discard(index)

    def _check_obs(self, index: int, method: str, obs: Any) -> None:
        """Write an observation to obs_B; EnvError if it is not of the space."""
        space, good = self.observation_space, True
        if isinstance(space, spaces.Box):  # a list would pass below
            # "same_kind" lets float64 pass for float32, as many environments return it.
            good = isinstance(obs, np.ndarray) and np.can_cast(obs.dtype, self.obs_B.dtype, "same_kind")
        try:
            if good:
                self.layout.encode(obs, self.obs_B[index])
        except MISFIT:
            good = False
        if not good:
            raise EnvError(
                f"{self._where(index)}: {method}() returned the observation {describe(obs)}; "
                f"its observation_space is {space}."
            )

    def _explain(self, error: Exception, index: int, method: str, returned: Any, how: str) -> NoReturn:
        """Raise EnvError where the return value breaks the API, else `error` with a note that says where."""
        if returned is RAISED:
            if method == "reset" and isinstance(error, TypeError) and "'seed'" in str(error):
                raise EnvError(
                    f"{self._where(index)}: {error}; gymnasium asks for reset(*, seed=None, options=None)."
                ) from error
            error.add_note(f"in {method}() {how} of environment {self._first + index} of {self.name}")
            raise error
        if isinstance(error, EnvError):
            raise error
        asked = {"step": "(obs, reward, terminated, truncated, info)", "reset": "(obs, info)"}[method]
        raise EnvError(
            f"{self._where(index)}: {method}() returned {describe(returned)}; gymnasium asks for {asked} "
            f"with observations of {self.observation_space}."
        ) from error


def saved_rows(obs_B: np.ndarray, layout: ObservationLayout) -> np.ndarray:
    """Return the observations of a checkpoint as rows: before 0.2 it held them as the environment returned them."""
    if obs_B.shape[1:] == layout.shape and obs_B.dtype == layout.dtype:
        return obs_B.copy()
    return layout.encode_batch(obs_B, np.empty((len(obs_B), *layout.shape), layout.dtype))


def describe(value: Any) -> str:
    """Return a short text of a value that an environment returned."""
    if isinstance(value, np.ndarray):
        return f"array of shape {value.shape} and dtype {value.dtype}"
    if isinstance(value, tuple):
        return f"a tuple of {len(value)}: ({', '.join(map(describe, value))})"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key!r}: {describe(item)}" for key, item in value.items()) + "}"
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
