"""One way to step many environments: `make_envs` returns scalar ones in a loop, or an adapter over a VectorEnv."""

from __future__ import annotations

import importlib
import inspect
import logging
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Protocol

import gymnasium
import numpy as np
from gymnasium.vector import VectorEnv

from rlx.errors import EnvError
from rlx.nets.actions import ActionLayout
from rlx.nets.observation import ObservationLayout, Space
from rlx.rollout.atari import AtariEnv, atari_vector_env, is_atari
from rlx.rollout.choice import processes_if_they_pay
from rlx.rollout.env_changes import Changes
from rlx.rollout.failures import Failures
from rlx.rollout.hooks import EnvHooks
from rlx.rollout.in_place import InPlaceEnvs, State, Step
from rlx.rollout.mujoco_warnings import log_warnings
from rlx.rollout.processes import ProcessEnvs
from rlx.rollout.vector_env import AnyVectorEnv, VectorEnvAdapter

log = logging.getLogger(__name__)

SCALAR = ("in_place", "processes")
EnvSource = str | type | Callable[..., Any] | AnyVectorEnv
"""A gymnasium id, "package.module:Name", an Env or VectorEnv class, a factory of either, or a VectorEnv."""


class Envs(Protocol):
    """B environments that restart by themselves. Arrays they return are good until the next step."""

    name: str
    num_envs: int
    observation_space: Space
    action_space: Space
    layout: ObservationLayout
    actions: ActionLayout
    obs_B: np.ndarray
    """Current observations as rows of `layout`, not normalised."""
    resets_on_next_step: bool
    """True if the step after an episode's end only resets (its row is no transition, and its obs is the final one)."""
    lives_B: np.ndarray | None
    """Lives left in the running episodes, after any reset; None where nobody counts them."""

    def reset(self) -> np.ndarray:
        """Return the first observations of a new episode in every environment."""
        ...

    def step(self, action_B: np.ndarray) -> Step:
        """Return what followed the policy's actions, which are rows of `actions`."""
        ...

    def change(self, changes: Changes) -> None:
        """Have scalar environments changed so when their next episode begins, a vector environment now."""

    def record(self, action_T_B: np.ndarray, done_T_B: np.ndarray) -> None:
        """Remember what `get_state` needs of a finished fragment."""

    def get_state(self) -> State:
        """Return the state between two fragments as plain values and arrays."""
        ...

    def set_state(self, state: State) -> np.ndarray:
        """Return a bool [B]: True where the running episode was restored, False where a new one had to begin."""
        ...

    def begin_at(self, episode: int) -> None:
        """Number the episodes from `episode` on, which decides their seeds; before the first reset."""
        ...

    def close(self) -> None:
        """Release the environments."""


def make_envs(
    env: EnvSource,
    num_envs: int,
    *,
    kwargs: Mapping[str, Any] | None = None,
    vectorization: str = "auto",
    seed: int = 0,
    first_env_index: int = 0,
    failures: Failures | None = None,
    num_processes: int | None = None,
    num_cores: int = 1,
    atari: Mapping[str, Any] | None = None,
    counts_lives: bool = False,
    hooks: EnvHooks | None = None,
) -> Envs:
    """Return `num_envs` environments made from `env`.

    vectorization: "native" takes the vector environment that the id registers, "in_place" steps scalar ones in
    a loop, "processes" in `num_processes` loops of their own (None: one for each of num_cores), "auto" prefers the
    native one where it exists and can be made, and measures which of the others is faster where it may use more than
    one core and `env` is a name. failures: what becomes of an environment that fails; by default its error is raised.
    atari: how Atari games are shown, see `rlx.settings.AtariSection`; None leaves them as gymnasium makes them.
    counts_lives: keep `lives_B`, of environments whose info has lives. hooks: who hears of environments and of the
    ends of episodes.
    """
    source: Any
    source, name = resolve(env)
    if atari is not None and is_atari(source):
        if vectorization in SCALAR:
            source = partial(AtariEnv, source, atari)
        else:
            source = partial(atari_vector_env, source, atari, num_threads=min(num_cores, num_envs))
    options = dict(kwargs or {})
    common = (name, seed, first_env_index)
    failures = failures or Failures(num_envs)
    native: AnyVectorEnv | None = None
    make: Callable[[], Any] | None = None
    if isinstance(source, VectorEnv):
        native = source
    elif isinstance(source, str):
        native = _native(source, num_envs, options, vectorization)
        make = partial(_native, source, num_envs, options, "native")
    elif "num_envs" in _parameters(source):
        make = partial(source, num_envs=num_envs, **options)
        native = make()
        if not isinstance(native, VectorEnv):
            raise EnvError(f"{name} takes num_envs but made a {type(native).__name__}, not a gymnasium VectorEnv.")
    if native is not None:
        return VectorEnvAdapter(native, num_envs, *common, make, failures, counts_lives, hooks)
    make = partial(make_scalar, source, options, name)
    make_many = partial(make_scalars, make, name)
    num_processes = min(num_envs, num_processes or num_cores)
    if vectorization == "processes":
        return ProcessEnvs(make_many, num_envs, num_processes, *common, failures, counts_lives, hooks)
    first = make()
    if isinstance(first, VectorEnv):
        return VectorEnvAdapter(first, num_envs, *common, make, failures, counts_lives, hooks)
    # What is passed in Python may share state with this program, which a scratch one would disturb: only names.
    if vectorization == "auto" and isinstance(env, str) and min(num_processes, num_cores) > 1:
        several = processes_if_they_pay(make_many, num_envs, num_processes, *common, failures, counts_lives, hooks)
        if several is not None:
            first.close()
            return several
    return InPlaceEnvs(make_many(num_envs, first), *common, make, failures, counts_lives, hooks)


