"""How any gymnasium observation becomes one row of numbers, and how the network takes the row apart again.

Every environment's observation is one array of a fixed shape from its border to the learner, so that no tree of
arrays has to be stored, shuffled and sent. What a space becomes:

    Box                                the numbers as float32
    Box of 3 axes; uint8 of 2 or 4     an image, in its own shape and, if uint8, as bytes
    Discrete, MultiDiscrete            one-hot, a group of columns for each number
    MultiBinary                        0.0 and 1.0
    Text                               one-hot for each position up to max_length; all zeros beyond the end
    OneOf                              which one it is, one-hot, and the parts side by side, zeros in all but that one
    Dict, Tuple                        their parts side by side

One image alone is the row, in its shape. Without uint8 images a row is float32 [n]. Otherwise it is bytes: the
floats first, then the images. A Dict's key "action_mask" is no input of the network: it says which actions are legal.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor

from rlx.errors import EnvError

Space = spaces.Space[Any]
Rows = TypeVar("Rows", np.ndarray, Tensor)
Writer = Callable[[Any, np.ndarray], None]
"""write(values of N observations, out [N, size]); ValueError, TypeError or IndexError where values do not fit."""

MASK_KEY = "action_mask"
MIN_IMAGE_SIDE = 8
"""Of a uint8 Box with 2 or 4 axes; anything smaller is a table, not a picture."""
FLOAT_BYTES = 4
MISFIT = (ValueError, TypeError, KeyError, IndexError)
"""What `ObservationLayout.encode` raises for a value that is not of the space."""


@dataclass(frozen=True, eq=False)
class Leaf:
    """One basic space of an observation, and where it lies: `start` counts the row's floats, of pixels its bytes."""

    path: tuple[str | int, ...]
    space: Space
    size: int
    write: Writer
    start: int = 0

    @property
    def name(self) -> str:
        """The path with dots; empty for a space that is no Dict or Tuple."""
        return ".".join(map(str, self.path))

    @property
    def stop(self) -> int:
        """Where it ends."""
        return self.start + self.size

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape in which the network sees it: a Box's own, else flat; never without an axis."""
        return self.space.shape or (1,) if isinstance(self.space, spaces.Box) else (self.size,)

    def of(self, observation: Any) -> Any:
        """Return this leaf's part of an observation, or of a batch of them."""
        for key in self.path:
            observation = observation[key]
        return observation


class Parts(NamedTuple):
    """What a row holds, as views of it."""

    vector: Tensor | None
    """float32 [..., n]: everything but images and the mask; None if there is nothing else."""
    images: dict[str, Tensor]
    """By name, [..., *shape], uint8 or float32."""
    mask: Tensor | None
    """float32 [..., m]: 1.0 where a choice is legal; None if every choice always is."""


