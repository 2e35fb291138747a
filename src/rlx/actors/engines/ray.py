"""Actors on Ray: every actor of rlx is one of Ray's, on whichever machine of the cluster has room for it.

Ray starts processes, moves bytes and notices deaths. Order, restarts, monitors, limits and what errors look like are
rlx's, the same as on the other engines. What Ray does not tell (a stall, a cancelled call that runs) is missing from
`capabilities`.
"""

from __future__ import annotations

import inspect
import itertools
import logging
import os
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import ray
from ray.exceptions import RayActorError, TaskCancelledError

from rlx.actors.engines import pickling, ray_host
from rlx.actors.engines.inline import NoSlot
from rlx.actors.engines.ray_data import Parcel, RayChannel, RayRef
from rlx.actors.future import Answer, Err, Future, Ok, Outcome, nothing, wait
from rlx.actors.interface import ActorSpec, ActorState, Listener, Slot
from rlx.actors.monitor import EventThread
from rlx.actors.resources import Claim, Pool, Resources
from rlx.actors.stream import Stream
from rlx.errors import ActorBusy, ActorDied, ActorError, CallCancelled, CallTimeout, ConfigError, Infeasible

NAMESPACE = "rlx"
MEASURES = {"cpu", "gpu", "memory"}
TASKS = 1000  # at once, of an actor with `async def` methods, where nothing else was asked for
Waiting = Future[Any] | Stream[Any] | None
_remote: Any = ray.remote(concurrency_groups={ray_host.WATCH: 1})  # type: ignore[call-overload]
Host, AsyncHost = _remote(ray_host.Host), _remote(ray_host.AsyncHost)


