"""Which machines belong to a cluster: nodes tell the head that they are there, and the head tells who asks.

The head keeps a connection to each of them. One that is silent for too long has left; when it comes back it joins
anew, as another incarnation, and what it did for a driver before is not taken from it any more.
"""

from __future__ import annotations

import dataclasses
import json
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from rlx.actors.cluster.heartbeat import Heartbeat, Patience
from rlx.actors.engines import wire
from rlx.actors.engines.link import Link
from rlx.actors.engines.reactor import Reactor
from rlx.actors.engines.wire import Frame
from rlx.actors.monitor import logger
from rlx.errors import ActorError

REJOIN_EVERY_S = 1.0
BEATS = 3  # of which a living node has been heard at least one


@dataclass(frozen=True)
class NodeInfo:
    """What a node says of itself."""

    name: str
    address: str
    """HOST:PORT of its daemon, as others reach it."""
    cpu: float
    gpu: int
    memory: int
    """Bytes."""
    labels: dict[str, str] = field(default_factory=dict)
    machine: str = ""
    """Its `identity`: a driver of the same one starts its actors itself. Empty: no driver does."""
    incarnation: int = 0
    """Given by the head: the how manieth node that has joined this is."""
    silent_s: float = 0.0
    """For how long the head had heard nothing of it, when it told of it."""

    @property
    def host(self) -> str:
        """Its address without the port."""
        return self.address.rpartition(":")[0].strip("[]")

    def __str__(self) -> str:
        return f"{self.name} ({self.address})"


class _Peer:
    """One connection, its sign of life, and what it says."""

    def __init__(
        self,
        reactor: Reactor,
        sock: Any,
        patience: Patience,
        take: Callable[[_Peer, Frame], None],
        lost: Callable[[_Peer, str], None],
    ) -> None:
        self._every_s = patience.every_s
        self._take, self._lost, self._is_lost = take, lost, False
        self.link = Link(reactor, sock, self._on_frame, self.lose)
        self._heart = Heartbeat(reactor, self.link, patience, lambda silent_s: None, self.lose)

    def open(self) -> None:
        """Begin to listen. Only in the reactor's thread, as all else."""
        self.link.open()
        self._heart.start()

    @property
    def is_alive(self) -> bool:
        """Whether it has given signs of life lately; who has not may have been switched off and on again."""
        return time.monotonic() - self.link.heard_at < BEATS * self._every_s

    def tell(self, kind: int, what: Any) -> None:
        self.link.write(wire.encode(kind, 0, json.dumps(what)))

    def lose(self, how: str) -> None:
        """It is gone, or has to go."""
        if not self._is_lost:
            self._is_lost = True
            self._heart.stop()
            self.link.finish(self.link.close)
            self._lost(self, how)

    def _on_frame(self, frame: Frame) -> None:
        if frame.kind != wire.PING:
            self._take(self, frame)


class Head:
    """Keeps the list."""

    def __init__(self, own: NodeInfo, patience: Patience) -> None:
        """own: the node on the head's machine, which is the first of them."""
        self._patience, self._reactor, self._joined = patience, Reactor(), 1
        self._own = dataclasses.replace(own, incarnation=1)
        self._nodes: dict[_Peer, NodeInfo] = {}
        self._viewers: set[_Peer] = set()

    def serve_node(self, sock: Any) -> None:
        """Take in a node behind an authenticated socket."""
        self._serve(sock, self._take_node, self._lose_node)

    def serve_viewer(self, sock: Any) -> None:
        """Tell who is behind an authenticated socket of all nodes, now and at every change."""
        peer = self._serve(sock, lambda peer, frame: None, lambda peer, how: self._viewers.discard(peer))

        def welcome() -> None:
            self._viewers.add(peer)
            self._tell([peer])

        self._reactor.post(welcome)

    def close(self, timeout_s: float) -> None:
        """End all connections."""
        done = threading.Event()

        def end() -> None:
            for peer in [*self._nodes, *self._viewers]:
                peer.lose("was closed")
            done.set()

        self._reactor.post(end)
        done.wait(timeout_s)
        self._reactor.close(timeout_s)

    def _serve(self, sock: Any, take: Callable[[_Peer, Frame], None], lost: Callable[[_Peer, str], None]) -> _Peer:
        peer = _Peer(self._reactor, sock, self._patience, take, lost)
        self._reactor.post(peer.open)
        return peer

    def _take_node(self, peer: _Peer, frame: Frame) -> None:
        if peer in self._nodes:
            return
        if frame.kind != wire.JOIN:
            peer.lose("sent what no node sends")
            return
        self._joined += 1
        info = NodeInfo(**json.loads(frame.text) | {"incarnation": self._joined})
        same = [other for other, known in self._nodes.items() if known.name == info.name]
        taken = [self._nodes[other] for other in same if other.is_alive] + [self._own] * (self._own.name == info.name)
        if taken and taken[0].address != info.address:
            peer.tell(wire.EXITED, f"there is a node {taken[0]} already; start this one with another --name.")
            return
        for other in same:
            other.lose("has joined anew")  # its connection is dead, and nobody has noticed yet
        self._nodes[peer] = info
        peer.tell(wire.JOIN, info.incarnation)
        logger.info("node %s has joined", info)
        self._tell(self._viewers)

    def _lose_node(self, peer: _Peer, how: str) -> None:
        info = self._nodes.pop(peer, None)
        if info is not None:
            logger.warning("node %s %s; it does not belong to the cluster any more", info, how)
            self._tell(self._viewers, {info.incarnation: how})

    def _tell(self, viewers: Iterable[_Peer], left: dict[int, str] | None = None) -> None:
        """left: how those were lost that have left just now, by incarnation."""
        now = time.monotonic()
        others = [dataclasses.replace(node, silent_s=now - peer.link.heard_at) for peer, node in self._nodes.items()]
        nodes = [dataclasses.asdict(node) for node in [self._own, *others]]
        for viewer in list(viewers):
            viewer.tell(wire.NODES, {"nodes": nodes, "left": list((left or {}).items())})


