"""How an actor's process works off its calls: one after another, in threads, or as tasks of an event loop."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import itertools
import os
import socket
import sys
import traceback
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NoReturn

from rlx.actors.context import current_call
from rlx.actors.engines import pickling, wire
from rlx.actors.engines.actor_link import ActorLink
from rlx.actors.engines.wire import Frame
from rlx.actors.timesheet import Running, Timesheet
from rlx.errors import CallCancelled

TASKS = 1000  # at once, of an actor with `async def` methods, where nothing else was asked for


class Server:
    """Runs calls on one object; `serve` returns when it is told to stop or the driver is gone."""

    def __init__(self, link: ActorLink, instance: Any, name: str, sheet: Timesheet) -> None:
        self.link, self.instance, self.name, self.sheet = link, instance, name, sheet

    def serve(self) -> None:
        """Work the calls off one after another."""
        link = self.link
        while (frame := link.receive()) is not None and frame.kind != wire.STOP:
            self.answer(frame)
            del frame  # its buffers are not kept while waiting for the next one

    def answer(self, frame: Frame) -> None:
        """Run one call and send what comes of it."""
        call_id, method = frame.call_id, frame.text
        running = self.sheet.begin(method)
        failed = True
        current_call.set((self.name, self._is_cancelled, call_id))
        try:
            result = self.begin(frame)
            if frame.kind == wire.STREAM:
                with closing(result):
                    self._stream(call_id, self.iterator(result, method), method, running)
                result = None
            self.reply(frame, result)
            failed = False
        except SystemExit:
            raise
        except BaseException as error:
            self.report(frame, error)
        finally:
            self.link.close_call(call_id)
            self.sheet.end(running, not failed)

    def begin(self, frame: Frame) -> Any:
        """Call the method and return what it returns; CallCancelled if the caller does not want it any more."""
        message = frame.open(self.link.memory.borrow)  # in any case: only what was borrowed is ever given back
        if self.link.is_cancelled(frame.call_id):
            raise CallCancelled("before it ran")
        args, kwargs = pickling.loads(message) if message[0] else ((), {})
        del message
        return getattr(self.instance, frame.text)(*args, **kwargs)

    def reply(self, frame: Frame, result: Any) -> None:
        """Send what a method has returned, to who waits for it; None is an empty message."""
        if frame.kind != wire.SEND:
            message = pickling.EMPTY
            if result is not None:
                message = pickling.dumps(result, f"the result of {self.name}.{frame.text}()")
            self.link.send(wire.REPLY, frame.call_id, "", message)

    def report(self, frame: Frame, error: BaseException) -> None:
        """Send the error of a call."""
        if isinstance(error, CallCancelled | asyncio.CancelledError) and self.link.is_cancelled(frame.call_id):
            self.link.send(wire.CANCELLED, frame.call_id, str(error) or "while it ran")
            return
        kind = wire.SEND_FAILED if frame.kind == wire.SEND else wire.ERROR
        self.link.send_error(kind, frame.call_id, error, f"{self.name}.{frame.text}(), process {os.getpid()}")

    def wait_for_credit(self, call_id: int) -> None:
        """Return once the stream may send one item more; CallCancelled if the caller has closed it."""
        while not self._is_cancelled(call_id):
            if self.link.credits(call_id):
                return
            if not self.link.read():
                raise ConnectionError("the driver is gone")
        raise CallCancelled

    def iterator(self, result: Any, method: str) -> Iterator[Any]:
        """Return what a stream's method has returned; TypeError if it yields nothing."""
        if not isinstance(result, Iterator):
            raise TypeError(
                f"{self.name}.{method}() returned a {type(result).__name__}; stream() needs a generator or an "
                f"iterator: yield the items, or use call()."
            )
        return result

    def send_item(self, call_id: int, index: int, item: Any, method: str) -> None:
        """Send one item of a stream."""
        message = pickling.dumps(item, f"item {index} of {self.name}.{method}()")
        self.link.send(wire.ITEM, call_id, str(index), message)
        self.link.spend_credit(call_id)

    def _is_cancelled(self, call_id: int) -> bool:
        self.link.look()
        return self.link.is_cancelled(call_id)

    def _stream(self, call_id: int, items: Iterator[Any], method: str, running: Running) -> None:
        for index in itertools.count():
            self.sheet.wait_for_reader(running, True)
            self.wait_for_credit(call_id)  # first: the method runs no further than the caller has asked for
            self.sheet.wait_for_reader(running, False)
            try:
                item = next(items)
            except StopIteration:
                return
            self.send_item(call_id, index, item, method)
            del item


class ThreadedServer(Server):
    """Runs up to `concurrency` calls at once, each in a thread; they start in the order in which they came."""

    def __init__(self, link: ActorLink, instance: Any, name: str, sheet: Timesheet, concurrency: int) -> None:
        super().__init__(link, instance, name, sheet)
        self._concurrency = concurrency

    def serve(self) -> None:
        """Work the calls off until the driver wants no more of them."""
        link = self.link
        with ThreadPoolExecutor(self._concurrency, thread_name_prefix="rlx-call") as pool:
            while (frame := link.receive()) is not None and frame.kind != wire.STOP:
                pool.submit(self._answer_in_thread, frame)
                del frame
            if frame is None:
                os._exit(1)  # nobody is left to answer, and the threads may run for ever

    def wait_for_credit(self, call_id: int) -> None:
        """Return once the stream may send one item more; CallCancelled if the caller has closed it."""
        link = self.link
        with link.news:
            link.news.wait_for(lambda: link.credits(call_id) or link.is_cancelled(call_id))
        if link.is_cancelled(call_id):
            raise CallCancelled

    def _is_cancelled(self, call_id: int) -> bool:
        return self.link.is_cancelled(call_id)

    def _answer_in_thread(self, frame: Frame) -> None:
        try:
            self.answer(frame)
        except BaseException as error:
            leave(error)


