"""FreeCpus: how many env runners there is room for, where nobody has said how many there shall be."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Sequence

from rlx.actors import Resources, Runtime

ONE_CPU = Resources(cpu=1)


class FreeCpus:
    """The CPUs that nobody has claimed, one for each runner: counted once, on a cluster whenever its nodes change."""

    def __init__(self, runtime: Runtime, kept: int) -> None:
        """kept: how many of them are left to others, such as learners, that have claimed none, or not yet."""
        self._runtime, self._kept = runtime, kept
        self._changed = threading.Event()
        self._changed.set()
        runtime.when_resources_change(self._changed.set)

    def keep(self, count: int) -> None:
        """From now on leave so many to others: those that have claimed theirs meanwhile are not counted twice."""
        self._kept = count

    @property
    def have_changed(self) -> bool:
        """Whether there may be others than at the last `take`."""
        return self._changed.is_set()

    def wait(self, timeout_s: float) -> bool:
        """Return whether they change within this time, or have already."""
        return self._changed.wait(timeout_s)

    def take(self, runners: int) -> list[Resources | None]:
        """Return what each runner that there is room for, beside so many, is to claim, as far as there are any.

        On a cluster that is a CPU of one node, with which it will be given up; elsewhere they claim nothing. Where
        there are no runners the first one may have a CPU that is kept.
        """
        self._changed.clear()
        room = _with_machine_for(self._kept, self._runtime.room_for(ONE_CPU))
        return [want if want.labels else None for want in room[: max(0, len(room) - self._kept, 1 - runners)]]


def _with_machine_for(kept: int, room: Sequence[Resources]) -> list[Resources]:
    """Return the CPUs with those of one machine last that has so many: learners are all on one where they can be."""
    machines = [list(cpus) for _, cpus in itertools.groupby(room, key=lambda cpu: cpu.labels.get("node"))]
    if large := [cpus for cpus in machines if len(cpus) >= kept > 0]:
        fullest = large[-1]  # the emptiest comes first
        machines = [cpus for cpus in machines if cpus is not fullest] + [fullest]
    return list(itertools.chain.from_iterable(machines))
