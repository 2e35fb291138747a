"""What runs in a process of Ray: one actor of rlx, and the newest version of each channel.

Messages are rlx's own, so an error, a tensor or a local class arrives as it does on any engine; Ray moves bytes. A
method answers with a tuple (kind, text, message), for what Ray does to exceptions loses the exception's own type.
"""

from __future__ import annotations

import asyncio
import inspect
import os
import sys
from collections import defaultdict
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import ray

from rlx.actors.context import current_call
from rlx.actors.engines import pickling
from rlx.actors.engines.inline import items_of
from rlx.actors.engines.pickling import Message
from rlx.actors.engines.ray_data import arrived, as_arrays
from rlx.actors.engines.serving import TASKS, has_coroutines
from rlx.actors.machine import Node
from rlx.errors import CallCancelled

VALUE, ERROR, EXIT, END, CANCELLED = "value", "error", "exit", "end", "cancelled"
Reply = tuple[str, str, Message]
"""EXIT has the code as its text, CANCELLED says when; END is that of a stream; VALUE and ERROR have a message."""
Reader = tuple[str, int | None]
"""Name and process id."""
NO_MORE = object()
"""What a stream returns after its last item."""


class Host:
    """An actor whose methods run one after another in the main thread, where alone signal handlers interrupt them.

    Ray runs them there as long as there are no concurrency groups, and max_concurrency is 1.
    """

    def __init__(self, name: str, env: dict[str, str], threads: int) -> None:
        address = ray.util.get_node_ip_address()
        os.environ.update(env | Node(address, address).environment())
        if "torch" in sys.modules:
            import torch

            torch.set_num_threads(threads)
        else:
            os.environ["OMP_NUM_THREADS"] = str(threads)
        self._name = name
        self._instance: Any = None
        self._streams: dict[int, Any] = {}  # by number of the call

    def make(self, *arguments: Any) -> Reply:
        """Make the object; the value is the process id."""

        def make() -> int:
            maker, args, kwargs = arrived(*arguments)
            self._instance = maker(*args, **kwargs)
            return os.getpid()

        return self._answer(0, "__init__", make)

    def run(self, number: int, method: str, *arguments: Any) -> Reply:
        """Call a method."""
        return self._answer(number, method, lambda: self._finished(self._call(method, arguments)))

    def begin(self, number: int, method: str, *arguments: Any) -> Reply:
        """Call a method that returns a generator, and keep that."""
        return self._answer(number, method, lambda: self._open(number, method, self._call(method, arguments)))

    def advance(self, number: int, method: str) -> Reply:
        """Return a stream's next item."""
        items = self._streams.get(number)
        if items is None:
            return END, "", pickling.EMPTY
        reply = self._answer(number, method, lambda: self._finished(_next(items)))
        if reply[0] != VALUE:
            self.end(number)
        return reply

    def end(self, number: int) -> None:
        """Close a stream, if it is open."""
        items = self._streams.pop(number, None)
        with suppress(Exception):  # nobody waits for it any more
            if isinstance(items, AsyncIterator):
                self._finished(getattr(items, "aclose", _nothing)())
            elif hasattr(items, "close"):
                items.close()

    def _call(self, method: str, arguments: tuple[Any, ...]) -> Any:
        args, kwargs = arrived(*arguments)
        return getattr(self._instance, method)(*args, **kwargs)

    def _open(self, number: int, method: str, result: Any) -> None:
        self._streams[number] = items_of(result, method)

    def _finished(self, result: Any) -> Any:
        """Return what a coroutine returns; other results as they are."""
        if not inspect.isawaitable(result):
            return result
        if not hasattr(self, "_loop"):
            self._loop = asyncio.new_event_loop()
        return self._loop.run_until_complete(result)

    def _answer(self, number: int, method: str, run: Callable[[], Any]) -> Reply:
        current_call.set((self._name, self._is_cancelled, number))
        try:
            return self._reply(method, run())
        except BaseException as error:
            return self._failure(number, method, error)

    def _reply(self, method: str, value: Any) -> Reply:
        if value is None:
            return VALUE, "", pickling.EMPTY
        if value is NO_MORE:
            return END, "", pickling.EMPTY
        body, buffers = pickling.dumps(value, f"the result of {self._name}.{method}()")
        return VALUE, "", (body, as_arrays(buffers))

    def _failure(self, number: int, method: str, error: BaseException) -> Reply:
        if isinstance(error, SystemExit):
            if not isinstance(error.code, int | None):
                print(error.code, file=sys.stderr)
                return EXIT, "1", pickling.EMPTY
            return EXIT, str(error.code or 0), pickling.EMPTY
        if isinstance(error, CallCancelled | asyncio.CancelledError) and self._is_cancelled(number):
            return CANCELLED, str(error) or "while it ran", pickling.EMPTY
        text, (body, buffers) = pickling.dump_error(error, f"{self._name}.{method}(), process {os.getpid()}")
        return ERROR, text, (body, as_arrays(buffers))

    def _is_cancelled(self, number: int) -> bool:
        return False  # nothing gets in while a method runs


