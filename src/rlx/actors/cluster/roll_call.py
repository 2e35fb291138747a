"""Who belongs to a cluster now, asked of its head by somebody who only looks."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Collection, Sequence

from rlx.actors.cluster.credentials import ClusterKey
from rlx.actors.cluster.daemon import parse_address
from rlx.actors.cluster.handshake import Role, connect
from rlx.actors.cluster.heartbeat import Patience
from rlx.actors.cluster.membership import NodeInfo, Watch
from rlx.actors.engines.reactor import Reactor
from rlx.errors import ActorError

ANSWER_TIMEOUT_S = 10.0
LOOK_EVERY_S = 0.2  # whether it was given up meanwhile


def present(address: str, key: ClusterKey) -> list[NodeInfo]:
    """Return the nodes of the cluster whose head is at HOST:PORT; ActorError if it does not answer."""
    nodes = _follow(address, key, lambda nodes: True, ANSWER_TIMEOUT_S)
    if nodes is None:
        raise ActorError(f"{address} has not answered within {ANSWER_TIMEOUT_S:g} s; is it the head's address?")
    return nodes


def wait_for(
    address: str,
    key: ClusterKey,
    expected: int | Collection[str],
    timeout_s: float,
    given_up: Callable[[], bool] = lambda: False,
) -> list[NodeInfo]:
    """Return the nodes once exactly the expected ones are there, the head's own among them.

    expected: how many, or their names. given_up: whether waiting on is in vain. ActorError names who is missing, or is
    one too many, without a full stop, for the caller to go on.
    """

    def is_complete(nodes: Sequence[NodeInfo]) -> bool:
        here = [node.name for node in nodes]
        if isinstance(expected, int):
            if len(here) > expected:
                raise ActorError(f"{len(here)} nodes have joined where {expected} were expected: {_list(here)}")
            return len(here) == expected
        if uninvited := [name for name in here if name not in expected]:
            raise ActorError(f"{_list(uninvited)} joined, where only {_list(expected)} were expected")
        return set(here) == set(expected)

    last: list[NodeInfo] = []

    def look(nodes: list[NodeInfo]) -> bool:
        last[:] = nodes
        return is_complete(nodes)

    nodes = _follow(address, key, look, timeout_s, given_up)
    if nodes is not None:
        return nodes
    here = [node.name for node in last]
    waited = "" if given_up() else f" within {timeout_s:g} s"
    if isinstance(expected, int):
        count = expected - len(here)
        missing = f"{count} of {expected} nodes {'has' if count == 1 else 'have'} not joined{waited}"
    else:
        names = [name for name in expected if name not in here]
        missing = f"{len(names)} of {len(expected)} nodes have not joined{waited}: {_list(names)}"
    raise ActorError(f"{missing}; {_list(here) or 'nobody'} {'is' if len(here) < 2 else 'are'} here")


def _follow(
    address: str,
    key: ClusterKey,
    enough: Callable[[list[NodeInfo]], bool],
    timeout_s: float,
    given_up: Callable[[], bool] = lambda: False,
) -> list[NodeInfo] | None:
    """Return the nodes once `enough` is true of them; None when that is not so in time, or given up."""
    deadline = time.monotonic() + timeout_s
    sock = connect(parse_address(address), key, Role.VIEWER)
    news: queue.SimpleQueue[list[NodeInfo] | str] = queue.SimpleQueue()
    reactor = Reactor()
    watch = Watch(reactor, sock, Patience(), lambda nodes, left: news.put(nodes), news.put)
    try:
        while (left_s := deadline - time.monotonic()) > 0:
            try:
                said = news.get(timeout=min(left_s, LOOK_EVERY_S))
            except queue.Empty:
                if given_up():  # and all that was told has been heard
                    return None
                continue
            if isinstance(said, str):
                raise ActorError(f"the daemon at {address} {said}: it is not the head of a cluster, or has ended.")
            if enough(said):
                return said
        return None
    finally:
        closed = threading.Event()
        reactor.post(lambda: (watch.close(), closed.set()))
        closed.wait(ANSWER_TIMEOUT_S)
        reactor.close(ANSWER_TIMEOUT_S)


def _list(names: Collection[str]) -> str:
    return ", ".join(names)
