"""Future: the answer to one call. GroupFuture: the answers of many. wait: until some have arrived."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, NoReturn, TypeVar

from rlx.errors import ActorDied, CallTimeout

T = TypeVar("T")
NAMED = 8  # of the calls that are late, in an error
LONGEST_WAIT_S = 1.0
"""In one system call. A signal that comes just before one does not end it, and its handler runs only afterwards: a
Ctrl-C would be answered when the wait is over."""


@dataclass(frozen=True)
class Ok(Generic[T]):
    """The call returned `value`."""

    value: T


@dataclass(frozen=True)
class Err:
    """The call raised `error`, or the actor died, or the answer is late."""

    error: BaseException


Outcome = Ok[T] | Err
Answer = Callable[[], Outcome[Any]]
"""Makes an outcome when asked: unpickling runs user code, which has no place in the thread that reads replies."""


def nothing() -> Ok[None]:
    """The answer of what only tells that something has happened."""
    return Ok(None)


# Guards the few instructions that change a future; one for all, because it is never held while anything runs.
_lock = threading.Lock()


class Future(Generic[T]):
    """The answer to one call, now or later."""

    __slots__ = (
        "__weakref__",
        "_answer",
        "_callbacks",
        "_outcome",
        "actor",
        "lead",
        "method",
        "request_cancel",
        "where",
    )

    def __init__(self, actor: str, method: str) -> None:
        self.actor = actor
        self.method = method
        self.where = ""
        """On which machine, for errors, where an engine has many of them: " on NAME"."""
        self.request_cancel: Callable[[], None] | None = None
        self.lead: Callable[[Future[Any], float | None], None] | None = None
        """Set by engines in which a waiting thread may read replies itself, up to a deadline (monotonic s)."""
        self._callbacks: list[Callable[[], None]] = []
        self._answer: Answer | None = None
        self._outcome: Outcome[T] | None = None

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            f"the future of {self.actor}.{self.method}() cannot be sent; send its result(), or a put() of it."
        )

    def result(self, timeout_s: float | None = None) -> T:
        """Return what the method returned, or raise what it raised; CallTimeout if late, and then ask again."""
        outcome = self.outcome(timeout_s)
        if isinstance(outcome, Err):
            raise outcome.error
        return outcome.value

    def exception(self, timeout_s: float | None = None) -> BaseException | None:
        """Return what the method raised, None if it returned."""
        outcome = self.outcome(timeout_s)
        return outcome.error if isinstance(outcome, Err) else None

    def outcome(self, timeout_s: float | None = None) -> Outcome[T]:
        """Return Ok(value) or Err(error); CallTimeout is raised."""
        if self._answer is None and not _wait([self], 1, timeout_s):
            raise self._late(timeout_s)
        answer = self._answer  # read before _outcome: where it is spent, the outcome is there
        outcome = self._outcome
        if outcome is None:
            assert answer is not None
            outcome = answer()
            with _lock:  # two threads may have unpickled it: both get the first one's objects
                if self._outcome is None:
                    self._outcome, self._answer = outcome, _spent
                outcome = self._outcome
        return outcome

    def done(self) -> bool:
        """True once the answer is here."""
        return self._answer is not None

    def cancel(self) -> bool:
        """Ask that the call is not run; False if it is too late to ask.

        The future then ends in CallCancelled, or in its value if the actor had begun with it.
        """
        request = self.request_cancel
        if self.done() or request is None:
            return False
        request()
        return True

    def __await__(self) -> Generator[Any, None, T]:
        yield from _arrival(self)
        return self.result()

    def settle(self, answer: Answer) -> None:
        """Give the answer (for engines); only the first counts. Cut short by an interrupt it may be called again."""
        with _lock:
            if self._answer is None:
                self._answer = answer
        self.request_cancel = None
        if self._callbacks:
            for callback in self._callbacks[:]:  # nothing is added any more
                callback()
            self._callbacks.clear()

    def when_done(self, callback: Callable[[], None]) -> None:
        """Call `callback` when the answer is here, twice if an interrupt cuts it; it must be quick and not raise."""
        with _lock:
            if self._answer is None:
                self._callbacks.append(callback)
                return
        callback()

    def forget(self, callback: Callable[[], None]) -> None:
        """Undo `when_done`."""
        with _lock:
            if callback in self._callbacks:
                self._callbacks.remove(callback)

    def _late(self, timeout_s: float | None) -> CallTimeout:
        return CallTimeout(
            f"{self.actor}.{self.method}(){self.where} has not answered within {timeout_s:g} s; the call goes on: "
            f"result() waits again, kill() ends the actor."
        )

    def __repr__(self) -> str:
        return f"<Future {self.actor}.{self.method}() {'done' if self.done() else 'pending'}>"


class GroupFuture(Generic[T]):
    """The answers of a group's members, in the order of the members."""

    def __init__(self, futures: Sequence[Future[T]], members: Sequence[Any] | None = None) -> None:
        self.futures = list(futures)
        self._members = [future.actor for future in self.futures] if members is None else list(members)

    def result(self, timeout_s: float | None = None) -> list[Outcome[T]]:
        """Return one Ok or Err per member; who is late after `timeout_s` (for all together) is Err(CallTimeout)."""
        _wait(self.futures, len(self.futures), timeout_s)
        return [f.outcome() if f.done() else Err(f._late(timeout_s)) for f in self.futures]

    def values(self, timeout_s: float | None = None) -> list[T]:
        """Return what every member returned, or raise the first error, with a note of who else failed.

        A death comes before other errors: those are often only what the dead member's peers noticed of it.
        """
        outcomes = self.result(timeout_s)
        errors = [outcome.error for outcome in outcomes if isinstance(outcome, Err)]
        if errors:
            error = next((one for one in errors if isinstance(one, ActorDied)), errors[0])
            failed = [f.actor for f, outcome in zip(self.futures, outcomes, strict=True) if isinstance(outcome, Err)]
            method = self.futures[0].method
            error.add_note(f"{method}() failed in {len(failed)} of {len(outcomes)} actors: {', '.join(failed)}")
            raise error
        return [outcome.value for outcome in outcomes if isinstance(outcome, Ok)]

    def as_completed(self, timeout_s: float | None = None) -> Iterator[tuple[Any, Outcome[T]]]:
        """Yield (member, outcome) as the answers arrive: its handle, or its name where no group made the call.

        CallTimeout is raised when `timeout_s`, for all together, is over.
        """
        members = dict(zip(map(id, self.futures), self._members, strict=True))
        for future in as_completed(self.futures, timeout_s):
            yield members[id(future)], future.outcome()

    def done(self) -> bool:
        """True once every member has answered."""
        return all(future.done() for future in self.futures)

    def __await__(self) -> Generator[Any, None, list[Outcome[T]]]:
        for future in self.futures:
            yield from _arrival(future)
        return self.result()


