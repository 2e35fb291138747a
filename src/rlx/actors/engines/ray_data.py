"""Values that actors on Ray share: messages with references among their arguments, `put`, and channels."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Sequence
from contextvars import ContextVar
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import ray
from ray.exceptions import RayActorError

from rlx.actors.channel import Published, Staleness
from rlx.actors.context import current_call
from rlx.actors.engines import pickling
from rlx.actors.engines.pickling import Message
from rlx.actors.engines.publisher import checked
from rlx.actors.ref import Ref
from rlx.errors import ActorError, NotSupported

NAMESPACE = "rlx"
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


def as_arrays(buffers: Any) -> list[Any]:
    """Return buffers as arrays of bytes, which Ray shares between the processes of a machine without a copy."""
    return [np.frombuffer(buffer, np.uint8) for buffer in buffers]


class RayRef(Ref):
    """A value in Ray's object store."""

    __slots__ = ("object",)

    def __init__(self, message: Message) -> None:
        self.object = ray.put(message)

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


def message_of(value: Any, what: str) -> Message:
    """Return a value as Ray can keep it."""
    body, buffers = pickling.dumps(value, what)
    return bytes(body), as_arrays(buffers)


def _value_of(key: str) -> Any:
    return pickling.loads(_values.get()[key])


class RayChannel:
    """The newest version of a value, kept by an actor, the board; values are in Ray's object store.

    The board is asked once a call: what was published before a call is seen in it. What comes while the call runs is
    told by an answer that was asked for before, so that to look for it costs nothing.
    """

    _here: ClassVar[dict[tuple[str, str], RayChannel]] = {}

    def __init__(self, name: str, board_name: str, board: Any, is_drivers: bool) -> None:
        self.name, self._board_name, self._board, self._is_drivers = name, board_name, board, is_drivers
        call = current_call.get()
        self._reader = call[0] if call is not None else "the driver", os.getpid()
        self._lock = threading.Lock()
        self._count, self._last = 0, None
        self._news: Any = None  # done once there is something newer than `_last`
        self._asked_in: Any = None  # which call

    @classmethod
    def arrive(cls, name: str, board_name: str) -> RayChannel:
        """Return this process' end of a channel."""
        if (name, board_name) not in cls._here:
            try:
                board = ray.get_actor(board_name, namespace=NAMESPACE)
            except ValueError as error:  # Ray knows no such actor
                raise _gone(name) from error
            cls._here[name, board_name] = cls(name, board_name, board, is_drivers=False)
        return cls._here[name, board_name]

    def publish(self, value: Any, version: int | None = None) -> int:
        """Make `value` the newest version, and return its number: `version`, or one more than the last, from 1 on."""
        if version is not None:
            checked(version)
        message = message_of(value, f"the value of channel {self.name!r}")
        # What the driver owns is there as long as the runtime; what an actor owns is lost with it.
        sent = [ray.put(message)] if self._is_drivers else message
        return self._ask(self._board.publish.remote(self.name, version, time.time(), sent))

    def latest(self) -> Published | None:
        """Return the newest version, the same object while there is no newer one; None before the first."""
        call = current_call.get()
        if call is None or call is not self._asked_in or self._news.done():
            with self._lock:
                self._look()
                self._asked_in = call
        return self._last

    def readers(self) -> dict[str, Staleness]:
        """Return how far behind each reader is, by its name."""
        found: Any = self._ask(self._board.readers.remote(self.name, time.time()))
        return {name: Staleness(*values) for name, values in found.items()}

    def close(self) -> None:
        """Nothing to let go of: the board has it."""

    def _look(self) -> None:
        found = self._ask(self._board.newest.remote(self.name, self._reader, self._count, time.time()))
        if found is not None:
            count, version, (reference,), at = found
            value = pickling.loads(self._ask(reference))
            age_s = max(0.0, time.time() - at)  # by the clocks of two machines
            self._last, self._count = Published(version, value, time.monotonic() - age_s), count
        if found is not None or self._news is None:
            self._news = self._board.wait.remote(self.name, self._count).future()

    def _ask(self, answer: Any) -> Any:
        try:
            return ray.get(answer)
        except RayActorError as error:
            raise _gone(self.name) from error

    def __reduce__(self) -> tuple[Any, ...]:
        return RayChannel.arrive, (self.name, self._board_name)


def _gone(name: str) -> ActorError:
    return ActorError(f"channel {name!r} is gone: the Ray actor that keeps it has ended; open a new runtime.")
