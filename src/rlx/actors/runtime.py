"""Runtime: starts actors, watches them, and ends them all; the same on every engine."""

from __future__ import annotations

import atexit
import difflib
import itertools
import os
import signal
import threading
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NoReturn, TypeVar

from rlx.actors.board import KEPT_ENDED
from rlx.actors.future import Future, as_completed, wait
from rlx.actors.handle import ActorHandle, Group
from rlx.actors.interface import ActorSpec, ActorState, AnyChannel, Engine, Stall
from rlx.actors.life import ENDED, ActorLife
from rlx.actors.monitor import EventThread, Watchers
from rlx.actors.ref import Ref
from rlx.actors.reservation import Bundle, Reservation
from rlx.actors.resources import Pool, Resources
from rlx.actors.supervision import STRATEGIES, Restart, Supervisor
from rlx.actors.tasks import TaskPool
from rlx.errors import ActorDied, ActorError, NotSupported

T = TypeVar("T")
MAX_NAME = 1000
HURRY_S = 2.0  # for each step of an end that was interrupted
OnError = Callable[[ActorHandle, BaseException], None]
OnStall = Callable[[ActorHandle, Stall], None]


class Runtime:
    """Starts actors, watches them, and ends them all."""

    def __init__(
        self,
        engine: Engine,
        events: EventThread,
        system_timeout_s: float,
        pool: Pool | None = None,
        pending_timeout_s: float | None = None,
        max_actors: int = 1000,
    ) -> None:
        self.capabilities = engine.capabilities
        self.system_timeout_s = system_timeout_s
        self._engine = engine
        self._events = events  # runs the user's callbacks
        self._work = EventThread("rlx-actor-starts")  # starts what could not be started in the caller's thread
        self._pool, self._pending_timeout_s, self._max_actors = pool, pending_timeout_s, max_actors
        self._actors: dict[str, ActorHandle] = {}
        self._numbers: defaultdict[str, Iterator[int]] = defaultdict(itertools.count)
        self._tasks = TaskPool(self, engine, self._work)
        self._lock = threading.RLock()
        self._closing = threading.RLock()  # held while somebody closes
        self._closed = False  # nothing new
        self._is_over = False  # nothing left
        self._pid = os.getpid()
        _open_runtimes.add(self)

    # Actors.

    def spawn(
        self,
        make: Callable[..., Any],
        *args: Any,
        name: str | None = None,
        env: Mapping[str, str] | None = None,
        threads: int = 1,
        resources: Resources | None = None,
        reservation: Bundle | None = None,
        restart: Restart | None = None,
        concurrency: int | None = None,
        max_pending: int = 10_000,
        stall_after_s: float = 5.0,
        **kwargs: Any,
    ) -> ActorHandle:
        """Return a handle to the actor `make(*args, **kwargs)`, at once; what its making raises comes with `ready()`.

        env: set before any code of the actor runs. threads: how many torch may use in it.
        resources: the actor's own until it has ended for good. While others hold them it is `pending` and its calls
        wait; more than there is in all is Infeasible. They come from the machine, or from one bundle of a
        `reserve()`: `reservation=reserved[0]`, the whole of it if no resources are given.
        restart: how often it is made again, from the same arguments, when it has died: see `Restart`. The calls
        that it had not answered fail with ActorDied, and later ones wait for the next incarnation.
        concurrency: calls that may run at once: None is one, or 1,000 tasks if it has `async def` methods.
        max_pending: unanswered calls at which the next one waits.
        stall_after_s: seconds in one call after which monitors hear of a stall.
        """
        _check_options(env or {}, threads=threads, concurrency=concurrency, max_pending=max_pending)
        with self._lock:
            self._check_open()
            self._check_room()
            name = self._check_name(name) if name else self._free_name(make)
            limits = concurrency, max_pending, stall_after_s
            slot = self._engine.slot(name)
            wanted = resources or (Resources() if reservation is None else reservation.total)
            spec = ActorSpec(name, make, args, kwargs, dict(env or {}), threads, *limits, slot, wanted)
            handle = ActorHandle(self, name)
            handle._watchers = Watchers(handle, name, self._events)
            life = handle._actor = ActorLife(self._engine, spec, handle._watchers, self._work, self.system_timeout_s)
            self._actors[name] = handle  # last: an interrupt leaves none behind that is not whole
        try:
            if restart is not None:
                life.supervise(Supervisor(restart, [life], False, self._work, self.system_timeout_s))
            if reservation is not None:
                claim = reservation.claim(f"actor {name}", [wanted])
                life.start_with(claim, self._pending_timeout_s)
            elif resources:
                life.start_with(self._machine.claim(f"actor {name}", [resources]), self._pending_timeout_s)
            else:
                life.start()
        except BaseException as error:
            life.fail(error)
            with self._lock:
                if self._actors.get(name) is handle:  # else another one has the name by now
                    del self._actors[name]
            raise
        return handle

    def group(
        self, actors: Sequence[ActorHandle], restart: Restart | None = None, strategy: str = "one_for_one"
    ) -> Group:
        """Return a group whose calls go to all `actors`.

        With `restart` the members are started again when they die, under one budget for all. "one_for_one" starts
        the dead one. "one_for_all" ends the others too, whose pending calls fail with ActorDied naming the one that
        died, and starts all in the order given: for actors that cannot go on without each other.
        """
        if strategy not in STRATEGIES:
            raise ValueError(f"strategy={strategy!r} is not one of {', '.join(STRATEGIES)}.")
        if restart is not None:
            lives = [handle._actor for handle in actors]
            together = strategy == "one_for_all"
            supervisor = Supervisor(restart, lives, together, self._work, self.system_timeout_s)
            for life in lives:
                life.supervise(supervisor)
        elif strategy != "one_for_one":
            raise ValueError(f"strategy={strategy!r} says how to restart; give restart=Restart(...) with it.")
        return Group(self._engine, actors)

    def lookup(self, name: str) -> ActorHandle:
        """Return the handle of the actor with this name, also of a lately ended one; ActorError if there is none."""
        with self._lock:
            handle, names = self._actors.get(name), list(self._actors)
        if handle is not None:
            return handle
        near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
        advice = f"the nearest are {', '.join(near)}" if near else f"there are {len(names)}, see state()"
        raise ActorError(f"there is no actor named {name!r}; {advice}.")

    def reserve(
        self, bundles: Sequence[Resources], timeout_s: float | None = None, strategy: str = "pack"
    ) -> Reservation:
        """Return all of these resources, for actors to draw from, once they are free together; none before.

        strategy: where they lie on a cluster. "pack" fills one machine after another, "spread" distributes them;
        "strict_pack" has them on one machine, "strict_spread" each on another; Infeasible says where that cannot be.
        Waits for timeout_s, by default for the runtime's pending_timeout_s; CallTimeout says who holds what is short.
        """
        self._check_open()
        timeout_s = self._pending_timeout_s if timeout_s is None else timeout_s
        return self._machine.reserve(bundles, timeout_s, strategy)

    def room_for(self, want: Resources) -> list[Resources]:
        """Return what as many more actors as there is room for now can ask for: `want`, which asks for no GPU.

        On a cluster each has the label of its node as well, those of the emptiest first; an actor that is started with
        it is never started again on another one. ValueError where it asks for nothing that can be counted.
        """
        if want.gpu or not any(want.amounts().values()):
            raise ValueError(f"room is for CPUs, memory or custom resources, and {want} was asked for; add cpu=1.")
        with self._lock:
            living = sum(not handle._actor.ended for handle in self._actors.values())
        return self._machine.room_for(want)[: self._max_actors - living]

    def when_resources_change(self, tell: Callable[[], None]) -> None:
        """Call `tell()` whenever there is more or less in all, as nodes of a cluster join and leave.

        It is called in the thread of all callbacks. Of a Ray cluster's machines nothing is told.
        """
        self._machine.when_changed(lambda: self._events.post(tell))

    # Data.

    def put(self, value: Any) -> Ref:
        """Copy the value once to where every actor can read it; the Ref is then an argument that costs nothing."""
        self._check_open()
        return self._engine.put(value)

    def channel(self, name: str) -> AnyChannel:
        """Return the channel of that name: one publishes, and who was given it as an argument reads the newest."""
        self._check_open()
        return self._engine.channel(name)

    # Futures and tasks.

    def wait(
        self, futures: Iterable[Future[Any]], count: int = 1, timeout_s: float | None = None
    ) -> tuple[list[Future[Any]], list[Future[Any]]]:
        """Return (done, pending), in the order given, once `count` are done or `timeout_s` has passed."""
        return wait(futures, count, timeout_s)

    def as_completed(self, futures: Iterable[Future[T]], timeout_s: float | None = None) -> Iterator[Future[T]]:
        """Yield the futures as they are done; CallTimeout naming the late once `timeout_s` is over for all."""
        return as_completed(futures, timeout_s)

    def submit(self, function: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
        """Run `function(*args, **kwargs)` in a pool of processes, at most one per CPU; return its future at once."""
        self._check_open()
        return self._tasks.submit(function, args, kwargs)

    def map(
        self,
        function: Callable[..., T],
        /,
        *iterables: Iterable[Any],
        in_flight: int | None = None,
        timeout_s: float | None = None,
    ) -> Iterator[T]:
        """Yield `function(...)` for the items of the iterables, in their order, as the builtin does; lazily.

        At most `in_flight` tasks are under way or waiting to be taken, by default two per CPU. timeout_s bounds the
        wait for each result. Leaving the iterator cancels what has not begun.
        """
        self._check_open()
        if in_flight is not None and in_flight < 1:
            raise ValueError(f"in_flight={in_flight} must be at least 1.")
        return self._tasks.map(function, zip(*iterables, strict=False), in_flight, timeout_s)

    # Watching and ending.

    def monitor(
        self,
        actor: ActorHandle,
        on_exit: OnError | None = None,
        on_failure: OnError | None = None,
        on_stall: OnStall | None = None,
        on_restart: OnError | None = None,
    ) -> None:
        """Have these called, one at a time in one thread beside the program's; they may use the runtime.

        on_exit(actor, error): it has ended for good, also if that was before, but not by close(). on_failure(actor,
        error): a one-way call failed. on_stall(actor, stall): one call has run for stall_after_s. on_restart(actor,
        error): it takes calls again, after it had ended with this error.
        """
        actor._watchers.add(on_exit, on_failure, on_stall, on_restart)

    def state(self) -> dict[str, ActorState]:
        """Return the state of every actor by name, of the latest ended ones too."""
        with self._lock:
            handles = list(self._actors.items())
        return {name: handle._actor.state() for name, handle in handles}

    def restart(self, actor: ActorHandle) -> None:
        """End the actor now and have it started again, at the cost of one restart; for one that hangs.

        Returns when the old incarnation is gone; `ready()` waits for the next. ValueError if no
        `restart` was given for it.
        """
        if actor._actor.supervisor is None:
            raise ValueError(f"actor {actor.name} cannot be restarted; spawn it with restart=Restart().")
        actor._actor.suspend("was ended by restart()", self.system_timeout_s)

    def kill(self, actor: ActorHandle) -> None:
        """End the actor for good, whatever it does; its pending calls fail with ActorDied. Returns when it is gone."""
        actor._actor.kill(self.system_timeout_s)

    def close(self) -> None:
        """End all actors and free everything; idle ones finish what they were sent, busy ones are killed.

        Cut short by an interrupt it may be called again, and the interpreter does so at its end.
        """
        # A process forked from this one has no say in it, and one thread does it.
        if os.getpid() != self._pid or not self._closing.acquire(blocking=False):
            return
        try:
            if not self._is_over:
                self._close()
                self._is_over = True
        finally:
            self._closing.release()

    def _close(self) -> None:
        with self._lock:
            self._closed = True
            handles, pool = list(self._actors.values()), self._pool
        self._work.close(self.system_timeout_s)
        if pool is not None:
            pool.close("its runtime was closed")
        self._tasks.close()
        for handle in handles:
            handle._watchers.dismiss()
            handle._actor.retire("was closed with its runtime")
        self._engine.close(self.system_timeout_s)
        for handle in handles:  # who died as this began was to be started again
            handle._actor.fail(ActorDied(f"actor {handle.name} was closed with its runtime."))
        self._events.close(self.system_timeout_s)
        _open_runtimes.discard(self)

    def __enter__(self) -> Runtime:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce__(self) -> NoReturn:
        raise NotSupported("a runtime cannot be sent to an actor or a task; keep it, and what uses it, in the driver.")

    @property
    def _machine(self) -> Pool:
        with self._lock:
            if self._pool is None:
                self._pool = self._engine.pool(Resources())
            return self._pool

    def _check_open(self) -> None:
        if self._closed:
            raise ActorError("this runtime is closed; open a new one with rlx.actors.runtime(...).")

    def _check_room(self) -> None:
        ended = [name for name, handle in self._actors.items() if handle._actor.ended]
        if len(self._actors) - len(ended) >= self._max_actors:
            raise ActorError(
                f"this runtime has {self._max_actors} living actors, and that is its limit; "
                f"end some, or open it with a larger max_actors."
            )
        for name in ended[: max(0, len(ended) - KEPT_ENDED)]:
            del self._actors[name]

    def _check_name(self, name: str) -> str:
        if len(name) > MAX_NAME:
            raise ValueError(f"the name {name[:40]!r}... has {len(name)} characters; at most {MAX_NAME} are allowed.")
        if not name.isprintable():
            raise ValueError(f"the name {name!r} cannot be printed; use letters, digits, / and the like.")
        handle = self._actors.get(name)
        if handle is not None and handle._actor.state().status not in ENDED:
            raise ValueError(f"there is already an actor named {name!r}; use another name, or kill() it first.")
        return name

    def _free_name(self, make: Callable[..., Any]) -> str:
        kind = getattr(make, "__name__", type(make).__name__).lower()
        return next(name for number in self._numbers[kind] if (name := f"{kind}/{number}") not in self._actors)


def _check_options(env: Mapping[Any, Any], **counts: int | None) -> None:
    for option, count in counts.items():
        if count is not None and count < 1:
            raise ValueError(f"{option}={count} of an actor; at least 1 is needed.")
    for name, value in env.items():
        if not isinstance(name, str) or not isinstance(value, str):
            raise TypeError(f"env={{{name!r}: {value!r}}} of an actor; names and values are strings.")


_open_runtimes: weakref.WeakSet[Runtime] = weakref.WeakSet()


@atexit.register
def _close_open_runtimes() -> None:
    try:
        for runtime in list(_open_runtimes):
            runtime.close()
    except KeyboardInterrupt:  # who presses Ctrl-C again is in a hurry, and nobody comes later to clean up
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        for runtime in list(_open_runtimes):
            runtime.system_timeout_s = min(runtime.system_timeout_s, HURRY_S)
            runtime.close()
