"""Any gymnasium VectorEnv as rlx steps it: in whichever autoreset mode its metadata states."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, VectorEnv

from rlx.errors import CheckpointError, EnvError
from rlx.nets.observation import MISFIT
from rlx.rollout.deadline import EnvTimeout
from rlx.rollout.env_changes import Changes, apply_changes, changes_from_state, changes_to_state, covered
from rlx.rollout.env_state import CannotCapture, capture, restore
from rlx.rollout.failures import Failures
from rlx.rollout.hooks import EnvHooks
from rlx.rollout.in_place import FAILED, NO_FINALS, State, Step, describe, episode_seed, saved_rows
from rlx.rollout.spaces import layouts

log = logging.getLogger(__name__)

AnyVectorEnv = VectorEnv[Any, Any, Any]


class VectorEnvAdapter:
    """Any gymnasium VectorEnv, in whichever autoreset mode its metadata states.

    A failure concerns all of its environments, also where only the reset of an ended episode failed: the step is lost
    for all, and `make` builds the whole anew; where that is None it is only reset.
    """

    def __init__(
        self,
        env: AnyVectorEnv,
        num_envs: int,
        name: str,
        seed: int,
        first_env_index: int,
        make: Callable[[], Any] | None,
        failures: Failures,
        counts_lives: bool = False,
        hooks: EnvHooks | None = None,
    ) -> None:
        if env.num_envs != num_envs:
            raise EnvError(f"{name} has {env.num_envs} environments and num_envs={num_envs}; make the two equal.")
        mode = env.metadata.get("autoreset_mode")
        if not isinstance(mode, AutoresetMode):
            raise EnvError(
                f"{name} states autoreset_mode {mode!r}; set metadata['autoreset_mode'] of the VectorEnv to "
                "gymnasium.vector.AutoresetMode.NEXT_STEP, SAME_STEP or DISABLED, whichever it does."
            )
        self.name = name
        self.num_envs = num_envs
        self.observation_space = env.single_observation_space
        self.action_space = env.single_action_space
        self.layout, self.actions = layouts(self.observation_space, self.action_space, name)
        self.env = env
        self.resets_on_next_step = mode is AutoresetMode.NEXT_STEP
        self.obs_B = np.zeros((num_envs, *self.layout.shape), self.layout.dtype)
        self.lives_B: np.ndarray | None = np.zeros(num_envs, np.int64) if counts_lives else None
        self._mode = mode
        self._seed, self._first, self._resets = seed, first_env_index, 0
        self._make, self._failures = make, failures
        self._steps_begun = 0
        self._checked = False
        self._changes: Changes = ()
        self._hooks = hooks
        if hooks is not None:
            hooks.env_created(env, first_env_index)

    def change(self, changes: Changes) -> None:
        """Change the vector environment now; it alone knows when the episodes of its environments begin."""
        if changes == self._changes:
            return
        if not covered(self._changes, changes):  # the run went back to before a change
            if self._make is None:
                raise EnvError(f"{self.name} cannot undo its changes; pass a factory of it as the environment.")
            self._make_anew(is_stuck=False)
        self._change(changes)

    def _change(self, changes: Changes) -> None:
        self._failures.watchdog.run("change", 0, apply_changes, changes, self._changes, self.env, self.name)
        self._changes = changes

    def begin_at(self, episode: int) -> None:
        """Take the resets before number `episode` as done."""
        self._resets = episode

    def reset(self) -> np.ndarray:
        """Return the first observations of a new episode in every environment."""
        try:
            self._reset_all()
        except Exception as error:
            if self._resets == 1:
                raise  # it has never worked: a mistake, not a mishap
            self._recover(error)
        return self.obs_B

    def _reset_all(self) -> None:
        self._resets += 1
        self._reset(episode_seed(self._seed, self._first, self._resets - 1))

    def _reset(self, seed: int | None, reset_mask: np.ndarray | None = None) -> np.ndarray:
        """Return the observations after a reset with `seed`, of all environments or those in `reset_mask` [B]."""
        options = None if reset_mask is None else {"reset_mask": reset_mask}
        returned = self._call("reset", seed=seed, options=options)
        if not (isinstance(returned, tuple) and len(returned) == 2):
            raise EnvError(f"{self.name}: reset() returned {describe(returned)}; gymnasium asks for (obs, info).")
        self.obs_B = self._rows("reset", returned[0])
        self._count_lives(returned[1])
        return self.obs_B

    def step(self, action_B: np.ndarray) -> Step:
        """Return what followed the policy's actions."""
        self._steps_begun += 1
        try:
            return self._step(action_B)
        except Exception as error:
            self._recover(error)
        none_B = np.zeros(self.num_envs, bool)
        return self.obs_B, np.zeros(self.num_envs), none_B, none_B, dict.fromkeys(range(self.num_envs), FAILED)

    def _step(self, action_B: np.ndarray) -> Step:
        env, watchdog, actions = self.env, self._failures.watchdog, self.actions.to_env(action_B)
        try:
            try:  # as Watchdog.run does it: this is the hot loop
                watchdog.call = ("step", 0)
                returned = env.step(actions)
            finally:
                watchdog.call = None
        except Exception as error:
            self._note(error, "step", (actions,))
            raise
        if not self._checked:
            self._check_step(returned)
        obs_B, reward_B, terminated_B, truncated_B, info = returned
        if self.lives_B is not None:
            self._count_lives(info)
        if self._hooks is not None:
            self._hooks.vector_step(np.logical_or(terminated_B, truncated_B), info, self._mode)
        obs_B, final_obs = self._rows("step", obs_B), NO_FINALS
        if not self.resets_on_next_step:
            done_B = np.logical_or(terminated_B, truncated_B)
            if done_B.any():
                obs_B, final_obs = self._restart(obs_B, done_B, info)
        self.obs_B = obs_B
        return obs_B, reward_B, terminated_B, truncated_B, final_obs

    def _restart(
        self, obs_B: np.ndarray, done_B: np.ndarray, info: dict[str, Any]
    ) -> tuple[np.ndarray, dict[int, Any]]:
        """Return the observations after the reset of ended episodes, and their final ones."""
        (ended,) = done_B.nonzero()
        if self._mode is AutoresetMode.SAME_STEP:
            if "final_obs" not in info:
                raise EnvError(
                    f"{self.name} resets in the same step but its info has no 'final_obs', only {sorted(info)}; "
                    "put the last observation of the ended episode there."
                )
            return obs_B, {int(i): self._row(info["final_obs"][i]) for i in ended}
        final_obs = {int(i): obs_B[i].copy() for i in ended}
        kept_B = obs_B.copy()
        kept_B[ended] = self._reset(None, done_B.copy())[ended]
        return kept_B, final_obs

    def record(self, action_T_B: np.ndarray, done_T_B: np.ndarray) -> None:
        """Nothing: the state is in the environment's attributes."""

    def get_state(self) -> State:
        """Return the environment's plain attributes, or why it has none that can be saved."""
        state: State = {
            "kind": "vector",
            "resets": self._resets,
            "rebuilds": list(self._failures.rebuilds),
            "obs": self.obs_B.copy(),
            "env": None,
            "obstacle": None,
            "changes": changes_to_state(self._changes),
        }
        try:
            state["env"] = capture(self.env)
        except CannotCapture as obstacle:
            state["obstacle"] = str(obstacle)
        return state

    def set_state(self, state: State) -> np.ndarray:
        """Return a bool [B]: all True if the environment was restored, all False if it had to be reset."""
        if state["kind"] != "vector" or len(state["obs"]) != self.num_envs:
            raise CheckpointError(
                f"the saved environments are {len(state['obs'])} of kind {state['kind']}, this runner has "
                f"{self.num_envs} of kind vector; resume with the num_envs and vectorization of the saved run."
            )
        self._resets = int(state["resets"])
        self._failures.rebuilds = list(state["rebuilds"])
        obstacle = state["obstacle"]
        self.change(changes_from_state(state.get("changes", ())))
        self.reset()
        if state["env"] is not None:
            try:
                restore(self.env, state["env"])
                self._resets = int(state["resets"])
                self.obs_B = saved_rows(state["obs"], self.layout)
                return np.ones(self.num_envs, bool)
            except CannotCapture as reason:
                obstacle = reason
        log.warning(
            "%s cannot be saved (%s): its %d environments begin new episodes, so this resume is not exact. "
            "vectorization=in_place can be resumed exactly.",
            *(self.name, obstacle, self.num_envs),
        )
        return np.zeros(self.num_envs, bool)

    def close(self) -> None:
        """Close the vector environment."""
        self.env.close()

    def _recover(self, error: Exception) -> None:
        """Begin episodes in a new vector environment in the place of one that failed with `error`, or raise it."""
        renew = partial(self._renew, isinstance(error, EnvTimeout))
        where = f"the vector environment {self.name}"
        self._failures.recover(error, renew, where=where, index=0, step=self._steps_begun)

    def _renew(self, is_stuck: bool) -> None:
        if self._make is not None:
            changes = self._changes
            self._make_anew(is_stuck)
            self._change(changes)
        self._reset_all()

    def _make_anew(self, is_stuck: bool) -> None:
        assert self._make is not None
        close = self.env.close
        if is_stuck and isinstance(self.env.unwrapped, AsyncVectorEnv):
            close = partial(close, terminate=True)  # it would wait for the process that hangs
        self._failures.close(close, f"the vector environment {self.name}", 0)
        self.env = self._failures.watchdog.run("__init__", 0, self._make)
        self._checked = False
        self._changes = ()
        if self._hooks is not None:
            self._hooks.env_created(self.env, self._first)

    def _call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        try:
            return self._failures.watchdog.run(method, 0, getattr(self.env, method), *args, **kwargs)
        except Exception as error:
            self._note(error, method, args or kwargs)
            raise

    def _note(self, error: Exception, method: str, given: Any) -> None:
        error.add_note(f"in {method}() of the vector environment {self.name}, called with {given}")

    def _check_step(self, returned: Any) -> None:
        if not (isinstance(returned, tuple) and len(returned) == 5):
            raise EnvError(
                f"{self.name}: step() returned {describe(returned)}; gymnasium asks for (obs, reward, terminated, "
                "truncated, info)."
            )
        for name, value in zip(("rewards", "terminated", "truncated"), returned[1:4], strict=True):
            if np.shape(value) != (self.num_envs,):
                raise EnvError(
                    f"{self.name}: step() returned {name} of shape {np.shape(value)}; gymnasium asks for one for each "
                    f"of its {self.num_envs} environments."
                )
            if np.asarray(value).dtype.kind not in "biuf":
                raise EnvError(f"{self.name}: step() returned {name} {describe(value)}; gymnasium asks for numbers.")
        self._checked = True

    def _rows(self, method: str, observations: Any) -> np.ndarray:
        """Return a batch of observations as rows; the array itself where it holds rows already."""
        if self.layout.is_verbatim and isinstance(observations, np.ndarray):
            shape, dtype = self.obs_B.shape, self.obs_B.dtype
            if (observations.shape, observations.dtype) == (shape, dtype):
                return observations
        try:
            return self.layout.encode_batch(observations, np.empty_like(self.obs_B))
        except MISFIT as error:
            raise EnvError(
                f"{self.name}: {method}() returned the observations {describe(observations)} ({error}); its "
                f"single_observation_space is {self.observation_space}, of {self.num_envs} environments."
            ) from error

    def _row(self, observation: Any) -> np.ndarray:
        """Return a final observation as a row."""
        return self.layout.encode(observation, np.empty_like(self.obs_B[0]))

    def _count_lives(self, info: dict[str, Any]) -> None:
        if self.lives_B is not None:
            self.lives_B = np.asarray(info["lives"])
