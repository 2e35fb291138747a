"""TaskPool: functions instead of actors, run by a few workers that come and go."""

from __future__ import annotations

import collections
import itertools
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from rlx.actors import machine
from rlx.actors.future import Err, Future, Outcome
from rlx.actors.interface import Engine
from rlx.actors.monitor import EventThread
from rlx.errors import ActorDied, CallCancelled, NotSupported

if TYPE_CHECKING:
    from rlx.actors.handle import ActorHandle
    from rlx.actors.runtime import Runtime

T = TypeVar("T")
IDLE_S = 5.0
"""Seconds without a task after which a worker ends."""

_this_thread = threading.local()


class Worker:
    """The actor that runs tasks, one at a time."""

    def run(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """Return `function(*args, **kwargs)`."""
        _this_thread.runs_task = True
        try:
            return function(*args, **kwargs)
        finally:
            _this_thread.runs_task = False


class _Task:
    """One function call that waits for a worker, or runs in one."""

    def __init__(self, name: str, message: Any) -> None:
        self.name, self.message = name, message
        self.future: Future[Any] = Future("task", name)
        self.call: Future[Any] | None = None  # of the worker that runs it


class TaskPool:
    """A queue of tasks and at most one worker per CPU; a worker has one task, so its death costs no other."""

    def __init__(self, runtime: Runtime, engine: Engine, work: EventThread) -> None:
        self._runtime, self._engine, self._work = runtime, engine, work
        self._limit = max(1, int(machine.cpu_count()))
        self._lock = threading.Lock()
        self._queue: collections.deque[_Task] = collections.deque()
        self._workers: dict[str, ActorHandle | None] = {}  # by name; None while it is being spawned
        self._idle: dict[str, float] = {}  # since when, the latest last
        self._reaps = False  # whether somebody will look for idle workers

    def submit(self, function: Callable[..., T], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Future[T]:
        """Queue `function(*args, **kwargs)`; return its future at once."""
        if getattr(_this_thread, "runs_task", False):
            raise NotSupported(
                "a task cannot submit tasks: they could wait for each other for ever with every worker taken; "
                "return what remains to be done, and submit it from where the first task was submitted."
            )
        name = getattr(function, "__qualname__", None) or repr(function)
        task = _Task(name, self._engine.pack((function, *args), kwargs))
        task.future.request_cancel = partial(self._cancel, task)
        with self._lock:
            self._queue.append(task)
        self._dispatch()
        return task.future

    def map(
        self,
        function: Callable[..., T],
        rows: Iterator[tuple[Any, ...]],
        in_flight: int | None,
        timeout_s: float | None,
    ) -> Iterator[T]:
        """Yield `function(*row)` for every row in order, with at most `in_flight` of them under way."""
        futures: collections.deque[Future[T]] = collections.deque()
        try:
            for row in itertools.islice(rows, in_flight or 2 * self._limit):
                futures.append(self.submit(function, row, {}))
            while futures:
                result = futures[0].result(timeout_s)
                futures.popleft()
                futures.extend(self.submit(function, row, {}) for row in itertools.islice(rows, 1))
                yield result
        finally:
            for future in futures:
                future.cancel()

    def close(self) -> None:
        """Fail what has not begun; the workers end with the runtime."""
        self._fail_queued(lambda task: ActorDied(f"task {task.name}() was not run: its runtime was closed."))

    def _dispatch(self) -> None:
        """Give waiting tasks to idle workers, and to new ones."""
        while (step := self._next_step()) is not None:
            if isinstance(step, str):
                if not self._hire(step):
                    return
                continue
            worker, task = step
            call: Future[Any] = Future(worker.name, "run")
            task.call = call
            call.when_done(partial(self._on_done, worker, task, call))
            try:
                worker._actor.post("run", task.message, call)
            except BaseException as error:  # it may be somebody else's task, who waits for it
                failure = Err(error)
                call.settle(lambda failure=failure: failure)
                if not isinstance(error, Exception):
                    raise

    def _next_step(self) -> tuple[ActorHandle, _Task] | str | None:
        """Return which worker is to run which task, or the name of a worker to hire; None if there is nothing to do."""
        with self._lock:
            if not self._queue:
                return None
            worker = self._take_idle()
            if worker is not None:
                return worker, self._queue.popleft()
            if len(self._workers) == self._limit:
                return None
            name = next(n for i in itertools.count() if (n := f"task_worker/{i}") not in self._workers)
            self._workers[name] = None
            return name

    def _take_idle(self) -> ActorHandle | None:
        """Return the worker that was busy last: its memory is warm, and the others may end. Holds the lock."""
        while self._idle:
            name, _ = self._idle.popitem()
            worker = self._workers[name]
            if worker is not None and not worker._actor.ended:
                return worker
            del self._workers[name]
        return None

    def _hire(self, name: str) -> bool:
        try:
            worker = self._runtime.spawn(Worker, name=name)
        except Exception as error:
            with self._lock:
                del self._workers[name]
                others = bool(self._workers)
            if not others:  # else these get to the waiting tasks as well
                failure = error
                self._fail_queued(lambda _: failure)
            return False
        with self._lock:
            self._workers[name], self._idle[name] = worker, time.monotonic()
        return True

    def _on_done(self, worker: ActorHandle, task: _Task, call: Future[Any]) -> None:
        """Called where the engine settles the call: only notes what there is to do."""
        with self._lock:
            if worker._actor.ended:
                del self._workers[worker.name]
            else:
                self._idle[worker.name] = time.monotonic()
            is_waited_for, reap = bool(self._queue), not self._reaps
            self._reaps = True
        task.future.settle(partial(_outcome, task.name, call))
        if is_waited_for:
            self._work.post(self._dispatch)
        if reap:
            self._work.after(IDLE_S, self._reap)

    def _reap(self) -> None:
        """End the workers that have been idle for long; look again when the next one will have been."""
        now = time.monotonic()
        with self._lock:
            leaving = [name for name, since in self._idle.items() if now - since >= IDLE_S]
            workers = [self._workers[name] for name in leaving]
            for name in leaving:
                del self._idle[name]
            oldest = min(self._idle.values(), default=now)
            self._reaps = len(self._workers) > len(leaving)
            if self._reaps:
                self._work.after(oldest + IDLE_S - now, self._reap)
        try:
            for worker in workers:
                assert worker is not None  # only while it is being spawned
                self._runtime.kill(worker)
        finally:
            with self._lock:
                for name in leaving:
                    del self._workers[name]
            self._dispatch()  # tasks that came meanwhile may have found every place taken

    def _cancel(self, task: _Task) -> None:
        with self._lock:
            waiting = task in self._queue
            if waiting:
                self._queue.remove(task)
        if waiting:
            error = CallCancelled(f"task {task.name}() was cancelled before it ran.")
            task.future.settle(lambda: Err(error))
        elif task.call is not None:
            task.call.cancel()

    def _fail_queued(self, why: Callable[[_Task], Exception]) -> None:
        with self._lock:
            tasks, self._queue = list(self._queue), collections.deque()
        for task in tasks:
            error = why(task)
            task.future.settle(partial(Err, error))


def _outcome(name: str, call: Future[Any]) -> Outcome[Any]:
    """Return the outcome of a task; a death names it rather than the worker's `run`."""
    outcome = call.outcome()
    if isinstance(outcome, Err) and isinstance(outcome.error, ActorDied):
        return Err(ActorDied(f"task {name}() was lost: {outcome.error}"))
    return outcome
