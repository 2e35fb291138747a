"""Whether the machine at the other end of a link is there: both ends send a sign of life and listen for one."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from rlx.actors.engines import wire
from rlx.actors.engines.link import Link
from rlx.actors.engines.reactor import Reactor


@dataclass(frozen=True)
class Patience:
    """After how many seconds of silence what is done."""

    every_s: float = 1.0
    """A sign of life is sent."""
    suspect_s: float = 5.0
    """The other end is said to be late."""
    dead_s: float = 15.0
    """It is given up, for good: whatever it did meanwhile, nothing more is taken from it."""


class Heartbeat:
    """Watches one link, in its reactor's thread. Any byte counts as a sign of life, also of an unfinished frame."""

    def __init__(
        self,
        reactor: Reactor,
        link: Link,
        patience: Patience,
        late: Callable[[float], None],
        dead: Callable[[str], None],
    ) -> None:
        """late: hears of how many seconds of silence, once a silence; dead: how the death is described, once."""
        self._reactor, self._link, self._patience, self._late, self._dead = reactor, link, patience, late, dead
        self._is_late = False
        self._looked_at = time.monotonic()

    def start(self) -> None:
        """Begin to send and to listen."""
        self._link.write(wire.encode(wire.PING))
        self._reactor.set_deadline(self, self._patience.every_s, self._beat)

    def stop(self) -> None:
        """The link is no more."""
        self._reactor.clear_deadline(self)

    def _beat(self) -> None:
        now = time.monotonic()
        # A process that was stopped itself has heard nothing meanwhile, which is not the other's fault: what came is
        # still in the socket. So no more than one beat of silence is counted for each beat that was made here.
        if now - self._looked_at > 2 * self._patience.every_s:
            self._link.heard_at = max(self._link.heard_at, now - 2 * self._patience.every_s)
        self._looked_at = now
        silent_s = now - self._link.heard_at
        if silent_s >= self._patience.dead_s:
            self._dead(f"has been silent for {silent_s:.0f} s")
            return
        if silent_s < self._patience.suspect_s:
            self._is_late = False
        elif not self._is_late:
            self._is_late = True
            self._late(silent_s)
        self.start()
