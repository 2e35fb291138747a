"""RunnerActors: env runners in processes of their own; what a lost one was asked for, the next one is asked again."""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from time import monotonic
from typing import Any

from rlx.actors import ActorHandle, Err, Future, Ok, Resources, Restart, Runtime
from rlx.errors import ActorDied, ActorError, CallTimeout
from rlx.rollout.first_ready import make_runner
from rlx.rollout.normalizers import State

log = logging.getLogger(__name__)

CLOSE_TIMEOUT_S = 5.0
BUSY_CLOSE_TIMEOUT_S = 0.5
IDLE_S = 60.0  # waiting for nothing but a bell
STRAGGLER_S = 1.0
STARTING = ("starting", "restarting")
"""What an actor's status is until it takes calls."""
STALLS_PER_TIMEOUT = 4
"""A call is looked at as a possible stall after the timeout divided by this."""


@dataclass(eq=False)
class Call:
    """What a runner was asked for, until it is answered."""

    actors: RunnerActors
    runner: int
    """Which of these."""
    method: str
    make_arguments: Callable[[], tuple[Any, ...]]
    """Returns them, for each incarnation that is asked."""
    timeout_s: float
    arguments: tuple[Any, ...] = ()
    future: Future[Any] = field(init=False)
    deadline: float = field(init=False)
    start_by: float = field(init=False)
    """Until when the actor may be starting, which is not counted."""
    outcome: Ok[Any] | Err | None = None
    is_vain: bool = False
    """Whether the runner was given up with its machine before it answered."""

    @property
    def value(self) -> Any:
        """What the runner returned, once it has."""
        assert isinstance(self.outcome, Ok)
        return self.outcome.value

    def forget(self) -> None:
        """Never mind the answer; the runner works at it all the same."""
        self.actors.forget([self])


@dataclass(frozen=True)
class Advice:
    """What to tell when a runner fails."""

    method: str
    """The call that does the work."""
    when_late: str
    when_dead: str
    """Goes on after "lower"."""
    when_back: str = ""


OF_ENV_RUNNERS = Advice(
    method="sample",
    when_late="An environment hangs, or a fragment takes longer than this: raise fault_tolerance.sample_timeout_s, or "
    "lower env_runners.rollout_fragment_length.",
    when_dead="env_runners.num_envs_per_env_runner if memory is short, cure the environment",
    when_back=" and begins new episodes",
)


