"""Actors in the caller's own thread: every call is run before it returns, so a debugger sees one stack.

What needs a process is not here: a crash is the program's crash, a timeout cannot cut a method short, no call overtakes
another whatever `concurrency` says, none stalls, and `threads` has nothing to act on. `strict` sends every message
through pickle, so that what would break elsewhere breaks here.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import itertools
import os
import threading
import weakref
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from functools import partial
from typing import Any

from rlx.actors.channel import InlineChannel
from rlx.actors.context import current_call
from rlx.actors.engines import pickling
from rlx.actors.future import Err, Future, Ok, Outcome
from rlx.actors.interface import ActorSpec, ActorState, Listener, Slot
from rlx.actors.ref import Ref
from rlx.actors.resources import Pool, Resources
from rlx.actors.stream import Stream
from rlx.errors import ActorDied


class InlineEngine:
    """Actors as plain objects of this process."""

    capabilities: frozenset[str] = frozenset({"resources"})

    def __init__(self, strict: bool = False) -> None:
        self._strict = strict
        self._actors: list[InlineActor] = []
        self._channels: dict[str, InlineChannel] = {}

    def pack(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the arguments, pickled if strict."""
        return pickling.dumps((args, kwargs), "arguments") if self._strict else _with_values((args, kwargs))

    def put(self, value: Any) -> Ref:
        """Keep a copy, as a process of its own would have it."""
        body, buffers = pickling.dumps(value, "the value")
        return Ref.to_copy_of([body, *buffers])

    def channel(self, name: str) -> InlineChannel:
        """Return the channel of that name."""
        return self._channels.setdefault(name, InlineChannel(name, self._strict))

    def pool(self, given: Resources) -> Pool:
        """Return what this machine has."""
        return Pool.of_this_machine(given)

    def slot(self, name: str) -> Slot:
        """Nobody looks from outside."""
        return NoSlot()

    def spawn(self, spec: ActorSpec, listener: Listener) -> InlineActor:
        """Make the actor now; what its __init__ raises is kept for `ready` and the calls."""
        actor = InlineActor(spec, self._strict, self.pack(spec.args, spec.kwargs), listener)
        self._actors.append(actor)
        return actor

    def close(self, timeout_s: float) -> None:
        """Let go of all actors."""
        for actor in self._actors:
            actor.end("was closed with its runtime")