class ObservationLayout:
    """Where the parts of an observation lie in its row; EnvError for a space that has no fixed size."""

    def __init__(self, space: Space) -> None:
        self.space = space
        inputs, masks = [], []
        for leaf in _leaves(space):
            (masks if leaf.path[:1] == (MASK_KEY,) else inputs).append(leaf)
        for leaf in masks:
            if not isinstance(leaf.space, spaces.Box | spaces.MultiBinary | spaces.MultiDiscrete):
                raise EnvError(f"the observation's {leaf.name!r} is {leaf.space}; masks are of MultiBinary or Box.")
        images = [leaf for leaf in inputs if _is_image(leaf.space)]
        pixels = [leaf for leaf in images if leaf.space.dtype == np.uint8]
        # What a normaliser may touch comes first, and what the vector consists of stands together.
        pictures = [leaf for leaf in images if leaf not in pixels]
        boxes = [leaf for leaf in inputs if isinstance(leaf.space, spaces.Box) and leaf not in images]
        codes = [leaf for leaf in inputs if not isinstance(leaf.space, spaces.Box)]
        self._floats = _placed([*pictures, *boxes, *codes, *masks], 0)
        self.num_floats = sum(leaf.size for leaf in self._floats)
        self.num_scalable = sum(leaf.size for leaf in (*pictures, *boxes))
        """How many of the floats, from the first on, are numbers of a Box: those that may be normalised."""
        self.mask_size = sum(leaf.size for leaf in masks)
        self.mask_parts = [(leaf.path[1:], leaf.size) for leaf in masks]
        """Path below the mask's key and number of entries of each part of the mask."""
        self.vector_size = sum(leaf.size for leaf in (*boxes, *codes))
        self._pixels = _placed(pixels, FLOAT_BYTES * self.num_floats)
        self.images = {leaf.name: leaf for leaf in (*self._floats[: len(pictures)], *self._pixels)}
        self.is_one_image = len(images) == 1 and not self.vector_size and not self.mask_size
        self.shape, self.dtype = self._row()
        self.is_verbatim = isinstance(space, spaces.Box) and space.shape == self.shape
        """Whether an observation is its own row, but for the type of its numbers."""
        if self.num_floats + len(pixels) == self.mask_size:
            raise EnvError(f"the observation space {space} holds no number that a policy could look at.")

    def encode(self, observation: Any, out: np.ndarray) -> np.ndarray:
        """Return `out` [*shape], filled with one observation; an error of MISFIT where it does not fit."""
        for leaf, target in self._targets(out[None]):
            leaf.write((leaf.of(observation),), target)
        return out

    def encode_batch(self, observations: Any, out: np.ndarray) -> np.ndarray:
        """Return `out` [N, *shape], filled with observations as gymnasium's vector environments batch them."""
        for leaf, target in self._targets(out):
            values = leaf.of(observations)
            if len(values) != len(out):
                raise ValueError(f"{len(values)} observations in place of {len(out)}")
            leaf.write(values, target)
        return out

    def floats(self, rows: Rows) -> Rows:
        """Return the float32 numbers in rows [..., *shape] as a view [..., num_floats]."""
        flat = rows.reshape(*rows.shape[: rows.ndim - len(self.shape)], -1)
        if self.dtype == np.float32 or not self.num_floats:
            return flat[..., : self.num_floats]
        return flat[..., : FLOAT_BYTES * self.num_floats].view(_FLOAT32[type(rows)])

    def scalable(self, rows: Rows) -> Rows:
        """Return, as a view of rows, the numbers that may be normalised; of one image, in its shape."""
        if self.is_one_image:
            return rows
        return self.floats(rows)[..., : self.num_scalable]

    def inputs(self, rows: Rows) -> Rows:
        """Return rows as the encoder takes them: a vector without its mask, and anything else as it is."""
        return rows if self.images or not self.mask_size else rows[..., : self.vector_size]

    def mask(self, rows: Rows) -> Rows | None:
        """Return which choices are legal, 1.0 or 0.0 [..., mask_size]; None if there is no mask."""
        return self.floats(rows)[..., self.num_floats - self.mask_size :] if self.mask_size else None

    def split(self, rows: Tensor) -> Parts:
        """Return views of the parts of rows [..., *shape]."""
        floats = self.floats(rows)
        end = self.num_floats - self.mask_size
        vector = floats[..., end - self.vector_size : end] if self.vector_size else None
        return Parts(vector, {name: self._view(leaf, rows) for name, leaf in self.images.items()}, self.mask(rows))

    def tree(self, rows: Tensor) -> Any:
        """Return the observation that rows stand for: a tensor, or for Dict and Tuple a dict or tuple of them.

        Images and Boxes have their shape, all else is float32 [..., n] as written above; without the mask.
        """
        leaves = {leaf.path: leaf for leaf in (*self._floats, *self._pixels)}

        def build(space: Space, path: tuple[str | int, ...]) -> Any:
            if isinstance(space, spaces.Dict):
                keys = [key for key in space.spaces if (*path, key) != (MASK_KEY,)]
                return {key: build(space[key], (*path, key)) for key in keys}
            if isinstance(space, spaces.Tuple):
                return tuple(build(part, (*path, number)) for number, part in enumerate(space.spaces))
            return self._view(leaves[path], rows)

        return build(self.space, ())

    def num_observations(self, observations: Any) -> int | None:
        """Return how many observations a batch holds, None for a single one; ValueError if it is neither."""
        leaf = (*self._floats, *self._pixels)[0]
        values = leaf.of(observations)
        if isinstance(leaf.space, spaces.Text):
            return None if isinstance(values, str) else len(values)
        if isinstance(leaf.space, spaces.OneOf):
            return None if isinstance(values[0], (int, np.integer)) else len(values)
        shape, own = np.shape(values), leaf.space.shape or ()
        if shape != own and shape[1:] != own:
            where = f" at {leaf.name!r}" if leaf.path else ""
            raise ValueError(f"an observation of shape {shape} was given{where}; allowed are {own} or (N, *{own}).")
        return None if shape == own else shape[0]

    def __reduce__(self) -> tuple[Any, ...]:
        """Travel as the space alone."""
        return type(self), (self.space,)

    def __repr__(self) -> str:
        """What the policy sees, in a line."""
        parts = [f"{self.vector_size} number{'s' * (self.vector_size > 1)}"] if self.vector_size else []
        parts += [
            f"image {name} {leaf.shape} {leaf.space.dtype}".replace("  ", " ") for name, leaf in self.images.items()
        ]
        parts += [f"mask of {self.mask_size} choices"] if self.mask_size else []
        return f"{self.dtype} {list(self.shape)}: {', '.join(parts)}"

    def _row(self) -> tuple[tuple[int, ...], np.dtype]:
        """Return the shape and the type of a row."""
        if self.is_one_image:
            (image,) = self.images.values()
            return image.shape, np.dtype(np.uint8 if self._pixels else np.float32)
        if not self._pixels:
            return (self.num_floats,), np.dtype(np.float32)
        num_bytes = self._pixels[-1].stop
        return (num_bytes + -num_bytes % FLOAT_BYTES,), np.dtype(np.uint8)

    def _targets(self, rows: np.ndarray) -> Iterator[tuple[Leaf, np.ndarray]]:
        """Yield every leaf with its columns in rows [N, *shape]."""
        floats = self.floats(rows)
        for leaf in self._floats:
            yield leaf, floats[:, leaf.start : leaf.stop]
        flat = rows.reshape(len(rows), -1)
        for leaf in self._pixels:
            yield leaf, flat[:, leaf.start : leaf.stop]
        if self._pixels and not self.is_one_image:
            flat[:, self._pixels[-1].stop :] = 0

    def _view(self, leaf: Leaf, rows: Tensor) -> Tensor:
        flat = rows.flatten(rows.ndim - len(self.shape)) if leaf in self._pixels else self.floats(rows)
        return flat[..., leaf.start : leaf.stop].unflatten(-1, leaf.shape)