def wait(
    futures: Iterable[Future[T]], count: int = 1, timeout_s: float | None = None
) -> tuple[list[Future[T]], list[Future[T]]]:
    """Return (done, pending), both in the order given, once `count` are done or `timeout_s` has passed."""
    futures = [_single(future) for future in futures]
    if not 0 <= count <= len(futures):
        raise ValueError(f"count={count} of {len(futures)} futures can never be done; use 0 to {len(futures)}.")
    _wait(futures, count, timeout_s)
    done = [future.done() for future in futures]
    return [f for f, d in zip(futures, done, strict=True) if d], [
        f for f, d in zip(futures, done, strict=True) if not d
    ]


def _single(future: Future[T]) -> Future[T]:
    if isinstance(future, GroupFuture):
        raise TypeError("a group's call is several futures; give its .futures, or ask it: result(), as_completed().")
    return future


def as_completed(futures: Iterable[Future[T]], timeout_s: float | None = None) -> Iterator[Future[T]]:
    """Yield the futures in the order in which they are done; CallTimeout naming the late once `timeout_s` is over."""
    arrived: queue.SimpleQueue[int] = queue.SimpleQueue()
    late = dict(enumerate(map(_single, futures)))
    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    callbacks = {number: partial(arrived.put, number) for number in late}
    for number, future in late.items():
        future.when_done(callbacks[number])
    try:
        while late:
            try:
                number = arrived.get(timeout=seconds_to(deadline))
            except queue.Empty:
                if deadline is None or time.monotonic() < deadline:
                    continue
                names = list(dict.fromkeys(f"{future.actor}.{future.method}()" for future in late.values()))
                some = ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} others" if len(names) > NAMED else "")
                raise CallTimeout(
                    f"{len(late)} of {len(callbacks)} calls have not answered within {timeout_s:g} s: {some}; "
                    f"they go on: wait for them again, or kill() their actors."
                ) from None
            if number in late:  # else its callback has been called twice: see when_done
                yield late.pop(number)
    finally:
        for number, future in late.items():
            future.forget(callbacks[number])


def _wait(futures: Sequence[Future[Any]], count: int, timeout_s: float | None) -> bool:
    """True once `count` of the futures are done, False after `timeout_s`."""
    late = [future for future in futures if not future.done()]
    spare = len(futures) - count
    if len(late) <= spare:
        return True
    deadline = None if timeout_s is None else time.monotonic() + max(0.0, timeout_s)
    if spare == 0:  # all are wanted, so the order in which this thread looks after them does not matter
        for future in late:
            if future.lead is not None and not future.done():
                future.lead(future, deadline)
        late = [future for future in late if not future.done()]
        if not late:
            return True
    # Each waiter has a gate of its own, so a KeyboardInterrupt here cannot spoil the future for anybody else.
    gate = threading.Lock()
    gate.acquire()
    missing = set(range(len(late)))

    def arrive(index: int) -> None:
        with _lock:
            missing.discard(index)
            if len(missing) <= spare and gate.locked():
                gate.release()

    arrivals = [partial(arrive, index) for index in range(len(late))]
    for future, arrival in zip(late, arrivals, strict=True):
        future.when_done(arrival)
    try:
        while not gate.acquire(timeout=seconds_to(deadline)):
            if deadline is not None and time.monotonic() >= deadline:
                return False
        return True
    finally:
        for future, arrival in zip(late, arrivals, strict=True):
            future.forget(arrival)


def seconds_to(deadline: float | None) -> float:
    """Return how long to wait before a look at the clock, and at signals: see LONGEST_WAIT_S."""
    return LONGEST_WAIT_S if deadline is None else min(max(0.0, deadline - time.monotonic()), LONGEST_WAIT_S)


def _arrival(future: Future[Any]) -> Generator[Any, None, None]:
    """Suspend the running asyncio task until the future is done."""
    import asyncio

    loop = asyncio.get_running_loop()
    arrived = loop.create_future()

    def wake() -> None:
        with contextlib.suppress(RuntimeError):  # the loop was closed meanwhile: nobody is left to wake
            loop.call_soon_threadsafe(lambda: arrived.done() or arrived.set_result(None))

    future.when_done(wake)
    try:
        yield from arrived
    finally:
        future.forget(wake)


def _spent() -> Outcome[Any]:
    raise AssertionError("an answer is made once")
