"""Where callbacks run, and who is told when an actor exits, restarts or stalls, or a one-way call fails."""

from __future__ import annotations

import heapq
import itertools
import logging
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Generic, TypeVar

from rlx.actors.future import Answer, Err

if TYPE_CHECKING:
    from rlx.actors.interface import Stall

logger = logging.getLogger("rlx.actors")

Who = TypeVar("Who")


class EventThread:
    """Runs functions one after another in its own thread, at once or later, so that a slow one holds up nobody else."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._events: list[tuple[float, int, Callable[..., None], tuple[object, ...]]] = []  # a heap, by time
        self._numbers = itertools.count()
        self._lock = threading.Lock()  # taken as itself: an interrupt inside Condition.__enter__ would keep it
        self._changed = threading.Condition(self._lock)
        self._thread: threading.Thread | None = None
        self._closed = False

    def post(self, function: Callable[..., None], *args: object) -> None:
        """Run `function(*args)` soon; what it raises is logged. Nothing runs after `close`."""
        self.after(0.0, function, *args)

    def after(self, delay_s: float, function: Callable[..., None], *args: object) -> None:
        """Run `function(*args)` in `delay_s` seconds, unless `close` comes first."""
        with self._lock:
            if self._closed:
                return
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
                try:
                    self._thread.start()
                except RuntimeError:  # there is none to be had now; the next event tries again
                    self._thread = None
                    raise
            heapq.heappush(self._events, (time.monotonic() + delay_s, next(self._numbers), function, args))
            self._changed.notify()

    def close(self, timeout_s: float) -> None:
        """Finish what is due, drop what is for later, and end the thread."""
        with self._lock:
            self._closed, thread = True, self._thread
            self._changed.notify()
        if thread is not None and thread is not threading.current_thread():
            thread.join(timeout_s)
            if thread.is_alive():
                logger.warning(
                    "a callback in %s still runs %g s after close(); it is left behind.", *(self._name, timeout_s)
                )

    def _run(self) -> None:
        while (event := self._next()) is not None:
            function, args = event
            try:
                function(*args)
            except Exception:
                logger.exception("a callback of the actor runtime failed: %r", function)
            del event, function, args  # they may hold an actor's arguments, and the next one may be hours away

    def _next(self) -> tuple[Callable[..., None], tuple[object, ...]] | None:
        """Wait for the next event that is due; None when closed and no other is."""
        with self._lock:
            while True:
                due_in_s = self._events[0][0] - time.monotonic() if self._events else None
                if due_in_s is not None and due_in_s <= 0:
                    return heapq.heappop(self._events)[2:]
                if self._closed:
                    return None
                self._changed.wait(due_in_s)


class Watchers(Generic[Who]):
    """Who wants to hear of one actor. The engine's threads post here; callbacks run in the event thread."""

    def __init__(self, who: Who, name: str, events: EventThread) -> None:
        self._who, self._name, self._events = who, name, events
        self._lock = threading.Lock()
        self._exit: Answer | None = None
        self._on_exit: list[Callable[[Who, BaseException], None]] = []
        self._on_failure: list[Callable[[Who, BaseException], None]] = []
        self._on_restart: list[Callable[[Who, BaseException], None]] = []
        self._on_stall: list[Callable[[Who, Stall], None]] = []

    def add(
        self,
        on_exit: Callable[[Who, BaseException], None] | None,
        on_failure: Callable[[Who, BaseException], None] | None,
        on_stall: Callable[[Who, Stall], None] | None,
        on_restart: Callable[[Who, BaseException], None] | None,
    ) -> None:
        """Tell these too; of an exit also if it has been told already."""
        with self._lock:
            self._on_failure += [on_failure] if on_failure else []
            self._on_restart += [on_restart] if on_restart else []
            self._on_stall += [on_stall] if on_stall else []
            self._on_exit += [on_exit] if on_exit else []
            exit = self._exit
        if on_exit is not None and exit is not None:
            self._events.post(self._tell_error, [on_exit], exit)

    @property
    def hear_of_restarts(self) -> bool:
        """Whether anybody is told of these."""
        return bool(self._on_restart)

    def dismiss(self) -> None:
        """Nobody wants to hear of an exit any more: the runtime closes."""
        with self._lock:
            self._on_exit.clear()

    def exited(self, why: Answer) -> None:
        """The actor has ended for good."""
        with self._lock:
            self._exit, callbacks = why, list(self._on_exit)
        if callbacks:
            self._events.post(self._tell_error, callbacks, why)

    def failed(self, why: Answer) -> None:
        """A one-way call has failed."""
        self._events.post(self._tell_failure, why)

    def restarted(self, why: Answer) -> None:
        """The actor lives again, after it had ended for this reason."""
        self._events.post(self._tell_error, self._on_restart, why)

    def stalled(self, stall: Stall) -> None:
        """A call has run for long."""
        self._events.post(self._tell_stall, stall)

    def _tell_failure(self, why: Answer) -> None:
        error = _error(why)
        logger.error("a one-way call to %s failed", self._name, exc_info=error)
        self._tell(self._on_failure, error)

    def _tell_stall(self, stall: Stall) -> None:
        if stall.stopped:  # else the method may be merely long
            logger.warning(
                "%s has been in %s() for %.1f s: %s", stall.actor, stall.method, stall.running_s, stall.reason
            )
        self._tell(self._on_stall, stall)

    def _tell_error(self, callbacks: list[Callable[[Who, BaseException], None]], why: Answer) -> None:
        self._tell(callbacks, _error(why))

    def _tell(self, callbacks: list[Callable[[Who, News], None]], news: News) -> None:
        for callback in list(callbacks):
            try:
                callback(self._who, news)
            except Exception:
                logger.exception("a monitor callback of %s failed", self._name)


News = TypeVar("News")


def _error(why: Answer) -> BaseException:
    outcome = why()
    assert isinstance(outcome, Err)
    return outcome.error