class LoopHost(Host):
    """An actor whose calls run at once: as tasks if it has `async def` methods, else in threads of their own.

    Ray brings the calls to its event loop in any order; here they begin by their numbers, which are 1, 2, 3 and so on.
    """

    def __init__(self, name: str, env: dict[str, str], threads: int, concurrency: int | None) -> None:
        super().__init__(name, env, threads)
        self._concurrency = concurrency
        self._pool: ThreadPoolExecutor | None = None
        self._room = asyncio.Semaphore(1)
        self._next = 0  # number of the call that begins next
        self._early: dict[int, asyncio.Future[None]] = {}
        self._tasks: dict[int, asyncio.Task[Reply]] = {}
        self._cancelled: set[int] = set()

    async def make(self, *arguments: Any) -> Reply:  # type: ignore[override]
        """Make the object; the value is the process id."""
        reply = await asyncio.to_thread(super().make, *arguments)
        if reply[0] == VALUE:
            is_async = has_coroutines(type(self._instance))
            concurrency = self._concurrency or (TASKS if is_async else 1)
            self._pool = None if is_async else ThreadPoolExecutor(concurrency, thread_name_prefix="rlx-call")
            self._room = asyncio.Semaphore(concurrency)
            self._admit_next()
        return reply

    async def run(self, number: int, method: str, *arguments: Any) -> Reply:  # type: ignore[override]
        """Call a method."""
        await self._enter(number)
        try:
            return await self._answered(number, method, lambda: self._call(method, arguments))
        finally:
            self._leave(number)

    async def begin(self, number: int, method: str, *arguments: Any) -> Reply:  # type: ignore[override]
        """Call a method that returns a generator, and keep that; it has its place until it is closed."""
        await self._enter(number)
        reply = await self._answered(
            number, method, lambda: self._call(method, arguments), lambda result: self._open(number, method, result)
        )
        return await self._kept(number, reply)

    async def advance(self, number: int, method: str) -> Reply:  # type: ignore[override]
        """Return a stream's next item."""
        items = self._streams.get(number)
        if items is None:
            return END, "", pickling.EMPTY
        return await self._kept(number, await self._answered(number, method, lambda: _next(items)))

    async def end(self, number: int) -> None:  # type: ignore[override]
        """Close a stream, now or once it has begun or come to its next item."""
        await self.cancel(number)
        if number in self._streams and number not in self._tasks:
            await self._close(number)

    async def cancel(self, number: int) -> None:
        """Take a call back: a task is cancelled, and a thread may look."""
        task = self._tasks.get(number)
        if task is not None or number >= self._next or number in self._streams:
            self._cancelled.add(number)
        if task is not None and self._pool is None:
            task.cancel()

    async def skip(self, number: int) -> None:
        """Do without a call that Ray could not bring."""
        await self._enter(number)
        self._leave(number)

    async def _enter(self, number: int) -> None:
        """Return when the call may begin: after those before it, and with a place to run in."""
        if number != self._next:
            self._early[number] = asyncio.get_running_loop().create_future()
            await self._early[number]
        await self._room.acquire()
        self._admit_next()

    def _admit_next(self) -> None:
        self._next += 1
        waiting = self._early.pop(self._next, None)
        if waiting is not None:
            waiting.set_result(None)

    def _leave(self, number: int) -> None:
        self._cancelled.discard(number)
        self._room.release()

    async def _answered(
        self, number: int, method: str, call: Callable[[], Any], keep: Callable[[Any], Any] = lambda result: result
    ) -> Reply:
        """Return the reply with what `keep` makes of the result, which comes from a task that can be cancelled."""
        task = asyncio.ensure_future(self._work(number, method, call, keep))
        if number in self._cancelled:
            task.cancel()
        self._tasks[number] = task
        try:
            return await task
        except asyncio.CancelledError:  # before its first step
            return CANCELLED, "before it ran", pickling.EMPTY
        finally:
            del self._tasks[number]

    async def _work(self, number: int, method: str, call: Callable[[], Any], keep: Callable[[Any], Any]) -> Reply:
        if self._pool is not None:
            run = lambda: keep(self._finished(call()))  # noqa: E731
            return await asyncio.get_running_loop().run_in_executor(self._pool, self._answer, number, method, run)
        current_call.set((self._name, self._is_cancelled, number))
        try:
            result = call()
            return self._reply(method, keep(await result if inspect.isawaitable(result) else result))
        except BaseException as error:
            return self._failure(number, method, error)

    async def _kept(self, number: int, reply: Reply) -> Reply:
        """Return the reply of a stream that goes on only after a value, and only if nobody has closed it."""
        if reply[0] != VALUE or number in self._cancelled:
            await self._close(number)
        return reply

    async def _close(self, number: int) -> None:
        """End a stream's generator and leave its place."""
        items = self._streams.pop(number, None)
        try:
            with suppress(Exception):  # nobody waits for it any more
                if isinstance(items, AsyncIterator):
                    await getattr(items, "aclose", _nothing)()
                elif hasattr(items, "close"):
                    await asyncio.to_thread(items.close) if self._pool is not None else items.close()
        finally:
            self._leave(number)

    def _is_cancelled(self, number: int) -> bool:
        return number in self._cancelled


