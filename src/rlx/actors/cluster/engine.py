"""Actors on the machines of a cluster, behind the interface of all engines: the driver's side."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import threading
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rlx.actors import machine
from rlx.actors.channel import Channel, Staleness
from rlx.actors.cluster import greeting
from rlx.actors.cluster.credentials import DEFAULT_PATH, ClusterKey
from rlx.actors.cluster.daemon import parse_address
from rlx.actors.cluster.handshake import Role, connect
from rlx.actors.cluster.heartbeat import Patience
from rlx.actors.cluster.home import HomeNode
from rlx.actors.cluster.membership import NodeInfo, Watch
from rlx.actors.cluster.mirrors import MirroredChannel, Mirrors
from rlx.actors.cluster.placement import ClusterPool
from rlx.actors.cluster.project import Project
from rlx.actors.cluster.remote import Node, RemoteActor
from rlx.actors.engines import wire
from rlx.actors.engines.local import CLOSE_GRACE_S, LocalEngine
from rlx.actors.engines.local_actor import LocalActor
from rlx.actors.future import Err, Future, nothing, seconds_to, wait
from rlx.actors.interface import ActorSpec, Listener
from rlx.actors.monitor import EventThread, logger
from rlx.actors.resources import Pool, Resources
from rlx.errors import ActorError, NotSupported

RELINK_EVERY_S = 1.0
PASSED_ON = ("RLX_", "OMP_", "MKL_", "TOKENIZERS_", "HF_", "CUDA_", "NCCL_", "GLOO_", "TORCH_")
"""Beginnings of the names of the driver's environment variables that its actors on other machines get."""


