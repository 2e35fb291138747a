"""Ref: a value in shared memory that any number of calls may take as an argument, without another copy."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from typing import Any

Bytes = bytes | bytearray | memoryview
ALIGN_BYTES = 64  # of every part: a cache line, and the widest vector registers


class Ref:
    """What `Runtime.put` returns. Inside arguments, at any depth, it arrives in the actor as the value itself.

    The memory is free when the Ref, and every array that was taken from it here or in an actor, are gone.
    """

    __slots__ = ("_spans", "_whole")

    def __init__(self, whole: Bytes, spans: Sequence[tuple[int, int]]) -> None:
        """Refer to a message whose body and buffers lie at these (start, size) of `whole`.

        It travels as one buffer however many arrays are in it: one place in a frame, one lease, one view.
        """
        self._whole, self._spans = whole, tuple(spans)

    @classmethod
    def to_copy_of(cls, parts: Sequence[Bytes]) -> Ref:
        """Return a Ref to body and buffers, copied to memory of this process."""
        whole, spans = bytearray(), []
        for part in parts:
            spans.append((len(whole), len(part)))
            whole += part
            whole += bytes(-len(whole) % ALIGN_BYTES)
        return cls(bytes(whole), spans)

    def get(self) -> Any:
        """Return the value; its arrays are read-only views of the shared memory."""
        return _arrive(self._whole, self._spans)

    def __reduce__(self) -> tuple[Any, ...]:
        return _arrive, (pickle.PickleBuffer(self._whole), self._spans)

    def __repr__(self) -> str:
        return f"<Ref of {sum(size for _, size in self._spans)} bytes>"


def _arrive(whole: Bytes, spans: Sequence[tuple[int, int]]) -> Any:
    view = memoryview(whole)
    body, *buffers = [view[start : start + size] for start, size in spans]
    return pickle.loads(body, buffers=buffers)
