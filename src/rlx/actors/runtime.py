"""Runtime: starts actors, watches them, and ends them all; the same on every engine."""

from __future__ import annotations

import atexit
import os
import threading
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from rlx.actors.future import Future, wait
from rlx.actors.handle import ActorHandle, Group, OnExit
from rlx.actors.interface import ActorSpec, ActorState, Engine
from rlx.actors.monitor import EventThread
from rlx.errors import ActorError


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
            handle._actor = self._engine.spawn(spec, handle._listener())
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


_open_runtimes: weakref.WeakSet[Runtime] = weakref.WeakSet()


@atexit.register
def _close_open_runtimes() -> None:
    for runtime in list(_open_runtimes):
        runtime.close()
