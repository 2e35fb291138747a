"""What runs in a process of Ray: one actor of rlx, and the newest version of each channel.

Messages are rlx's own, so an error, a tensor or a local class arrives as it does on any engine; Ray moves bytes. A
method answers with a tuple (kind, text, message), for what Ray does to exceptions loses the exception's own type.
"""

from __future__ import annotations

import asyncio
import inspect
import os
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import ray

from rlx.actors.context import current_call
from rlx.actors.engines import pickling
from rlx.actors.engines.pickling import Message
from rlx.actors.engines.ray_data import arrived

VALUE, ERROR, EXIT, END = "value", "error", "exit", "end"
Reply = tuple[str, str, Message]
"""EXIT has the code as its text; END is that of a stream; else the message is the value or the exception."""
WATCH = "watch"
"""The concurrency group of the call that never returns, by whose end the driver hears of a death."""


class Host:
    """An actor whose methods run one after another, or in `max_concurrency` threads."""

    def __init__(self, name: str, env: dict[str, str], threads: int) -> None:
        os.environ.update(env)
        if "torch" in sys.modules:
            import torch

            torch.set_num_threads(threads)
        else:
            os.environ["OMP_NUM_THREADS"] = str(threads)
        self._name = name
        self._instance: Any = None
        self._streams: dict[int, Any] = {}

    @ray.method(concurrency_group=WATCH)
    def live(self) -> None:
        """Never return."""
        threading.Event().wait()

    def make(self, *arguments: Any) -> Reply:
        """Make the object; the value is the process id."""

        def make() -> int:
            maker, args, kwargs = arrived(*arguments)
            self._instance = maker(*args, **kwargs)
            return os.getpid()

        return self._answer("__init__", make)

    def run(self, method: str, *arguments: Any) -> Reply:
        """Call a method."""
        return self._answer(method, lambda: self._finished(self._call(method, arguments)))

    def begin(self, stream: int, method: str, *arguments: Any) -> Reply:
        """Call a method that returns a generator, and keep that as `stream`."""

        def begin() -> None:
            self._streams[stream] = _items_of(self._call(method, arguments), method)

        return self._answer(method, begin)

    def advance(self, stream: int, method: str) -> Reply:
        """Return a stream's next item."""
        items = self._streams.get(stream)
        if items is None:
            return END, "", pickling.EMPTY
        reply = self._answer(method, lambda: self._next(items))
        if reply[0] != VALUE:
            del self._streams[stream]
        return reply

    def end(self, stream: int) -> None:
        """Close a stream."""
        items = self._streams.pop(stream, None)
        if isinstance(items, AsyncIterator):
            self._finished(getattr(items, "aclose", _nothing)())
        elif items is not None and hasattr(items, "close"):
            items.close()

    def _call(self, method: str, arguments: tuple[Any, ...]) -> Any:
        args, kwargs = arrived(*arguments)
        return getattr(self._instance, method)(*args, **kwargs)

    def _next(self, items: Iterator[Any] | AsyncIterator[Any]) -> Any:
        return self._finished(anext(items)) if isinstance(items, AsyncIterator) else next(items)

    def _finished(self, result: Any) -> Any:
        """Return what a coroutine returns; other results as they are."""
        if not inspect.isawaitable(result):
            return result
        if not hasattr(self, "_loop"):
            self._loop = asyncio.new_event_loop()
        return self._loop.run_until_complete(result)

    def _answer(self, method: str, run: Callable[[], Any]) -> Reply:
        current_call.set((self._name, _is_cancelled, 0))
        try:
            return self._value(method, run())
        except BaseException as error:
            return self._failure(method, error)

    def _value(self, method: str, value: Any) -> Reply:
        if value is None:
            return VALUE, "", pickling.EMPTY
        body, buffers = pickling.dumps(value, f"the result of {self._name}.{method}()")
        return VALUE, "", (body, as_arrays(buffers))

    def _failure(self, method: str, error: BaseException) -> Reply:
        if isinstance(error, SystemExit):
            return EXIT, str(error.code or 0), pickling.EMPTY
        if isinstance(error, StopIteration | StopAsyncIteration):
            return END, "", pickling.EMPTY
        text, (body, buffers) = pickling.dump_error(error, f"{self._name}.{method}(), process {os.getpid()}")
        return ERROR, text, (body, as_arrays(buffers))


class AsyncHost(Host):
    """An actor with `async def` methods: calls are tasks of Ray's event loop."""

    @ray.method(concurrency_group=WATCH)
    async def live(self) -> None:
        """Never return."""
        await asyncio.Event().wait()

    async def make(self, *arguments: Any) -> Reply:
        """Make the object within the loop, to which its locks belong."""
        return super().make(*arguments)

    async def run(self, method: str, *arguments: Any) -> Reply:
        """Call a method."""
        current_call.set((self._name, _is_cancelled, 0))
        try:
            result = self._call(method, arguments)
            return self._value(method, await result if inspect.isawaitable(result) else result)
        except asyncio.CancelledError:
            raise
        except BaseException as error:
            return self._failure(method, error)

    async def begin(self, stream: int, method: str, *arguments: Any) -> Reply:
        """Call a method that returns a generator, and keep that as `stream`."""
        return super().begin(stream, method, *arguments)

    async def advance(self, stream: int, method: str) -> Reply:
        """Return a stream's next item."""
        items = self._streams.get(stream)
        if not isinstance(items, AsyncIterator):
            return super().advance(stream, method)
        try:
            return self._value(method, await anext(items))
        except BaseException as error:
            self._streams.pop(stream, None)
            return self._failure(method, error)

    async def end(self, stream: int) -> None:
        """Close a stream."""
        items = self._streams.pop(stream, None)
        if isinstance(items, AsyncIterator):
            await getattr(items, "aclose", _nothing)()
        elif items is not None and hasattr(items, "close"):
            items.close()


class Board:
    """The newest version of one channel, which readers ask for."""

    def __init__(self) -> None:
        self._count, self._version, self._value = 0, 0, []
        self._published_at = 0.0
        self._taken: dict[str, tuple[int, int, float]] = {}

    def publish(self, version: int | None, value: list[Any], now: float) -> int:
        """Keep this reference in place of the last; return its version."""
        self._count += 1
        self._version = self._version + 1 if version is None else version
        self._value, self._published_at = value, now
        return self._version

    def newest(self, reader: str, count: int, now: float) -> tuple[int, int, list[Any], float] | None:
        """Return (count, version, reference, published at); None where nothing is newer than `count`."""
        if self._count:
            self._taken[reader] = self._count, self._version, now
        return (self._count, self._version, self._value, self._published_at) if self._count > count else None

    def readers(self, now: float) -> dict[str, tuple[int, int, float]]:
        """Return each reader's version, the versions that came after it, and the seconds since it asked."""
        return {name: (version, self._count - count, now - at) for name, (count, version, at) in self._taken.items()}


def as_arrays(buffers: Any) -> list[Any]:
    """Return buffers as arrays of bytes, which Ray shares between the processes of a machine without a copy."""
    import numpy as np

    return [np.frombuffer(buffer, np.uint8) for buffer in buffers]


def _is_cancelled(call_id: int) -> bool:
    return False


def _items_of(result: Any, method: str) -> Iterator[Any] | AsyncIterator[Any]:
    if not isinstance(result, Iterator | AsyncIterator):
        raise TypeError(
            f"{method}() returned a {type(result).__name__}; stream() needs a generator or an iterator: yield the "
            f"items, or use call()."
        )
    return result


async def _nothing() -> None:
    pass