_FLOAT32: dict[type, Any] = {np.ndarray: np.float32, Tensor: torch.float32}


def _is_image(space: Space) -> bool:
    if not isinstance(space, spaces.Box):
        return False
    shape = space.shape
    return len(shape) == 3 or (space.dtype == np.uint8 and len(shape) in (2, 4) and sorted(shape)[-2] >= MIN_IMAGE_SIDE)


def _placed(leaves: list[Leaf], start: int) -> list[Leaf]:
    """Return the leaves one after another from `start` on."""
    ends = np.cumsum([start, *(leaf.size for leaf in leaves)]).tolist()
    return [replace(leaf, start=begin) for leaf, begin in zip(leaves, ends, strict=False)]


def _leaves(space: Space, path: tuple[str | int, ...] = ()) -> Iterator[Leaf]:
    """Yield the basic spaces in the space's own order; EnvError for one without a fixed size."""
    if isinstance(space, spaces.Dict | spaces.Tuple):
        parts = space.spaces.items() if isinstance(space, spaces.Dict) else enumerate(space.spaces)
        for key, part in parts:
            yield from _leaves(part, (*path, key))
        return
    try:
        yield Leaf(path, space, *_writer(space, is_mask=path[:1] == (MASK_KEY,)))
    except _NoFixedSize as error:
        where = f", at {'.'.join(map(str, path))!r}," if path else ""
        raise EnvError(
            f"the observation space{where} holds {type(error.args[0]).__name__}, whose values have no fixed size; wrap "
            "the environment with gymnasium.wrappers.TransformObservation and pad them into a Box."
        ) from None


