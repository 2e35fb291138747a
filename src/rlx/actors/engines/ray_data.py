"""Values that actors on Ray share: messages with references among their arguments, `put`, and channels."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from contextvars import ContextVar
from functools import cached_property
from typing import Any, ClassVar

import ray

from rlx.actors.channel import Published, Staleness
from rlx.actors.engines import pickling
from rlx.actors.engines.pickling import Message
from rlx.actors.engines.publisher import checked
from rlx.actors.ref import Ref
from rlx.errors import ActorError, NotSupported

INLINE_BYTES = 64 * 1024
"""Buffers of fewer bytes travel with the call; larger ones are put into Ray's object store, once for all receivers."""
_values: ContextVar[dict[str, Message]] = ContextVar("rlx_ray_values")
"""What the references in a message have arrived as, by their keys."""


class Parcel:
    """A message on its way to one or many actors."""

    def __init__(self, value: Any, what: str) -> None:
        (body, buffers), met = pickling.dumps_with_channels(value, what)
        self._body, self._buffers = bytes(body), buffers
        self._refs = {one.object.hex(): one for one in met if isinstance(one, RayRef)}

    @cached_property
    def arguments(self) -> tuple[Any, ...]:
        """What Ray is given: body, buffers, keys of references, and these, which arrive as the values behind them."""
        from rlx.actors.engines.ray_host import as_arrays

        arrays = as_arrays(self._buffers)
        is_large = sum(map(len, arrays)) >= INLINE_BYTES
        # A copy either way: the caller may change what it has sent.
        sent: Any = ray.put(arrays) if is_large else [array.copy() for array in arrays]
        return self._body, sent, list(self._refs), *(ref.object for ref in self._refs.values())


def arrived(body: bytes, buffers: Sequence[Any], keys: Sequence[str], *values: Message) -> Any:
    """Return the object of a message whose references have arrived as these values."""
    token = _values.set(dict(zip(keys, values, strict=True)))
    try:
        return pickling.loads((body, buffers))
    finally:
        _values.reset(token)


class RayRef(Ref):
    """A value in Ray's object store."""

    __slots__ = ("object",)

    def __init__(self, value: Any) -> None:
        from rlx.actors.engines.ray_host import as_arrays

        body, buffers = pickling.dumps(value, "the value")
        self.object = ray.put((bytes(body), as_arrays(buffers)))

    def get(self) -> Any:
        """Return the value; its arrays are read-only."""
        return pickling.loads(ray.get(self.object))

    def __reduce__(self) -> tuple[Any, ...]:
        key = self.object.hex()
        try:
            pickling.met_channels.get()[key] = self
        except LookupError:
            raise NotSupported("what put() returns can be sent to an actor only, as an argument.") from None
        return _value_of, (key,)

    def __repr__(self) -> str:
        return f"<RayRef {self.object.hex()[:8]}>"


def _value_of(key: str) -> Any:
    return pickling.loads(_values.get()[key])


class RayChannel:
    """The newest version of a value, kept by an actor of its own; values are in Ray's object store."""

    _here: ClassVar[dict[str, RayChannel]] = {}

    def __init__(self, name: str, board: str, namespace: str, keeper: Any = None) -> None:
        self.name = name
        self._board_name, self._namespace = board, namespace
        self._board = ray.get_actor(board, namespace=namespace) if keeper is None else keeper
        self._reader = f"{ray.util.get_node_ip_address()}:{os.getpid()}"
        self._count, self._last = 0, None

    @classmethod
    def arrive(cls, name: str, board: str, namespace: str) -> RayChannel:
        """Return this process' end of a channel."""
        if board not in cls._here:
            cls._here[board] = cls(name, board, namespace)
        return cls._here[board]

    def publish(self, value: Any, version: int | None = None) -> int:
        """Make `value` the newest version, and return its number: `version`, or one more than the last, from 1 on."""
        if version is not None:
            checked(version)
        reference = RayRef(value).object
        return ray.get(self._board.publish.remote(version, [reference], time.time()))

    def latest(self) -> Published | None:
        """Return the newest version, the same object while there is no newer one; None before the first."""
        found = ray.get(self._board.newest.remote(self._reader, self._count, time.time()))
        if found is not None:
            self._count, version, (reference,), at = found
            age_s = max(0.0, time.time() - at)  # by the clocks of two machines
            self._last = Published(version, pickling.loads(ray.get(reference)), time.monotonic() - age_s)
        return self._last

    def readers(self) -> dict[str, Staleness]:
        """Return how far behind each reader is: by machine and process."""
        found: Any = ray.get(self._board.readers.remote(time.time()))
        return {name: Staleness(*values) for name, values in found.items()}

    def close(self) -> None:
        """End the actor that keeps it."""
        type(self)._here.pop(self._board_name, None)
        try:
            ray.kill(self._board)
        except Exception as error:
            raise ActorError(f"channel {self.name!r} cannot be closed: {error}") from error

    def __reduce__(self) -> tuple[Any, ...]:
        return RayChannel.arrive, (self.name, self._board_name, self._namespace)
