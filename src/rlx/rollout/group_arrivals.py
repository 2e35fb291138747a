"""GroupArrivals: samples of prompts in the order in which they end, while runners and learners work together."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from rlx.generation.request import Request, Sampling
from rlx.rollout.age import WhenOld
from rlx.rollout.assignments import Assignments
from rlx.rollout.call_loop import PATIENCE_S, CallLoop
from rlx.rollout.conversations import Conversation
from rlx.rollout.runner_actors import Call, RunnerActors
from rlx.rollout.token_runner import Completions


@dataclass(eq=False)
class Group:
    """The samples of one prompt."""

    number: int
    """Of the prompt, counted over the whole run."""
    version: int
    """The newest weights when it was asked for: no token of it is of older ones."""
    completions: Completions
    conversations: Sequence[Conversation] = ()
    """What they are transcripts of, if they are."""


Made = tuple[int, Completions, Sequence[Conversation]]
"""A group that has ended: its number, and what it is made of."""


class GroupMaker(Protocol):
    """Has groups made by token runners, and by whoever else it takes; nobody is waited for."""

    def begin(self, number: int) -> None:
        """Begin a group; a number that has ended may be begun again."""
        ...

    def ask(self, calls: Sequence[Call]) -> list[Call]:
        """Ask for what may be asked for now, beside these calls; return the new ones."""
        ...

    def hear(self, call: Call) -> list[Made]:
        """Take over the answer of a call; return the groups that have ended with it."""
        ...

    def forget(self) -> None:
        """Never mind all groups that have not ended."""
        ...


class CompletionGroups:
    """Groups of completions. make_request: returns what is asked for by its number."""

    def __init__(self, actors: RunnerActors, make_request: Callable[[int], Request], sampling: Sampling) -> None:
        self._make_request, self._assignments = make_request, Assignments(actors, sampling)

    def begin(self, number: int) -> None:
        """Give it to the runner that has the fewest."""
        runner = min(range(self._assignments.runners), key=self._assignments.given)
        self._assignments.give(runner, number, self._make_request(number))

    def ask(self, calls: Sequence[Call]) -> list[Call]:
        """Have runners advance."""
        return self._assignments.ask(calls)

    def hear(self, call: Call) -> list[Made]:
        """Return the groups that a runner has completed."""
        return [(number, completions, ()) for number, _, completions in self._assignments.hear(call)]

    def forget(self) -> None:
        """Have the runners forget what they are at."""
        self._assignments.forget()


class GroupArrivals(CallLoop):
    """Keeps token runners at work in a thread; `take` returns groups to learn from.

    A batch is `per_batch` groups, learned from in one version of the weights. The age of a group is the versions that
    came after the one it was asked for with; it is max_age at most where it is learned from. Unless `when_old` is
    "drop", runners are no further ahead than it takes for `take` not to wait: what is begun later is younger.
    """

    def __init__(
        self,
        actors: RunnerActors,
        maker: GroupMaker,
        *,
        per_batch: int,
        max_age: int,
        when_old: WhenOld = "wait",
    ) -> None:
        super().__init__(actors)
        self._maker = maker
        self._per_batch, self._max_age, self._when_old = per_batch, max_age, when_old
        self._version, self._is_learning = 0, False
        self._lead = 1  # batches that may be ahead of the one that is learned from
        self._next = 0  # number
        self._again: list[int] = []  # numbers below it that have to be asked for once more
        self._asked: dict[int, int] = {}  # number -> version, of what has not arrived
        self._arrived: list[Group] = []
        self._dropped_tokens = 0
        self._dropped_failed: list[Group] = []

    def take(self) -> list[Group]:
        """Return the groups of the next batch, the oldest first; while it is learned from, less is asked for.

        It waits for them; each runner has a deadline. What a runner raised, this raises.
        """
        with self._changed:
            self._start()
            has_waited = False
            while (batch := self._pick()) is None:
                self._raise_error()
                has_waited = True
                self._changed.wait(PATIENCE_S)
            self._arrived = [group for group in self._arrived if group not in batch]
            if has_waited:
                self._lead = min(self._lead + 1, self._max_age)
            elif len(self._arrived) >= self._per_batch:  # the next one is complete before this one is begun
                self._lead = max(self._lead - 1, 1)
            self._is_learning = True
            self._ring()
        return batch

    def publish(self, version: int, value: Mapping[str, Any]) -> None:
        """Have what is asked for from now on begin with these weights."""
        with self._changed:
            self._actors.publish(version, value)
            self._version, self._is_learning = version, False
            self._ring()

    def take_dropped(self) -> int:
        """Return how many tokens were dropped, as they were too old, since the last call."""
        with self._changed:
            dropped, self._dropped_tokens = self._dropped_tokens, 0
        return dropped

    def take_dropped_failed(self) -> list[Group]:
        """Return the groups that were dropped since the last call and have conversations whose environment failed."""
        with self._changed:
            dropped, self._dropped_failed = self._dropped_failed, []
        return dropped

    def get_state(self) -> dict[str, Any]:
        """Return which numbers were taken: those below `next` that are not in `open`."""
        with self._changed:
            waiting = [*self._again, *self._asked, *(group.number for group in self._arrived)]
            return {"next": self._next, "open": sorted(waiting)}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Forget all that was asked for or has arrived, and go on from `get_state`."""
        self.pause()
        self._next, self._again = int(state["next"]), [int(number) for number in state["open"]]
        self._asked, self._arrived = {}, []
        self._error, self._is_learning = None, False
        for call in self._calls:
            call.forget()
        self._calls = []
        self._maker.forget()

    def _pick(self) -> list[Group] | None:
        """Return the groups to be learned from now; None where some have to be waited for."""
        if self._when_old != "wait":
            self._drop([group for group in self._arrived if self._version - group.version > self._max_age])
        batch = sorted(self._arrived, key=lambda group: group.version)[: self._per_batch]
        if len(batch) < self._per_batch:
            return None
        if self._when_old == "wait":
            taken = {group.number for group in batch}
            versions = [*self._asked.values(), *(one.version for one in self._arrived if one.number not in taken)]
            for ahead in range(self._max_age + 1):  # what is left has to fit into the updates before it is too old
                due = sum(version + self._max_age <= self._version + ahead for version in versions)
                if due > ahead * self._per_batch and self._asked:
                    return None
        return batch

    def _drop(self, groups: Sequence[Group]) -> None:
        self._dropped_tokens += sum(int(group.completions.drawn_length.sum()) for group in groups)
        self._dropped_failed += [group for group in groups if any(one.failure for one in group.conversations)]
        self._arrived = [group for group in self._arrived if group not in groups]

    def _ask(self) -> None:
        """Begin as many prompts as may be begun, and see that everybody has something to do."""
        while self._may_ask():
            number = self._again.pop(0) if self._again else self._next
            self._next = max(self._next, number + 1)
            self._asked[number] = self._version
            self._maker.begin(number)
        self._calls += self._maker.ask(self._calls)

    def _may_ask(self) -> bool:
        if self._when_old == "drop":
            return len(self._asked) < (self._max_age + 1) * self._per_batch
        batches = self._lead + (not self._is_learning)
        return len(self._asked) + len(self._arrived) < batches * self._per_batch

    def _hear(self, call: Call) -> None:
        with self._changed:
            for number, completions, conversations in self._maker.hear(call):
                self._arrived.append(Group(number, self._asked.pop(number), completions, conversations))
            if self._when_old == "drop":
                most = (self._max_age + 1) * self._per_batch
                self._drop(sorted(self._arrived, key=lambda group: group.version)[: max(0, len(self._arrived) - most)])
            self._changed.notify_all()
