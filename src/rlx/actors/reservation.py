"""Reservations: bundles of resources, got together, from which actors draw."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import TracebackType
from typing import Any

from rlx.actors.future import Err, Future, nothing, wait
from rlx.actors.monitor import logger
from rlx.actors.resources import WAIT_WARNING_S, Claim, Devices, Placement, Pool, Resources
from rlx.errors import CallTimeout


class Reservation:
    """Bundles of resources, got all or none; actors draw from them: `rt.spawn(..., reservation=reservation[0])`.

    `release()`, or the end of its `with` block, ends no actor: no more can be spawned from it, and what it reserved
    is free again when the last actor that draws from it has ended. Bundles whose machines are lost are claimed anew,
    all or none, as soon as an actor that drew from one is to be started again.
    """

    def __init__(self, claim: Claim) -> None:
        self._claims = [claim]
        self._bundles = [
            Bundle(self, f"bundle {index} of the reservation", want, dict.fromkeys(devices, min(want.gpu, 1.0)), claim)
            for index, (want, devices) in enumerate(zip(claim.wants, claim.devices, strict=True))
        ]
        for bundle, at in zip(self._bundles, claim.places, strict=True):
            bundle.place = at
        self._lock = threading.Lock()
        self._released = False
        self._give_back: Callable[[], None] | None = None

    @classmethod
    def wait_for(cls, claim: Claim, timeout_s: float | None) -> Reservation:
        """Return the reservation once the claim is granted; CallTimeout otherwise."""
        decided: Future[None] = Future(claim.holder, "reserve")
        claim.when_decided(lambda error: decided.settle(nothing if error is None else lambda: Err(error)))
        first_s = WAIT_WARNING_S if timeout_s is None else min(WAIT_WARNING_S, timeout_s)
        try:
            if not wait([decided], 1, first_s)[0]:
                logger.warning("%s %s", claim.holder, claim.waiting())
                if not wait([decided], 1, None if timeout_s is None else timeout_s - first_s)[0]:
                    raise CallTimeout(f"{claim.holder} was not granted within {timeout_s:g} s: it {claim.waiting()}.")
            decided.result()
        except BaseException:
            claim.release()
            raise
        return cls(claim)

    def set_aside(self, places: Sequence[Any], give_back: Callable[[], None]) -> None:
        """Have the actors of each bundle started at its place, until all is given back (for engines)."""
        self._give_back = give_back
        for bundle, place in zip(self._bundles, places, strict=True):
            bundle.place = place

    def release(self) -> None:
        """Spawn nothing more from it; twice is fine."""
        self._released = True
        for bundle in self._bundles:
            bundle.close("the reservation has been released")
        self.return_unused()

    def replace_lost(self) -> None:
        """Claim the lost bundles anew, together; Infeasible if that can never be any more (for bundles)."""
        with self._lock:
            lost = [bundle for bundle in self._bundles if bundle.replacing is None and bundle.is_gone]
            if not lost:
                return
            first = self._claims[0]
            beside = [bundle.place for bundle in self._bundles if bundle not in lost]
            claim = first.pool.claim(first.holder, [bundle.total for bundle in lost], first.strategy, beside)
            self._claims.append(claim)
            for bundle in lost:
                bundle.replacing = claim
        claim.when_decided(partial(self._on_decision, lost, claim))

    def _on_decision(self, lost: Sequence[Bundle], claim: Claim, error: Exception | None) -> None:
        if error is None:
            for bundle, at, devices in zip(lost, claim.places, claim.devices, strict=True):
                bundle.move(claim, at, devices)
        else:
            for bundle in lost:
                bundle.close(str(error).rstrip("."))

    def return_unused(self) -> None:
        """Return everything if it has been released and nobody draws from it any more."""
        if self._released and not any(bundle.in_use() for bundle in self._bundles):
            for claim in self._claims:
                claim.release()
            give_back, self._give_back = self._give_back, None
            if give_back is not None:
                give_back()

    def __getitem__(self, index: int) -> Bundle:
        return self._bundles[index]

    def __len__(self) -> int:
        return len(self._bundles)

    def __enter__(self) -> Reservation:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.release()


class Bundle(Pool):
    """One bundle of a reservation: a small pool."""

    def __init__(
        self, reservation: Reservation, name: str, total: Resources, devices: Mapping[str, float], source: Claim
    ) -> None:
        super().__init__(name, total, devices)
        self._reservation, self._source = reservation, source
        self.place: Any = None
        """Where the engine starts its actors; None: anywhere."""
        self.replacing: Claim | None = None
        """What it waits for since it was lost with its machine."""

    @property
    def is_gone(self) -> bool:
        """Whether its machine is, since it was granted there: linked anew, one has the number that it had before."""
        return self.place in self._source.lost

    def move(self, source: Claim, place: Any, devices: Devices) -> None:
        """It is a part of this claim now, on another machine, and nobody holds anything of it."""
        with self._lock:
            for claim in self._holding:
                claim.lost = claim.places
            self._source, self.place, self.replacing, self._holding = source, place, None, []
            self._devices = dict.fromkeys(devices, min(self.total.gpu, 1.0))
            self._free, self._free_devices = self.total.amounts(), dict(self._devices)
        self.grant_waiting()

    def is_lost(self, claim: Claim) -> bool:
        """Whether the machine is gone that the bundle was on when it was granted."""
        return bool(claim.lost or (claim.places and self.is_gone))

    def anew(self, claim: Claim) -> Claim:
        """Return a claim to the same on another machine, also after the reservation has been released."""
        self._reservation.replace_lost()
        again = Claim(self, claim.holder, claim.wants, claim.strategy)
        with self._lock:
            self._waiting.append(again)
        super().give_back(claim)
        return again

    def waiting_for(self, claim: Claim) -> str | None:
        """Return what the claim waits for, in words; None if it does not wait."""
        replacing = self.replacing
        return super().waiting_for(claim) if replacing is None else replacing.waiting()

    def _fit(self, claim: Claim) -> Placement | None:
        placement = super()._fit(claim) if self.replacing is None else None
        return placement and [(self.place, devices) for _, devices in placement]

    def give_back(self, claim: Claim) -> None:
        """Take back what the claim holds."""
        super().give_back(claim)
        self._reservation.return_unused()