class Watch:
    """The list of nodes, as the head tells it, in the reactor's thread."""

    def __init__(
        self,
        reactor: Reactor,
        sock: Any,
        patience: Patience,
        changed: Callable[[list[NodeInfo], dict[int, str]], None],
        lost: Callable[[str], None],
    ) -> None:
        """sock: to the head, authenticated. changed: is called at once, and at every change.

        It gets all nodes, and how those that have just left were lost, by incarnation.
        """
        self._changed = changed
        self._peer = _Peer(reactor, sock, patience, self._take, lambda peer, how: lost(how))
        reactor.post(self._peer.open)

    def close(self) -> None:
        """Hear no more of it. In the reactor's thread."""
        self._peer.lose("is not listened to any more")

    def _take(self, peer: _Peer, frame: Frame) -> None:
        told = json.loads(frame.text)
        self._changed([NodeInfo(**node) for node in told["nodes"]], dict(told["left"]))


class Membership:
    """A node's place in the cluster; where the head is gone it knocks again until it is back."""

    def __init__(
        self,
        reactor: Reactor,
        connect: Callable[[], Any],
        own: NodeInfo,
        patience: Patience,
        refused: Callable[[str], None],
    ) -> None:
        """connect: returns an authenticated socket to the head. refused: hears why the head does not want it."""
        self._reactor, self._connect, self._own, self._patience = reactor, connect, own, patience
        self._refused = refused
        self._closed, self._answered = threading.Event(), threading.Event()
        self._lost = threading.Event()
        self._why_not: str | None = None
        self._peer: _Peer | None = None

    def join(self, sock: Any, timeout_s: float) -> None:
        """Join over an authenticated socket, this first time; ActorError when the head does not want it."""
        self._enter(sock)
        if not self._answered.wait(timeout_s):
            self._why_not = f"the head has not answered within {timeout_s:g} s; is it overloaded, or no head?"
        if self._why_not is not None:
            raise ActorError(self._why_not)
        threading.Thread(target=self._keep, name="rlx-node-membership", daemon=True).start()

    def close(self) -> None:
        """Leave."""
        self._closed.set()
        self._lost.set()
        peer = self._peer
        if peer is not None:
            self._reactor.post(lambda: peer.lose("is left"))

    def _enter(self, sock: Any) -> None:
        self._lost.clear()
        peer = self._peer = _Peer(self._reactor, sock, self._patience, self._take, self._on_lost)

        def begin() -> None:
            if self._closed.is_set():  # while it was knocking
                sock.close()
                return
            peer.open()
            peer.tell(wire.JOIN, dataclasses.asdict(self._own))

        self._reactor.post(begin)

    def _take(self, peer: _Peer, frame: Frame) -> None:
        if frame.kind == wire.EXITED:
            self._why_not = why = json.loads(frame.text)
            self._closed.set()
            self._refused(why)
        self._answered.set()

    def _on_lost(self, peer: _Peer, how: str) -> None:
        if not self._closed.is_set():
            logger.warning("the head %s; knocking until it is back", how)
        if not self._answered.is_set():
            self._why_not = f"what was to be the head {how}; give the address of the head's daemon."
            self._answered.set()
        self._lost.set()

    def _keep(self) -> None:
        while True:
            self._lost.wait()
            if self._closed.wait(REJOIN_EVERY_S):
                return
            try:
                self._enter(self._connect())
            except Exception:  # it is not back yet; whatever is wrong was said when it was lost
                continue
            logger.warning("the head is back")