class ClusterEngine(LocalEngine):
    """A link to the daemon of every node; what the local engine does beside them is done on the driver's machine."""

    capabilities = LocalEngine.capabilities - {"resources"} | {"machines"}

    def __init__(
        self,
        events: EventThread,
        system_timeout_s: float,
        address: str,
        token_file: str | Path = DEFAULT_PATH,
        preload: Sequence[str] = ("numpy", "torch"),
        object_memory: int | None = None,
        log_folder: Path | None = None,
        patience: Patience | None = None,
    ) -> None:
        """address: HOST:PORT of the head's daemon. token_file: the cluster's key.

        Returns when all nodes that belong to the cluster now are linked.
        """
        project = Project.around(Path.cwd())
        self._head, self._key, self._address = parse_address(address), ClusterKey.load(token_file), address
        super().__init__(events, system_timeout_s, None, object_memory, log_folder)
        self.patience = patience or Patience()
        self.mirrors = Mirrors(self.reactor, self.channel)
        self._nodes: dict[int, Node] = {}  # by incarnation
        self._present: dict[int, NodeInfo] = {}  # as the head said last
        self._unreachable: set[int] = set()  # of those, what cannot be linked, as was said
        self._spawned = 0
        self._pool: ClusterPool | None = None
        self._placing = threading.Lock()
        self._placeable = threading.Condition(self._placing)  # there is a node again, or never will be
        self._head_lost: str | None = None
        self._preload, self._project, self._machine = preload, project, machine.identity()
        self._opening = {"system_timeout_s": system_timeout_s, "patience": dataclasses.asdict(self.patience)}
        self._opening_elsewhere: dict[str, Any] = {"preload": list(preload), "object_memory": object_memory}
        if project is not None:
            self._opening_elsewhere |= {"project": project.digest, "root": str(project.root)}
        self._linking = EventThread("rlx-cluster-links")  # connecting waits
        self._first: Future[None] = Future("cluster", "nodes")
        self._watch: Watch | None = None
        try:
            sock = connect(self._head, self._key, Role.VIEWER)
            changed = lambda nodes, left: self._linking.post(self._follow, nodes, left)  # noqa: E731
            self._watch = Watch(self.reactor, sock, self.patience, changed, self._lose_head)
            if not wait([self._first], 1, system_timeout_s)[0]:
                raise ActorError(
                    f"the head of the cluster ({address}) has not said within {system_timeout_s:g} s which nodes "
                    "belong to it, or one of them has not answered; see whether it is stopped, raise system_timeout_s."
                )
            self._first.result()
        except BaseException:
            self.close(system_timeout_s)
            raise

    def pool(self, given: Resources) -> Pool:
        """Return what the nodes have together; it follows them as they join and leave."""
        if given:
            raise NotSupported("a cluster has what its nodes have; give `rlx start` --cpu, --gpu or --memory instead.")
        with self._placing:
            if self._pool is None:
                self._pool = ClusterPool({number: node.info for number, node in self._nodes.items()})
            return self._pool

    def spawn(self, spec: ActorSpec, listener: Listener) -> LocalActor | RemoteActor:  # type: ignore[override]
        """Have a node start the actor: the one where its resources are, or the one with the fewest actors.

        Where none is linked now, wait for one.
        """
        parcel = self.pack_actor(spec)
        deadline = time.monotonic() + self.system_timeout_s
        with self._placing:
            node = self._choose(spec, deadline)
            self._spawned += 1
            number = self._spawned
            node.actors[number] = None
        return node.spawn(number, spec, parcel, listener)

    def _choose(self, spec: ActorSpec, deadline: float) -> Node:
        """Return the node for it. Holds the lock, and lets go of it while there is none."""
        while not (nodes := [node for node in self._nodes.values() if node.lost is None]):
            if time.monotonic() >= deadline or self.closing or self._head_lost:
                break
            self._placeable.wait(seconds_to(deadline))
        if self.closing:
            raise ActorError(f"actor {spec.name} cannot be started: this runtime is closed.")
        if not nodes:
            why = self._head_lost or "no node of the cluster is left; start one with `rlx start`"
            raise ActorError(f"actor {spec.name} cannot be started: {why}.")
        if spec.place is None:
            return min(nodes, key=lambda node: len(node.actors))
        node = self._nodes.get(spec.place)
        if node is None:
            raise ActorError(f"actor {spec.name} cannot be started: the node where its resources were has left.")
        return node

    def _new_channel(self, name: str) -> Channel:
        channel = MirroredChannel.create(name, self.memory.limit_bytes)
        channel.readers_elsewhere = self._readers
        return channel

    def _readers(self, name: str) -> dict[str, Staleness]:
        answers = [node.readers(name) for node in list(self._nodes.values())]
        return {reader: how for answer in answers for reader, how in answer.result(self.system_timeout_s).items()}

    def surroundings(self, spec: ActorSpec) -> dict[str, Any]:
        """Return what an actor's process is to look like: environment variables, working folder, module path."""
        env = {name: value for name, value in os.environ.items() if name.startswith(PASSED_ON)}
        return {"env": env | spec.env, "cwd": os.getcwd(), "path": [*map(str, sys.path)]}

    def forget(self, node: Node) -> None:
        """The node is gone; where the head still counts it in, it is linked anew."""
        self.mirrors.remove(node.link)
        with self._placing:
            if self._nodes.get(node.info.incarnation) is not node:  # known already
                return
            if self._pool is not None:  # first: who finds no node finds its claims lost
                self._pool.remove(node.info.incarnation)
            self._nodes = {number: other for number, other in self._nodes.items() if other is not node}
        self._link_again()

    def close(self, timeout_s: float) -> None:
        """End the idle actors, then the links, upon which nodes kill the rest."""
        deadline = time.monotonic() + timeout_s
        with self._placing:
            self.closing = True
            self._placeable.notify_all()
        nodes = list(self._nodes.values())
        actors = [actor for node in nodes for actor in list(node.actors.values()) if actor is not None]
        idle = [actor for actor in actors if actor.stop()]
        grace = min(deadline, time.monotonic() + CLOSE_GRACE_S)
        wait([actor.gone for actor in idle], len(idle), grace - time.monotonic())
        self._linking.close(max(0.1, deadline - time.monotonic()))
        if self._watch is not None:
            self.reactor.post(self._watch.close)
        for node in list(self._nodes.values()):
            self.reactor.post(lambda node=node: node.lose("was closed with its runtime"))
        wait([actor.gone for actor in actors], len(actors), max(0.1, deadline - time.monotonic()))
        super().close(max(0.1, deadline - time.monotonic()))

    def _follow(self, infos: list[NodeInfo], left: dict[int, str]) -> None:
        """Link the nodes that have joined, give up those that have left. In a thread of its own, for it waits."""
        self._present = {info.incarnation: info for info in infos}
        for number, node in list(self._nodes.items()):
            if number not in self._present:
                how = f"{left[number]}, as the head says" if number in left else "has left the cluster"
                self.reactor.post(lambda node=node, how=how: node.lose(how))
        self._link_missing()
        self._first.settle(nothing)

    def _link_missing(self) -> None:
        """Link the nodes that belong to the cluster and are not linked; where one cannot be, try again later."""
        for number, info in self._present.items():
            if number in self._nodes or self.closing or self._head_lost:
                continue
            try:
                self._link(number, info)
                self._unreachable.discard(number)
            except (ActorError, OSError) as error:
                if number not in self._unreachable:
                    logger.warning("node %s belongs to the cluster and cannot be used from here: %s", info, error)
                self._unreachable.add(number)
                self._link_again()

    def _link_again(self) -> None:
        self.reactor.set_deadline(self._link_again, RELINK_EVERY_S, lambda: self._linking.post(self._link_missing))

    def _link(self, number: int, info: NodeInfo) -> None:
        is_home = info.machine == self._machine
        sock = connect(parse_address(info.address), self._key, Role.DRIVER)
        try:
            self._greet(sock, is_home)
            if is_home:
                self._need_forkserver()
        except BaseException:
            sock.close()
            raise
        with self._placing:
            if self.closing or self._head_lost:  # meanwhile, which gave up the nodes that were linked
                sock.close()
                return
            self._nodes[number] = (HomeNode if is_home else Node)(self, info, sock)
            self._placeable.notify_all()
            pool = self._pool
        if pool is not None:
            pool.add(number, info)

    def _need_forkserver(self) -> None:
        """Have one, a new one if it has ended."""
        if self._server is None or self._lost is not None:
            if self._server is not None:
                self._control.close()
            why, self._lost = self._lost, None
            try:
                self._start_forkserver(self._preload)
            except BaseException:  # descriptors have run out, say: there is none yet
                self._lost = why
                raise

    def _greet(self, sock: Any, is_home: bool) -> None:
        """Have a daemon take this driver in."""
        opening = self._opening | ({"folder": str(self.folder)} if is_home else self._opening_elsewhere)
        greeting.send(sock, wire.OPEN, opening, self.system_timeout_s)
        answer = greeting.receive(sock, self.system_timeout_s)
        if answer.kind == wire.PROJECT and self._project is not None:
            greeting.send(sock, wire.PROJECT, {}, self.system_timeout_s, self._project.archive())
            answer = greeting.receive(sock, self.system_timeout_s)
        if answer.kind != wire.OPEN:
            raise ActorError(f"it takes no actors: {json.loads(answer.text)}")

    def _end_without_server(self, actors: Sequence[LocalActor], how: str, is_final: bool) -> None:
        """The driver's own nodes are linked anew, with a new forkserver."""
        homes = [] if is_final else [node for node in list(self._nodes.values()) if isinstance(node, HomeNode)]
        for node in homes:  # first: who hears of a death may start the actor again at once
            self.forget(node)
        super()._end_without_server(actors, how, is_final)
        for node in homes:
            node.lose("has lost its forkserver")

    def _lose_head(self, how: str) -> None:
        """Without the head nobody knows who belongs to the cluster: the run ends, and can be resumed."""
        if not self.closing:
            with self._placing:
                self._head_lost = f"the head of the cluster ({self._address}) {how}"
                self._placeable.notify_all()
                pool = self._pool
            if pool is not None:
                pool.close(self._head_lost)
            if not self._first.done():  # who opens this runtime is told
                why = f"the daemon at {self._address} {how}: it is not the head of a cluster, or has ended"
                self._first.settle(partial(_head_error, why))
                return
            logger.error("%s; all actors of this runtime end with it", self._head_lost)
            for node in list(self._nodes.values()):
                node.lose(f"belongs to no cluster any more: the head ({self._address}) {how}")


def _head_error(how: str) -> Err:
    return Err(ActorError(f"{how}."))
