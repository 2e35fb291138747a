"""How an action of any gymnasium space becomes one row of numbers, and how the environment gets it back.

    Discrete                      one integer from 0 on: int64, no axis of its own
    Box of floats                 its numbers as float32 [A], as sampled: what the environment gets is clipped
    MultiDiscrete, MultiBinary    one integer for each part, from 0 on
    Box of integers               one integer for each number, counted from its lowest value
    Dict, Tuple                   the integers of all parts, then the floats of all parts

Several integers are int64 [K]; integers beside floats are float32 [K + A], which holds them exactly.
Only what the environment receives is shifted, clipped and cast, so log-probabilities stay those of the row.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from gymnasium import spaces

from rlx.errors import EnvError

Space = spaces.Space[Any]
Convert = Callable[[np.ndarray], Any]
"""From rows [B, ...] to a batch of the environment's actions, as gymnasium's vector environments take them."""

MAX_INTEGERS = 1024
"""Values of one number in a Box of integers: beyond this its order matters more than its values."""
MAX_EXACT = 1 << 24
"""float32 holds every integer up to here."""


class ActionLayout:
    """What a policy chooses for one action of a space; EnvError for a space that has no fixed number of choices."""

    def __init__(self, space: Space) -> None:
        self.space = space
        self.sizes: list[int] = []
        """How many choices each integer has."""
        self.num_floats = 0
        self.parts: list[tuple[tuple[str | int, ...], int]] = []
        """Path and number of choices of each part that is chosen: what a mask of the same structure has."""
        converters = self._converters(space, ())
        if not self.sizes and not self.num_floats:
            raise EnvError(f"the action space {space} leaves nothing to choose.")
        self.is_discrete, is_mixed = isinstance(space, spaces.Discrete), bool(self.sizes and self.num_floats)
        if is_mixed and max(self.sizes) > MAX_EXACT:
            raise EnvError(f"the action space {space} has more than {MAX_EXACT} choices beside floats; split them up.")
        self.shape = () if self.is_discrete else (len(self.sizes) + self.num_floats,)
        self.dtype = np.dtype(np.float32 if self.num_floats else np.int64)
        self.to_env: Convert = converters(len(self.sizes))
        """From rows [B, *shape] to a batch of actions, in new arrays."""
        self._is_array = bool(space.shape) or self.is_discrete  # else indexing would not give single actions

    def each(self, rows: np.ndarray) -> Sequence[Any]:
        """Return the environment's action for each of rows [B, *shape]."""
        batch = self.to_env(rows)
        return batch if self._is_array else [_one(self.space, batch, number) for number in range(len(rows))]

    def is_stuck(self, legal: np.ndarray) -> np.ndarray:
        """Return a bool [...]: True where a mask [..., sum(sizes)] leaves some integer without a legal choice."""
        firsts = np.cumsum([0, *self.sizes[:-1]])
        return (np.add.reduceat(legal != 0, firsts, axis=-1) == 0).any(-1)

    def __reduce__(self) -> tuple[Any, ...]:
        """Travel as the space alone."""
        return type(self), (self.space,)

    def __repr__(self) -> str:
        """What is chosen, in a line."""
        parts = [f"1 of {self.sizes[0]}"] if len(self.sizes) == 1 else []
        parts += [f"{len(self.sizes)} choices, 1 of {self.sizes} each"] if len(self.sizes) > 1 else []
        parts += [f"{self.num_floats} number{'s' * (self.num_floats > 1)}"] if self.num_floats else []
        return f"{self.dtype} {list(self.shape)}: {' and '.join(parts)}"

    def _converters(self, space: Space, path: tuple[str | int, ...]) -> Callable[[int], Convert]:
        """Count the parts of `space`; return the function from the number of all integers to its converter.

        Floats stand behind all integers, so where they lie is known once everything is counted.
        """
        if isinstance(space, spaces.Dict):
            named = {key: self._converters(part, (*path, key)) for key, part in space.spaces.items()}
            return lambda count: _dict_converter({key: make(count) for key, make in named.items()})
        if isinstance(space, spaces.Tuple):
            parts = [self._converters(part, (*path, number)) for number, part in enumerate(space.spaces)]
            return lambda count: _tuple_converter([make(count) for make in parts])
        if isinstance(space, spaces.Box) and np.issubdtype(space.dtype, np.floating):
            first = self.num_floats
            self.num_floats += math.prod(space.shape)
            columns = None if not path else (first, self.num_floats)
            return lambda count: _float_converter(space, columns and slice(count + columns[0], count + columns[1]))
        first, (sizes, lowest) = len(self.sizes), _choices(space, path)
        self.sizes += sizes.ravel().tolist()
        self.parts.append((path, int(sizes.sum())))
        if not path and isinstance(space, spaces.Discrete):
            return lambda count: lambda action_B: action_B + space.start
        last = len(self.sizes)
        return lambda count: _integer_converter(space, slice(first, last), lowest)


