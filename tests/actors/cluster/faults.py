"""A middle between a driver and the daemons of a cluster that knows their frames by name: it loses, doubles, delays and
garbles them, and cuts the connection before, inside or behind one.

It stands at the driver's ends, where frames are plain. Whether a frame is struck depends on the seed, its name and the
how manieth of its name it is, and on nothing else, so what has happened happens again with the same seed.
"""

import collections
import contextlib
import random
import select
import socket
import threading
import time
from dataclasses import dataclass
from functools import partial

from rlx.actors.cluster import daemon, engine, handshake
from rlx.actors.cluster.handshake import Role
from rlx.actors.engines import wire

NAMES = {
    getattr(wire, name): name
    for name in (
        *("SPAWN", "CALL", "SEND", "STREAM", "CANCEL", "CREDIT", "STOP"),
        *("READY", "INIT_FAILED", "REPLY", "ERROR", "SEND_FAILED", "CANCELLED", "ITEM"),
        *("OPEN", "KILL", "CHANNEL", "STARTED", "EXITED", "STALLED", "PRINTED", "PUBLISH", "PING"),
        *("JOIN", "NODES", "READERS", "PROJECT", "ASK", "FULL", "ROOM", "KEEP", "DROP"),
    )
}
LOSE, DOUBLE, DELAY, GARBLE = "lose", "double", "delay", "garble"
CUTS = BEFORE, INSIDE, BEHIND = "cut before", "cut inside", "cut behind"
DELAY_S = 0.2
READ, WRITE = select.POLLIN, select.POLLOUT


@dataclass(frozen=True)
class Fault:
    """What is done to which frames."""

    do: str
    kind: str
    """The name of the frame."""
    to_node: bool
    """The way it goes; else it comes from there."""
    method: str | None = None
    """Only calls of this method, and what answers them."""
    nth: int = 1
    """Only the how manieth of these, from 1 on; 0: any."""
    chance: float = 1.0
    role: Role = Role.DRIVER
    """On whose connections."""


class Faults:
    """All connections that were made while it was installed."""

    def __init__(self, seed=0):
        self.seed, self.done = seed, []
        self.seen = set()
        """Names of frames, and the way they went."""
        self._lock = threading.Lock()
        self._faults: list[Fault] = []
        self._counts = collections.Counter()
        self._methods: dict[int, str] = {}  # by call id

    def install(self, monkeypatch):
        """Stand at the driver's ends of all connections that are made from now on, and at a node's to its head."""
        for module in (engine, daemon, handshake):
            monkeypatch.setattr(module, "connect", partial(self._connect, module.connect))

    @contextlib.contextmanager
    def __call__(self, *faults):
        """Do this to the frames that pass within."""
        with self._lock:
            self._faults, self.done, self._counts = list(faults), [], collections.Counter()
        try:
            yield self
        finally:
            with self._lock:
                self._faults = []

    def __repr__(self):
        return f"seed {self.seed}: {', '.join(self.done) or 'nothing was done'}"

    def _connect(self, connect, address, key, role, **options):
        """Return the socket to be used in the place of that to a daemon."""
        far = connect(address, key, role, **options)
        near, ours = socket.socketpair()
        near.setblocking(False)
        ours.setblocking(False)
        line = _Line(self, ours, far, role)
        for to_node in (True, False):
            threading.Thread(target=line.pump, args=(to_node,), name="rlx-faults", daemon=True).start()
        return near

    def strike(self, kind, call_id, text, to_node, role):
        """Return what is to be done to a frame, None for nothing."""
        name = NAMES[kind]
        with self._lock:
            if to_node and name in ("CALL", "STREAM", "SEND"):
                self._methods[call_id] = text.rpartition(" ")[2]
            method = self._methods.get(call_id) if call_id else None
            self.seen.add((name, to_node))
            for fault in self._faults:
                if (fault.kind, fault.to_node, fault.role) != (name, to_node, role):
                    continue
                if fault.method not in (None, method):
                    continue
                self._counts[fault] += 1
                number = self._counts[fault]
                luck = random.Random(f"{self.seed} {fault} {number}").random()
                if fault.nth in (0, number) and luck < fault.chance:
                    self.done.append(f"{fault.do} {name} {number} {'to' if to_node else 'from'} node ({method})")
                    return fault.do
        return None


class _Line:
    """One connection: near is the driver's, far the node's."""

    def __init__(self, faults, near, far, role):
        self._faults, self._near, self._far, self._role = faults, near, far, role
        self._open, self._lock = 2, threading.Lock()

    def pump(self, to_node):
        """Carry what goes one way, until its end."""
        source, target = (self._near, self._far) if to_node else (self._far, self._near)
        try:
            with contextlib.suppress(ConnectionError):
                self._carry(source, target, to_node)
        finally:
            with contextlib.suppress(OSError):
                target.shutdown(socket.SHUT_WR)
            with self._lock:
                self._open -= 1
                if self._open == 0:
                    self._near.close()
                    self._far.close()

    def _carry(self, source, target, to_node):
        window, waiting = memoryview(bytearray(2**18)), bytearray()
        while count := _receive(source, window):
            waiting += window[:count]
            while (frame := _cut_off(waiting)) is not None:
                _, kind, text_size, buffers, call_id, _ = wire.HEADER.unpack_from(frame)
                text_at = wire.HEADER.size + buffers * wire.PLACE.size
                text = frame[text_at : text_at + text_size].decode()
                do = self._faults.strike(kind & ~wire.SHARED_BODY, call_id, text, to_node, self._role)
                if do in CUTS:
                    part = {BEFORE: 0, INSIDE: len(frame) // 2, BEHIND: len(frame)}[do]
                    with contextlib.suppress(ConnectionError):
                        _send(target, frame[:part])
                    for end in (self._near, self._far):
                        with contextlib.suppress(OSError):
                            end.shutdown(socket.SHUT_RDWR)
                    return
                if do == GARBLE:
                    frame = b"".join(wire.encode(kind & ~wire.SHARED_BODY, call_id, "?", (b"?", ())))
                if do == DELAY:
                    time.sleep(DELAY_S)  # and what is behind it: a stream has an order
                for _ in range({LOSE: 0, DOUBLE: 2}.get(do, 1)):
                    _send(target, frame)


def _cut_off(waiting):
    """Take the first frame out of what has come; None if it is not whole."""
    if len(waiting) < wire.HEADER.size:
        return None
    _, _, text_size, buffers, _, body_size = wire.HEADER.unpack_from(waiting)
    places_end = wire.HEADER.size + buffers * wire.PLACE.size
    if len(waiting) < places_end:
        return None
    places = wire.PLACE.iter_unpack(waiting[wire.HEADER.size : places_end])
    size = places_end + text_size + body_size + sum(size for size, _, lease in places if not lease)
    if len(waiting) < size:
        return None
    frame = bytes(waiting[:size])
    del waiting[:size]
    return frame


def _receive(source, window):
    while True:
        try:
            return source.recv_into(window)
        except BlockingIOError:
            if not getattr(source, "pending", int)():
                _wait(source, READ)


def _send(target, data):
    rest = memoryview(data)
    while rest:
        try:
            rest = rest[target.send(rest, socket.MSG_NOSIGNAL) :]
        except BlockingIOError:
            _wait(target, WRITE)


def _wait(sock, events):
    poll = select.poll()
    poll.register(sock.fileno(), events)
    poll.poll(1000)
