"""The daemon of one machine: one port, behind which drivers get a place for their actors; on one machine also the head.

    python -m rlx.actors.cluster.daemon '{"name": "a", "host": "10.0.0.1", ...}'

is what `rlx start` runs. It prints its address once it listens and has joined, and ends by SIGTERM.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import select
import signal
import socket
import sys
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlx.actors import machine
from rlx.actors.cluster import greeting
from rlx.actors.cluster.credentials import ClusterKey
from rlx.actors.cluster.handshake import Doorman, Role, connect
from rlx.actors.cluster.heartbeat import Patience
from rlx.actors.cluster.membership import Head, Membership, NodeInfo
from rlx.actors.cluster.relay import NodeEngine
from rlx.actors.engines import wire
from rlx.actors.engines.reactor import Reactor
from rlx.actors.monitor import EventThread, logger
from rlx.errors import ActorError, RlxError

CLOSE_TIMEOUT_S = 10.0


@dataclass(frozen=True)
class Options:
    """What a daemon is started with."""

    name: str
    key: str
    """The file with the cluster's key."""
    host: str
    port: int = 0
    head: str | None = None
    """HOST:PORT of the head's daemon; None: this is the head."""
    cpu: float = 0
    """How many CPUs actors may ask for; 0: as many as the machine has. The same for gpu and memory."""
    gpu: int = 0
    memory: int = 0
    labels: dict[str, str] = field(default_factory=dict)
    patience: dict[str, float] = field(default_factory=dict)


class NodeDaemon:
    """Serves until it is closed, or until the head does not want it: then `refused` says why."""

    def __init__(self, options: Options) -> None:
        self._patience = Patience(**options.patience)
        self._key = ClusterKey.load(options.key)
        listener = socket.create_server((options.host, options.port), backlog=512)
        self.address = f"{options.host}:{listener.getsockname()[1]}"
        self.info = _describe(options, self.address)
        self._ended, self.bell_fd = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self.refused: str | None = None
        self._engines: set[NodeEngine] = set()
        self._lock = threading.Lock()
        self._endings = EventThread("rlx-node-endings")
        self._head = Head(self.info, self._patience) if options.head is None else None
        self._reactor, self._membership = Reactor(), None
        self._doorman = Doorman(self._key, listener, self._admit)
        if options.head is not None:
            head = parse_address(options.head)
            connect_to_head = lambda: connect(head, self._key, Role.NODE)  # noqa: E731
            self._membership = Membership(self._reactor, connect_to_head, self.info, self._patience, self._refuse)
            self._membership.join()
            if self.refused is not None:
                raise ActorError(self.refused)

    def wait(self) -> None:
        """Return when the head does not want it any more, or once something has been written to `bell_fd`."""
        select.select([self._ended], [], [])

    def close(self) -> None:
        """Leave the cluster, and end all actors of all drivers."""
        self._doorman.close()
        if self._membership is not None:
            self._membership.close()
        for engine in list(self._engines):
            self._end(engine)
        self._endings.close(CLOSE_TIMEOUT_S)
        if self._head is not None:
            self._head.close(CLOSE_TIMEOUT_S)
        self._reactor.close(CLOSE_TIMEOUT_S)

    def _admit(self, sock: Any, role: Role, address: tuple[str, int]) -> None:
        if role == Role.DRIVER:
            threading.Thread(target=self._serve_driver, args=(sock,), name="rlx-node-welcome", daemon=True).start()
        elif self._head is None:
            sock.close()
        elif role == Role.NODE:
            self._head.serve_node(sock)
        else:
            self._head.serve_viewer(sock)

    def _serve_driver(self, sock: Any) -> None:
        """Give a driver a place for actors."""
        events = EventThread("rlx-node-events")
        try:
            settings = json.loads(greeting.receive(sock, CLOSE_TIMEOUT_S).text)
            patience = Patience(**settings["patience"])
            engine = NodeEngine(events, self.info.name, sock, settings, patience, self._on_end)
        except Exception as error:
            logger.warning("a driver got no place here: %s", error)
            with contextlib.suppress(RlxError, OSError):  # it is gone
                greeting.send(sock, wire.EXITED, str(error), 1.0)
            sock.close()
            return
        with self._lock:
            self._engines.add(engine)
        engine.begin()

    def _on_end(self, engine: NodeEngine) -> None:
        self._endings.post(self._end, engine)

    def _end(self, engine: NodeEngine) -> None:
        with self._lock:
            if engine not in self._engines:
                return
            self._engines.remove(engine)
        engine.close(engine.system_timeout_s)
        engine.events.close(engine.system_timeout_s)

    def _refuse(self, why: str) -> None:
        self.refused = why
        os.write(self.bell_fd, b"!")


def parse_address(text: str) -> tuple[str, int]:
    """Return host and port of HOST:PORT; ValueError if it is not."""
    host, _, port = text.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise ValueError(f"{text!r} is not HOST:PORT, such as 10.0.0.1:6380")
    return host.strip("[]"), int(port)


def _describe(options: Options, address: str) -> NodeInfo:
    gpu = options.gpu or len(machine.gpus()[0])
    cpu, memory = options.cpu or machine.cpu_count(), options.memory or machine.memory_bytes()
    return NodeInfo(options.name, address, cpu, gpu, memory, options.labels)


def main() -> int:
    """Run a daemon until SIGTERM."""
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=logging.INFO)
    options = Options(**json.loads(sys.argv[1]))
    try:
        daemon = NodeDaemon(options)
    except (RlxError, OSError) as error:
        print(json.dumps({"error": str(error)}), flush=True)
        return 1
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    # Any thread may be given a signal, after SIGCONT say, and no handler would run while the main one waits for a lock.
    signal.set_wakeup_fd(daemon.bell_fd, warn_on_full_buffer=False)
    print(json.dumps({"address": daemon.address, "pid": os.getpid()}), flush=True)
    devnull = os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, 1)  # who has started it does not wait for more
    os.close(devnull)
    daemon.wait()
    daemon.close()
    if daemon.refused is not None:
        logger.error("%s", daemon.refused)
    return 0 if daemon.refused is None else 1


def folder() -> Path:
    """Return where this user's daemons note their addresses."""
    return Path.home() / ".rlx" / "nodes"


if __name__ == "__main__":
    sys.exit(main())
