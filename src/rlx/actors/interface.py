"""Runtime, ActorHandle and Group: what a program holds, the same on every engine; Engine: what an engine provides."""

from __future__ import annotations

import atexit
import os
import threading
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, Protocol

from rlx.actors.future import Answer, Err, Future, GroupFuture, wait
from rlx.actors.monitor import EventThread, logger
from rlx.errors import ActorError, NotSupported

OnExit = Callable[["ActorHandle", BaseException], None]


class Runtime:
    """Starts actors, watches them, and ends them all."""

    def __init__(self, engine: Engine, events: EventThread, system_timeout_s: float) -> None:
        self.capabilities = engine.capabilities
        self.system_timeout_s = system_timeout_s
        self._engine = engine
        self._events = events
        self._actors: dict[str, ActorHandle] = {}
        self._lock = threading.RLock()  # re-entered where an inline actor's __init__ spawns another
        self._closed = False
        self._pid = os.getpid()
        _open_runtimes.add(self)

    def spawn(
        self,
        make: Callable[..., Any],
        *args: Any,
        name: str | None = None,
        env: Mapping[str, str] | None = None,
        threads: int = 1,
        **kwargs: Any,
    ) -> ActorHandle:
        """Return a handle to the actor `make(*args, **kwargs)`, at once; what its making raises comes with `ready()`.

        env is set before any code of the actor runs; threads is how many threads torch may use in it.
        """
        with self._lock:
            self._check_open()
            name = name or self._free_name(getattr(make, "__name__", type(make).__name__).lower())
            if name in self._actors and self._actors[name]._actor.state().status in ("starting", "alive"):
                raise ValueError(f"there is already an actor named {name!r}; use another name, or kill() it first.")
            spec = ActorSpec(name, make, args, kwargs, dict(env or {}), threads)
            handle = ActorHandle(self, name)
            handle._actor = self._engine.spawn(spec, handle._note_exit, handle._note_failure)
            self._actors[name] = handle
        return handle

    def group(self, actors: Sequence[ActorHandle]) -> Group:
        """Return a group whose calls go to all `actors`."""
        return Group(self._engine, actors)

    def wait(
        self, futures: Iterable[Future[Any]], count: int = 1, timeout_s: float | None = None
    ) -> tuple[list[Future[Any]], list[Future[Any]]]:
        """Return (done, pending), in the order given, once `count` are done or `timeout_s` has passed."""
        return wait(futures, count, timeout_s)

    def monitor(self, actor: ActorHandle, on_exit: OnExit | None = None, on_failure: OnExit | None = None) -> None:
        """Have `on_exit(actor, error)` called when the actor ends, also if it has ended already, but not by close().

        `on_failure(actor, error)` is called when a one-way call fails. Callbacks run one at a time in one thread
        beside the program's; they may use the runtime.
        """
        actor._watch(on_exit, on_failure)

    def kill(self, actor: ActorHandle) -> None:
        """End the actor now, whatever it does; its pending calls fail with ActorDied. Returns when it is gone."""
        actor._actor.kill(self.system_timeout_s)

    def state(self) -> dict[str, ActorState]:
        """Return the state of every actor by name, of the ended ones too."""
        with self._lock:
            return {name: handle._actor.state() for name, handle in self._actors.items()}

    def close(self) -> None:
        """End all actors and free everything; idle ones finish what they were sent, busy ones are killed."""
        with self._lock:
            if self._closed or os.getpid() != self._pid:  # a process forked from this one has no say in it
                return
            self._closed = True
        _open_runtimes.discard(self)
        self._engine.close(self.system_timeout_s)
        self._events.close(self.system_timeout_s)

    def __enter__(self) -> Runtime:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check_open(self) -> None:
        if self._closed:
            raise ActorError("this runtime is closed; open a new one with rlx.actors.runtime(...).")

    def _free_name(self, kind: str) -> str:
        number = 0
        while f"{kind}/{number}" in self._actors:
            number += 1
        return f"{kind}/{number}"


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


@dataclass(frozen=True)
class ActorSpec:
    """What an engine needs to start an actor."""

    name: str
    make: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    env: dict[str, str]
    threads: int


@dataclass(frozen=True)
class ActorState:
    """An actor at one moment."""

    name: str
    status: str
    """starting (also while __init__ runs), alive, failed (__init__ raised), or dead."""
    pid: int | None
    """The process it runs in; None until that is known."""
    pending: int
    """Calls that have no answer yet."""
    method: str | None
    """The method that runs, or is the next to run; None when idle."""
    error: str | None
    """Why it ended; None while it lives."""


class EngineActor(Protocol):
    """One actor, as its engine keeps it."""

    ready: Future[None]

    def post(self, method: str, message: Any, future: Future[Any] | None) -> None:
        """Have the method run after all earlier ones; settle the future, also when the actor is or falls dead.

        Without a future only a failure is reported. Must not wait for the actor.
        """
        ...

    def kill(self, timeout_s: float) -> None:
        """End the actor and return when it is gone; CallTimeout otherwise."""
        ...

    def state(self) -> ActorState:
        """Return the state of the actor now."""
        ...


class Engine(Protocol):
    """A place for actors to live."""

    capabilities: frozenset[str]
    """"processes": an actor has a process of its own, so a crash or a kill hits nobody else, and timeouts hold."""

    def pack(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the arguments as a message that can go to any number of actors; TypeError if they cannot go."""
        ...

    def spawn(self, spec: ActorSpec, exited: Callable[[Answer], None], failed: Callable[[Answer], None]) -> EngineActor:
        """Start an actor and return at once. `exited` is told why it ended, `failed` of each failed one-way call."""
        ...

    def close(self, timeout_s: float) -> None:
        """End all actors and free everything."""
        ...


def _call(handle: ActorHandle, method: str, message: Any) -> Future[Any]:
    future: Future[Any] = Future(handle.name, method)
    handle._actor.post(method, message, future)
    return future


_open_runtimes: weakref.WeakSet[Runtime] = weakref.WeakSet()


@atexit.register
def _close_open_runtimes() -> None:
    for runtime in list(_open_runtimes):
        runtime.close()
