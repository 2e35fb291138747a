"""Who starts an actor again after its death, how often, and with whom: Erlang's supervision, in the driver."""

from __future__ import annotations

import collections
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from rlx.actors.future import Answer, Err, Ok
from rlx.actors.interface import EngineActor
from rlx.actors.monitor import EventThread
from rlx.errors import ActorDied, CallTimeout

if TYPE_CHECKING:
    from rlx.actors.life import ActorLife

STRATEGIES = ("one_for_one", "one_for_all")
POISONED_STARTS = 3
"""Failures of __init__ in a row after which another start would fail as well."""


@dataclass(frozen=True)
class Restart:
    """How often to start an actor again: at most `max` times within any `per_s` seconds; then it stays dead.

    Before each restart there is a pause: backoff_s, doubled with every other restart within the same per_s seconds,
    up to max_backoff_s. An actor whose __init__ fails three times in a row is not started again whatever `max` says.
    """

    max: int = 3
    per_s: float = 60.0
    backoff_s: float = 0.1
    max_backoff_s: float = 10.0

    def __post_init__(self) -> None:
        for name, value, low in (("max", self.max, 1), ("backoff_s", self.backoff_s, 0)):
            if value < low:
                raise ValueError(f"Restart({name}={value}) must be at least {low}.")
        if self.per_s <= 0 or self.max_backoff_s < self.backoff_s:
            raise ValueError(f"{self} needs per_s above 0 and max_backoff_s of at least backoff_s.")


class RestartBudget:
    """Counts restarts against a `Restart`."""

    def __init__(self, rule: Restart, clock: Callable[[], float] = time.monotonic) -> None:
        self.rule = rule
        self._clock = clock
        self._restarts: collections.deque[float] = collections.deque()

    def spend(self) -> float | None:
        """Take one restart; return the seconds to pause before it, None if none is left."""
        rule, now = self.rule, self._clock()
        while self._restarts and self._restarts[0] <= now - rule.per_s:
            self._restarts.popleft()
        if len(self._restarts) == rule.max:
            return None
        pause_s = min(rule.backoff_s * 2 ** len(self._restarts), rule.max_backoff_s)
        self._restarts.append(now + pause_s)
        return pause_s


class Supervisor:
    """Starts its members again, under one budget: only the one that has ended, or `together` all of them.

    All but `hold_calls` run in the thread `work`, so nothing here needs a lock. kill_timeout_s bounds the end of each
    member that goes down with another.
    """

    def __init__(
        self,
        rule: Restart,
        members: Sequence[ActorLife],
        together: bool,
        work: EventThread,
        kill_timeout_s: float,
    ) -> None:
        self._budget = RestartBudget(rule)
        self._members, self._together = list(members), together
        self._work, self._kill_timeout_s = work, kill_timeout_s
        self._handled: dict[ActorLife, int] = {}  # the last incarnation whose end has been dealt with
        self._failed_starts: dict[ActorLife, list[Answer]] = {}  # in a row

    def hold_calls(self, member: ActorLife) -> None:
        """A member is about to be known as ended: calls to those who share its fate are for the next incarnation."""
        for one in self._affected(member):
            one.hold_calls()

    def member_ready(self, member: ActorLife) -> None:
        """The __init__ of a member has returned."""
        self._failed_starts.pop(member, None)

    def member_ended(self, member: ActorLife, incarnation: int, body: EngineActor, why: Answer) -> None:
        """A member has ended, by itself or with another; start again what must be, or end it for good."""
        if self._handled.get(member, -1) >= incarnation:
            return
        affected = self._affected(member)
        self._handled.update({one: one.incarnation for one in affected})
        try:
            self._take_down([one for one in affected if one is not member], member, why)
        except CallTimeout as error:
            stuck = Err(error)
            self._finish(affected, lambda: stuck)
            return
        if not (body.ready.done() and isinstance(body.ready.outcome(), Ok)):
            failures = self._failed_starts.setdefault(member, [])
            failures.append(why)
            if len(failures) == POISONED_STARTS:
                self._finish(affected, partial(_poisoned, member.name, failures[0]))
                return
        pause_s = self._budget.spend()
        if pause_s is None:
            self._finish(affected, partial(_exhausted, member.name, self._budget.rule, why))
            return
        self._work.after(pause_s, self._start_again, affected)

    def _affected(self, member: ActorLife) -> list[ActorLife]:
        return self._members if self._together else [member]

    def _take_down(self, others: Sequence[ActorLife], dead: ActorLife, why: Answer) -> None:
        cause = _cause(dead.name, why)
        for other in others:
            other.suspend(f"was ended with its group ({cause})", self._kill_timeout_s)

    def _start_again(self, members: Sequence[ActorLife]) -> None:
        for member in members:
            member.start_again()

    def _finish(self, members: Sequence[ActorLife], end: Answer) -> None:
        for member in members:
            member.finish(end)


def _poisoned(name: str, first: Answer) -> Err:
    """Return the first failure: the later ones are often only what it left behind."""
    error = _error(first)
    note = f"{name}.__init__() failed {POISONED_STARTS} times in a row, so it is not started again; this is the first."
    if note not in getattr(error, "__notes__", ()):
        error.add_note(note)
    return Err(error)


def _exhausted(name: str, rule: Restart, last: Answer) -> Err:
    error = _error(last)
    text = (
        f"actor {name} was restarted {rule.max} times within {rule.per_s:g} s and has ended again, so it stays "
        f"dead; cure what ends it, or give it a larger Restart(max=...). The last end: {error}"
    )
    died = ActorDied(text)
    died.__cause__ = error
    return Err(died)


def _cause(name: str, why: Answer) -> str:
    error = _error(why)
    if not isinstance(error, ActorDied):
        return f"{type(error).__name__} in {name}.__init__()"
    return re.split(r"[;\n]|\. ", str(error))[0].rstrip(".")  # without advice and last lines


def _error(why: Answer) -> BaseException:
    outcome = why()
    assert isinstance(outcome, Err)
    return outcome.error
