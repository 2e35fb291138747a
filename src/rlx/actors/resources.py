"""What actors ask for, who holds what, and who waits: a ledger, first come first served."""

from __future__ import annotations

import collections
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from rlx.actors import machine
from rlx.errors import ActorError, Infeasible

if TYPE_CHECKING:
    from rlx.actors.reservation import Reservation

WAIT_WARNING_S = 5.0  # until the log says what somebody waits for
STRATEGIES = ("spread", "pack", "strict_spread", "strict_pack")
EPSILON = 1e-9  # so that three thirds of a GPU are one
Amounts = dict[str, float]
Devices = tuple[str, ...]
Placement = list[tuple[Any, Devices]]
"""Of each of a claim's wants its machine, as the engine calls it (None where there is one only), and its GPUs there."""


@dataclass(frozen=True)
class Resources:
    """What an actor asks for, or what a runtime has. The ledger counts; it does not fence anybody in.

    An actor that asks for GPUs sees its own and no others: the runtime sets CUDA_VISIBLE_DEVICES for it.
    """

    cpu: float = 0
    gpu: float = 0
    """A fraction up to 1 of a device that is shared, or a whole number of devices to itself."""
    memory: int = 0
    """Bytes."""
    custom: Mapping[str, float] = field(default_factory=dict)
    """Anything else that is scarce: {"license": 1}."""
    labels: Mapping[str, str] = field(default_factory=dict)
    """On a cluster: what the machine must be labelled with; {"node": NAME} names it."""

    def __post_init__(self) -> None:
        for name, amount in self.amounts().items():
            if not (isinstance(amount, int | float) and math.isfinite(amount) and amount >= 0):
                raise ValueError(f"Resources: {name}={amount!r} must be a number of at least 0.")
        if self.gpu > 1 and self.gpu != int(self.gpu):
            raise ValueError(f"Resources: gpu={self.gpu} must be a fraction up to 1 or a whole number.")
        if names := self.custom.keys() & {"cpu", "gpu", "memory"}:
            raise ValueError(f"Resources: custom={dict(self.custom)} names {min(names)!r}; that is a field of its own.")

    def amounts(self) -> Amounts:
        """Return everything by name."""
        return {"cpu": self.cpu, "gpu": self.gpu, "memory": self.memory, **self.custom}

    def __bool__(self) -> bool:
        return any(self.amounts().values()) or bool(self.labels)

    def __str__(self) -> str:
        amounts = [_amount(name, amount) for name, amount in self.amounts().items() if amount]
        return ", ".join([*amounts, *(f"{name}={value}" for name, value in self.labels.items())]) or "nothing"


