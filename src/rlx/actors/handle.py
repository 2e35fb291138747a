"""ActorHandle and Group: actors from outside, and their methods."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from rlx.actors.future import Err, Future, GroupFuture
from rlx.actors.interface import Engine
from rlx.actors.life import ActorLife
from rlx.actors.monitor import Watchers
from rlx.actors.stream import Stream
from rlx.errors import ActorError, CallTimeout, NotSupported

if TYPE_CHECKING:
    from rlx.actors.runtime import Runtime


class ActorHandle:
    """An actor, from outside: `handle.method.call(...)` and `handle.method.send(...)`."""

    _actor: ActorLife
    _watchers: Watchers[ActorHandle]

    def __init__(self, runtime: Runtime, name: str) -> None:
        self.name = name
        self._runtime = runtime

    @property
    def incarnation(self) -> int:
        """How often the actor was started again: 0 is the first."""
        return self._actor.incarnation

    @property
    def is_lost(self) -> bool:
        """Whether the machine is gone that its resources were from; so it is until it has the same on another one."""
        return self._actor.is_lost

    def ready(self, timeout_s: float | None = None) -> None:
        """Return when the __init__ of the present incarnation has returned; raise what it raised, or how it has ended.

        The default is the system timeout. An actor that waits for resources is late and says for what.
        """
        timeout_s = self._runtime.system_timeout_s if timeout_s is None else timeout_s
        try:
            self._actor.making().result(timeout_s)
        except CallTimeout as error:
            waiting = self._actor.state().waiting
            if waiting is None:
                raise
            raise CallTimeout(f"actor {self.name} is not ready after {timeout_s:g} s: it {waiting}.") from error

    def __getattr__(self, method: str) -> Method:
        if method.startswith("_"):
            raise AttributeError(f"{method!r} is private to the actor {self.__dict__.get('name')!r}")
        found = self.__dict__[method] = Method(self._runtime._engine, self._actor, method)
        return found

    def __reduce__(self) -> NoReturn:
        raise NotSupported(f"the handle of actor {self.name!r} cannot be sent to another actor by this engine.")

    def __repr__(self) -> str:
        return f"<ActorHandle {self.name}>"


class Method:
    """One method of one actor."""

    __slots__ = ("_actor", "_engine", "_name")

    def __init__(self, engine: Engine, actor: ActorLife, name: str) -> None:
        self._engine, self._actor = engine, actor  # not the handle, which keeps this
        self._name = name

    def __call__(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Raise TypeError: which of the three ways to run it is meant?"""
        method = f"{self._actor.name}.{self._name}"
        raise TypeError(
            f"{method}(...) runs nothing; use {method}.call(...) for a future of what it returns, .stream(...) for a "
            "generator's items, .send(...) for no answer."
        )

    def call(self, *args: Any, **kwargs: Any) -> Future[Any]:
        """Run the method in the actor; return its future at once. TypeError if an argument cannot be sent."""
        return _call(self._actor, self._name, self._engine.pack(args, kwargs))

    def stream(self, *args: Any, credits: int = 8, **kwargs: Any) -> Stream[Any]:
        """Run a generator method in the actor; return its items as they come, `credits` ahead at most."""
        message = self._engine.pack(args, kwargs)
        stream: Stream[Any] = Stream(self._actor.name, self._name, credits)
        self._actor.stream(self._name, message, stream)
        return stream

    def send(self, *args: Any, **kwargs: Any) -> None:
        """Run the method in the actor without an answer; what it raises reaches the monitor and the log."""
        self._actor.post(self._name, self._engine.pack(args, kwargs), None)


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
        actors = self._group.actors
        return GroupFuture([_try_to_call(actor, self._name, message) for actor in actors], actors)

    def map(self, *arguments: Iterable[Any]) -> GroupFuture[Any]:
        """Like the builtin: member i runs the method with the i-th item of each iterable as its arguments."""
        rows = list(zip(*arguments, strict=True))
        if len(rows) != len(self._group):
            raise ValueError(f"map() got {len(rows)} arguments for {len(self._group)} members; give one to each.")
        messages = [self._group._engine.pack(row, {}) for row in rows]  # all, before any is sent
        actors = self._group.actors
        pairs = zip(actors, messages, strict=True)
        return GroupFuture([_try_to_call(actor, self._name, message) for actor, message in pairs], actors)

    def send(self, *args: Any, **kwargs: Any) -> None:
        """Run the method in every member without an answer."""
        message = self._group._engine.pack(args, kwargs)
        for actor in self._group.actors:
            actor._actor.post(self._name, message, None)


def _call(actor: ActorLife, method: str, message: Any) -> Future[Any]:
    future: Future[Any] = Future(actor.name, method)
    actor.post(method, message, future)
    return future


def _try_to_call(handle: ActorHandle, method: str, message: Any) -> Future[Any]:
    """Like `_call`; that one member takes no call is that member's error, for the others have got theirs."""
    try:
        return _call(handle._actor, method, message)
    except ActorError as error:
        future, failure = Future[Any](handle.name, method), Err(error)
        future.settle(lambda: failure)
        return future
