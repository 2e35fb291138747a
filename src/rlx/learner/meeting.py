"""How learners find each other: by a store on the machine of learner 0, over the network of their machines' addresses.

Nothing here encrypts or authenticates (docs/cluster_security.md), so nothing listens at any other address.
"""

from __future__ import annotations

import fcntl
import os
import socket
import struct
from array import array
from collections.abc import Sequence
from datetime import timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import NamedTuple

import torch.distributed as dist
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

from rlx.actors.machine import LOOPBACK, Node
from rlx.errors import RlxError

INTERFACES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
SIOCGIFCONF = 0x8912
IFREQ, MAX_INTERFACES = 40, 256
"""Bytes of what the kernel says of one IPv4 address of this machine, and how many it is asked for."""


class Meeting(NamedTuple):
    """Where learners meet, and who they are."""

    hosts: tuple[str, ...]
    """By rank: the address at which it listens."""
    names: tuple[str, ...]
    """By rank, in words, for errors."""
    port: int = 0
    """Of the store, at the host of learner 0."""

    @classmethod
    def of(cls, names: Sequence[str], nodes: Sequence[Node]) -> Meeting:
        """Return that of learners on these nodes: over loopback where they share one."""
        if len({node.host for node in nodes}) == 1:
            return cls((LOOPBACK,) * len(nodes), tuple(names))
        named = [f"{name} on node {node}" for name, node in zip(names, nodes, strict=True)]
        return cls(tuple(node.host for node in nodes), tuple(named))

    @property
    def is_exposed(self) -> bool:
        """Whether something of it can be seen on a network."""
        return not all(_is_loopback(host) for host in self.hosts)


def open_store(host: str) -> TCPStore:
    """Return a new store that listens at this address of this machine and no other, at a port that was free."""
    listener = socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET, backlog=128)
    port = listener.getsockname()[1]
    return TCPStore(host, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach())


def meet(store: TCPStore | None, rank: int, meeting: Meeting, timeout_s: float, backend: str) -> None:
    """Make torch's process group of all learners; RlxError, naming who is missing, where that takes longer.

    store: of learner 0, its own.
    """
    host, names, timeout = meeting.hosts[0], meeting.names, timedelta(seconds=timeout_s)
    _use_interface(meeting.hosts[rank])
    if store is None:
        try:
            store = TCPStore(host, meeting.port, is_master=False, wait_for_workers=False, timeout=timeout)
        except RuntimeError as error:
            raise RlxError(
                f"{names[rank]} does not reach {names[0]} at {host} port {meeting.port}, where the learners meet, "
                f"within {timeout_s:g} s: let these machines reach each other on all TCP ports."
            ) from error
    keys = [f"here/{other}" for other in range(len(names))]
    store.set(keys[rank], "")
    try:
        store.wait(keys, timeout)
    except RuntimeError as error:
        late = [name for name, key in zip(names, keys, strict=True) if not store.check([key])]
        raise RlxError(
            f"{', '.join(late)} has not come to {host} port {meeting.port}, where the learners "
            f"meet, within {timeout_s:g} s: see whether it is stopped, and let these machines reach each other on all "
            "TCP ports, or raise fault_tolerance.start_timeout_s."
        ) from error
    try:
        dist.init_process_group(backend, store=store, rank=rank, world_size=len(names), timeout=timeout)
    except RuntimeError as error:
        raise RlxError(
            f"{names[rank]} has met the other learners ({', '.join(names)}) and cannot be connected with them by "
            f"{backend}: let these machines reach each other on all TCP ports ({str(error).splitlines()[0]})."
        ) from error


def interface_of(host: str) -> str | None:
    """Return the network interface of this machine that has the address; None where none has."""
    if _is_loopback(host):
        return "lo"
    if ":" in host:
        wanted = socket.inet_pton(socket.AF_INET6, host).hex()
        lines = [line.split() for line in Path("/proc/net/if_inet6").read_text().splitlines()]
        return next((fields[-1] for fields in lines if fields[0] == wanted), None)
    found = array("B", bytes(IFREQ * MAX_INTERFACES))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        place, _ = found.buffer_info()
        size = struct.unpack("iL", fcntl.ioctl(sock, SIOCGIFCONF, struct.pack("iL", len(found), place)))[0]
    entries = [found[at : at + IFREQ].tobytes() for at in range(0, size, IFREQ)]
    names = {entry[20:24]: entry[:16].rstrip(b"\0").decode() for entry in entries}
    return names.get(socket.inet_aton(host))


def _use_interface(host: str) -> None:
    """Have gloo and nccl listen where this address is, but where the user wants another interface."""
    interface = interface_of(host)
    if interface == "lo":
        os.environ[INTERFACES[0]] = interface  # what one machine keeps to itself needs no other
    for name in INTERFACES:
        if interface is not None:
            os.environ.setdefault(name, interface)


def _is_loopback(host: str) -> bool:
    return ip_address(host).is_loopback
