"""The daemon of one machine: one port, behind which drivers get a place for their actors; on one machine also the head.

    python -m rlx.actors.cluster.daemon '{"name": "a", "host": "10.0.0.1", ...}'

is what `rlx start` runs. It prints its address once it listens and has joined, and ends by SIGTERM.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlx.actors import machine, processes
from rlx.actors.cluster import greeting, project
from rlx.actors.cluster.credentials import HOME, ClusterKey
from rlx.actors.cluster.handshake import Doorman, Reason, Role, connect
from rlx.actors.cluster.heartbeat import Patience
from rlx.actors.cluster.home import HomeDriver
from rlx.actors.cluster.membership import Head, Membership, NodeInfo
from rlx.actors.cluster.notes import Note
from rlx.actors.cluster.relay import NodeEngine
from rlx.actors.engines import wire
from rlx.actors.engines.reactor import Reactor
from rlx.actors.monitor import EventThread, logger
from rlx.errors import ActorError, ConfigError, HandshakeError, RlxError

CLOSE_TIMEOUT_S = 10.0
PROJECT_TIMEOUT_S = 60.0
LOOK_TIMEOUT_S = 20.0
LOOKING = ("ps", "why", "stack", "logs", "trace")
"""The commands that are run for who asks; they read, and signal actors to say where they are."""
KNOCK_EVERY_S = 0.5
NOT_THERE_YET = (Reason.NOBODY_LISTENS, Reason.UNREACHABLE, Reason.TIMED_OUT)
"""Why a head may be asked again, while somebody waits for it."""


@dataclass(frozen=True)
class Options:
    """What a daemon is started with."""

    name: str
    key: str
    """The file with the cluster's key."""
    host: str | None = None
    """The address of this machine that it listens at; None: that of the connection to the head, or of the head's
    default route."""
    port: int = 0
    head: str | None = None
    """HOST:PORT of the head's daemon; None: this is the head."""
    cpu: float = 0
    """How many CPUs actors may ask for; 0: as many as the machine has. The same for gpu and memory."""
    gpu: int = 0
    memory: int = 0
    labels: dict[str, str] = field(default_factory=dict)
    apart: bool = False
    """Whether it starts the actors of drivers on this machine, too, which else do so themselves."""
    wait_for_head_s: float = 0.0
    log: str = ""
    """The file that its log is in, for who looks for it."""
    patience: dict[str, float] = field(default_factory=dict)


class NodeDaemon:
    """Serves until it is closed, or until the head does not want it: then `refused` says why."""

    def __init__(self, options: Options) -> None:
        self._patience = Patience(**options.patience)
        self._key = ClusterKey.load(options.key)
        head = None if options.head is None else parse_address(options.head)
        to_head = None if head is None else _reach(head, self._key, options.wait_for_head_s)
        listener = _listen(options.host or (_default_host() if to_head is None else _own_host(to_head)), options.port)
        self.address = format_address(*listener.getsockname()[:2])
        self.info = _describe(options, self.address)
        self._ended, self.bell_fd = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self.refused: str | None = None
        self._engines: set[NodeEngine | HomeDriver] = set()
        self._closed = False
        self._lock = threading.Lock()
        self._endings = EventThread("rlx-node-endings")
        self._head = Head(self.info, self._patience) if options.head is None else None
        self._reactor, self._membership = Reactor(), None
        self._doorman = Doorman(self._key, listener, self._admit)
        if head is not None:
            connect_to_head = lambda: connect(head, self._key, Role.NODE)  # noqa: E731
            self._membership = Membership(self._reactor, connect_to_head, self.info, self._patience, self._refuse)
            self._membership.join(to_head, CLOSE_TIMEOUT_S)

    def wait(self) -> None:
        """Return when the head does not want it any more, or once something has been written to `bell_fd`."""
        select.select([self._ended], [], [])

    def close(self) -> None:
        """Leave the cluster, and end all actors of all drivers."""
        self._doorman.close()
        if self._membership is not None:
            self._membership.close()
        with self._lock:
            self._closed, engines = True, list(self._engines)
        for engine in engines:
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
        try:
            frame = greeting.receive(sock, CLOSE_TIMEOUT_S)
            settings = json.loads(frame.text)
            if frame.kind == wire.ASK:
                greeting.send(sock, wire.ASK, self._look(settings), CLOSE_TIMEOUT_S)
                sock.close()
                return
            if "folder" in settings:
                engine = HomeDriver(self._reactor, sock, settings, self._on_end)
            else:
                folder = _project(sock, settings.get("project"))
                here = machine.Node(self.info.name, self.info.host)
                engine = NodeEngine(here, sock, settings, self._on_end, folder)
        except Exception as error:
            logger.warning("a driver got no place here: %s", error)
            with contextlib.suppress(RlxError, OSError):  # it is gone
                greeting.send(sock, wire.EXITED, str(error), 1.0)
            sock.close()
            return
        with self._lock:
            self._engines.add(engine)
            is_late = self._closed
        if is_late:  # it was let in just before the door was closed
            self._end(engine)
            sock.close()
        else:
            engine.begin()

    def _look(self, words: list[str]) -> list[tuple[int, str, str]]:
        """Return what a command that looks at actors says here: exit code, output and errors for each driver's."""
        if not words or words[0] not in LOOKING:
            raise ActorError(f"{words[:1]} is not one of {', '.join(LOOKING)}")
        found = []
        for engine in list(self._engines):
            command = [sys.executable, "-m", "rlx.cli", *words, "--runtime", str(engine.folder)]
            command += ["--here"] if isinstance(engine, HomeDriver) and words[0] != "logs" else []
            done = subprocess.run(command, capture_output=True, text=True, timeout=LOOK_TIMEOUT_S, check=False)
            found.append((done.returncode, done.stdout, done.stderr))
        return found

    def _on_end(self, engine: NodeEngine | HomeDriver) -> None:
        self._endings.post(self._end, engine)

    def _end(self, engine: NodeEngine | HomeDriver) -> None:
        with self._lock:
            if engine not in self._engines:
                return
            self._engines.remove(engine)
        engine.close(engine.system_timeout_s)

    def _refuse(self, why: str) -> None:
        self.refused = why
        os.write(self.bell_fd, b"!")


