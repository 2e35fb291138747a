"""One actor on Ray, from the driver: its pending calls and streams, and its end."""

from __future__ import annotations

import collections
import inspect
import itertools
import threading
import time
import weakref
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

import ray
from ray.core.generated.gcs_pb2 import ActorTableData  # type: ignore[attr-defined]
from ray.exceptions import ActorUnavailableError, RayActorError, TaskCancelledError

from rlx.actors.engines import pickling, ray_host
from rlx.actors.engines.ray_data import Parcel
from rlx.actors.engines.serving import has_coroutines
from rlx.actors.future import Answer, Err, Future, Ok, Outcome, nothing, wait
from rlx.actors.interface import ActorSpec, ActorState, Listener
from rlx.actors.monitor import EventThread
from rlx.actors.stream import OpenStream, Stream
from rlx.errors import ActorBusy, ActorDied, ActorError, CallCancelled, CallTimeout

LOOK_SOON_S = 0.01  # for the end of a process that is being ended
SPARE_TASKS = 1000  # at once in a loop, beside the calls that may be pending
MAX_CAUSE = 300  # characters of what Ray says of a death
GUESSES = ("There are some potential root causes", "Some common causes include")
SHUT_DOWN = "was lost: Ray was shut down under it"
Host, LoopHost = ray.remote(ray_host.Host), ray.remote(ray_host.LoopHost)


class RayStream(OpenStream):
    """A stream of which one item is asked for at a time: of two calls to a loop either may come first."""

    def __init__(self, method: str, stream: weakref.ref[Stream[Any]], credits: int) -> None:
        super().__init__(method, stream)
        self.credits, self.index = credits, 0
        self.is_asked = True


