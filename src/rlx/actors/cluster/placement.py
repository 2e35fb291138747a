"""Which machine gets which actor: the ledger of a cluster, whose claims are granted whole or not at all."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence

from rlx.actors.cluster.membership import NodeInfo
from rlx.actors.resources import EPSILON, Amounts, Claim, Devices, Placement, Pool, Resources, place, times

MAX_TRIES = 10_000  # of bundles on machines, before a reservation counts as one that does not fit


class Ledger:
    """What one machine has, and what of it is free."""

    def __init__(self, info: NodeInfo) -> None:
        self.info = info
        self.labels = {"node": info.name, **info.labels}
        self.total = Resources(info.cpu, info.gpu, info.memory)
        self.devices = {str(index): 1.0 for index in range(info.gpu)}
        self.free: Amounts = self.total.amounts()

    def empty(self) -> Ledger:
        """Return it as it is when nobody holds anything."""
        return Ledger(self.info)

    def fit(self, want: Resources) -> Devices | None:
        """Return the GPUs that `want` would get here, None if it does not fit now."""
        if any(self.labels.get(name) != value for name, value in want.labels.items()):
            return None
        placed = place(self.free, self.devices, [want])
        return None if placed is None else placed[0]

    def book(self, want: Resources, devices: Devices, sign: int) -> None:
        """Take (-1) or give back (1)."""
        for name, amount in want.amounts().items():
            self.free[name] = round(self.free.get(name, 0) + sign * amount, 9)
        for device in devices:
            self.devices[device] = round(self.devices[device] + sign * min(want.gpu, 1.0), 9)


class ClusterPool(Pool):
    """What the machines of a cluster have together, of which an actor gets its part from one of them.

    Strategies: "spread" puts each bundle on the machine with the fewest of the same claim, and of these the emptiest;
    "pack" fills one machine after another. Their strict kinds, "strict_spread" and "strict_pack", wait until no two
    bundles share a machine, or until all do.
    """

    def __init__(self, infos: Mapping[int, NodeInfo]) -> None:
        """infos: the machines, by what `Claim.places` is to name them by."""
        self._ledgers = {number: Ledger(info) for number, info in infos.items()}
        super().__init__("this cluster", self._sum(), {})

    def add(self, number: int, info: NodeInfo) -> None:
        """A machine has joined."""
        with self._lock:
            self._ledgers[number] = Ledger(info)
            self.total = self._sum()
        self.grant_waiting()
        self._note_change()

    def remove(self, number: int) -> None:
        """A machine is gone; what was held there is held no more."""
        with self._lock:
            if self._ledgers.pop(number, None) is None:
                return
            self.total = self._sum()
            for claim in self._holding:
                claim.lost += [number] if number in claim.places else []
        self._note_change()

    def _sum(self) -> Resources:
        totals = [ledger.total for ledger in self._ledgers.values()]
        return Resources(sum(t.cpu for t in totals), sum(t.gpu for t in totals), sum(t.memory for t in totals))

    def _could_fit(self, claim: Claim) -> bool:
        return self._distribute(claim, {number: one.empty() for number, one in self._ledgers.items()}) is not None

    def _fit(self, claim: Claim) -> Placement | None:
        return self._distribute(claim, copy.deepcopy(self._ledgers))

    def _distribute(self, claim: Claim, ledgers: dict[int, Ledger]) -> Placement | None:
        """Find a machine for each bundle, the largest first, and go back where that leads nowhere."""
        order = sorted(range(len(claim.wants)), key=lambda index: _size(claim.wants[index]), reverse=True)
        placed: dict[int, tuple[int, Devices]] = {}  # by the bundle's index
        tries = 0

        def settle(position: int) -> bool:
            nonlocal tries
            if position == len(order):
                return True
            index, want = order[position], claim.wants[order[position]]
            taken = [*claim.beside, *(number for number, _ in placed.values())]
            for number in _preferred(ledgers, taken, claim.strategy):
                found = ledgers[number].fit(want)
                if found is None:
                    continue
                tries += 1
                if tries > MAX_TRIES:
                    return False
                ledgers[number].book(want, found, -1)
                placed[index] = number, found
                if settle(position + 1):
                    return True
                del placed[index]
                ledgers[number].book(want, found, 1)
            return False

        return [placed[index] for index in range(len(order))] if settle(0) else None

    def _book(self, claim: Claim, sign: int) -> None:
        for want, number, devices in zip(claim.wants, claim.places, claim.devices, strict=True):
            if number in self._ledgers and number not in claim.lost:  # linked anew, it is whole again
                self._ledgers[number].book(want, devices, sign)

    def _room_for(self, want: Resources) -> list[Resources]:
        rooms = []
        for ledger in self._ledgers.values():
            here = dataclasses.replace(want, labels={**want.labels, "node": ledger.labels["node"]})
            rooms.append([here] * times(ledger.free, want) if ledger.fit(here) is not None else [])
        return [here for room in sorted(rooms, key=len, reverse=True) for here in room]

    def _free_of(self, name: str) -> float:
        return sum(ledger.free.get(name, 0) for ledger in self._ledgers.values())

    def _shortage(self, claim: Claim) -> str:
        machines = "; ".join(
            f"{ledger.info.name}: {ledger.total}{_labels(ledger)}" for ledger in self._ledgers.values()
        )
        for want in claim.wants:
            if not any(ledger.empty().fit(want) is not None for ledger in self._ledgers.values()):
                return f"and no machine of {self.name} has {want}: {machines or 'there is none'}"
        return f'which do not fit on the machines together with strategy="{claim.strategy}": {machines or "none"}'


def _preferred(ledgers: Mapping[int, Ledger], taken: Sequence[int], strategy: str) -> list[int]:
    """Return the machines in the order in which they are tried for the next bundle."""
    if strategy == "strict_spread":
        ledgers = {number: ledger for number, ledger in ledgers.items() if number not in taken}
    elif strategy == "strict_pack" and taken:
        ledgers = {number: ledger for number, ledger in ledgers.items() if number == taken[0]}
    if strategy.endswith("spread"):
        return sorted(ledgers, key=lambda number: (taken.count(number), -_share_free(ledgers[number]), number))
    return sorted(ledgers, key=lambda number: (-taken.count(number), _share_free(ledgers[number]), number))


def _share_free(ledger: Ledger) -> float:
    """Return how empty a machine is, by what is scarcest there, from 0 to 1."""
    amounts = {name: amount for name, amount in ledger.total.amounts().items() if amount > EPSILON}
    return min((ledger.free[name] / amount for name, amount in amounts.items()), default=0.0)


def _size(want: Resources) -> tuple[float, ...]:
    return want.gpu, want.cpu, want.memory


def _labels(ledger: Ledger) -> str:
    return "".join(f", {name}={value}" for name, value in ledger.info.labels.items())