class _NoFixedSize(Exception):
    """The space in args[0] cannot become a row."""


def _writer(space: Space, is_mask: bool = False) -> tuple[int, Writer]:
    """Return how many numbers a basic space becomes, and the function that writes them."""
    if isinstance(space, spaces.Box | spaces.MultiBinary):
        return math.prod(space.shape), _mask_writer(space.shape) if is_mask else _number_writer(space.shape)
    if isinstance(space, spaces.Discrete):
        return int(space.n), _discrete_writer(int(space.n), int(space.start))
    if isinstance(space, spaces.MultiDiscrete):
        if is_mask:
            return space.nvec.size, _mask_writer(space.nvec.shape)
        return int(space.nvec.sum()), _one_hot_writer(space.nvec.ravel(), space.start.ravel())
    if isinstance(space, spaces.Text):
        return space.max_length * len(space.character_set), _text_writer(space)
    if isinstance(space, spaces.OneOf):
        return _one_of_writer(space)
    raise _NoFixedSize(space)


def _number_writer(shape: tuple[int, ...]) -> Writer:
    def write(values: Any, out: np.ndarray) -> None:
        values = np.asarray(values)
        if values.shape[1:] != shape or values.dtype.kind not in "fiub":
            raise ValueError(f"shape {values.shape[1:]} and dtype {values.dtype} in place of shape {shape}")
        out[...] = values.reshape(out.shape)

    return write


def _mask_writer(shape: tuple[int, ...]) -> Writer:
    write_numbers = _number_writer(shape)

    def write(values: Any, out: np.ndarray) -> None:
        write_numbers(np.asarray(values) != 0, out)

    return write


def _discrete_writer(size: int, start: int) -> Writer:
    def write(values: Any, out: np.ndarray) -> None:
        out[...] = 0.0
        for value, row in zip(values, out, strict=True):  # for one observation three times faster than arrays
            index = operator.index(value) - start
            if not 0 <= index < size:  # a negative index would pass in silence
                raise ValueError(f"{value} is outside of the space")
            row[index] = 1.0

    return write


def _one_hot_writer(sizes: np.ndarray, starts: np.ndarray) -> Writer:
    firsts = np.cumsum(sizes) - sizes

    def write(values: Any, out: np.ndarray) -> None:
        values = np.asarray(values)
        if values.dtype.kind not in "iub":
            raise ValueError(f"dtype {values.dtype} in place of integers")
        index = values.reshape(len(out), len(sizes)).astype(np.int64) - starts
        if (index < 0).any() or (index >= sizes).any():
            raise ValueError(f"{values} is outside of the space")
        out[...] = 0.0
        np.put_along_axis(out, index + firsts, 1.0, axis=-1)

    return write


def _text_writer(space: spaces.Text) -> Writer:
    # Sorted: of a charset given as a set, gymnasium's order may differ from process to process.
    columns = {character: column for column, character in enumerate(sorted(space.character_set))}

    def write(values: Any, out: np.ndarray) -> None:
        out[...] = 0.0
        for text, row in zip(values, out, strict=True):
            for position, character in enumerate(text):
                row[position * len(columns) : (position + 1) * len(columns)][columns[character]] = 1.0

    return write


def _one_of_writer(space: spaces.OneOf) -> tuple[int, Writer]:
    try:
        sizes = [spaces.flatdim(part) for part in space.spaces]
    except (ValueError, NotImplementedError):  # of a Sequence or a Graph within
        raise _NoFixedSize(space) from None
    ends = np.cumsum([len(sizes), *sizes]).tolist()

    def write(values: Any, out: np.ndarray) -> None:
        out[...] = 0.0
        for (number, value), row in zip(values, out, strict=True):
            row[: len(sizes)][number] = 1.0
            row[ends[number] : ends[number + 1]] = spaces.flatten(space.spaces[number], value)

    return ends[-1], write
