"""Ref: a value in shared memory that any number of calls may take as an argument, without another copy."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from typing import Any

Bytes = bytes | bytearray | memoryview


class Ref:
    """What `Runtime.put` returns. Inside arguments, at any depth, it arrives in the actor as the value itself.

    The memory is free when the Ref, and every array that was taken from it here or in an actor, are gone.
    """

    __slots__ = ("_body", "_buffers")

    def __init__(self, body: Bytes, buffers: Sequence[Bytes]) -> None:
        self._body, self._buffers = body, buffers

    def get(self) -> Any:
        """Return the value; its arrays are read-only views of the shared memory."""
        return pickle.loads(self._body, buffers=self._buffers)

    def __reduce__(self) -> tuple[Any, ...]:
        body = pickle.PickleBuffer(self._body)  # it may be long, and then lies in shared memory too
        return _arrive, (body, [pickle.PickleBuffer(buffer) for buffer in self._buffers])

    def __repr__(self) -> str:
        return f"<Ref of {len(self._body) + sum(map(len, self._buffers))} bytes>"


def _arrive(body: Bytes, buffers: Sequence[Bytes]) -> Any:
    return pickle.loads(body, buffers=buffers)
