"""ActorLife: one actor from its spawn to its final end, over all its incarnations."""

from __future__ import annotations

import collections
import dataclasses
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from rlx.actors.future import LONGEST_WAIT_S, Answer, Err, Future, Ok, nothing
from rlx.actors.interface import ActorSpec, ActorState, Engine, EngineActor, Listener
from rlx.actors.monitor import EventThread, Watchers, logger
from rlx.actors.resources import WAIT_WARNING_S, Claim
from rlx.actors.stream import Stream
from rlx.actors.supervision import Supervisor
from rlx.errors import ActorDied, ActorError, CallCancelled

ENDED = ("failed", "dead")


@dataclass(frozen=True)
class _Held:
    """What waits until there is an incarnation that takes calls."""

    deliver: Callable[[EngineActor], None]
    refuse: Callable[[Answer], None]
    future: Future[Any] | None


class ActorLife:
    """An actor as its handle knows it: an EngineActor that outlives those of the engine.

    Calls go straight to the present incarnation, `body`. While there is none that takes them they are held here in
    order: while the actor waits for resources, and, if it is supervised, until the next incarnation's __init__ has
    returned. `work` is the thread that starts incarnations: neither the engine's nor the one of the user's callbacks.
    """

    def __init__(
        self, engine: Engine, spec: ActorSpec, watchers: Watchers[Any], work: EventThread, timeout_s: float
    ) -> None:
        self.name = spec.name
        self.incarnation = 0
        self.body: EngineActor | None = None
        self.ready: Future[None] = Future(spec.name, "__init__")
        self.supervisor: Supervisor | None = None
        self._engine, self._spec, self._watchers, self._work = engine, spec, watchers, work
        self._given_env = spec.env
        self._kill_timeout_s = timeout_s
        self._claim: Claim | None = None
        self._lock = threading.RLock()  # re-entered where an inline actor runs held calls that end it
        self._changed = threading.Condition(self._lock)
        self._held: collections.deque[_Held] = collections.deque()
        self._open: EngineActor | None = None  # the body, once it takes calls
        self._phase: str | None = "starting"  # as in ActorState; None: as the body says
        self._body_ended = False
        self._is_doomed = False  # the body lives, and will be ended with its group
        self._retired = False  # the next end is final
        self._is_final = False  # the last end was
        self._death: Answer | None = None  # of the last incarnation
        self._end: Answer | None = None  # final

    # What callers do.

    @property
    def ended(self) -> bool:
        """True once it has ended for good."""
        return self._end is not None

    @property
    def is_lost(self) -> bool:
        """True while what it claimed was on a machine that is gone."""
        return self._claim is not None and self._claim.is_lost

    def making(self) -> Future[None]:
        """Return the answer of the present incarnation's __init__; of an actor that has ended, how it did."""
        with self._lock:
            if self._end is None or not self.ready.done():
                return self.ready
            ended: Future[None] = Future(self.name, "__init__")
        ended.settle(self._end)
        return ended

    def post(self, method: str, message: Any, future: Future[Any] | None) -> None:
        """Have the method run after all earlier ones, by this incarnation or, if there is none yet, by the next."""
        body = self._open
        if body is not None:
            body.post(method, message, future)
            return
        refuse = self._watchers.failed if future is None else future.settle
        self.hold(lambda body: body.post(method, message, future), refuse, future)

    def stream(self, method: str, message: Any, stream: Stream[Any]) -> None:
        """Like `post`, for a method whose items the stream takes one by one."""
        body = self._open
        if body is not None:
            body.stream(method, message, stream)
            return
        self.hold(lambda body: body.stream(method, message, stream), stream.finish)

    def hold(
        self,
        deliver: Callable[[EngineActor], None],
        refuse: Callable[[Answer], None],
        future: Future[Any] | None = None,
    ) -> None:
        """Have `deliver(body)` called when there is a body that takes calls, or `refuse(why)` if there never will be.

        Waits while as many are held as the actor may have unanswered.
        """
        held = _Held(deliver, refuse, future)
        with self._lock:
            while self._open is None and self._end is None and len(self._held) >= self._spec.max_pending:
                self._changed.wait(LONGEST_WAIT_S)
            body, end = self._open, self._end
            if body is None and end is None:
                if future is not None:
                    future.request_cancel = partial(self._cancel, held)
                self._held.append(held)
                self._note(held=len(self._held))
                return
        if body is not None:
            deliver(body)
        else:
            assert end is not None
            refuse(end)

    def kill(self, timeout_s: float) -> None:
        """End it for good and return when it is gone; CallTimeout otherwise."""
        body = self.retire("was ended by kill()")
        if body is not None:
            body.kill(timeout_s)
            if self._death is not None:  # a death just before the kill was to be followed by a restart
                self.finish(self._death)

    def retire(self, how: str) -> EngineActor | None:
        """Have its next end be the last one; without a living body that is now. Return the body to be ended."""
        with self._lock:
            self._retired = True
            if self.body is not None and not self._body_ended:
                return self.body
        phase = f" while {self._phase}" if self._phase else ""
        self.fail(ActorDied(f"actor {self.name} {how}{phase}."))
        return None

    def state(self) -> ActorState:
        """Return its state now."""
        with self._lock:
            body, end, phase, claim = self.body, self._end, self._phase, self._claim
            why, held, incarnation = end or self._death, len(self._held), self.incarnation
        now = body.state() if body is not None else ActorState(self.name, phase or "dead", None, 0, None, None)
        status, error = now.status, now.error
        if end is not None:
            status = status if status in ENDED else "dead"
        elif phase is not None:
            status = phase
        if why is not None and status != "alive":
            outcome = why()
            error = str(outcome.error) if isinstance(outcome, Err) else None
        return dataclasses.replace(
            now,
            status=status,
            pid=None if status == "restarting" and self._body_ended else now.pid,
            pending=now.pending + held,
            error=error,
            restarts=incarnation,
            waiting=claim.waiting() if claim is not None else None,
            resources=str(claim) if claim is not None else "",
        )

    # What the runtime does.

    def start(self) -> None:
        """Start the first incarnation or the next."""
        with self._lock:
            if self._end is not None:
                return
            self.body, self._body_ended, self._is_doomed, spec = None, False, False, self._spec
        self._note(status="starting", restarts=self.incarnation, waiting="")
        listener = Listener(self._on_exit, self._watchers.failed, self._watchers.stalled)
        body = self._engine.spawn(spec, listener)
        with self._lock:
            self.body = body
            ended, stray = self._body_ended, self._end is not None
            if self.supervisor is None and not stray:  # the engine holds calls until __init__ has returned
                self._phase = None
                self._let_in(body)
        if stray:  # kill() came while it was being started
            body.kill(self._kill_timeout_s)
        elif ended:  # already, and nobody could deal with it before there was a body
            self._deal_with_end()
        body.ready.when_done(partial(self._on_ready, body))

    def start_with(self, claim: Claim, timeout_s: float | None) -> None:
        """Start once the claim is granted, which it keeps to its end; fail if that takes longer than timeout_s."""
        self._claim = claim
        if self._end is not None:  # it was killed just before this, which has not released this claim
            claim.release()
            return
        self._note(resources=str(claim))
        if any(want.gpu for want in claim.wants) and "CUDA_VISIBLE_DEVICES" in self._given_env:
            raise ValueError(f"actor {self.name} has CUDA_VISIBLE_DEVICES in env and asks for GPUs; leave one out.")
        if claim.granted:
            self._start_granted()
            return
        self._phase = "pending"
        self._note(status="pending", waiting=claim.waiting() or "")
        claim.when_decided(lambda error: self._work.post(self._on_decision, error))
        self._work.after(WAIT_WARNING_S, self._warn_of_waiting)
        if timeout_s is not None:
            self._work.after(timeout_s, self._give_up_waiting, timeout_s)

    def supervise(self, supervisor: Supervisor) -> None:
        """Have `supervisor` decide at its next end; ValueError if another does, or if that was the last."""
        with self._lock:
            if self.supervisor is not None:
                raise ValueError(f"actor {self.name} is supervised already; give restart= to it or to one group.")
            if self._retired or self._body_ended or self._end is not None:
                raise ValueError(f"actor {self.name} has ended already; make its group before that.")
            self.supervisor = supervisor

    def hold_calls(self) -> None:
        """Keep calls for the next incarnation from now on."""
        with self._lock:
            if self._end is None and not self._retired:
                self._open, self._phase, self._is_doomed = None, "restarting", True
                self._note(status="restarting")
                if self.ready.done():
                    self.ready = Future(self.name, "__init__")

    def suspend(self, how: str, timeout_s: float) -> None:
        """End the present incarnation, if it lives, as its supervisor will notice."""
        with self._lock:
            body = None if self._body_ended else self.body
        if body is not None:
            body.kill(timeout_s, how)

    def start_again(self) -> None:
        """Start the next incarnation, unless it has ended for good."""
        with self._lock:
            if self._end is not None:
                return
        try:
            anew = self._claim.anew() if self._claim is not None and self.is_lost else None  # on another machine
            self.incarnation += 1
            if not self._watchers.hear_of_restarts:  # who does knows better what to say of it
                logger.warning("actor %s is started again (restart %d)", self.name, self.incarnation)
            if anew is not None:
                self.start_with(anew, None)
            else:
                self.start()
        except Exception as error:  # there is no process to be had
            self.fail(error)

    def fail(self, error: BaseException) -> None:
        """It has ended for good, with this error."""
        self.finish(lambda: Err(error))

    def finish(self, end: Answer) -> None:
        """It has ended for good."""
        with self._lock:
            if self._end is not None:
                return
            self._end, self._open, self._phase = end, None, None
            self._spec = dataclasses.replace(self._spec, make=object, args=(), kwargs={})  # they may be large
            held, self._held = list(self._held), collections.deque()
            self._changed.notify_all()
            if not self.ready.done():
                self.ready.settle(end)
        if self._claim is not None:
            self._claim.release()
        self._work.post(self._note_end, end)
        self._watchers.exited(end)
        for one in held:
            one.refuse(end)

    # What the engine tells.

    def _on_exit(self, why: Answer) -> None:
        """Called by the engine, once an incarnation; `start` may not have returned yet."""
        with self._lock:
            supervisor = None if self._retired or self._end is not None else self.supervisor
        if supervisor is not None:  # before anybody can see the end and start it again
            supervisor.hold_calls(self)
        with self._lock:
            self._death, self._body_ended, self._is_final = why, True, supervisor is None
            if self.body is None:
                return
        self._deal_with_end()

    def _deal_with_end(self) -> None:
        death, body = self._death, self.body
        assert death is not None and body is not None
        if self._is_final:
            self.finish(death)
        else:
            assert self.supervisor is not None
            self._work.post(self.supervisor.member_ended, self, self.incarnation, body, death)

    def _on_ready(self, body: EngineActor) -> None:
        """Called where the engine settles it: what its __init__ raised is not for this thread to unpickle."""
        if self.supervisor is not None:
            self._work.post(self._welcome, body)
        else:
            self._settle_ready(lambda: body.ready.outcome())

    def _welcome(self, body: EngineActor) -> None:
        """Give the new incarnation the calls that were held; what failed in __init__ is the supervisor's matter."""
        if not isinstance(body.ready.outcome(), Ok):
            return
        with self._lock:
            if self.body is not body or self._is_doomed or self._body_ended or self._end is not None:
                return
            assert self.supervisor is not None
            self.supervisor.member_ready(self)
            self._phase = None
            if self._open is None:
                self._let_in(body)
            death = self._death
        self._settle_ready(nothing)
        if death is not None:
            self._watchers.restarted(death)

    def _let_in(self, body: EngineActor) -> None:
        """Deliver what is held and open the way for the calls behind it. Holds the lock, which keeps the order."""
        while self._held:
            held = self._held.popleft()
            if held.future is not None:
                held.future.request_cancel = None
            try:
                held.deliver(body)
            except Exception as error:  # no room for it; those behind it must not share its fate
                failure = Err(error)
                held.refuse(lambda failure=failure: failure)
        self._note(held=0)
        if not self._body_ended:
            self._open = body
        self._changed.notify_all()

    def _settle_ready(self, answer: Answer) -> None:
        with self._lock:
            if self._end is None:
                self._note(status="alive")
            if not self.ready.done():
                self.ready.settle(answer)

    def _note(self, **news: Any) -> None:
        """Tell who looks from outside."""
        if self._spec.slot is not None:
            self._spec.slot.update(**news)

    def _note_end(self, end: Answer) -> None:
        outcome = end()
        self._note(status=self.state().status, error=str(outcome.error) if isinstance(outcome, Err) else "", waiting="")

    # Waiting: for resources, and to be delivered.

    def _on_decision(self, error: Exception | None) -> None:
        try:
            if error is not None:
                raise error
            self._start_granted()
        except Exception as failure:
            self.fail(failure)

    def _start_granted(self) -> None:
        assert self._claim is not None
        env = self._given_env | self._claim.environment()
        self._spec = dataclasses.replace(self._spec, env=env, place=self._claim.places[0])
        with self._lock:
            if self._end is None:
                self._phase = "starting"
        self.start()

    def _warn_of_waiting(self) -> None:
        waiting = self._claim.waiting() if self._claim is not None else None
        if waiting is not None:
            self._note(waiting=waiting)
            logger.warning("actor %s %s", self.name, waiting)

    def _give_up_waiting(self, timeout_s: float) -> None:
        waiting = self._claim.waiting() if self._claim is not None else None
        if waiting is not None:
            self.fail(ActorError(f"actor {self.name} was not started within {timeout_s:g} s: it {waiting}."))

    def _cancel(self, held: _Held) -> None:
        future = held.future
        assert future is not None
        with self._lock:
            if held in self._held:
                self._held.remove(held)
                self._note(held=len(self._held))
                self._changed.notify_all()
                cancelled = f"{self.name}.{future.method}() was cancelled before it ran."
                future.settle(lambda: Err(CallCancelled(cancelled)))
                return
        if not future.done() and future.request_cancel is not None:  # it has just been delivered
            future.request_cancel()