class RayEngine:
    """A connection to a Ray cluster, or to a Ray of this machine that it starts and ends."""

    capabilities: frozenset[str] = frozenset({"processes", "machines"})

    def __init__(self, system_timeout_s: float, address: str | None = None, **options: Any) -> None:
        """address: of a running cluster, as ray.init takes it; None starts Ray here. options: of ray.init."""
        self.system_timeout_s = system_timeout_s
        self._owns_ray = not ray.is_initialized()
        if self._owns_ray:
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
            quiet = {} if address else {"include_dashboard": False, "logging_level": logging.WARNING}
            ray.init(address=address, namespace=NAMESPACE, **{**quiet, **options})
        elif options:
            raise ConfigError(
                f"Ray runs in this process already, so {', '.join(options)} cannot be set; leave it out, or call "
                "ray.shutdown() first."
            )
        self._answers = EventThread("rlx-ray-answers")  # Ray's own thread must not be held up, nor call Ray
        self._actors: list[RayActor] = []
        self._channels: dict[str, RayChannel] = {}
        self._lock = threading.Lock()

    def pack(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Parcel:
        """Return the arguments as a message."""
        return Parcel((args, kwargs), "arguments")

    def put(self, value: Any) -> RayRef:
        """Copy the value into Ray's object store, once for any number of actors."""
        return RayRef(value)

    def channel(self, name: str) -> RayChannel:
        """Return the channel of that name."""
        with self._lock:
            if name not in self._channels:
                board = f"channel/{uuid.uuid4().hex}"
                options = {"name": board, "namespace": NAMESPACE, "num_cpus": 0}
                made = ray.remote(ray_host.Board).options(**options).remote()
                self._channels[name] = RayChannel(name, board, NAMESPACE, made)
            return self._channels[name]

    def pool(self, given: Resources) -> Pool:
        """Return what the living machines of the cluster have."""
        return ClusterPool(given, [node["Resources"] for node in ray.nodes() if node["Alive"]])

    def slot(self, name: str) -> Slot:
        """Ray has a board of its own."""
        return NoSlot()

    def spawn(self, spec: ActorSpec, listener: Listener) -> RayActor:
        """Have Ray start a process; return at once."""
        parcel = Parcel((spec.make, spec.args, spec.kwargs), f"what {spec.name} is made of")
        actor = RayActor(spec, listener, parcel, self.system_timeout_s, self._answers)
        with self._lock:
            self._actors = [one for one in self._actors if not one.gone.done()]
            self._actors.append(actor)
        return actor

    def close(self, timeout_s: float) -> None:
        """End all actors and channels, and the Ray that was started here."""
        deadline = time.monotonic() + timeout_s
        with self._lock:
            actors, channels = list(self._actors), list(self._channels.values())
        for actor in actors:
            actor.end("was closed with its runtime")
        wait([actor.gone for actor in actors], len(actors), max(0.1, deadline - time.monotonic()))
        for channel in channels:
            channel.close()
        self._answers.close(max(0.1, deadline - time.monotonic()))
        if self._owns_ray:
            ray.shutdown()


class ClusterPool(Pool):
    """What the machines of a cluster have together, of which an actor gets its part from one of them."""

    def __init__(self, given: Resources, machines: Sequence[Mapping[str, float]]) -> None:
        self._machines = [_resources(machine) for machine in machines]
        found = [machine.amounts() for machine in self._machines]
        cpu, gpu, memory = (sum(one[name] for one in found) for name in ("cpu", "gpu", "memory"))
        custom = {name: sum(one.get(name, 0) for one in found) for one in found for name in one.keys() - MEASURES}
        total = Resources(
            given.cpu or cpu, given.gpu or int(gpu), given.memory or int(memory), {**custom, **given.custom}
        )
        super().__init__("the Ray cluster", total, {f"GPU {index}": 1.0 for index in range(int(total.gpu))})

    def claim(self, holder: str, wants: Sequence[Resources]) -> Claim:
        """Return a claim, as every pool does; Infeasible also where no machine has all that one actor asks for."""
        for want in wants:
            asked = want.amounts().items()
            if not any(all(amount <= one.amounts().get(name, 0) for name, amount in asked) for one in self._machines):
                machines = "; ".join(map(str, self._machines))
                raise Infeasible(f"{holder} asks for {want}, and no machine of {self.name} has that: {machines}.")
        return super().claim(holder, wants)


def _resources(machine: Mapping[str, float]) -> Resources:
    """Return what Ray says of a machine; its own marks of nodes and kinds are no resources to ask for."""
    own = ("CPU", "GPU", "memory", "object_store_memory")
    custom = {name: n for name, n in machine.items() if name not in own and ":" not in name}
    return Resources(machine.get("CPU", 0), int(machine.get("GPU", 0)), int(machine.get("memory", 0)), custom)


class RayActor:
    """The driver's end of one actor."""

    def __init__(
        self, spec: ActorSpec, listener: Listener, parcel: Parcel, timeout_s: float, answers: EventThread
    ) -> None:
        self._spec, self._listener, self._timeout_s, self._answers = spec, listener, timeout_s, answers
        self.ready: Future[None] = Future(spec.name, "__init__")
        self.gone: Future[None] = Future(spec.name, "end")
        self._lock = threading.RLock()  # of the order of calls, and of the moment after which none is answered
        self._changed = threading.Condition(self._lock)
        self._pending: dict[int, tuple[str, Waiting]] = {}  # by number, oldest first: method, and who waits
        self._numbers = itertools.count(1)
        self._pid: int | None = None
        self._init_failed = False
        self._how: str | None = None  # how a wanted death is described
        self._end: Callable[[], Err] | None = None  # what every call gets from then on
        is_async, asked = _has_coroutines(spec.make), spec.resources
        options: dict[str, Any] = {
            "num_cpus": asked.cpu,
            "num_gpus": asked.gpu,
            "memory": asked.memory or None,
            "resources": dict(asked.custom),
            "max_concurrency": spec.concurrency or (TASKS if is_async else 1),
            "max_task_retries": 0,
        }
        host = (AsyncHost if is_async else Host).options(**options)
        # Ray says which GPUs an actor sees: the pool counts them, and does not know them.
        env = {name: value for name, value in spec.env.items() if not (asked.gpu and name == "CUDA_VISIBLE_DEVICES")}
        self._host = host.remote(spec.name, env, spec.threads)
        self._when_done(self._host.live.remote(), self._on_end)
        self._when_done(self._host.make.remote(*parcel.arguments), self._on_made)

    def post(self, method: str, message: Parcel, future: Future[Any] | None) -> None:
        """Have the method run after all earlier ones; waits while the actor has too many of them."""
        arguments = message.arguments
        with self._lock:
            self._wait_for_room()
            end = self._end
            if end is None:
                number = next(self._numbers)
                self._pending[number] = method, future
                answer = self._host.run.remote(method, *arguments)
                if future is not None:
                    future.request_cancel = partial(ray.cancel, answer, recursive=False)
                self._when_done(answer, self._on_answer, number, method, future)
        if end is not None and future is not None:
            future.settle(end)
        elif end is not None:
            self._listener.failed(end)

    def stream(self, method: str, message: Parcel, stream: Stream[Any]) -> None:
        """Like `post`, for a method whose items the stream takes one by one."""
        arguments = message.arguments
        with self._lock:
            self._wait_for_room()
            end, number = self._end, next(self._numbers)
            if end is None:
                self._pending[number] = method, stream
                stream.cancel = partial(self._close_stream, number)
                stream.grant = partial(self._advance, number, method, stream, itertools.count())
                begun = self._host.begin.remote(number, method, *arguments)
                self._when_done(begun, self._on_begun, number, method, stream)
                stream.grant(stream.credits)
        if end is not None:
            stream.finish(end)

    def kill(self, timeout_s: float, how: str = "was ended by kill()") -> None:
        """End the process and return when it is gone."""
        self.end(how)
        if not wait([self.gone], 1, timeout_s)[0]:
            raise CallTimeout(f"actor {self._spec.name} (pid {self._pid}) is not gone {timeout_s:g} s after kill().")

    def end(self, how: str) -> None:
        """Have Ray end the process."""
        if not self.gone.done():
            self._how = self._how or how
            ray.kill(self._host)

    def state(self) -> ActorState:
        """Return the state now."""
        with self._lock:
            end, pending = self._end, list(self._pending.values())
        if end is not None:
            status = "failed" if self._init_failed else "dead"
            return ActorState(self._spec.name, status, self._pid, 0, None, str(end().error))
        status = "alive" if self.ready.done() else "starting"
        method = pending[0][0] if pending and self.ready.done() else None
        return ActorState(self._spec.name, status, self._pid, len(pending), method, None)

    def _when_done(self, answer: Any, tell: Callable[..., None], *about: Any) -> None:
        """Call tell(done future, *about) in the engine's thread once Ray has the answer."""
        answer.future().add_done_callback(lambda done: self._answers.post(tell, done, *about))

    # Called in the engine's thread.

    def _on_made(self, done: Any) -> None:
        reply = self._reply_of(done, "__init__")
        if isinstance(reply, Err):
            return  # the actor has ended
        kind, text, message = reply
        if kind == ray_host.VALUE:
            self._pid = pickling.loads(message)
            self.ready.settle(nothing)
        elif kind == ray_host.ERROR:
            self._init_failed = True
            self._die(partial(pickling.load_error, text, message))
            self.end("failed")
        else:
            self.end(f"ended with exit code {text} in __init__()")

    def _on_answer(self, done: Any, number: int, method: str, future: Future[Any] | None) -> None:
        reply = self._reply_of(done, method)
        if isinstance(reply, Err):
            answer: Answer = lambda: reply  # noqa: E731
        elif reply[0] == ray_host.EXIT:
            self.end(f"ended with exit code {reply[1]} in {method}()")
            return  # the end of the process answers this call, too
        elif reply[0] == ray_host.VALUE:
            answer = partial(self._value, reply[2], method)
        else:
            answer = partial(pickling.load_error, *reply[1:])
        self._drop(number)
        if future is not None:
            future.settle(answer)
        elif isinstance(reply, Err) or reply[0] == ray_host.ERROR:
            self._listener.failed(answer)

    def _on_begun(self, done: Any, number: int, method: str, stream: Stream[Any]) -> None:
        reply = self._reply_of(done, method)
        if isinstance(reply, Err):
            self._drop(number)
            stream.finish(lambda: reply)
        elif reply[0] == ray_host.ERROR:
            self._drop(number)
            stream.finish(partial(pickling.load_error, *reply[1:]))

    def _on_item(self, done: Any, number: int, method: str, stream: Stream[Any], index: int) -> None:
        reply = self._reply_of(done, method)
        if not isinstance(reply, Err) and reply[0] == ray_host.VALUE:
            stream.feed(index, partial(self._value, reply[2], method))
            return
        self._drop(number)
        if isinstance(reply, Err):
            stream.finish(lambda: reply)
        else:
            stream.finish(partial(pickling.load_error, *reply[1:]) if reply[0] == ray_host.ERROR else nothing)

    def _on_end(self, done: Any) -> None:
        """The call that never returns has failed: the process is gone."""
        error = done.exception()
        died = self._died(error)
        self._die(lambda: died)
        self.gone.settle(nothing)

    # Inside.

    def _advance(self, number: int, method: str, stream: Stream[Any], index: Any, count: int) -> None:
        for _ in range(count):
            item = self._host.advance.remote(number, method)
            self._when_done(item, self._on_item, number, method, stream, next(index))

    def _close_stream(self, number: int) -> None:
        self._drop(number)
        self._host.end.remote(number)

    def _reply_of(self, done: Any, method: str) -> ray_host.Reply | Err:
        """Return what a method has answered with, or how its call ended without an answer."""
        error = done.exception()
        if error is None:
            return done.result()
        if isinstance(error, TaskCancelledError):
            return Err(CallCancelled(f"{self._spec.name}.{method}() was cancelled before it ran."))
        if isinstance(error, RayActorError):
            died = self._died(error)
            self._die(lambda: died)  # first: who hears of the death from a call may call again at once
            return self._end() if self._end is not None else died
        return Err(ActorError(f"Ray has lost the answer of {self._spec.name}.{method}(): {error}"))

    def _died(self, error: BaseException | None = None) -> Err:
        how = self._how or f"has ended: {' '.join(str(error).split())}"
        return Err(ActorDied(f"actor {self._spec.name} (pid {self._pid}) {how}."))

    def _die(self, end: Callable[[], Err]) -> None:
        """From now on every call gets `end`, unless an earlier end holds already."""
        with self._lock:
            if self._end is not None:
                return
            self._listener.exited(end)
            self._end = end
            if not self.ready.done():
                self.ready.settle(end)
            pending, self._pending = list(self._pending.values()), {}
            self._changed.notify_all()
        for _, waiting in pending:
            if isinstance(waiting, Future):
                waiting.settle(end)
            elif waiting is not None:
                waiting.finish(end)

    def _drop(self, number: int) -> None:
        with self._lock:
            self._pending.pop(number, None)
            self._changed.notify_all()

    def _wait_for_room(self) -> None:
        """Wait while too many calls are unanswered. Holds the lock."""
        limit = self._spec.max_pending
        if not self._changed.wait_for(lambda: len(self._pending) < limit or self._end is not None, self._timeout_s):
            raise ActorBusy(
                f"{self._spec.name} has {limit} unanswered calls and finished none within {self._timeout_s:g} s; wait "
                "for results before calling on, or raise max_pending at spawn."
            )

    def _value(self, message: pickling.Message, method: str) -> Outcome[Any]:
        try:
            return Ok(pickling.loads(message) if message[0] else None)
        except Exception as error:
            error.add_note(f"while unpickling the result of {self._spec.name}.{method}()")
            return Err(error)


def _has_coroutines(make: Callable[..., Any]) -> bool:
    """Return whether an actor made by this has `async def` methods."""
    kind = make if inspect.isclass(make) else None
    return kind is not None and any(
        inspect.iscoroutinefunction(part) or inspect.isasyncgenfunction(part) for part in vars(kind).values()
    )