def _choices(space: Space, path: tuple[str | int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Return the number of choices of each integer of a basic space, and its lowest value."""
    if isinstance(space, spaces.Discrete):
        return np.array(space.n), np.array(space.start)
    if isinstance(space, spaces.MultiDiscrete):
        return space.nvec, space.start
    if isinstance(space, spaces.MultiBinary):
        return np.full(space.shape, 2), np.zeros(space.shape, np.int64)
    where = f", at {'.'.join(map(str, path))!r}," if path else ""
    if not isinstance(space, spaces.Box):
        raise EnvError(
            f"the action space{where} is {type(space).__name__}, which has no fixed number of choices; wrap the "
            "environment with gymnasium.wrappers.TransformAction and let it take Discrete or Box parts."
        )
    # As Python's integers: the range of int64 does not fit into int64.
    ranges = [int(high) - int(low) + 1 for low, high in zip(space.low.ravel(), space.high.ravel(), strict=True)]
    if max(ranges, default=0) > MAX_INTEGERS:
        raise EnvError(
            f"the action space{where} is a Box of integers with {max(ranges)} values, and rlx chooses among at most "
            f"{MAX_INTEGERS}; narrow its bounds, or make it a Box of floats that the environment rounds."
        )
    return np.array(ranges).reshape(space.shape), space.low.astype(np.int64)


def _integer_converter(space: Space, columns: slice, lowest: np.ndarray) -> Convert:
    shape, dtype = (-1, *lowest.shape), space.dtype
    return lambda rows: (rows[:, columns].astype(np.int64).reshape(shape) + lowest).astype(dtype)


def _float_converter(space: spaces.Box, columns: slice | None) -> Convert:
    shape, dtype = (-1, *space.shape), space.dtype

    def shaped(rows: np.ndarray) -> np.ndarray:
        return (rows if columns is None else rows[:, columns]).astype(dtype).reshape(shape)

    if not (np.isfinite(space.low).any() or np.isfinite(space.high).any()):
        return shaped
    low, high = space.low, space.high
    # minimum of maximum: np.clip costs twice as much on small arrays.
    return lambda rows: np.minimum(np.maximum(shaped(rows), low), high)


def _dict_converter(parts: dict[str, Convert]) -> Convert:
    return lambda rows: {key: convert(rows) for key, convert in parts.items()}


def _tuple_converter(parts: list[Convert]) -> Convert:
    return lambda rows: tuple(convert(rows) for convert in parts)


def _one(space: Space, batch: Any, number: int) -> Any:
    """Return action `number` of a batch."""
    if isinstance(space, spaces.Dict):
        return {key: _one(part, batch[key], number) for key, part in space.spaces.items()}
    if isinstance(space, spaces.Tuple):
        return tuple(_one(part, values, number) for part, values in zip(space.spaces, batch, strict=True))
    return batch[number, ...] if isinstance(space, spaces.Box) else batch[number]
