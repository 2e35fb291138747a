"""Stream: the items that a generator method yields in its actor, as they come; the caller's pace bounds the actor's."""

from __future__ import annotations

import collections
import threading
import weakref
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any, Generic, TypeVar

from rlx.actors.future import Answer, Err, Future, nothing
from rlx.errors import ActorError, CallTimeout

T = TypeVar("T")


class Stream(Generic[T]):
    """Iterate it, with `for` or `async for`, or ask with `next(timeout_s)`; close it to end the method early.

    The actor is at most `credits` items ahead. What the method raises comes after the items that it had yielded.
    """

    def __init__(self, actor: str, method: str, credits: int = 8) -> None:
        if credits < 1:
            raise ValueError(f"credits={credits}: the actor could never yield an item; use 1 or more.")
        self.actor, self.method, self.credits, self.where = actor, method, credits, ""
        self.grant: Callable[[int], None] | None = None
        """Set by the engine: allow the method that many items more."""
        self.cancel: Callable[[], None] | None = None
        """Set by the engine: end the method."""
        self._lock = threading.Lock()
        self._items: collections.deque[tuple[int, Answer]] = collections.deque()
        self._next = 0  # the index of the item after the last one that was taken
        self._owed = 0
        self._end: Answer | None = None
        self._news: Future[None] = Future(actor, method)

    def next(self, timeout_s: float | None = None) -> T:
        """Return the next item; StopIteration at the end, CallTimeout if it is late, and then ask again."""
        while True:
            with self._lock:
                news, end = self._news, self._end
                item = self._items[0] if self._items else None
                if item is not None:
                    self._next = item[0] + 1
                    self._items.popleft()
            if item is not None:
                return self._take(item)
            if end is not None:
                outcome = end()
                if isinstance(outcome, Err):
                    raise outcome.error
                raise StopIteration
            try:
                news.outcome(timeout_s)
            except CallTimeout:
                raise CallTimeout(
                    f"{self.actor}.{self.method}(){self.where} has yielded nothing for {timeout_s:g} s; it goes on: "
                    f"next() waits again, close() ends it."
                ) from None

    def close(self) -> None:
        """End the method at its next yield, and this stream now; what has not been taken is dropped."""
        cancel, self.cancel = self.cancel, None
        if cancel is not None and self._end is None:
            cancel()
        self.finish(nothing)
        with self._lock:
            self._items.clear()

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

    def feed(self, index: int, answer: Answer) -> None:
        """Add item number `index` (for engines); one that has come before is ignored, ActorError if one is missing."""
        with self._lock:
            if self._end is not None:
                return
            expected = self._items[-1][0] + 1 if self._items else self._next
            if index > expected:
                raise ActorError(f"item {expected} of {self.actor}.{self.method}() is missing; close the link.")
            if index == expected:
                self._items.append((index, answer))
            self._news.settle(nothing)  # also if it is known: an interrupt may have cut the first call short
            self._news = Future(self.actor, self.method)

    def finish(self, answer: Answer) -> None:
        """Say how the method ended (for engines): Ok at the end of its items, Err otherwise; only the first counts."""
        with self._lock:
            if self._end is None:
                self._end = answer
            self._news.settle(nothing)

    def _take(self, item: tuple[int, Answer]) -> T:
        try:
            outcome = item[1]()
        except BaseException:  # an interrupt while it was unpickled: it is still the next one
            with self._lock:
                self._items.appendleft(item)
            raise
        with self._lock:
            self._owed += 1
            owed = self._owed if 2 * self._owed >= self.credits else 0
            self._owed -= owed
        if owed and self.grant is not None and self._end is None:
            self.grant(owed)
        if isinstance(outcome, Err):
            raise outcome.error
        return outcome.value


class OpenStream:
    """A stream as an engine keeps it until it has ended: it does not keep the caller's end alive."""

    def __init__(self, method: str, stream: weakref.ref[Stream[Any]]) -> None:
        self.method, self._stream = method, stream

    def feed(self, index: int, answer: Answer) -> None:
        """Add item number `index`."""
        stream = self._stream()
        if stream is not None:
            stream.feed(index, answer)

    def settle(self, answer: Answer) -> None:
        """Say how the method ended."""
        stream = self._stream()
        if stream is not None:
            stream.finish(answer)