class RunnerActors:
    """Spawns the runners, and asks all of them together (`gather`) or takes what the first one answers (`first`).

    One that claims resources of a machine is given up when that machine is gone; another may have its number later.
    """

    def __init__(
        self,
        runtime: Runtime,
        start_timeout_s: float,
        timeout_s: float,
        restart: Restart | None,
        make: Callable[..., Any] = make_runner,
        advice: Advice = OF_ENV_RUNNERS,
    ) -> None:
        """make: what makes a runner, of the arguments and options of `spawn`; advice: what to tell when one fails."""
        self._runtime = runtime
        self._make, self._advice = make, advice
        self._start_timeout_s, self._timeout_s = start_timeout_s, timeout_s
        self._restart = restart
        self._channel = runtime.channel("policy")
        self.numbers: Sequence[int] = ()
        """Of the runners that have started, in order."""
        self._handles: dict[int, ActorHandle] = {}
        self._starting: list[Call] = []  # what those are asked that are still to start
        self._late: dict[str, str] = {}  # by name, in words: those that were ended because they did not answer
        self._restarts_taken = self._restarts_before = 0  # before: of runners that were given up
        self._asked: dict[int, list[Call]] = {}  # by runner, oldest first
        self._newest: dict[int, Future[Any]] = {}  # by runner: what it was asked for last
        self.calls: list[int] = []
        """How often those of each number were asked for what may begin episodes in the run: see `EnvRunner.sample`."""

    def __len__(self) -> int:
        return len(self.numbers)

    def free_number(self) -> int:
        """Return the smallest number that no runner has."""
        return next(number for number in itertools.count() if number not in self._handles)

    def spawn(
        self, name: str, arguments: tuple[Any, ...], options: Mapping[str, Any], resources: Resources | None = None
    ) -> None:
        """Start one more runner, with the smallest free number; `start` waits for it, `admit` looks for it."""
        number = self.free_number()
        handle = self._runtime.spawn(
            *(_make, self._make, *arguments),
            name=name,
            resources=resources,
            restart=self._restart,
            stall_after_s=self._timeout_s / STALLS_PER_TIMEOUT,
            policy_channel=self._channel,
            **options,
        )
        self._runtime.monitor(handle, on_restart=self._on_restart)
        self._handles[number], self._asked[number] = handle, []
        self.calls += [0] * (number + 1 - len(self.calls))
        self._starting.append(self.ask(number, "spaces", tuple, self._start_timeout_s))

    def start(self) -> Any:
        """Return what every runner has to say once it is up: the environment's spaces; None where none is left."""
        said = self.gather(self._starting)
        self.admit()
        return said[0] if said else None

    def admit(self) -> None:
        """Have those take part that have started by now. Without who cannot start the others go on."""
        for call in self._starting:
            try:
                self._wait([call], 0, at_most_s=0.0)
            except ActorDied as died:
                call.outcome = Err(died)
            if isinstance(call.outcome, Ok):
                self.numbers = sorted([*self.numbers, call.runner])
            elif call.outcome is not None and not call.is_vain:
                self._give_up(call.runner, call.outcome.error)
        self._starting = [call for call in self._starting if call.outcome is None]

    @property
    def starting(self) -> int:
        """How many runners take no part yet."""
        return len(self._starting)

    def give_up_lost(self) -> None:
        """Give up those whose machines are gone, also where they were asked for nothing."""
        for number, handle in list(self._handles.items()):
            if handle.is_lost:
                self._give_up(number, ActorDied("its machine is gone."))

    def publish(self, version: int, value: Mapping[str, Any]) -> None:
        """Have every call that begins from now on do so with this value; no runner is waited for."""
        self._channel.publish(value, version)

    def ask_to_sample(self, runner: int, num_steps: int) -> Call:
        """Ask one runner for a fragment."""
        return self.ask(runner, "sample", lambda: (num_steps, self._count_call(runner)))

    def get_state(self, *, of_all: bool = True) -> list[State | None]:
        """Return each runner's state by its number, as it is after all that it was asked for; None where there is none.

        of_all: False waits for the first one, and for the others as long again and a second; who is late has None.
        """
        calls = [
            self.ask(number, "get_state", lambda number=number: (self._count_call(number),)) for number in self.numbers
        ]
        if of_all:
            self.gather(calls)
        try:
            started = monotonic()
            while calls and all(call.outcome is None for call in calls):
                self._wait(calls, 1)
            ends = monotonic() + (monotonic() - started) + STRAGGLER_S
            while (late := [call for call in calls if call.outcome is None]) and monotonic() < ends:
                self._wait(late, len(late), at_most_s=ends - monotonic())
        finally:
            self.forget(calls)
        self.gather([call for call in calls if call.outcome is not None])
        answers = {call.runner: call.value for call in calls if isinstance(call.outcome, Ok)}
        return [answers.get(number) for number in range(len(self.calls))]

    def set_state(self, states: Sequence[State | None], calls: Sequence[int]) -> None:
        """Give each runner the state of its number; one without goes on as it is."""
        self.calls = [*calls, *[0] * (len(self.calls) - len(calls))]
        self.gather(
            [
                self.ask(number, "set_state", lambda state=state: (state,))
                for number, state in enumerate(states)
                if state is not None and number in self.numbers
            ]
        )

    def ask(
        self, runner: int, method: str, make_arguments: Callable[[], tuple[Any, ...]], timeout_s: float | None = None
    ) -> Call:
        """Ask one runner for something, after what it was asked for already; its time begins when that is done."""
        call = Call(self, runner, method, make_arguments, self._timeout_s if timeout_s is None else timeout_s)
        self._send(call)
        return call

    def gather(self, calls: Sequence[Call]) -> list[Any]:
        """Return the answers to all calls, in their order, without those of runners that were given up."""
        try:
            while missing := [call for call in calls if call.outcome is None]:
                self._wait(missing, len(missing))
        except BaseException:
            self.forget(calls)
            raise
        calls = [call for call in calls if not call.is_vain]
        failed = [call for call in calls if isinstance(call.outcome, Err)]
        if failed:
            names = ", ".join(call.future.actor for call in failed)
            error = failed[0].outcome.error  # type: ignore[union-attr]
            error.add_note(f"{failed[0].method}() failed in {len(failed)} of {len(calls)} actors: {names}")
            raise error
        return [call.value for call in calls]

    def first(self, calls: Sequence[Call], bell: Future[Any]) -> Call | None:
        """Return the first call to be answered; None where the bell rings before. What a runner raised is raised.

        Of those that have been answered already it is the one that was asked first. There may be calls to other actors
        of the same runtime among them.
        """
        while True:
            for call in calls:
                if call.outcome is not None:
                    call.actors.gather([call])
                    return call
            if bell.done():
                return None
            self._wait(calls, 1, bell)

    def forget(self, calls: Sequence[Call]) -> None:
        """Never mind the answers to these; the runners work at them all the same."""
        for call in calls:
            if call in (asked := self._asked.get(call.runner, [])):
                asked.remove(call)

    def incarnation(self, runner: int) -> int:
        """Return how often a runner was started again; what the last one knew, the next one does not."""
        return self._handles[runner].incarnation

    def take_restarts(self) -> int:
        """Return how many runners were started again since the last call."""
        total = self._restarts_before + sum(handle.incarnation for handle in list(self._handles.values()))
        taken, self._restarts_taken = self._restarts_taken, total
        return total - taken

    def close(self) -> None:
        """Close the environments as far as the runners still answer, then end the processes."""
        handles, self._handles, self.numbers = list(self._handles.values()), {}, ()
        if not handles:
            return
        # An interrupted runner still collects, and who pressed Ctrl-C does not want to wait for it.
        is_busy = not all(future.done() for future in self._newest.values())
        timeout_s = BUSY_CLOSE_TIMEOUT_S if is_busy else CLOSE_TIMEOUT_S
        outcomes = self._runtime.group(handles).close.call().result(timeout_s)
        for handle, outcome in zip(handles, outcomes, strict=True):
            if isinstance(outcome, Err) and not isinstance(outcome.error, ActorError):
                log.warning("%s could not close its environments: %r", handle.name, outcome.error)
            self._runtime.kill(handle)

    def _count_call(self, runner: int) -> int:
        self.calls[runner] += 1
        return self.calls[runner] - 1

    def _send(self, call: Call) -> None:
        before, now = self._asked[call.runner], monotonic()
        call.deadline = max([now, *(one.deadline for one in before)]) + call.timeout_s
        call.start_by = now + self._start_timeout_s
        call.arguments = call.make_arguments()
        call.future = getattr(self._handles[call.runner], call.method).call(*call.arguments)
        self._newest[call.runner] = call.future
        before.append(call)

    def _wait(self, calls: Sequence[Call], count: int, *bell: Future[Any], at_most_s: float = math.inf) -> None:
        """Wait until `count` calls are answered, or one is late; note the answers, and ask again who is lost."""
        patience_s = min(at_most_s, *(call.deadline - monotonic() for call in calls), IDLE_S)
        self._runtime.wait([*(call.future for call in calls), *bell], count, max(0.0, patience_s))
        # The last one first: where they end between two looks, none counts as done without those asked before it.
        done = {call for call in reversed(calls) if call.future.done()}
        for call in calls:
            is_late = monotonic() >= call.deadline
            if call.outcome is None and (call in done or (is_late and not call.actors._is_starting(call))):
                call.actors._note(call)

    def _note(self, call: Call) -> None:
        """Note the answer to a call, or that it is late; ask again if the runner is lost."""
        outcome = call.future.outcome() if call.future.done() else Err(self._timeout_of(call))
        if isinstance(outcome, Err) and self._handles[call.runner].is_lost:
            self._give_up(call.runner, outcome.error)
            return
        asked = self._asked[call.runner]
        asked.remove(call)
        if asked and call.future.done():  # its time begins now
            asked[0].deadline = monotonic() + asked[0].timeout_s
        if isinstance(outcome, Ok) or not self._is_lost(call, outcome.error):
            call.outcome = outcome
            return
        if not call.future.done():
            self._late[self._handles[call.runner].name] = str(outcome.error)
            self._runtime.restart(self._handles[call.runner])
        self._send(call)

    def _give_up(self, runner: int, why: BaseException) -> None:
        """Go on without it: what it was asked for nobody answers."""
        handle = self._handles.pop(runner)
        self.numbers = [number for number in self.numbers if number != runner]
        for call in self._asked.pop(runner):
            call.outcome, call.is_vain = Err(why), True
        log.warning("%s is given up, and the run goes on without it: %s", handle.name, why)
        self._runtime.kill(handle)
        self._restarts_before += handle.incarnation

    def _is_starting(self, call: Call) -> bool:
        """Return whether the actor is being started again, within its time; then what it is asked for has longer."""
        if self._status(call.runner) not in STARTING or monotonic() >= call.start_by:
            return False
        ends = monotonic()
        for one in self._asked[call.runner]:
            ends += one.timeout_s
            one.deadline = max(one.deadline, ends)
        return True

    def _status(self, runner: int) -> str:
        return self._runtime.state()[self._handles[runner].name].status

    def _timeout_of(self, call: Call) -> CallTimeout:
        name = self._handles[call.runner].name
        if call.method != "spaces" and self._status(call.runner) in STARTING:
            return CallTimeout(
                f"{name} has not started within {self._start_timeout_s:g} s. Raise fault_tolerance.start_timeout_s."
            )
        cure = f" {self._advice.when_late}" if call.method == self._advice.method else ""
        return CallTimeout(f"{name}.{call.method}() has not answered within {call.timeout_s:g} s.{cure}")

    def _is_lost(self, call: Call, error: BaseException) -> bool:
        """Return whether the call is lost with an incarnation that another one follows; ActorDied if none does."""
        handle = self._handles[call.runner]
        if isinstance(error, CallTimeout) and not call.future.done():
            return self._restart is not None and call.method != "spaces"  # a start has one deadline
        if not isinstance(error, ActorDied):
            return False
        if self._status(call.runner) not in ("dead", "failed"):
            return True
        last = self._late.get(handle.name) or str(error.__cause__ or error)
        times = f"It was started again {handle.incarnation} times already; l" if handle.incarnation else "L"
        raise ActorDied(
            f"{last}\n{times}ower {self._advice.when_dead}, or raise fault_tolerance.max_restarts."
        ) from error

    def _on_restart(self, handle: ActorHandle, error: BaseException) -> None:
        log.warning("%s It was started again%s.", self._late.pop(handle.name, None) or error, self._advice.when_back)


def _make(make: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """Return a runner; where its making raises, that is an answer and not a death, for no restart would cure it."""
    try:
        return make(*arguments, **options)
    except Exception as error:
        return _FailedRunner(error)


class _FailedRunner:
    """Answers every call with the error that kept the runner from being made."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    def __getattr__(self, method: str) -> Any:
        raise self._error
