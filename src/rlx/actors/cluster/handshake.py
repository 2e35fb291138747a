"""Connections between machines of a cluster: `connect` makes them, a Doorman lets them in. See protocol.py."""

from __future__ import annotations

import errno
import os
import select
import selectors
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any

from rlx.actors.cluster import protocol
from rlx.actors.cluster.credentials import ClusterKey
from rlx.actors.cluster.protocol import Failure, Reason, Role
from rlx.actors.cluster.secure_socket import READ, SecureSocket
from rlx.actors.monitor import logger
from rlx.errors import HandshakeError

__all__ = ["Doorman", "Reason", "Role", "connect"]

TIMEOUT_S = 5.0
MAX_IN_HANDSHAKE = 256
MAX_FAILURES = 30
FAILURE_WINDOW_S = 60.0
MAX_ADDRESSES = 4096  # whose failures are counted
ACCEPTS_AT_ONCE = 64  # before those that are in the handshake get their turn
PAUSE_S = 0.1  # in accepting, where there are no descriptors left

_NO_DESCRIPTORS = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
_SENTENCES = {
    Reason.NOBODY_LISTENS: "nobody listens at {where}: start rlx there, or correct the address.",
    Reason.UNREACHABLE: "{where} cannot be reached ({detail}): correct the address, or look at the network.",
    Reason.NOT_RLX: "what listens at {where} is no rlx node ({detail}): correct the address or the port.",
    Reason.WRONG_TOKEN: "{where} belongs to another cluster than the key {key}: copy the file of its head "
    "to this machine.",
    Reason.EXPIRED: "a certificate has expired between here and {where}: `rlx certs --renew` on the cluster's head, "
    "and copy the file to every machine.",
    Reason.OTHER_VERSION: "{where} speaks version {detail} of the cluster's protocol and this process version "
    f"{protocol.VERSION}: install the same version of rlx on both.",
    Reason.TLS_NEEDED: "{where} takes connections with TLS only, and this one was without: connect with TLS.",
    Reason.TIMED_OUT: "{where} has not finished the handshake within {timeout_s:g} s: it is stopped, or behind a "
    "firewall, or no rlx node.",
    Reason.CLOSED: "{where} has closed the connection without a verdict: it is no rlx node, or it refuses this machine "
    "for a minute, after too many failures.",
}


def connect(
    address: tuple[str, int], key: ClusterKey, role: Role, timeout_s: float = TIMEOUT_S, *, tls: bool | None = None
) -> SecureSocket:
    """Return a connection to a machine of the cluster, both ends proven; HandshakeError after at most `timeout_s`.

    tls: None leaves it out where both ends are loopback addresses, unless the other end wants it or something stands
    between. The other end may have sent frames with its proof: look at `pending` before the first poll.
    """
    deadline = time.monotonic() + timeout_s
    try:
        sock = _dial(address, deadline)
        if tls is False or (tls is None and protocol.is_loopback(sock)):
            try:
                return _introduce(sock, key, role, deadline, with_tls=False)
            except Failure as failure:
                if tls is False or failure.reason not in (Reason.TLS_NEEDED, Reason.WRONG_TOKEN):
                    raise
            sock = _dial(address, deadline)
        return _introduce(sock, key, role, deadline, with_tls=True)
    except Failure as failure:
        where = "{}:{}".format(*address)
        sentence = _SENTENCES[failure.reason].format(
            where=where, detail=failure.detail, key=key.path, timeout_s=timeout_s
        )
        raise HandshakeError(sentence, failure.reason) from failure


