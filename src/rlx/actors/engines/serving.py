"""How an actor's process works off its calls: one after another, in threads, or as tasks of an event loop."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import inspect
import os
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from rlx.actors.context import Context, current_call
from rlx.actors.engines import pickling, wire
from rlx.actors.engines.memory import ActorMemory
from rlx.actors.engines.wire import Frame, FrameReader, Outbox
from rlx.actors.timesheet import Timesheet
from rlx.errors import CallCancelled, ObjectMemoryFull

READ_AHEAD_FRAMES = 1024
LOOK_EVERY_S = 0.0005
TASKS = 1000  # at once, of an actor with `async def` methods, where nothing else was asked for


class ActorLink:
    """The actor's end of its link: frames that have come in, cancellations and credits that overtake them."""

    def __init__(self, sock: socket.socket, memory: ActorMemory) -> None:
        self.sock, self.memory = sock, memory
        self._reader, self._outbox = FrameReader(sock), Outbox(sock)
        self._frames: collections.deque[Frame] = collections.deque()
        self._cancelled: set[int] = set()  # calls that wait or run
        self._open: set[int] = set()  # calls that have come in and are not answered
        self._credits: dict[int, int] = {}
        self._looked_at = 0.0
        self._sending = threading.Lock()
        self.news = threading.Condition()  # of cancellations and credits, for other threads than the reading one

    def receive(self) -> Frame | None:
        """Return the next call, None when the driver is gone."""
        # So that a cancellation overtakes the call it is for; not before every one of many short calls.
        if 0 < len(self._frames) < READ_AHEAD_FRAMES and time.monotonic() > self._looked_at + LOOK_EVERY_S:
            self.look()
        while not self._frames:
            if not self.read():
                return None
        return self._frames.popleft()

    def look(self) -> None:
        """Take in what has arrived, without waiting."""
        self._looked_at = time.monotonic()
        with contextlib.suppress(BlockingIOError):
            self.read(socket.MSG_DONTWAIT)

    def read(self, flags: int = 0) -> bool:
        """Wait for something and take it in; False when the driver is gone."""
        more = self._reader.read(flags)
        frames = self._reader.frames
        if frames:
            with self.news:
                for frame in frames:
                    self._accept(frame)
                frames.clear()
        return more

    def waiting(self) -> int:
        """Return how many calls have come in and have not been taken."""
        return len(self._frames)

    def send(self, kind: int, call_id: int = 0, text: str = "", message: pickling.Message = pickling.EMPTY) -> None:
        """Write a frame; waits for the driver, which always reads."""
        message, places = self.memory.lend(message)
        with self._sending:
            self._outbox.add(wire.encode(kind, call_id, text, message, places))
            self._outbox.flush()

    def send_error(self, kind: int, call_id: int, error: BaseException, where: str) -> None:
        """Send an error and its traceback; only the text if it carries more than the object memory holds."""
        text, message = pickling.dump_error(error, where)
        try:
            self.send(kind, call_id, text, message)
        except ObjectMemoryFull as full:
            self.send(kind, call_id, f"{text}\n(the error itself cannot be sent: {full})")

    def is_cancelled(self, call_id: int) -> bool:
        """Return whether the caller has taken the call back."""
        return call_id in self._cancelled

    def credits(self, call_id: int) -> int:
        """Return how many items a stream may send."""
        return self._credits.get(call_id, 0)

    def spend_credit(self, call_id: int) -> None:
        """Note that an item has been sent."""
        with self.news:
            self._credits[call_id] -= 1

    def close_call(self, call_id: int) -> None:
        """The call has been answered."""
        self._open.discard(call_id)
        if self._cancelled or self._credits:
            with self.news:
                self._cancelled.discard(call_id)
                self._credits.pop(call_id, None)

    def _accept(self, frame: Frame) -> None:
        if frame.kind == wire.CANCEL:
            if frame.call_id in self._open:
                self._cancelled.add(frame.call_id)
        elif frame.kind == wire.CREDIT:
            if frame.call_id in self._open:
                self._credits[frame.call_id] = self._credits.get(frame.call_id, 0) + int(frame.text)
        else:
            if frame.kind == wire.STREAM:
                number, _, frame.text = frame.text.partition(" ")
                self._credits[frame.call_id] = int(number)
            if frame.kind != wire.SEND:
                self._open.add(frame.call_id)
            self._frames.append(frame)
            return
        self.news.notify_all()


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
        current_call.set(Context(self.name, partial(self._is_cancelled, call_id)))
        try:
            if self.link.is_cancelled(call_id):
                raise CallCancelled("before it ran")
            args, kwargs = self._arguments(frame)
            result = getattr(self.instance, method)(*args, **kwargs)
            if frame.kind == wire.STREAM:
                for index, item in enumerate(self._items(result, method)):
                    if not self.wait_for_credit(call_id):
                        raise CallCancelled
                    self._send_item(call_id, index, item, method)
                    del item
                result = None
            failed = False
            if frame.kind != wire.SEND:
                self._send_result(call_id, result, method)
        except SystemExit:
            raise
        except BaseException as error:
            self.report(frame, error)
        finally:
            self.link.close_call(call_id)
            self.sheet.end(running, not failed)

    def _arguments(self, frame: Frame) -> Any:
        message = frame.open(self.link.memory.borrow)
        return pickling.loads(message) if message[0] else ((), {})

    def _send_result(self, call_id: int, result: Any, method: str) -> None:
        """Send what the method returned; None is an empty message."""
        message = pickling.EMPTY
        if result is not None:
            message = pickling.dumps(result, f"the result of {self.name}.{method}()")
        self.link.send(wire.REPLY, call_id, "", message)

    def report(self, frame: Frame, error: BaseException) -> None:
        """Send the error of a call."""
        if isinstance(error, CallCancelled | asyncio.CancelledError) and self.link.is_cancelled(frame.call_id):
            self.link.send(wire.CANCELLED, frame.call_id, str(error) or "while it ran")
            return
        kind = wire.SEND_FAILED if frame.kind == wire.SEND else wire.ERROR
        self.link.send_error(kind, frame.call_id, error, f"{self.name}.{frame.text}(), process {os.getpid()}")

    def wait_for_credit(self, call_id: int) -> bool:
        """Return once the stream may send one item more; False if the caller has closed it."""
        while not self.link.credits(call_id) and not self.link.is_cancelled(call_id):
            if not self.link.read():
                raise ConnectionError("the driver is gone")
        return not self._is_cancelled(call_id)

    def _is_cancelled(self, call_id: int) -> bool:
        self.link.look()
        return self.link.is_cancelled(call_id)

    def _items(self, result: Any, method: str) -> Iterator[Any]:
        if not isinstance(result, Iterator):
            raise TypeError(
                f"{self.name}.{method}() returned a {type(result).__name__}; stream() needs a generator or an "
                f"iterator: yield the items, or use call()."
            )
        return result

    def _send_item(self, call_id: int, index: int, item: Any, method: str) -> None:
        message = pickling.dumps(item, f"item {index} of {self.name}.{method}()")
        self.link.send(wire.ITEM, call_id, str(index), message)
        self.link.spend_credit(call_id)


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

    def wait_for_credit(self, call_id: int) -> bool:
        """Return once the stream may send one item more; False if the caller has closed it."""
        with self.link.news:
            while not self.link.credits(call_id) and not self.link.is_cancelled(call_id):
                self.link.news.wait()
        return not self.link.is_cancelled(call_id)

    def _is_cancelled(self, call_id: int) -> bool:
        return self.link.is_cancelled(call_id)

    def _answer_in_thread(self, frame: Frame) -> None:
        try:
            self.answer(frame)
        except SystemExit as exit:
            os._exit(exit.code if isinstance(exit.code, int) else 0 if exit.code is None else 1)
        except ConnectionError:
            os._exit(1)


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
        while self.link.waiting() and len(self._tasks) < self._concurrency and not self._ended.done():
            frame = self.link.receive()
            assert frame is not None
            if frame.kind == wire.STOP:
                self._ended.set_result(None)
                return
            task = asyncio.get_running_loop().create_task(self._run(frame))
            self._tasks[frame.call_id] = task
            task.add_done_callback(lambda done, call_id=frame.call_id: self._finished(call_id, done))

    def _finished(self, call_id: int, task: asyncio.Task[None]) -> None:
        self._tasks.pop(call_id, None)
        error = None if task.cancelled() else task.exception()
        if isinstance(error, SystemExit | ConnectionError) and self._ended is not None and not self._ended.done():
            self._ended.set_exception(error)
        self._start()

    async def _run(self, frame: Frame) -> None:
        call_id, method = frame.call_id, frame.text
        running = self.sheet.begin(method)
        current_call.set(Context(self.name, partial(self.link.is_cancelled, call_id)))
        failed = True
        try:
            if self.link.is_cancelled(call_id):
                raise CallCancelled("before it ran")
            args, kwargs = self._arguments(frame)
            result = getattr(self.instance, method)(*args, **kwargs)
            if inspect.isawaitable(result):
                result = await result
            if frame.kind == wire.STREAM:
                await self._stream(call_id, result, method)
                result = None
            failed = False
            if frame.kind != wire.SEND:
                self._send_result(call_id, result, method)
        except SystemExit:
            raise
        except BaseException as error:
            self.report(frame, error)
        finally:
            self.link.close_call(call_id)
            self.sheet.end(running, not failed)

    async def _stream(self, call_id: int, result: Any, method: str) -> None:
        index = 0
        if isinstance(result, AsyncIterator):
            async for item in result:
                await self._wait_for_credit(call_id)
                self._send_item(call_id, index, item, method)
                index += 1
            return
        for item in self._items(result, method):
            await self._wait_for_credit(call_id)
            self._send_item(call_id, index, item, method)
            index += 1

    async def _wait_for_credit(self, call_id: int) -> None:
        assert self._turns is not None
        while not self.link.credits(call_id):
            if self.link.is_cancelled(call_id):
                raise CallCancelled
            self._turns.clear()
            await self._turns.wait()


def server_for(link: ActorLink, instance: Any, name: str, sheet: Timesheet, concurrency: int | None) -> Server:
    """Return the server that fits the object: by its `async def` methods, and how many calls may run at once."""
    if _has_coroutines(type(instance)):
        return TaskServer(link, instance, name, sheet, concurrency or TASKS)
    if concurrency is not None and concurrency > 1:
        return ThreadedServer(link, instance, name, sheet, concurrency)
    return Server(link, instance, name, sheet)


def _has_coroutines(kind: type) -> bool:
    is_async: Callable[[Any], bool] = lambda m: inspect.iscoroutinefunction(m) or inspect.isasyncgenfunction(m)  # noqa: E731
    return any(is_async(method) for _, method in inspect.getmembers_static(kind))