class InlineActor:
    """One object and its lock."""

    def __init__(
        self,
        spec: ActorSpec,
        strict: bool,
        message: Any,
        listener: Listener,
    ) -> None:
        self._spec, self._strict = spec, strict
        self._listener = listener
        self._lock = threading.RLock()
        self._running: str | None = None
        self._loop: asyncio.AbstractEventLoop | None = None  # of its `async def` methods, from the first call on
        self._death: BaseException | None = None
        self._init_error: BaseException | None = None
        self.ready: Future[None] = Future(spec.name, "__init__")
        outcome = self._run("__init__", spec.make, message, keep_result=True)
        self._instance = outcome.value if isinstance(outcome, Ok) else None
        self._init_error = outcome.error if isinstance(outcome, Err) else None
        self.ready.settle(lambda: outcome if isinstance(outcome, Err) else Ok(None))
        if self._init_error is not None and self._death is None:
            self._listener.exited(lambda: outcome)

    def post(self, method: str, message: Any, future: Future[Any] | None) -> None:
        """Run the method now."""
        with self._lock:
            if self._init_error is not None:
                outcome = Err(self._init_error)
            elif self._death is not None:
                outcome = Err(ActorDied(f"{self._death} {method}() was not run."))
            else:
                instance = self._instance
                outcome = self._run(method, lambda *a, **k: getattr(instance, method)(*a, **k), message)
        if future is not None:
            future.settle(lambda: outcome)
        elif isinstance(outcome, Err):
            self._listener.failed(lambda: outcome)

    def kill(self, timeout_s: float, how: str = "was ended by kill()") -> None:
        """Let go of the object; a method that runs in another thread runs on, to no effect."""
        self.end(how)

    def end(self, how: str) -> None:
        """Be dead from now on."""
        if self._death is None and self._init_error is None:
            error = self._death = ActorDied(f"actor {self._spec.name} {how}.")
            self._instance = None
            self._close_loop()
            self._listener.exited(lambda: Err(error))

    def state(self) -> ActorState:
        """Return the state now."""
        status = "failed" if self._init_error is not None else "dead" if self._death is not None else "alive"
        error = self._init_error or self._death
        running = self._running
        return ActorState(
            self._spec.name,
            status,
            os.getpid(),
            int(running is not None),
            running,
            None if error is None else str(error),
        )

    def stream(self, method: str, message: Any, stream: Stream[Any]) -> None:
        """Run the generator as far as the stream's credits go, and on as they are granted."""
        with self._lock:
            items: Any = None
            owner = weakref.ref(stream)  # the stream owns what it calls, and ends its generator when it goes

            def begin(*args: Any, **kwargs: Any) -> None:
                nonlocal items
                items = items_of(getattr(self._instance, method)(*args, **kwargs), method)

            index = itertools.count()

            def advance(count: int) -> None:
                stream = owner()
                if stream is None:
                    return
                with self._lock:
                    for _ in range(count):
                        outcome = self._run(method, self._next_item, ((items,), {}), is_message=False)
                        if isinstance(outcome, Err):
                            ended = isinstance(outcome.error, StopAsyncIteration)
                            stream.finish(partial(_same, Ok(None) if ended else outcome))
                            return
                        stream.feed(next(index), partial(_same, outcome))

            death = self._init_error or self._death
            begun = Err(death) if death is not None else self._run(method, begin, message)
            if isinstance(begun, Err):
                stream.finish(lambda: begun)
                return
            stream.grant, stream.cancel = advance, partial(self._close_items, items)
            advance(stream.credits)

    def _next_item(self, items: Any) -> Any:
        """Return the next item; StopAsyncIteration after the last, of plain generators too."""
        if isinstance(items, AsyncIterator):
            return self._run_to_the_end(items.__anext__())  # type: ignore[arg-type]
        try:
            return next(items)
        except StopIteration:
            raise StopAsyncIteration from None

    def _close_items(self, items: Any) -> None:
        with self._lock:
            if hasattr(items, "aclose"):
                self._run_to_the_end(items.aclose())
            elif hasattr(items, "close"):
                items.close()

    def _run_to_the_end(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        """Return its result, from a loop of the actor's own that it keeps: what it awaits may outlive the call."""
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
        # The caller may be a coroutine itself. Its loop stands still meanwhile, as its thread does.
        callers = asyncio._get_running_loop()
        asyncio._set_running_loop(None)
        try:
            return self._loop.run_until_complete(coroutine)
        finally:
            coroutine.close()  # unfinished where the loop refused it: the actor was calling itself
            asyncio._set_running_loop(callers)

    def _close_loop(self) -> None:
        if self._loop is not None and not self._loop.is_running():
            self._loop.close()

    def _run(
        self,
        method: str,
        function: Callable[..., Any],
        message: Any,
        keep_result: bool = False,
        is_message: bool = True,
    ) -> Outcome[Any]:
        where = f"{self._spec.name}.{method}()"
        before, self._running = self._running, method
        token = current_call.set((self._spec.name, lambda _: False, 0))  # nobody can take back what has begun
        try:
            args, kwargs = _received(message) if self._strict and is_message else message
            with _environment(self._spec.env):
                result = function(*args, **kwargs)
                if inspect.iscoroutine(result):
                    result = self._run_to_the_end(result)
            if self._strict and not keep_result:
                result = _received(pickling.dumps(result, f"the result of {where}"))
            outcome = Ok(result)
        except SystemExit as exit:
            self.end(f"ended with exit code {exit.code or 0} in {method}()")
            return Err(ActorDied(f"actor {self._spec.name} ended with exit code {exit.code or 0} in {method}()."))
        except Exception as error:
            if self._strict:
                return pickling.load_error(*pickling.dump_error(error, where))
            error.add_note(f"raised in {where}")
            return Err(error)
        finally:
            current_call.reset(token)
            self._running = before
            if self._death is not None:
                self._close_loop()
        if self._death is not None:
            return Err(ActorDied(f"{self._death} It was running {method}()."))
        return outcome


def _same(outcome: Outcome[Any]) -> Outcome[Any]:
    return outcome


class NoSlot:
    """A line of no board, of an engine that nobody looks at from outside."""

    serial = 0

    def sent(self) -> None:
        """Note nothing."""

    def update(self, **news: Any) -> None:
        """Note nothing."""


def items_of(result: Any, method: str) -> Iterator[Any] | AsyncIterator[Any]:
    """Return what a stream's method has returned; TypeError if it yields nothing."""
    if not isinstance(result, Iterator | AsyncIterator):
        raise TypeError(
            f"{method}() returned a {type(result).__name__}; stream() needs a generator or an iterator: yield the "
            f"items, or use call()."
        )
    return result


def _with_values(value: Any) -> Any:
    """Return the arguments with every Ref in them, at any depth of plain containers, replaced by its value."""
    if isinstance(value, Ref):
        return value.get()
    if type(value) in (tuple, list):
        return type(value)(map(_with_values, value))
    if type(value) is dict:
        return {key: _with_values(part) for key, part in value.items()}
    return value


def _received(message: pickling.Message) -> Any:
    """Return the object as a process at the other end would get it: sharing no memory with the sender's."""
    body, buffers = message
    return pickling.loads((body, [bytearray(buffer) for buffer in buffers]))


@contextlib.contextmanager
def _environment(env: dict[str, str]) -> Iterator[None]:
    """Lend the actor its environment variables while its code runs."""
    before = {key: os.environ.get(key) for key in env}
    os.environ.update(env)
    try:
        yield
    finally:
        for key, value in before.items():
            if value is None:
                os.environ.pop(key, None)
            else:
                os.environ[key] = value
