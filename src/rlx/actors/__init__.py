"""The actor core: objects that live in processes of their own, called through handles.

with actors.runtime("local") as rt:
    counter = rt.spawn(Counter, 3, name="counter/0")
    future = counter.add.call(2)            # .result(timeout_s) .exception() .done() .cancel(), and await
    counter.set.send(5)                     # one way
    outcomes = rt.group([counter]).add.call(2).result()     # a list of Ok(value) and Err(error)

Every engine keeps the same promises: calls of one caller to one actor run in order, each at most once;
arguments are not changed after the call; an exception arrives as itself with the remote traceback;
`close()` leaves no process and no file descriptor behind.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

from rlx.actors.channel import Channel, Published, Staleness
from rlx.actors.context import Context, current
from rlx.actors.future import Err, Future, GroupFuture, Ok
from rlx.actors.handle import ActorHandle, Group
from rlx.actors.interface import ActorState, Stall
from rlx.actors.monitor import EventThread
from rlx.actors.ref import Ref
from rlx.actors.reservation import Reservation
from rlx.actors.resources import Resources
from rlx.actors.runtime import Runtime
from rlx.actors.stream import Stream
from rlx.actors.supervision import Restart
from rlx.errors import ConfigError, MissingExtra

__all__ = [
    "ActorHandle",
    "ActorState",
    "Channel",
    "Context",
    "Err",
    "Future",
    "Group",
    "GroupFuture",
    "Ok",
    "Published",
    "Ref",
    "Reservation",
    "Resources",
    "Restart",
    "Runtime",
    "Staleness",
    "Stall",
    "Stream",
    "check_engine",
    "current",
    "runtime",
]

ENGINES = ("local", "inline", "cluster", "ray")


def runtime(
    engine: str = "local",
    *,
    system_timeout_s: float = 30.0,
    resources: Resources | None = None,
    pending_timeout_s: float | None = None,
    max_actors: int = 1000,
    **options: Any,
) -> Runtime:
    """Return a running runtime; close it, or use it in a `with` block.

    engine: "local" gives every actor a process; its option is `preload=("numpy", "torch")`, the modules that are
    imported once and shared by all actors. "inline" runs actors in the caller's thread, for debugging; its option
    `strict=True` pickles every message, which shows what would not survive the way to another process. "cluster" has
    them on the machines of a cluster that `rlx start` has made; its options are `address`, HOST:PORT of the head, and
    `token_file`, the cluster's key. "ray" has Ray start them; its option is `address`, of a running Ray cluster, where
    Ray is not to be started here.
    system_timeout_s bounds what the runtime itself waits for (a start, a kill, a close), never a method.
    resources: what actors may ask for in all; what is 0 is as the machine, its cgroup and CUDA_VISIBLE_DEVICES have it.
    pending_timeout_s: how long an actor or a reservation may wait for resources; None is without end, with a warning.
    max_actors: how many may live at once.
    """
    check_engine(engine)
    events = EventThread("rlx-actor-events")
    if engine == "inline":
        from rlx.actors.engines.inline import InlineEngine

        opened = InlineEngine(**options)
    elif engine == "cluster":
        from rlx.actors.cluster.engine import ClusterEngine

        opened = ClusterEngine(events, system_timeout_s, **options)
    elif engine == "ray":
        from rlx.actors.engines.ray import RayEngine

        opened = RayEngine(system_timeout_s, **options)
    else:
        from rlx.actors.engines.local import LocalEngine

        opened = LocalEngine(events, system_timeout_s, **options)
    try:
        pool = None if resources is None else opened.pool(resources)
    except BaseException:
        opened.close(system_timeout_s)
        raise
    return Runtime(opened, events, system_timeout_s, pool, pending_timeout_s, max_actors)


def check_engine(engine: str) -> None:
    """Raise ConfigError for an engine that there is not, MissingExtra for one that is not installed."""
    if engine not in ENGINES:
        raise ConfigError(f"engine {engine!r} is not an actor engine; use {', '.join(map(repr, ENGINES))}.")
    if engine == "ray" and find_spec("ray") is None:
        raise MissingExtra("engine 'ray' needs Ray, which is not installed: pip install 'rlx[ray]'.")
