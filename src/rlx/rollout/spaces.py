"""How observations reach the policy and actions reach the environment.

Box observations become float32 (uint8 images stay uint8), Discrete ones become one-hot float32.
The policy's actions are 0-based integers [B] or unclipped float32 [B, A]; only what the environment
receives is shifted, clipped and cast, so that log-probabilities stay those of the stored action.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from gymnasium import spaces

from rlx.errors import EnvError

SUPPORTED = (
    "rlx supports observations of Box with 1 axis (a vector) or 3 axes (an image) and Discrete, "
    "and actions of Discrete and float Box"
)

Space = spaces.Space[Any]


def check_spaces(observation_space: Space, action_space: Space, name: str) -> None:
    """Raise EnvError, naming environment `name`, if rlx cannot serve these spaces."""
    if not isinstance(observation_space, spaces.Discrete) and not (
        isinstance(observation_space, spaces.Box) and len(observation_space.shape) in (1, 3)
    ):
        raise EnvError(
            f"{name} has observation space {observation_space}; {SUPPORTED}. "
            "Wrap the environment, for example with gymnasium.wrappers.FlattenObservation."
        )
    if not isinstance(action_space, spaces.Discrete) and not (
        isinstance(action_space, spaces.Box)
        and np.issubdtype(action_space.dtype, np.floating)
        and len(action_space.shape) > 0
    ):
        raise EnvError(f"{name} has action space {action_space}; {SUPPORTED}. Wrap the environment's actions.")


def encoded_observation_space(space: Space) -> spaces.Box:
    """Return the space of what the policy sees."""
    if isinstance(space, spaces.Discrete):
        return spaces.Box(0.0, 1.0, (int(space.n),), np.float32)
    assert isinstance(space, spaces.Box)
    if len(space.shape) == 3 and space.dtype == np.uint8:
        return space
    with np.errstate(over="ignore"):  # a float64 bound beyond float32 becomes inf, which is what it means
        return spaces.Box(space.low.astype(np.float32), space.high.astype(np.float32), space.shape, np.float32)


def encode_obs(space: Space, obs_N: np.ndarray, out: np.ndarray) -> np.ndarray:
    """Return `out`, filled with observations [N, ...] of `space` as the policy sees them."""
    if isinstance(space, spaces.Discrete):
        index_N = np.asarray(obs_N, np.int64) - int(space.start)
        if index_N.min() < 0 or index_N.max() >= space.n:  # a negative index would pass in silence
            raise EnvError(f"an observation is outside {space}: {obs_N}.")
        out[...] = 0.0
        out[np.arange(len(index_N)), index_N] = 1.0
    else:
        out[...] = obs_N
    return out


def env_action(space: Space) -> Callable[[np.ndarray], np.ndarray]:
    """Return a function from the policy's actions [B] or [B, A] to a new array [B, ...] for the environments."""
    if isinstance(space, spaces.Discrete):
        start = space.start
        return lambda action_B: action_B + start
    assert isinstance(space, spaces.Box)
    shape, dtype = (-1, *space.shape), space.dtype
    if not (np.isfinite(space.low).any() or np.isfinite(space.high).any()):
        return lambda action_B: action_B.astype(dtype).reshape(shape)
    low, high = space.low, space.high
    # minimum of maximum: np.clip costs twice as much on small arrays.
    return lambda action_B: np.minimum(np.maximum(action_B.astype(dtype).reshape(shape), low), high)


def row_of_actions(space: Space) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Return shape and dtype of one of the policy's actions."""
    if isinstance(space, spaces.Discrete):
        return (), np.dtype(np.int64)
    return (int(np.prod(space.shape or ())),), np.dtype(np.float32)


def space_to_state(space: Space) -> dict[str, Any]:
    """Return a supported space as plain values and arrays, for a checkpoint."""
    if isinstance(space, spaces.Discrete):
        return {"kind": "Discrete", "n": int(space.n), "start": int(space.start)}
    assert isinstance(space, spaces.Box)
    return {"kind": "Box", "low": space.low.copy(), "high": space.high.copy(), "dtype": str(space.dtype)}


def space_from_state(state: dict[str, Any]) -> Space:
    """Return the space that `space_to_state` described."""
    if state["kind"] == "Discrete":
        return spaces.Discrete(state["n"], start=state["start"])
    return spaces.Box(state["low"], state["high"], dtype=np.dtype(state["dtype"]).type)