def _dial(address: tuple[str, int], deadline: float) -> socket.socket:
    """Return a TCP connection to the first of the host's addresses that takes one, each with its share of the time."""
    try:
        places = socket.getaddrinfo(*address, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise Failure(Reason.UNREACHABLE, getattr(error, "strerror", None) or str(error)) from error
    failure = Failure(Reason.UNREACHABLE, "it has no address")
    for index, (family, kind, number, _, place) in enumerate(places):
        timeout_s = max((deadline - time.monotonic()) / (len(places) - index), 0.001)
        try:
            return _connected(socket.socket(family, kind, number), place, timeout_s)
        except TimeoutError:
            failure = Failure(Reason.TIMED_OUT)
        except ConnectionRefusedError:
            failure = Failure(Reason.NOBODY_LISTENS)
        except OSError as error:
            failure = Failure(Reason.UNREACHABLE, error.strerror or str(error))
    raise failure


def _connected(sock: socket.socket, place: Any, timeout_s: float) -> socket.socket:
    try:
        sock.settimeout(timeout_s)
        sock.connect(place)
        return sock
    except BaseException:
        sock.close()
        raise


def _introduce(sock: socket.socket, key: ClusterKey, role: Role, deadline: float, with_tls: bool) -> SecureSocket:
    """Return the connection once the handshake is done, else close it."""
    try:
        channel = None if with_tls else protocol.addresses(sock.getsockname(), sock.getpeername())
        secure = SecureSocket(sock, key.client_context() if with_tls else None)
        steps = protocol.initiate(secure, key, role, channel)
        poll = select.poll()
        for events in steps:
            poll.register(sock, events)
            if not poll.poll(max(deadline - time.monotonic(), 0.0) * 1e3):
                raise Failure(Reason.TIMED_OUT)
        return secure
    except OSError as error:  # the other end is gone already
        sock.close()
        raise Failure(Reason.CLOSED, str(error)) from error
    except BaseException:
        sock.close()
        raise


@dataclass(eq=False)
class _Visitor:
    """A connection in the handshake."""

    sock: socket.socket
    address: tuple[str, int]
    group: str
    """Who shares its failures: an IPv4 address, or a network of IPv6."""
    deadline: float
    steps: Generator[int, None, Any]
    failed: bool = False


class Doorman:
    """Lets into the cluster who proves to have its key, in a thread of its own; nobody waits for anybody else.

    `admit(socket, role, address)` is called in that thread for each and owns the socket; it should be quick. Where
    `max_in_handshake` connections have not proven themselves yet, a new one takes the place of the oldest from the
    address that has the most. An address that fails `max_failures` times within a minute is not listened to for the
    rest of it. Connections without TLS are taken between loopback addresses, unless `tls_only`.
    """

    def __init__(
        self,
        key: ClusterKey,
        listener: socket.socket,
        admit: Callable[[SecureSocket, Role, tuple[str, int]], object],
        *,
        timeout_s: float = TIMEOUT_S,
        max_in_handshake: int = MAX_IN_HANDSHAKE,
        max_failures: int = MAX_FAILURES,
        tls_only: bool = False,
    ) -> None:
        self._key, self._listener, self._admit = key, listener, admit
        self._timeout_s, self._max_in_handshake, self._tls_only = timeout_s, max_in_handshake, tls_only
        self._failures = _Failures(max_failures)
        self._visitors: dict[_Visitor, None] = {}  # oldest first, so by deadline, too
        self._paused_until: float | None = None
        self._is_starved = False  # of descriptors, which has been logged
        self._closing = False
        listener.setblocking(False)
        key.server_context()  # made now and not while somebody waits
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._wake, READ)
        self._selector.register(listener, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._run, name="rlx-doorman", daemon=True)
        self._thread.start()

    @property
    def in_handshake(self) -> int:
        """How many connections have not proven themselves yet."""
        return len(self._visitors)

    def close(self, timeout_s: float = TIMEOUT_S) -> None:
        """Let nobody in any more: close the listener and what is in the handshake; closing twice is fine."""
        self._closing = True
        if self._wake < 0:
            return
        os.eventfd_write(self._wake, 1)
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout_s)
        if not self._thread.is_alive():
            wake, self._wake = self._wake, -1  # closed here, where nobody can be about to write to its number
            os.close(wake)

    def _run(self) -> None:
        try:
            while not self._closing:
                for chosen, _ in self._selector.select(self._patience_s()):
                    if chosen.fileobj is self._listener:
                        self._accept()
                    elif isinstance(chosen.data, _Visitor):
                        self._advance(chosen.data)
                self._expire(time.monotonic())
        except Exception:
            logger.exception("the cluster's port is closed, as its thread failed")
        finally:
            for visitor in list(self._visitors):
                self._dismiss(visitor)
            self._listener.close()
            self._selector.close()

    def _patience_s(self) -> float | None:
        times = [visitor.deadline for visitor in self._visitors][:1]
        times += [] if self._paused_until is None else [self._paused_until]
        return max(0.0, min(times) - time.monotonic()) if times else None

    def _accept(self) -> None:
        for _ in range(ACCEPTS_AT_ONCE):
            try:
                sock, address = self._listener.accept()
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno in _NO_DESCRIPTORS:
                    self._pause(error)
                    return
                continue  # that one is gone before it was let in
            self._is_starved = False
            group = _group(address[0])
            if self._failures.are_too_many(group):
                sock.close()
                continue
            if len(self._visitors) >= self._max_in_handshake:
                self._dismiss(self._most_dispensable())
            sock.setblocking(False)
            plain_is_allowed = not self._tls_only and protocol.is_loopback(sock)
            steps = protocol.respond(sock, self._key, plain_is_allowed)
            visitor = _Visitor(sock, address[:2], group, time.monotonic() + self._timeout_s, steps)
            self._visitors[visitor] = None
            self._selector.register(sock, selectors.EVENT_READ, visitor)
            self._advance(visitor)

    def _pause(self, error: OSError) -> None:
        """Accept nobody for a moment; without it the thread would spin."""
        if not self._is_starved:
            logger.warning("the cluster's port takes no connections for now: %s", error.strerror)
        self._is_starved = True
        if self._visitors:
            self._dismiss(self._most_dispensable())
        self._selector.unregister(self._listener)
        self._paused_until = time.monotonic() + PAUSE_S

    def _most_dispensable(self) -> _Visitor:
        """Return the oldest of the address that has the most: who is honest is done in milliseconds."""
        group = Counter(visitor.group for visitor in self._visitors).most_common(1)[0][0]
        return next(visitor for visitor in self._visitors if visitor.group == group)

    def _advance(self, visitor: _Visitor) -> None:
        """Have one connection go on as far as it can."""
        if visitor not in self._visitors:  # dismissed in this round
            return
        try:
            events = next(visitor.steps)
            self._selector.modify(
                visitor.sock, selectors.EVENT_READ if events == READ else selectors.EVENT_WRITE, visitor
            )
        except StopIteration as done:
            self._dismiss(visitor, close=visitor.failed)
            if not visitor.failed:
                self._failures.forgive(visitor.group)
                self._hand_over(visitor, *done.value)
        except Failure as failure:
            self._failures.add(visitor.group, failure.reason + (f" ({failure.detail})" if failure.detail else ""))
            visitor.failed, visitor.steps = True, protocol.linger(visitor.sock)
            self._advance(visitor)
        except Exception as error:
            if not isinstance(error, OSError):  # else it is gone; and nobody may close the door for all by a bug
                logger.exception("a connection of %s has failed in an unknown way", visitor.address[0])
            self._failures.add(visitor.group, str(error))
            self._dismiss(visitor)

    def _hand_over(self, visitor: _Visitor, sock: SecureSocket, role: Role) -> None:
        try:
            self._admit(sock, role, visitor.address)
        except Exception:
            logger.exception("a connection of %s is closed, as nobody took it", visitor.address[0])
            sock.close()

    def _expire(self, now: float) -> None:
        while self._visitors and (oldest := next(iter(self._visitors))).deadline <= now:
            if not oldest.failed:
                self._failures.add(oldest.group, f"no handshake within {self._timeout_s:g} s")
            self._dismiss(oldest)
        if self._paused_until is not None and self._paused_until <= now:
            self._paused_until = None
            self._selector.register(self._listener, selectors.EVENT_READ)

    def _dismiss(self, visitor: _Visitor, close: bool = True) -> None:
        del self._visitors[visitor]
        self._selector.unregister(visitor.sock)
        if close:
            visitor.steps.close()
            visitor.sock.close()