def _project(sock: Any, digest: str | None) -> Path | None:
    """Return the folder of the driver's project, which it sends where this machine has never had it."""
    if digest is None:
        return None
    if not re.fullmatch("[0-9a-f]{64}", digest):
        raise ActorError(f"{digest[:80]!r} is no SHA-256 of a project")
    home = HOME.expanduser() / "projects"
    folder = project.known(digest, home)
    if folder is None:
        greeting.send(sock, wire.PROJECT, {}, CLOSE_TIMEOUT_S)
        frame = greeting.receive(sock, PROJECT_TIMEOUT_S)
        folder = project.unpack(bytes(frame.open(None)[0]), digest, home)
    return folder


def parse_address(text: str) -> tuple[str, int]:
    """Return host and port of HOST:PORT; ValueError if it is not."""
    host, _, port = text.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise ValueError(f"{text!r} is not HOST:PORT, such as 10.0.0.1:6380")
    return host.strip("[]"), int(port)


def format_address(host: str, port: int) -> str:
    """Return HOST:PORT."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _reach(head: tuple[str, int], key: ClusterKey, wait_s: float) -> Any:
    """Return a connection to the head, which may start within `wait_s`."""
    deadline = time.monotonic() + wait_s
    while True:
        try:
            return connect(head, key, Role.NODE)
        except HandshakeError as error:
            if error.reason not in NOT_THERE_YET or time.monotonic() + KNOCK_EVERY_S > deadline:
                raise
        time.sleep(KNOCK_EVERY_S)


def _listen(host: str, port: int) -> socket.socket:
    if host in ("0.0.0.0", "::"):
        raise ConfigError(f"--host {host} is no address that others can connect to: give this machine's own.")
    try:
        return socket.create_server(
            (host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET, backlog=512
        )
    except OSError as error:
        where = format_address(host, port)
        reason = os.strerror(error.errno) if error.errno and error.errno > 0 else error.strerror
        raise ConfigError(
            f"rlx cannot listen at {where} ({reason}): give an address of this machine as --host, and a port that is "
            "free as --port (0: any)."
        ) from None


def _own_host(to_head: Any) -> str:
    """Return the address of this machine on its connection to the head."""
    with socket.socket(fileno=os.dup(to_head.fileno())) as sock:
        return sock.getsockname()[0]


def _default_host() -> str:
    """Return the address of the interface that leads outside; 127.0.0.1 if none does."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        try:
            sock.connect(("203.0.113.1", 9))  # nobody's address (RFC 5737): the route is looked up, and nothing is sent
        except OSError:
            return "127.0.0.1"
        return sock.getsockname()[0]


def _describe(options: Options, address: str) -> NodeInfo:
    gpu = options.gpu or len(machine.gpus()[0])
    cpu, memory = options.cpu or machine.cpu_count(), options.memory or machine.memory_bytes()
    identity = "" if options.apart else machine.identity()
    return NodeInfo(options.name, address, cpu, gpu, memory, options.labels, identity)


def main() -> int:
    """Run a daemon until SIGTERM."""
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=logging.INFO)
    options = Options(**json.loads(sys.argv[1]))
    try:
        daemon = NodeDaemon(options)
    except (RlxError, OSError) as error:
        print(json.dumps({"error": str(error), "bad_input": isinstance(error, ConfigError)}), flush=True)
        return 1
    pid, own = os.getpid(), processes.stat(os.getpid())
    started = 0 if own is None else own.start_ticks
    note = Note(options.name, daemon.address, options.head, options.key, options.log, pid, started)
    try:
        note.write()
    except OSError as error:
        logger.warning("this daemon cannot be noted in %s, so `rlx status` does not find it", error)
    # Any thread may be given a signal, after SIGCONT say, and no handler would run while the main one waits for a lock.
    signal.set_wakeup_fd(daemon.bell_fd, warn_on_full_buffer=False)
    for number in (signal.SIGTERM, signal.SIGINT):  # now: a signal that came before the line above would be lost
        signal.signal(number, lambda *_: None)
    print(json.dumps({"address": daemon.address, "pid": pid}), flush=True)
    devnull = os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, 1)  # who has started it does not wait for more
    os.close(devnull)
    daemon.wait()
    daemon.close()
    note.remove()
    if daemon.refused is not None:
        logger.error("%s", daemon.refused)
    return 0 if daemon.refused is None else 1


if __name__ == "__main__":
    sys.exit(main())
