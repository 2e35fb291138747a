"""Stream: the items that a generator method yields in its actor, as they come; the caller's pace bounds the actor's."""

from __future__ import annotations

import collections
import contextlib
import threading
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any, Generic, TypeVar

from rlx.actors.future import Answer, Err, Future, Ok, Outcome
from rlx.errors import CallTimeout

T = TypeVar("T")


class Stream(Generic[T]):
    """Iterate it, with `for` or `async for`, or ask with `next(timeout_s)`; close it to end the method early.

    The actor is at most `credits` items ahead. What the method raises comes after the items that it had yielded.
    """

    def __init__(self, actor: str, method: str, credits: int = 8) -> None:
        if credits < 1:
            raise ValueError(f"credits={credits}: the actor could never yield an item; use 1 or more.")
        self.actor, self.method, self.credits = actor, method, credits
        self.grant: Callable[[int], None] | None = None
        """Set by the engine: allow the method that many items more."""
        self.cancel: Callable[[], None] | None = None
        """Set by the engine: end the method."""
        self._lock = threading.Lock()
        self._items: collections.deque[Answer] = collections.deque()
        self._count = 0  # of all items that have come
        self._owed = 0
        self._end: Answer | None = None
        self._news: Future[None] = Future(actor, method)

    def next(self, timeout_s: float | None = None) -> T:
        """Return the next item; StopIteration at the end, CallTimeout if it is late, and then ask again."""
        while True:
            with self._lock:
                answer = self._items.popleft() if self._items else None
                news = self._news
                ended = self._end
            if answer is not None:
                return self._taken(answer())
            if ended is not None:
                return self._finish(ended())
            try:
                news.outcome(timeout_s)
            except CallTimeout:
                raise CallTimeout(
                    f"{self.actor}.{self.method}() has yielded nothing for {timeout_s:g} s; it goes on: next() waits "
                    f"again, close() ends it."
                ) from None

    def close(self) -> None:
        """End the method at its next yield; what it has yielded meanwhile is dropped."""
        with self._lock:
            running, self._items = self._end is None, collections.deque()
        if running and self.cancel is not None:
            self.cancel()
        self.cancel = None

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        return self.next()

    def __aiter__(self) -> Stream[T]:
        return self

    async def __anext__(self) -> T:
        while True:
            with self._lock:
                news, waiting = self._news, not self._items and self._end is None
            if not waiting:
                break
            await news
        try:
            return self.next()
        except StopIteration:
            raise StopAsyncIteration from None

    def __enter__(self) -> Stream[T]:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.close()

    def __del__(self) -> None:
        with contextlib.suppress(Exception):  # the interpreter may be at its end
            self.close()

    def feed(self, index: int, answer: Answer) -> None:
        """Add item number `index` (for engines); one that has come before is ignored."""
        with self._lock:
            if index != self._count:
                return
            self._count += 1
            self._items.append(answer)
            news, self._news = self._news, Future(self.actor, self.method)
        news.settle(_nothing)

    def finish(self, answer: Answer) -> None:
        """Say how the method ended (for engines): Ok at the end of its items, Err otherwise."""
        with self._lock:
            if self._end is not None:
                return
            self._end = answer
            news = self._news
        news.settle(_nothing)

    def _taken(self, outcome: Outcome[Any]) -> T:
        self._owed += 1
        if self._owed * 2 >= self.credits and self.grant is not None:
            owed, self._owed = self._owed, 0
            self.grant(owed)
        if isinstance(outcome, Err):
            raise outcome.error
        return outcome.value

    def _finish(self, outcome: Outcome[Any]) -> T:
        if isinstance(outcome, Err):
            raise outcome.error
        raise StopIteration


def _nothing() -> Outcome[None]:
    return Ok(None)
