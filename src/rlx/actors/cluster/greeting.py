"""The first frame each way on a connection between driver and node, before a reactor serves it."""

from __future__ import annotations

import json
import select
import time
from typing import Any

from rlx.actors.engines import wire
from rlx.actors.engines.wire import Frame, FrameReader, Outbox
from rlx.errors import ActorError

READ, WRITE = 1, 4


def send(sock: Any, kind: int, what: Any, timeout_s: float) -> None:
    """Write one frame with `what` as JSON; ActorError when the other end takes it not in time."""
    outbox, deadline = Outbox(sock), time.monotonic() + timeout_s
    outbox.add(wire.encode(kind, 0, json.dumps(what)))
    while not outbox.flush():
        _wait(sock, WRITE, deadline)


def receive(sock: Any, timeout_s: float) -> Frame:
    """Return the first frame; ActorError if there is none in time. Whoever sends it waits for an answer."""
    reader, deadline = FrameReader(sock), time.monotonic() + timeout_s
    while not reader.frames:
        try:
            if not reader.read():
                raise ActorError("it closed the connection")
        except BlockingIOError:
            _wait(sock, READ, deadline)
    return reader.frames[0]


def _wait(sock: Any, events: int, deadline: float) -> None:
    poll = select.poll()
    poll.register(sock.fileno(), events)
    if not poll.poll(max(0.0, deadline - time.monotonic()) * 1e3):
        raise ActorError("it has not answered in time")