def resolve(env: EnvSource) -> tuple[Any, str]:
    """Return what `env` stands for (a gymnasium id, a callable or a VectorEnv) and a name for messages."""
    if not isinstance(env, str):
        if not callable(env) and not isinstance(env, VectorEnv):
            raise EnvError(
                f"{env!r} cannot be used as an environment: give a gymnasium id, 'package.module:Name', a class, "
                "a function that makes one, or a gymnasium VectorEnv."
            )
        return env, getattr(env, "__qualname__", None) or repr(env)
    module, colon, attribute = env.rpartition(":")
    if not colon:
        return env, env
    try:
        found = getattr(importlib.import_module(module), attribute, None)
    except ModuleNotFoundError as error:
        raise EnvError(f"{env}: cannot import {error.name!r}; check the spelling or install the package.") from error
    # gymnasium has the same notation, "module:Id-v0": the module registers the id when it is imported.
    return (env, env) if found is None else resolve(found)


def make_scalar(source: Any, kwargs: Mapping[str, Any], name: str) -> Any:
    """Return one environment from a resolved `source`."""
    if not isinstance(source, str):
        _check_kwargs(source, kwargs, name)
        made = source(**kwargs)
    else:
        try:
            spec = gymnasium.registry.get(source.rpartition(":")[2])
            if spec is not None and str(spec.entry_point).startswith("gymnasium.envs.mujoco"):
                log_warnings()
            made = gymnasium.make(source, disable_env_checker=True, **kwargs)
        except (gymnasium.error.Error, ImportError, TypeError) as error:
            raise EnvError(f"{name} cannot be made: {error}") from error
    if not isinstance(made, (gymnasium.Env, VectorEnv)):
        raise EnvError(f"{name} made a {type(made).__name__}, not a gymnasium.Env or VectorEnv.")
    for space in () if isinstance(made, VectorEnv) else ("observation_space", "action_space"):
        if not hasattr(made, space):
            raise EnvError(f"{name} has no {space}; set it in the class or in __init__, as gymnasium asks.")
    return made


def make_scalars(make: Callable[[], Any], name: str, count: int, *given: Any) -> list[Any]:
    """Return `count` scalar environments, those that are `given` among them."""
    envs = [*given, *(make() for _ in range(count - len(given)))]
    if any(isinstance(env, VectorEnv) for env in envs):
        raise EnvError(f"{name} made a VectorEnv, which steps its environments itself; set vectorization=auto.")
    if len(set(map(id, envs))) < count:
        raise EnvError(f"{name} returned the same environment twice; it must make a new one at every call.")
    return envs


def _native(env_id: str, num_envs: int, kwargs: dict[str, Any], vectorization: str) -> AnyVectorEnv | None:
    """Return the vector environment registered for the id, or None where scalar ones should serve."""
    spec = gymnasium.registry.get(env_id.rpartition(":")[2])
    if vectorization in SCALAR or (vectorization == "auto" and (spec is None or spec.vector_entry_point is None)):
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about autoreset_mode: the adapter checks it, and says what to do
            return gymnasium.make_vec(env_id, num_envs, "vector_entry_point", **kwargs)
    except (gymnasium.error.Error, ImportError, TypeError) as error:
        if vectorization == "native":
            raise EnvError(f"{env_id} has no native vector environment here ({error}); use in_place.") from error
        log.warning("%s: its vector environment cannot be made (%s); stepping scalar ones in place.", env_id, error)
        return None


def _check_kwargs(source: Callable[..., Any], kwargs: Mapping[str, Any], name: str) -> None:
    try:
        signature = inspect.signature(source)
    except ValueError:  # a callable written in C
        return
    try:
        signature.bind(**kwargs)
    except TypeError as error:
        raise EnvError(
            f"{name}{signature} cannot be called with environment.kwargs {dict(kwargs)}: {error}."
        ) from error


def _parameters(source: Any) -> Mapping[str, inspect.Parameter]:
    try:
        return inspect.signature(source).parameters
    except ValueError:  # a callable written in C
        return {}
