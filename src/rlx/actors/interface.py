"""What an engine must provide, and what it is told and asked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from rlx.actors.channel import Published, Staleness
from rlx.actors.future import Answer, Future
from rlx.actors.ref import Ref
from rlx.actors.resources import Pool, Resources
from rlx.actors.stream import Stream


class AnyChannel(Protocol):
    """One publishes, and all who were given it as an argument read the newest version."""

    name: str

    def publish(self, value: Any, version: int | None = None) -> int:
        """Make `value` the newest version, and return its number: `version`, or one more than the last, from 1 on."""
        ...

    def latest(self) -> Published | None:
        """Return the newest version, the same object while there is no newer one; None before the first."""
        ...

    def readers(self) -> dict[str, Staleness]:
        """Return how far behind each reader is, by its name."""
        ...

    def close(self) -> None:
        """Let go of it."""
        ...


class Slot(Protocol):
    """One actor on the board that `rlx ps` and its kin read."""

    serial: int

    def sent(self) -> None:
        """Note one more call."""
        ...

    def update(self, **news: Any) -> None:
        """Note status, pid, restarts, sent, resources, waiting, error: any of them."""
        ...


@dataclass(frozen=True)
class ActorSpec:
    """What an engine needs to start an actor."""

    name: str
    make: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    env: dict[str, str]
    threads: int = 1
    """Threads that torch may use in it."""
    concurrency: int | None = None
    """Calls that may run at once: in threads (None: 1), or as tasks if it has `async def` methods (None: 1,000)."""
    max_pending: int = 10_000
    """Unanswered calls at which the next one waits."""
    stall_after_s: float = 5.0
    """Seconds that one call may run before `Listener.stalled` is told."""
    slot: Slot | None = None
    """Where the engine notes process and calls."""
    resources: Resources = field(default_factory=Resources)
    """What it was granted, for engines that place actors by it."""
    place: Any = None
    """Where the engine has set that aside, see `Reservation.set_aside`; None: nowhere."""


@dataclass(frozen=True)
class Stall:
    """An actor that has run one method for long. It is not dead; what becomes of it is the listener's choice."""

    actor: str
    pid: int | None
    method: str
    running_s: float
    reason: str
    """In words: stopped by a signal, busy on the CPU, sleeping or waiting, waiting for the disk ..."""
    stopped: bool
    """Whether the process cannot run at all, stopped or stuck in the kernel; else the method may be merely long."""


@dataclass(frozen=True)
class Listener:
    """Whom an engine tells what happens to one actor. Called from the engine's own thread: must return at once."""

    exited: Callable[[Answer], None]
    """Once, with why it ended. Told before the calls that are left fail, so that who hears of a death from a call, and
    calls again, finds the actor restarting."""
    failed: Callable[[Answer], None]
    """With the error of each one-way call that failed."""
    stalled: Callable[[Stall], None]
    """At most once a call."""


@dataclass(frozen=True)
class ActorState:
    """An actor at one moment."""

    name: str
    status: str
    """pending (waits for resources), starting (also while __init__ runs), alive, restarting (from its death until the
    next __init__ has returned), failed (__init__ raised), or dead."""
    pid: int | None
    """The process it runs in; None until that is known."""
    pending: int
    """Calls that have no answer yet, also those that wait until it is started."""
    method: str | None
    """The method that runs, or is the next to run; None when idle."""
    error: str | None
    """Why it ended, or had to be restarted; None while it lives."""
    restarts: int = 0
    """How often it was started again."""
    waiting: str | None = None
    """What it waits for while pending, and who holds that; None otherwise."""
    resources: str = ""
    """What it asked for, in words."""


class EngineActor(Protocol):
    """One actor, as its engine keeps it."""

    ready: Future[None]

    def post(self, method: str, message: Any, future: Future[Any] | None) -> None:
        """Have the method run after all earlier ones; settle the future, also when the actor is or falls dead.

        Without a future only a failure is reported. Must not wait for the actor.
        """
        ...

    def stream(self, method: str, message: Any, stream: Stream[Any]) -> None:
        """Like `post`, for a method whose items the stream takes one by one."""
        ...

    def kill(self, timeout_s: float, how: str = "was ended by kill()") -> None:
        """End the actor and return when it is gone; CallTimeout otherwise. Its error says `how` it ended."""
        ...

    def state(self) -> ActorState:
        """Return the state of the actor now."""
        ...


class Engine(Protocol):
    """A place for actors to live."""

    capabilities: frozenset[str]
    """"processes": an actor has a process of its own, so a crash or a kill hits nobody else, and timeouts hold.
    "machines": these are on any machine of a cluster. "stalls": `Listener.stalled` is told. "resources":
    `runtime(resources=...)` may say what there is. "cancellation": a method that runs alone in its actor can see that
    its call was taken back."""

    def pack(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the arguments as a message that can go to any number of actors; TypeError if they cannot go."""
        ...

    def put(self, value: Any) -> Ref:
        """Keep the value where all actors can read it."""
        ...

    def channel(self, name: str) -> AnyChannel:
        """Return the channel of that name, new at the first call."""
        ...

    def slot(self, name: str) -> Slot:
        """Return where to note, for who looks from outside, what becomes of a new actor."""
        ...

    def pool(self, given: Resources) -> Pool:
        """Return what actors may ask for in all; what `given` says goes before what is found."""
        ...

    def spawn(self, spec: ActorSpec, listener: Listener) -> EngineActor:
        """Start an actor and return at once."""
        ...

    def close(self, timeout_s: float) -> None:
        """End all actors and free everything."""
        ...
