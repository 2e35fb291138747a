"""The state of a vector environment as plain values: attributes that are numbers, arrays, strings or generators.

gymnasium has no call for "save your state", but most environments keep theirs in plain attributes. Whatever
is not plain and not known to be constant makes the environment uncapturable, and the reason is said: a state
that is nearly complete would continue on another path, silently.
"""

from __future__ import annotations

import enum
import types
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from gymnasium import spaces
from gymnasium.envs.registration import EnvSpec
from gymnasium.vector import VectorEnv, VectorWrapper

CONSTANT_NAMES = {"env", "metadata", "spec"}
CONSTANT_TYPES = (
    spaces.Space,
    EnvSpec,
    enum.Enum,
    type,
    types.FunctionType,
    types.MethodType,
    types.BuiltinFunctionType,
    types.ModuleType,
)


class CannotCapture(Exception):
    """An attribute is neither plain nor constant; the message names it."""


def capture(env: VectorEnv[Any, Any, Any]) -> list[dict[str, Any]]:
    """Return the attributes of each wrapper level, outermost first; raise CannotCapture."""
    captured = []
    encoder = _Encoder()
    for level in _levels(env):
        attributes = {
            name: encoder.encode(value, f"{type(level).__name__}.{name}")
            for name, value in vars(level).items()
            if name not in CONSTANT_NAMES and not isinstance(value, CONSTANT_TYPES)
        }
        captured.append({"class": type(level).__qualname__, "attributes": attributes})
    return captured


def restore(env: VectorEnv[Any, Any, Any], captured: list[dict[str, Any]]) -> None:
    """Give a freshly reset `env` the captured attributes; raise CannotCapture if it is built otherwise."""
    levels = list(_levels(env))
    classes, saved_classes = [type(level).__qualname__ for level in levels], [level["class"] for level in captured]
    if classes != saved_classes:
        raise CannotCapture(f"it was {saved_classes} and is now {classes}")
    for level, saved in zip(levels, captured, strict=True):
        for name, tree in saved["attributes"].items():
            live = getattr(level, name, None)
            if isinstance(live, np.random.Generator) and isinstance(tree, dict) and "generator" in tree:
                live.bit_generator.state = tree["generator"]  # in place: wrappers may share it
            else:
                setattr(level, name, _decode(tree))


def _levels(env: VectorEnv[Any, Any, Any]) -> Iterator[VectorEnv[Any, Any, Any]]:
    yield env
    while isinstance(env, VectorWrapper):
        env = env.env
        yield env


class _Encoder:
    """Encodes values as JSON types and arrays; what JSON would change is tagged as {kind: content}."""

    def __init__(self) -> None:
        self.arrays: list[np.ndarray] = []
        self.containers: dict[int, Any] = {}

    def encode(self, value: Any, where: str) -> Any:
        """Return the tree of `value`; raise CannotCapture, naming `where`."""
        if value is None or type(value) in (bool, int, float, str):
            return value
        if type(value) is np.ndarray and value.dtype.kind in "biuf" and value.dtype.itemsize <= 8:
            self._refuse_shared(value, where)
            return value.copy()
        if isinstance(value, np.generic) and value.dtype.kind in "biuf":
            return {"scalar": np.array([value])}
        if isinstance(value, np.random.Generator):
            return {"generator": _copy_of_state(value.bit_generator.state)}
        if type(value) in (list, tuple, dict):
            self._refuse_shared(value, where)
            items: Any = list(value.items()) if isinstance(value, dict) else value
            return {type(value).__name__: [self.encode(item, f"{where}[{i}]") for i, item in enumerate(items)]}
        raise CannotCapture(f"{where} is a {type(value).__name__}")

    def _refuse_shared(self, value: Any, where: str) -> None:
        # Two names for one mutable value would become two values.
        if isinstance(value, np.ndarray):
            shared = any(np.may_share_memory(value, other) for other in self.arrays)
            self.arrays.append(value)
        else:
            shared = not isinstance(value, tuple) and id(value) in self.containers
            self.containers[id(value)] = value
        if shared:
            raise CannotCapture(f"{where} shares its memory with another attribute")


def _copy_of_state(state: Mapping[str, Any]) -> dict[str, Any]:
    copied = {}
    for name, value in state.items():
        nested = isinstance(value, dict)
        copied[name] = _copy_of_state(value) if nested else value.copy() if isinstance(value, np.ndarray) else value
    return copied


def _decode(tree: Any) -> Any:
    if isinstance(tree, np.ndarray):
        return tree.copy()
    if not isinstance(tree, dict):
        return tree
    ((kind, content),) = tree.items()
    if kind == "scalar":
        return content[0]
    if kind == "generator":
        bit_generator = getattr(np.random, content["bit_generator"])()
        bit_generator.state = content
        return np.random.Generator(bit_generator)
    items = [_decode(item) for item in content]
    return {"list": list, "tuple": tuple, "dict": dict}[kind](items)
