"""File descriptors for a running actor: packets on a socket of their own, read when an actor needs one."""

from __future__ import annotations

import array
import json
import select
import socket
import time
from typing import Any

from rlx.errors import ActorError

MAX_BYTES = 4096


def send(sock: socket.socket, label: dict[str, Any], fd: int) -> None:
    """Send `fd` with its label; a peer that has gone is not told."""
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))]
    try:
        sock.sendmsg([json.dumps(label).encode()], rights, socket.MSG_NOSIGNAL | socket.MSG_DONTWAIT)
    except ConnectionError:
        pass  # the end of its link says so
    except BlockingIOError:
        raise ActorError(
            "an actor has left hundreds of channels unread; give it fewer, or wait until it has taken them."
        ) from None


def receive(sock: socket.socket, timeout_s: float) -> tuple[dict[str, Any], int]:
    """Return the next label and descriptor; ActorError after timeout_s."""
    deadline = time.monotonic() + timeout_s
    while select.select([sock], [], [], max(0.0, deadline - time.monotonic()))[0]:
        data, ancillary, _, _ = sock.recvmsg(MAX_BYTES, socket.CMSG_SPACE(4), socket.MSG_DONTWAIT)
        if not data:
            break
        rights = array.array("i", ancillary[0][2][:4])
        return json.loads(data), rights[0]
    raise ActorError(f"the descriptor of a channel has not arrived within {timeout_s:g} s; the driver may be stopped.")