class Pool:
    """What can be given out. Claims are granted in order, so a large one waits for its turn and not for ever."""

    def __init__(self, name: str, total: Resources, devices: Mapping[str, float], no_gpu: str = "") -> None:
        self.name = name
        self.total = total
        self._no_gpu = no_gpu
        self._devices = dict(devices)
        self._free, self._free_devices = total.amounts(), dict(devices)
        self._lock = threading.Lock()
        self._holding: list[Claim] = []
        self._waiting: collections.deque[Claim] = collections.deque()
        self._closed: str | None = None
        self._tell_of_change: list[Callable[[], None]] = []

    @classmethod
    def of_this_machine(cls, given: Resources) -> Pool:
        """Return what the machine has; what `given` says goes first."""
        no_gpu = ""
        if given.gpu:
            visible = machine.visible_gpus()
            names = [str(index) for index in range(int(given.gpu))] if visible is None else visible
            if len(names) < given.gpu or given.gpu != int(given.gpu):
                raise ValueError(f"the runtime cannot have gpu={given.gpu}: CUDA_VISIBLE_DEVICES lists {names}.")
            names = names[: int(given.gpu)]
        else:
            names, no_gpu = machine.gpus()
        total = Resources(
            given.cpu or machine.cpu_count(), len(names), given.memory or machine.memory_bytes(), given.custom
        )
        return cls("this runtime", total, dict.fromkeys(names, 1.0), no_gpu)

    def claim(
        self, holder: str, wants: Sequence[Resources], strategy: str = "spread", beside: Sequence[Any] = ()
    ) -> Claim:
        """Return a claim to all of `wants` or nothing, granted or waiting; Infeasible if that can never be.

        strategy: one of STRATEGIES, which says how they lie on the machines of a cluster. beside: the machines that
        count for it as if more of the same claim were there already.
        """
        if strategy not in STRATEGIES:
            raise ValueError(f"strategy={strategy!r} of {holder} is not one of {', '.join(STRATEGIES)}.")
        claim = Claim(self, holder, wants, strategy, beside)
        with self._lock:
            if self._closed is not None:
                raise ActorError(f"{holder} cannot have {claim}: {self._closed}.")
            if not self._could_fit(claim):
                raise Infeasible(f"{holder} asks for {claim}, {self._shortage(claim)}.")
            self._waiting.append(claim)
        try:
            self.grant_waiting()
        except BaseException:  # an interrupt: nobody would ever give it back
            claim.release()
            raise
        return claim

    def room_for(self, want: Resources) -> list[Resources]:
        """Return `want`, which asks for no GPU, as often as it would be granted now; none while others wait.

        Where there are several machines each names its own by a label, those of the emptiest first. ActorError once
        nothing is granted any more.
        """
        with self._lock:
            if self._closed is not None:
                raise ActorError(f"nobody can have {want} any more: {self._closed}.")
            return [] if self._waiting else self._room_for(want)

    def when_changed(self, tell: Callable[[], None]) -> None:
        """Call `tell()` whenever there is more or less in all, as machines join and leave; it must return at once.

        Also when nothing is granted any more.
        """
        self._tell_of_change.append(tell)

    def reserve(self, bundles: Sequence[Resources], timeout_s: float | None, strategy: str = "pack") -> Reservation:
        """Return all of `bundles` once they are granted together; CallTimeout otherwise."""
        from rlx.actors.reservation import Reservation  # whose bundles are pools

        return Reservation.wait_for(self.claim("a reservation", bundles, strategy), timeout_s)

    def grant_waiting(self) -> None:
        """Grant what has become possible."""
        granted: list[Claim] = []
        try:
            with self._lock:
                while self._waiting and (placement := self._fit(self._waiting[0])) is not None:
                    claim = self._waiting.popleft()
                    claim.places, claim.devices = [at for at, _ in placement], [devices for _, devices in placement]
                    self._book(claim, -1)
                    self._holding.append(claim)
                    granted.append(claim)
        finally:  # also after an interrupt: whoever has it would wait for it for ever
            for claim in granted:
                claim.decide(None)

    def give_back(self, claim: Claim) -> None:
        """Take back what the claim holds, or its wish."""
        with self._lock:
            if claim in self._waiting:
                self._waiting.remove(claim)
            elif claim in self._holding:
                self._holding.remove(claim)
                self._book(claim, 1)
        self.grant_waiting()

    def close(self, why: str) -> None:
        """Grant nothing more; who holds something keeps it."""
        with self._lock:
            self._closed = why
            waiting, self._waiting = list(self._waiting), collections.deque()
        for claim in waiting:
            claim.decide(ActorError(f"{claim.holder} cannot have {claim}: {why}."))
        self._note_change()

    def in_use(self) -> bool:
        """True while somebody holds something, or waits for it."""
        with self._lock:
            return bool(self._holding or self._waiting)

    def is_lost(self, claim: Claim) -> bool:
        """Whether a machine of the claim is gone."""
        return bool(claim.lost)

    def anew(self, claim: Claim) -> Claim:
        """Take back what the claim holds and return one to the same; Infeasible if that can never be any more."""
        self.give_back(claim)
        return self.claim(claim.holder, claim.wants, claim.strategy)

    def waiting_for(self, claim: Claim) -> str | None:
        """Return what the claim waits for, in words; None if it does not wait."""
        with self._lock:
            if claim not in self._waiting:
                return None
            first = self._waiting[0]
            asked = _sum(claim.wants)
            short = [name for name, amount in asked.items() if amount > self._free_of(name) + EPSILON] or list(asked)
            holders = [f"{one.holder} ({one})" for one in self._holding if any(_sum(one.wants).get(n) for n in short)]
            free = ", ".join(f"{_amount(n, self._free_of(n))} of {self.total.amounts()[n]:g} free" for n in short)
        text = f"waits for {claim}: {free}; held by {', '.join(holders) or 'nobody'}"
        return text if claim is first else f"{text}; {first.holder} ({first}) is first in the queue"

    def _could_fit(self, claim: Claim) -> bool:
        """Whether there is enough for it once nobody else holds anything. The lock is the caller's, as below."""
        return place(self.total.amounts(), self._devices, claim.wants) is not None

    def _fit(self, claim: Claim) -> Placement | None:
        """Return where the claim's wants would lie now; None if there is no room."""
        placed = place(self._free, self._free_devices, claim.wants)
        return None if placed is None else [(None, devices) for devices in placed]

    def _note_change(self) -> None:
        for tell in self._tell_of_change:
            tell()

    def _room_for(self, want: Resources) -> list[Resources]:
        return [want] * times(self._free, want)

    def _free_of(self, name: str) -> float:
        return self._free[name]

    def _book(self, claim: Claim, sign: int) -> None:
        for name, amount in _sum(claim.wants).items():
            self._free[name] = round(self._free[name] + sign * amount, 9)
        for want, devices in zip(claim.wants, claim.devices, strict=True):
            for device in devices:
                self._free_devices[device] = round(self._free_devices[device] + sign * min(want.gpu, 1.0), 9)

    def _shortage(self, claim: Claim) -> str:
        total, wants = self.total.amounts(), claim.wants
        short = [name for name, amount in _sum(wants).items() if amount > total.get(name, 0) + EPSILON]
        if not short:
            return f"which does not fit on the GPUs of {self.name}, because a share of a GPU lies on one device"
        has = ", ".join(_amount(name, total.get(name, 0)) for name in short)
        return f"and {self.name} has {has}" + (f" ({self._no_gpu})" if "gpu" in short and self._no_gpu else "")