class RayActor:
    """The driver's end of one actor."""

    def __init__(
        self,
        spec: ActorSpec,
        listener: Listener,
        parcel: Parcel,
        timeout_s: float,
        answers: EventThread,
        on_gone: Callable[[str, int | None], None],
    ) -> None:
        """answers: the engine's thread. on_gone: told the name and process id."""
        self._spec, self._listener, self._timeout_s, self._answers = spec, listener, timeout_s, answers
        self._on_gone = on_gone
        self.ready: Future[None] = Future(spec.name, "__init__")
        self.gone: Future[None] = Future(spec.name, "end")
        self._lock = threading.RLock()  # of the order of calls, and of the moment after which none is answered
        self._changed = threading.Condition(self._lock)
        self._pending: dict[int, tuple[str, Future[Any] | RayStream | None]] = {}  # by number, oldest first
        self._numbers = itertools.count(1)
        self._ended_one_at = 0.0  # monotonic s
        self._pid: int | None = None
        self._init_failed = False
        self._how: str | None = None  # how a wanted death is described
        self._is_dying = False
        self._is_asked_why = False
        self._left: collections.deque[int] = collections.deque()  # streams that nobody has any more
        self._end: Callable[[], Err] | None = None  # what every call gets from then on
        self._host = self._start()
        self._when_done(self._host.make.remote(*parcel.arguments), self._on_made)

    def _start(self) -> Any:
        spec, asked = self._spec, self._spec.resources
        options: dict[str, Any] = {
            "num_cpus": asked.cpu,
            "num_gpus": asked.gpu,
            "memory": asked.memory or None,
            "resources": dict(asked.custom),
            "scheduling_strategy": spec.place,
            "max_task_retries": 0,
        }
        # Ray says which GPUs an actor sees: the pool counts them, and does not know them.
        env = {name: value for name, value in spec.env.items() if not (asked.gpu and name == "CUDA_VISIBLE_DEVICES")}
        self._has_loop = (spec.concurrency or 1) > 1 or (inspect.isclass(spec.make) and has_coroutines(spec.make))
        if not self._has_loop:
            return Host.options(**options).remote(spec.name, env, spec.threads)
        options["max_concurrency"] = spec.max_pending + SPARE_TASKS
        return LoopHost.options(**options).remote(spec.name, env, spec.threads, spec.concurrency)

    def post(self, method: str, message: Parcel, future: Future[Any] | None) -> None:
        """Have the method run after all earlier ones; waits while the actor has too many of them."""
        arguments = message.arguments
        with self._lock:
            self._wait_for_room()
            end = self._end_now()
            if end is None:
                number = next(self._numbers)
                self._pending[number] = method, future
                answer = self._host.run.remote(number, method, *arguments)
                if future is not None:
                    future.request_cancel = partial(self._cancel, number, answer)
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
            end = self._end_now()
            if end is None:
                number = next(self._numbers)
                # Noted only: the stream may go while this thread has any lock.
                left = weakref.ref(stream, lambda _: self._left.append(number))
                opened = RayStream(method, left, stream.credits)
                self._pending[number] = method, opened
                stream.cancel, stream.grant = partial(self._close_stream, number), partial(self._grant, number)
                begun = self._host.begin.remote(number, method, *arguments)
                self._when_done(begun, self._on_begun, number, opened)
        if end is not None:
            stream.finish(end)

    def kill(self, timeout_s: float, how: str = "was ended by kill()") -> None:
        """End the process and return when it is gone."""
        self.end(how)
        if not wait([self.gone], 1, timeout_s)[0]:
            raise CallTimeout(f"actor {self._spec.name} (pid {self._pid}) is not gone {timeout_s:g} s after kill().")

    def finish(self, began: float, grace_s: float, deadline: float) -> None:
        """Wait for the one-way calls of an actor that has no others to answer, while it ends one every grace_s."""
        with self._lock:
            while self._end is None and self._pending and all(one is None for _, one in self._pending.values()):
                left_s = min(max(began, self._ended_one_at) + grace_s, deadline) - time.monotonic()
                if not self._changed.wait(max(0.0, left_s)):
                    return

    def end(self, how: str) -> None:
        """Have Ray end the process."""
        if not self.gone.done():
            self._how = self._how or how
            with suppress(Exception):  # Ray knows it no more, or is not there any more
                if ray.is_initialized():
                    ray.kill(self._host)
            self._answers.post(self._look_until_gone)

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

    # Called in the engine's thread.

    def look(self) -> None:
        """See whether it is still there: Ray tells who waits for an answer, and nobody else."""
        if self.gone.done():
            return
        while self._left:
            self._close_stream(self._left.popleft())
        if not ray.is_initialized():
            self._how = self._how or SHUT_DOWN
        elif self._host._get_local_state() != ActorTableData.DEAD:
            return
        elif self._how is None:
            if not self._is_asked_why:
                self._is_asked_why = True
                self._when_done(self._host.end.remote(0), self._on_end)  # Ray refuses it, and says why
            return
        self._bury(None)

    def _look_until_gone(self) -> None:
        self.look()
        if not self.gone.done():
            self._answers.after(LOOK_SOON_S, self._look_until_gone)

    def _on_made(self, done: Any) -> None:
        reply = self._reply_of(done, "__init__", 0)
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
        reply = self._reply_of(done, method, number)
        answer = self._answer(reply, method)
        if answer is None:
            return  # the end of the process answers this call, too
        self._drop(number)
        if future is not None:
            future.settle(answer)
        elif isinstance(reply, Err) or reply[0] == ray_host.ERROR:
            self._listener.failed(answer)

    def _on_begun(self, done: Any, number: int, opened: RayStream) -> None:
        reply = self._reply_of(done, opened.method, number)
        if not isinstance(reply, Err) and reply[0] == ray_host.VALUE:
            self._ask_on(number, opened)
        else:
            self._end_stream(reply, number, opened)

    def _on_item(self, done: Any, number: int, opened: RayStream) -> None:
        reply = self._reply_of(done, opened.method, 0)
        if not isinstance(reply, Err) and reply[0] == ray_host.VALUE:
            opened.feed(opened.index, partial(self._value, reply[2], opened.method))
            opened.index += 1
            self._ask_on(number, opened)
        else:
            self._end_stream(reply, number, opened)

    def _end_stream(self, reply: ray_host.Reply | Err, number: int, opened: RayStream) -> None:
        is_over = not isinstance(reply, Err) and reply[0] == ray_host.END
        answer = nothing if is_over else self._answer(reply, opened.method)
        if answer is not None:
            self._drop(number)
            opened.settle(answer)

    def _on_end(self, done: Any) -> None:
        self._bury(done.exception())

    # Inside.

    def _when_done(self, answer: Any, tell: Callable[..., None], *about: Any) -> None:
        """Call tell(done future, *about) in the engine's thread once Ray has the answer."""
        answer.future().add_done_callback(lambda done: self._answers.post(tell, done, *about))

    def _cancel(self, number: int, answer: Any) -> None:
        with suppress(Exception):  # the actor has ended: that answers the call
            self._host.cancel.remote(number) if self._has_loop else ray.cancel(answer, recursive=False)

    def _grant(self, number: int, count: int) -> None:
        with self._lock:
            _, opened = self._pending.get(number, ("", None))
            if isinstance(opened, RayStream):
                opened.credits += count
                if not opened.is_asked:
                    self._ask_on(number, opened)

    def _ask_on(self, number: int, opened: RayStream) -> None:
        """Ask for a stream's next item, if the caller wants one."""
        with self._lock:
            opened.is_asked = opened.credits > 0 and number in self._pending
            if opened.is_asked:
                opened.credits -= 1
                self._when_done(self._host.advance.remote(number, opened.method), self._on_item, number, opened)

    def _close_stream(self, number: int) -> None:
        with self._lock:
            is_open = self._pending.pop(number, None) is not None
            self._changed.notify_all()
        if is_open:
            with suppress(Exception):  # the actor has ended, and the generator with it
                self._host.end.remote(number)

    def _reply_of(self, done: Any, method: str, number: int) -> ray_host.Reply | Err:
        """Return what a method has answered with, or how its call ended without an answer."""
        error = done.exception()
        if error is None:
            return done.result()
        if isinstance(error, TaskCancelledError):
            return Err(CallCancelled(f"{self._spec.name}.{method}() was cancelled before it ran."))
        if isinstance(error, ActorUnavailableError):  # it may live, and have done what it was asked
            self.end(f"was ended as it could not be reached: {_cause(error)}")
        if isinstance(error, RayActorError):
            died = self._died(error)
            self._die(lambda: died)  # first: who hears of the death from a call may call again at once
            return self._end() if self._end is not None else died
        if self._has_loop and number:  # the calls behind it wait for its turn
            self._host.skip.remote(number)
        return Err(ActorError(f"Ray has lost the answer of {self._spec.name}.{method}(): {error}"))

    def _answer(self, reply: ray_host.Reply | Err, method: str) -> Answer | None:
        """Return what a call's reply says; None where the end of the actor will say it."""
        if isinstance(reply, Err):
            return lambda: reply
        kind, text, message = reply
        if kind == ray_host.EXIT:
            self.end(f"ended with exit code {text} in {method}()")
            return None
        if kind == ray_host.CANCELLED:
            return lambda: Err(CallCancelled(f"{self._spec.name}.{method}() was cancelled {text}."))
        if kind == ray_host.ERROR:
            return partial(pickling.load_error, text, message)
        return partial(self._value, message, method)

    def _died(self, error: BaseException | None) -> Err:
        with self._lock:
            method = next((method for method, _ in self._pending.values()), None) if self.ready.done() else "__init__"
        during = f" in {method}()" if method else ""
        how = self._how or (f"has ended{during}: {_cause(error)}" if ray.is_initialized() else SHUT_DOWN)
        return Err(ActorDied(f"actor {self._spec.name} (pid {self._pid}) {how}."))

    def _bury(self, error: BaseException | None) -> None:
        """The process is gone."""
        died = self._died(error)
        self._die(lambda: died)
        self._on_gone(self._spec.name, self._pid)
        self.gone.settle(nothing)

    def _die(self, end: Callable[[], Err]) -> None:
        """From now on every call gets `end`, unless an earlier end holds already."""
        with self._lock:
            if self._is_dying:
                return
            self._is_dying = True
        # Before the lock is taken: the actor's life holds its own while it posts calls, and this takes that.
        self._listener.exited(end)
        with self._lock:
            self._end = end
            pending, self._pending = list(self._pending.values()), {}
            self._changed.notify_all()
        self.ready.settle(end)
        for _, waiting in pending:
            if waiting is not None:
                waiting.settle(end)

    def _end_now(self) -> Callable[[], Err] | None:
        """Return what a new call gets, None if it can be made: one to a Ray that is shut down would start another."""
        if self._end is None and not ray.is_initialized():
            died = self._died(None)
            return lambda: died
        return self._end

    def _drop(self, number: int) -> None:
        with self._lock:
            self._pending.pop(number, None)
            self._ended_one_at = time.monotonic()
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


def _cause(error: BaseException | None) -> str:
    """Return what Ray says of a death, without its ids and guesses."""
    text = " ".join(str(error).split())
    text = text.partition("The actor is dead because ")[2] or text
    for guess in GUESSES:
        text = text.partition(f" {guess}")[0]
    return text.rstrip(".")[:MAX_CAUSE]
