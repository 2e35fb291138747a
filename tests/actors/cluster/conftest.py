"""Keys, doors and connections for the tests of clusters."""

import contextlib
import dataclasses
import json
import os
import queue
import signal
import socket
import subprocess
import sys
from dataclasses import dataclass, field

import pytest

from rlx import actors
from rlx.actors.cluster.credentials import ClusterKey
from rlx.actors.cluster.handshake import Doorman
from rlx.actors.cluster.heartbeat import Patience
from rlx.actors.cluster.secure_socket import SecureSocket
from tests.actors.cluster.namespaces import Network

PATIENCE_S = 20.0
CALM = Patience(every_s=0.1, suspect_s=0.3, dead_s=30.0)


@dataclass
class Door:
    """A doorman, and who it let in: (SecureSocket, role, address)."""

    doorman: Doorman
    address: tuple[str, int]
    admitted: queue.Queue = field(default_factory=queue.Queue)

    def next(self):
        return self.admitted.get(timeout=PATIENCE_S)


@pytest.fixture(scope="session")
def key(tmp_path_factory):
    return ClusterKey.create(tmp_path_factory.mktemp("key") / "cluster.key")


@pytest.fixture(scope="session")
def other_key(tmp_path_factory):
    return ClusterKey.create(tmp_path_factory.mktemp("other") / "cluster.key")


@pytest.fixture
def closing():
    with contextlib.ExitStack() as stack:
        yield lambda thing: stack.enter_context(contextlib.closing(thing))


@pytest.fixture
def open_door(key, closing):
    """Return a function that opens a door on loopback; doors, and who came in, are closed in the end."""

    def open_(key=key, **options):
        listener = socket.create_server(("127.0.0.1", 0), backlog=2048)
        admitted = queue.Queue()

        def admit(sock, role, address):
            admitted.put((closing(sock), role, address))

        door = Door(Doorman(key, listener, admit, **options), listener.getsockname(), admitted)
        closing(door.doorman)
        return door

    return open_


@pytest.fixture
def tcp_pair(closing):
    """Return a function that makes two ends of a TCP connection."""

    def pair():
        with socket.create_server(("127.0.0.1", 0)) as listener:
            ours = closing(socket.create_connection(listener.getsockname()))
            return ours, closing(listener.accept()[0])

    return pair


@pytest.fixture
def tls_pair(tcp_pair, key):
    """Return a function that makes two ends of a connection with TLS."""

    def pair():
        ours, theirs = tcp_pair()
        ends = (SecureSocket(ours, key.client_context()), SecureSocket(theirs, key.server_context(), True))
        waits = [1, 1]
        while any(waits):
            waits = [end.negotiate() for end in ends]
        return ends

    return pair


class Daemon:
    """A real daemon, as `rlx start` runs it."""

    def __init__(self, key, name, head=None, home=None, before=(), **options):
        """before: what to put before the command."""
        settings = {"name": name, "key": str(key.path), "host": "127.0.0.1", "head": head, "apart": True, **options}
        command = [*before, sys.executable, "-m", "rlx.actors.cluster.daemon", json.dumps(settings)]
        env = os.environ | {"RLX_HOME": str(home or key.path.parent)}  # where it notes itself and keeps projects
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env)
        self.news = json.loads(self.process.stdout.readline())

    @property
    def address(self):
        return self.news["address"]

    def end(self, number=signal.SIGTERM):
        self.process.send_signal(signal.SIGCONT)
        self.process.send_signal(number)
        return self.process.wait(PATIENCE_S)

    def close(self):
        """End it, whatever it does."""
        try:
            if self.process.poll() is None:
                self.end()
        finally:
            self.process.kill()
            self.process.wait()
            self.process.stdout.close()


@pytest.fixture(scope="module")
def start(key):
    """Starts daemons, which end with the module's tests."""
    with contextlib.ExitStack() as stack:
        yield lambda name, head=None, **options: stack.enter_context(
            contextlib.closing(Daemon(key, name, head, **options))
        )


@pytest.fixture(scope="module")
def network(request):
    """Machines called a, b and driver."""
    with contextlib.closing(Network("a", "b", "driver", **getattr(request, "param", {}))) as network:
        yield network


@pytest.fixture
def open_apart(key, network):
    """Return a function that opens a runtime on the machine called driver."""
    with contextlib.ExitStack() as stack:

        def open_(head, preload=("numpy",), **options):
            with network.on("driver"):
                rt = actors.runtime("cluster", address=head.address, token_file=key.path, preload=preload, **options)
            return stack.enter_context(rt)

        yield open_


@pytest.fixture
def start_apart(key, network):
    """Return a function that starts the daemon of a machine; they end with the test."""
    with contextlib.ExitStack() as stack:

        def start_one(name, head=None, patience=CALM, **has):
            options = {"host": network.address(name), "patience": dataclasses.asdict(patience), **has}
            daemon = Daemon(key, name, head, before=network.command(name), **options)
            return stack.enter_context(contextlib.closing(daemon))

        yield start_one


@pytest.fixture
def cluster(start_apart, open_apart):
    """Return a function that makes a cluster of a, the head, and b; it returns their daemons and a driver's runtime."""

    def make(patience=CALM, of_daemons=CALM, **options):
        head = start_apart("a", patience=of_daemons)
        other = start_apart("b", head.address, patience=of_daemons)
        return head, other, open_apart(head, patience=patience, **options)

    return make