class Board:
    """The newest version of every channel, which readers ask for."""

    def __init__(self) -> None:
        self._channels: defaultdict[str, _Channel] = defaultdict(_Channel)

    async def publish(self, channel: str, version: int | None, now: float, value: list[Any] | Message) -> int:
        """Keep a value in place of the last, and return its version.

        value: a reference in a list, or a message, of which the board keeps a copy of its own: the objects of an actor
        are lost with it.
        """
        at, kept = self._channels[channel], value if isinstance(value, list) else [ray.put(value)]
        at.count += 1
        at.version = at.version + 1 if version is None else version
        at.value, at.published_at = kept, now
        news, at.news = at.news, asyncio.Event()
        news.set()
        return at.version

    async def newest(
        self, channel: str, reader: Reader, count: int, now: float
    ) -> tuple[int, int, list[Any], float] | None:
        """Return (count, version, reference, published at); None where nothing is newer than `count`."""
        at = self._channels[channel]
        if at.count:
            at.taken[reader] = at.count, at.version, now
        return (at.count, at.version, at.value, at.published_at) if at.count > count else None

    async def wait(self, channel: str, count: int) -> None:
        """Return once there is something newer than `count`."""
        at = self._channels[channel]
        while at.count <= count:
            await at.news.wait()

    async def readers(self, channel: str, now: float) -> dict[str, tuple[int, int, float]]:
        """Return each reader's version, the versions that came after it, and the seconds since it asked."""
        at = self._channels[channel]
        return {name: (version, at.count - count, now - t) for (name, _), (count, version, t) in at.taken.items()}

    async def forget(self, reader: Reader) -> None:
        """A reader is there no more."""
        for at in self._channels.values():
            at.taken.pop(reader, None)


class _Channel:
    """What the board knows of one."""

    def __init__(self) -> None:
        self.count = self.version = 0
        self.value: list[Any] = []
        self.published_at = 0.0
        self.taken: dict[Reader, tuple[int, int, float]] = {}
        self.news = asyncio.Event()


def _next(items: Any) -> Any:
    """Return the next item, or what is awaited for it; NO_MORE at the end."""
    return anext(items, NO_MORE) if isinstance(items, AsyncIterator) else next(items, NO_MORE)


async def _nothing() -> None:
    pass