class Claim:
    """What one holder asked for: waiting, then granted, then released."""

    def __init__(
        self, pool: Pool, holder: str, wants: Sequence[Resources], strategy: str, beside: Sequence[Any] = ()
    ) -> None:
        self.holder = holder
        self.wants, self.strategy, self.beside = list(wants), strategy, list(beside)
        self.devices: list[Devices] = []
        """The GPUs of each of `wants`, once granted; empty until then."""
        self.places: list[Any] = []
        """The machine of each, as the engine calls it, likewise; None where there is one only."""
        self.lost: list[Any] = []
        """Those of them that are gone."""
        self.pool = pool
        self._lock = threading.Lock()
        self._decision: list[Exception | None] = []
        self._tell: Callable[[Exception | None], None] | None = None

    @property
    def is_lost(self) -> bool:
        """Whether a machine of what was granted is gone."""
        return self.pool.is_lost(self)

    @property
    def granted(self) -> bool:
        """True once it has what it asked for."""
        return self._decision == [None]

    def when_decided(self, tell: Callable[[Exception | None], None]) -> None:
        """Call `tell(None)` once it is granted, or `tell(error)` if it never will be; `tell` must return at once."""
        with self._lock:
            self._tell = tell
            decision = list(self._decision)
        for error in decision:
            tell(error)

    def decide(self, error: Exception | None) -> None:
        """It is granted, or refused (for the pool)."""
        with self._lock:
            self._decision.append(error)
            tell = self._tell
        if tell is not None:
            tell(error)

    def waiting(self) -> str | None:
        """Return what it waits for and who holds it, None if it does not wait."""
        return self.pool.waiting_for(self)

    def anew(self) -> Claim:
        """Give back what was granted and claim the same once more; Infeasible if that can never be any more."""
        return self.pool.anew(self)

    def release(self) -> None:
        """Give back what was granted, or step out of the queue; twice is fine."""
        self.pool.give_back(self)

    def environment(self) -> dict[str, str]:
        """Return the variables that show an actor its GPUs; none if it asked for none."""
        devices = [device for one in self.devices for device in one]
        return {"CUDA_VISIBLE_DEVICES": ",".join(devices)} if devices else {}

    def __str__(self) -> str:
        counts = collections.Counter(map(str, self.wants))
        return " + ".join(want if count == 1 else f"{count} times {want}" for want, count in counts.items())


def place(free: Amounts, free_devices: Mapping[str, float], wants: Sequence[Resources]) -> list[Devices] | None:
    """Return the GPUs for each of `wants`, None if they do not all fit.

    Whole devices go first, then the larger shares; a share goes where it leaves the least, so that whole devices
    stay whole.
    """
    if any(amount > free.get(name, 0) + EPSILON for name, amount in _sum(wants).items()):
        return None
    left, placed = dict(free_devices), {}
    for index in sorted(range(len(wants)), key=lambda index: -wants[index].gpu):
        share = min(wants[index].gpu, 1.0)
        count = math.ceil(wants[index].gpu)
        fitting = sorted((room, number) for number, room in enumerate(left.values()) if room + EPSILON >= share)
        if len(fitting) < count:
            return None
        names = list(left)
        placed[index] = tuple(names[number] for _, number in fitting[:count])
        for name in placed[index]:
            left[name] -= share
    return [placed[index] for index in range(len(wants))]


def times(free: Amounts, want: Resources) -> int:
    """Return how often `want` is there."""
    return min(int((free.get(name, 0) + EPSILON) / amount) for name, amount in want.amounts().items() if amount)


def _sum(wants: Sequence[Resources]) -> Amounts:
    total: Amounts = {}
    for want in wants:
        for name, amount in want.amounts().items():
            if amount:
                total[name] = total.get(name, 0) + amount
    return total


def _amount(name: str, amount: float) -> str:
    if name == "memory":
        return f"{amount / 2**30:.3g} GiB memory"
    unit = {"cpu": "CPU", "gpu": "GPU"}.get(name, name)
    return f"{amount:g} {unit}{'s' * (amount != 1 and unit in ('CPU', 'GPU'))}"