class TaskServer(Server):
    """Runs `async def` methods as tasks of one event loop, up to `concurrency` at once; plain ones in between."""

    def __init__(self, link: ActorLink, instance: Any, name: str, sheet: Timesheet, concurrency: int) -> None:
        super().__init__(link, instance, name, sheet)
        self._concurrency = concurrency
        self._tasks: dict[int, asyncio.Task[None]] = {}  # by call id
        self._turns: asyncio.Event | None = None
        self._ended: asyncio.Future[None] | None = None

    def serve(self) -> None:
        """Run the event loop until the driver wants no more calls."""
        asyncio.run(self._serve())

    async def _serve(self) -> None:
        loop = asyncio.get_running_loop()
        self._ended, self._turns = loop.create_future(), asyncio.Event()
        loop.add_reader(self.link.sock.fileno(), self._take_in)
        self._take_in()
        await self._ended
        loop.remove_reader(self.link.sock.fileno())
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    def _take_in(self) -> None:
        assert self._ended is not None and self._turns is not None
        with contextlib.suppress(BlockingIOError):
            if not self.link.read(socket.MSG_DONTWAIT):
                os._exit(1)  # the driver is gone
        for call_id, task in self._tasks.items():
            if self.link.is_cancelled(call_id):
                task.cancel()
        self._turns.set()
        self._start()

    def _start(self) -> None:
        """Begin calls, in order, as far as there is room."""
        assert self._ended is not None
        while len(self._tasks) < self._concurrency and not self._ended.done():
            frame = self.link.next_received()
            if frame is None:
                return
            if frame.kind == wire.STOP:
                self._ended.set_result(None)
                return
            task = asyncio.get_running_loop().create_task(self._run(frame))
            self._tasks[frame.call_id] = task
            task.add_done_callback(partial(self._finished, frame))

    def _finished(self, frame: Frame, task: asyncio.Task[None]) -> None:
        del self._tasks[frame.call_id]
        if task.cancelled():  # before its first step, so that nobody has answered
            frame.open(self.link.memory.borrow)
            self.report(frame, CallCancelled("before it ran"))
            self.link.close_call(frame.call_id)
        self._start()

    async def _run(self, frame: Frame) -> None:
        call_id, method = frame.call_id, frame.text
        running = self.sheet.begin(method)
        current_call.set((self.name, self.link.is_cancelled, call_id))
        failed = True
        try:
            try:
                result = self.begin(frame)
                if inspect.isawaitable(result):
                    result = await result
                if frame.kind == wire.STREAM:
                    await self._stream_in_turns(call_id, result, method, running)
                    result = None
                self.reply(frame, result)
                failed = False
            except SystemExit:
                raise
            except BaseException as error:
                self.report(frame, error)
        except BaseException as error:  # the loop would cancel the other tasks first, and they would answer
            leave(error)
        finally:
            self.link.close_call(call_id)
            self.sheet.end(running, not failed)

    async def _stream_in_turns(self, call_id: int, result: Any, method: str, running: Running) -> None:
        items: Any = result if isinstance(result, AsyncIterator) else _in_turns(self.iterator(result, method))
        async with contextlib.aclosing(items) if hasattr(items, "aclose") else contextlib.nullcontext():
            for index in itertools.count():
                self.sheet.wait_for_reader(running, True)
                await self._wait_for_credit(call_id)
                self.sheet.wait_for_reader(running, False)
                try:
                    item = await anext(items)
                except StopAsyncIteration:
                    return
                self.send_item(call_id, index, item, method)
                del item

    async def _wait_for_credit(self, call_id: int) -> None:
        assert self._turns is not None
        while not self.link.credits(call_id):
            if self.link.is_cancelled(call_id):
                raise CallCancelled
            self._turns.clear()
            await self._turns.wait()


async def _in_turns(items: Iterator[Any]) -> AsyncIterator[Any]:
    with closing(items):
        for item in items:
            yield item


@contextlib.contextmanager
def closing(items: Any) -> Iterator[None]:
    """End a generator at the end of the block, so that its `finally` has run before the answer is sent."""
    try:
        yield
    finally:
        if hasattr(items, "close"):
            items.close()


def leave(error: BaseException) -> NoReturn:
    """End this process as the interpreter would, from any thread of it."""
    code = 1
    if isinstance(error, SystemExit):
        if error.code is None or isinstance(error.code, int):
            code = (error.code or 0) & 0xFF
        else:
            print(error.code, file=sys.stderr)
    elif not isinstance(error, ConnectionError):  # that is the driver, gone: nobody is left to be told
        traceback.print_exception(error)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # not the forkserver's atexit handlers, and no wait for threads of the user's


def server_for(link: ActorLink, instance: Any, name: str, sheet: Timesheet, concurrency: int | None) -> Server:
    """Return the server that fits the object: by its `async def` methods, and how many calls may run at once."""
    if has_coroutines(type(instance)):
        return TaskServer(link, instance, name, sheet, concurrency or TASKS)
    if concurrency is not None and concurrency > 1:
        return ThreadedServer(link, instance, name, sheet, concurrency)
    return Server(link, instance, name, sheet)


def has_coroutines(kind: type) -> bool:
    """Return whether a class has `async def` methods, its own or inherited."""
    is_async: Callable[[Any], bool] = lambda m: inspect.iscoroutinefunction(m) or inspect.isasyncgenfunction(m)  # noqa: E731
    return any(is_async(method) for _, method in inspect.getmembers_static(kind))
