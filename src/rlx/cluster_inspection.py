"""ps, why, stack, logs and trace with --address: each node says of its actors what the command says there."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from rlx.errors import ActorError, ConfigError
from rlx.inspection import write_trace

if TYPE_CHECKING:
    from rlx.actors.cluster.credentials import ClusterKey

TIMEOUT_S = 30.0
OF_ONE_MACHINE = ("runtime", "run", "follow", "json")
"""Options that are not passed on to the nodes."""
WITH_JSON = ("ps", "trace")


class _Said(NamedTuple):
    """What one node says of one runtime."""

    node: str
    code: int
    out: str
    err: str


def ps(options: argparse.Namespace) -> None:
    """Print the actors of every node."""
    said = list(_ask(options, ["ps"]))
    if options.json:
        print(json.dumps({one.node: json.loads(one.out) for one in said}, indent=2))
    else:
        print("\n\n".join(f"node {one.node}\n{one.out.rstrip()}" for one in said) or "No actor is on this cluster.")


def of_actor(options: argparse.Namespace) -> None:
    """Print what the nodes that know the actor say: why, stack or logs; without an actor, what all say."""
    words = [options.name] + ([options.actor] if options.actor else [])
    words += ["-n", str(options.lines)] if options.name == "logs" else []
    said = list(_ask(options, words))
    known = list({one.out: one for one in said if one.code == 0}.values())  # a driver's machine has all logs
    if not known:
        reasons = [f"node {one.node}: {one.err.strip().removeprefix('rlx: error: ').rstrip('.')}" for one in said]
        raise ActorError(f"no node of the cluster can tell: {'; '.join(reasons) or 'no actor is on it'}.")
    print("\n\n".join(f"node {one.node}\n{one.out.rstrip()}" for one in known))
    for one in known:
        if one.err.strip():
            print(one.err.strip(), file=sys.stderr)


def trace(options: argparse.Namespace) -> None:
    """Write the latest calls of all actors on all nodes to one file."""
    events: list[dict[str, Any]] = []
    for one in _ask(options, ["trace", "-o", "/dev/stdout", "--json"]):
        if one.code:
            raise ActorError(f"node {one.node}: {one.err.strip()}")
        found = json.JSONDecoder().raw_decode(one.out)[0]
        for event in found["traceEvents"]:  # process ids are each machine's own
            event["pid"] = f"{one.node}:{event['pid']}"
            events.append(event)
    write_trace({"traceEvents": events}, options)


def _ask(options: argparse.Namespace, words: list[str]) -> Iterator[_Said]:
    """Yield what every node says of every runtime that has actors there; stderr names who does not answer."""
    from rlx.actors.cluster import roll_call
    from rlx.cluster_commands import load_key

    given = [name for name in OF_ONE_MACHINE if getattr(options, name, None)]
    if alien := [f"--{name}" for name in given if name != "json" or words[0] not in WITH_JSON]:
        raise ConfigError(f"rlx {words[0]} has no {' and no '.join(alien)} with --address; leave one out.")
    key = load_key(options.token_file)
    for node in roll_call.present(options.address, key):
        try:
            said = _ask_one(node.address, key, words + (["--json"] if words[0] == "ps" and options.json else []))
        except (ActorError, ValueError) as error:
            print(f"rlx: node {node}: {error}", file=sys.stderr)
            continue
        yield from (_Said(node.name, *of_runtime) for of_runtime in said)


def _ask_one(address: str, key: ClusterKey, words: list[str]) -> list[tuple[int, str, str]]:
    """Return code, output and errors for each runtime; ActorError if the node does not answer."""
    from rlx.actors.cluster import greeting
    from rlx.actors.cluster.daemon import parse_address
    from rlx.actors.cluster.handshake import Role, connect
    from rlx.actors.engines import wire

    with contextlib.closing(connect(parse_address(address), key, Role.DRIVER)) as sock:
        greeting.send(sock, wire.ASK, words, TIMEOUT_S)
        answer = greeting.receive(sock, TIMEOUT_S)
    if answer.kind != wire.ASK:
        raise ActorError(f"it cannot tell: {json.loads(answer.text)}")
    return json.loads(answer.text)
