"""ActorHandle and Group: actors from outside, and their methods."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from rlx.actors.future import Answer, Err, Future, GroupFuture
from rlx.actors.interface import Engine, EngineActor, Listener, Stall
from rlx.actors.monitor import logger
from rlx.errors import NotSupported

if TYPE_CHECKING:
    from rlx.actors.runtime import Runtime

OnExit = Callable[["ActorHandle", BaseException], None]


class ActorHandle:
    """An actor, from outside: `handle.method.call(...)` and `handle.method.send(...)`."""

    _actor: EngineActor

    def __init__(self, runtime: Runtime, name: str) -> None:
        self.name = name
        self._runtime = runtime
        self._lock = threading.Lock()
        self._on_exit: list[OnExit] = []
        self._on_failure: list[OnExit] = []
        self._exit: Answer | None = None

    def ready(self, timeout_s: float | None = None) -> None:
        """Return when the actor's __init__ has returned; raise what it raised. The default is the system timeout."""
        self._actor.ready.result(self._runtime.system_timeout_s if timeout_s is None else timeout_s)

    def __getattr__(self, method: str) -> Method:
        if method.startswith("_"):
            raise AttributeError(f"{method!r} is private to the actor {self.__dict__.get('name')!r}")
        return Method(self, method)

    def __reduce__(self) -> NoReturn:
        raise NotSupported(f"the handle of actor {self.name!r} cannot be sent to another actor by this engine.")

    def __repr__(self) -> str:
        return f"<ActorHandle {self.name}>"

    def _watch(self, on_exit: OnExit | None, on_failure: OnExit | None) -> None:
        with self._lock:
            if on_failure is not None:
                self._on_failure.append(on_failure)
            if on_exit is not None and self._exit is None:
                self._on_exit.append(on_exit)
                on_exit = None
        if on_exit is not None and self._exit is not None:
            self._runtime._events.post(self._tell, [on_exit], self._exit)

    def _listener(self) -> Listener:
        return Listener(self._note_exit, self._note_failure, self._note_stall)

    def _note_stall(self, stall: Stall) -> None:
        pass

    def _note_exit(self, why: Answer) -> None:
        """Called by the engine, once, when the actor has ended."""
        with self._lock:
            self._exit, callbacks = why, self._on_exit
        if callbacks and not self._runtime._closed:
            self._runtime._events.post(self._tell, callbacks, why)

    def _note_failure(self, why: Answer) -> None:
        """Called by the engine when a one-way call has failed."""
        self._runtime._events.post(self._tell_failure, why)

    def _tell_failure(self, why: Answer) -> None:
        outcome = why()
        assert isinstance(outcome, Err)
        logger.error("a one-way call to %s failed", self.name, exc_info=outcome.error)
        self._tell(self._on_failure, lambda: outcome)

    def _tell(self, callbacks: list[OnExit], why: Answer) -> None:
        outcome = why()
        assert isinstance(outcome, Err)
        for callback in callbacks:
            try:
                callback(self, outcome.error)
            except Exception:
                logger.exception("a monitor callback of %s failed", self.name)


class Method:
    """One method of one actor."""

    def __init__(self, handle: ActorHandle, name: str) -> None:
        self._handle = handle
        self._name = name

    def call(self, *args: Any, **kwargs: Any) -> Future[Any]:
        """Run the method in the actor; return its future at once. TypeError if an argument cannot be sent."""
        message = self._handle._runtime._engine.pack(args, kwargs)
        return _call(self._handle, self._name, message)

    def send(self, *args: Any, **kwargs: Any) -> None:
        """Run the method in the actor without an answer; what it raises reaches the monitor and the log."""
        message = self._handle._runtime._engine.pack(args, kwargs)
        self._handle._actor.post(self._name, message, None)


class Group:
    """Several actors of a kind: `group.method.call(...)` calls all of them."""

    def __init__(self, engine: Engine, actors: Sequence[ActorHandle]) -> None:
        self.actors = list(actors)
        self._engine = engine

    def __getattr__(self, method: str) -> GroupMethod:
        if method.startswith("_"):
            raise AttributeError(f"{method!r} is private to the actors of this group")
        return GroupMethod(self, method)

    def __len__(self) -> int:
        return len(self.actors)


class GroupMethod:
    """One method of all members of a group."""

    def __init__(self, group: Group, name: str) -> None:
        self._group = group
        self._name = name

    def call(self, *args: Any, **kwargs: Any) -> GroupFuture[Any]:
        """Run the method in every member with the same arguments, which are pickled once."""
        message = self._group._engine.pack(args, kwargs)
        return GroupFuture([_call(actor, self._name, message) for actor in self._group.actors])

    def map(self, *arguments: Iterable[Any]) -> GroupFuture[Any]:
        """Like the builtin: member i runs the method with the i-th item of each iterable as its arguments."""
        rows = list(zip(*arguments, strict=True))
        if len(rows) != len(self._group):
            raise ValueError(f"map() got {len(rows)} arguments for {len(self._group)} members; give one to each.")
        messages = [self._group._engine.pack(row, {}) for row in rows]  # all, before any is sent
        actors = zip(self._group.actors, messages, strict=True)
        return GroupFuture([_call(actor, self._name, message) for actor, message in actors])

    def send(self, *args: Any, **kwargs: Any) -> None:
        """Run the method in every member without an answer."""
        message = self._group._engine.pack(args, kwargs)
        for actor in self._group.actors:
            actor._actor.post(self._name, message, None)


def _call(handle: ActorHandle, method: str, message: Any) -> Future[Any]:
    future: Future[Any] = Future(handle.name, method)
    handle._actor.post(method, message, future)
    return future