class _Failures:
    """How often each address has failed within its minute; of each the first is logged, and the last that is taken."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._counts: dict[str, tuple[float, int]] = {}  # when the minute ends, and how many

    def are_too_many(self, group: str) -> bool:
        return self._count(group)[1] >= self._limit

    def forgive(self, group: str) -> None:
        self._counts.pop(group, None)

    def add(self, group: str, why: str) -> None:
        end, count = self._count(group)
        if count == 0:
            logger.warning("a connection from %s is refused: %s", group, why)
        if count + 1 == self._limit:
            logger.warning("connections from %s are refused for a minute, after %d failures", group, self._limit)
        if count == 0 and len(self._counts) >= MAX_ADDRESSES:
            del self._counts[next(iter(self._counts))]
        self._counts[group] = (end, count + 1)

    def _count(self, group: str) -> tuple[float, int]:
        now = time.monotonic()
        end, count = self._counts.get(group, (0.0, 0))
        return (end, count) if now < end else (now + FAILURE_WINDOW_S, 0)


def _group(host: str) -> str:
    """Return who shares failures with this address: of IPv6, whose hosts choose theirs, the first half."""
    ip = protocol.plain_ip(host)
    return str(ip) if ip.version == 4 else f"{ip.exploded[:19]}::/64"
