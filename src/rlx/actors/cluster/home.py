"""A node on the driver's own machine: the driver starts actors there itself, over no network, as engine local does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from rlx.actors import machine
from rlx.actors.channel import Staleness
from rlx.actors.cluster.heartbeat import Heartbeat, Patience
from rlx.actors.cluster.remote import Node
from rlx.actors.engines import wire
from rlx.actors.engines.link import Link
from rlx.actors.engines.local_actor import LocalActor
from rlx.actors.engines.memory import Parcel
from rlx.actors.engines.reactor import Reactor
from rlx.actors.engines.wire import Frame
from rlx.actors.future import Future, Ok
from rlx.actors.interface import ActorSpec, Listener
from rlx.actors.monitor import logger


class HomeNode(Node):
    """The driver's side: actors are its own processes, and end when the node is lost like all others'."""

    def spawn(self, number: int, spec: ActorSpec, parcel: Parcel, listener: Listener) -> LocalActor:
        """Start an actor."""
        try:
            here = machine.Node(self.name, self.info.host).environment()
            actor = self._engine.start_here(replace(spec, env=here | spec.env), parcel, listener)
        except BaseException:
            self.remove(number)
            raise
        self.actors[number] = actor
        actor.gone.when_done(lambda: self.remove(number))
        self._end_if_lost(actor)
        return actor

    def readers(self, channel: str) -> Future[dict[str, Staleness]]:
        """Return nobody: the driver knows its machine's readers."""
        answer: Future[dict[str, Staleness]] = Future(self.name, "readers")
        answer.settle(lambda: Ok({}))
        return answer


class HomeDriver:
    """The daemon's side: tells the driver that the node is there, and is told when the driver is not."""

    def __init__(
        self, reactor: Reactor, sock: Any, settings: dict[str, Any], ended: Callable[[HomeDriver], None]
    ) -> None:
        """sock: authenticated. settings: what the driver's OPEN frame says: system_timeout_s, patience, folder."""
        self.folder, self.system_timeout_s = Path(settings["folder"]), settings["system_timeout_s"]
        self._reactor, self._ended, self._is_ended = reactor, ended, False
        self.link = Link(reactor, sock, _ignore, self._lose)
        patience = Patience(**settings["patience"])
        self._heart = Heartbeat(reactor, self.link, patience, _note_silence, self._lose)

    def begin(self) -> None:
        """Tell the driver that it may start actors."""
        self._reactor.post(self._begin)

    def close(self, timeout_s: float) -> None:
        """Have the driver know that the node is gone."""
        self._reactor.post(lambda: self._lose("is left"))

    def _begin(self) -> None:
        self.link.open()
        self.link.write(wire.encode(wire.OPEN))
        self._heart.start()

    def _lose(self, how: str) -> None:
        if not self._is_ended:
            self._is_ended = True
            self._heart.stop()
            self.link.finish(self.link.close)
            self._ended(self)


def _ignore(frame: Frame) -> None:
    """Signs of life are all that comes."""


def _note_silence(silent_s: float) -> None:
    logger.warning("the driver has been silent for %.0f s", silent_s)
