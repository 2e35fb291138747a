"""How two ends of a connection prove that they hold the same key, before either reads anything else.

    the one that connects                       the one that listens
    hello:  role, nonce            ->
                                   <-           challenge: nonce
    proof:  MAC                    ->
                                   <-           welcome: MAC

Each is one frame of 40 bytes. The MACs are HMAC-SHA256 under the token, over the sender, version, role, both nonces
and the channel: with TLS the listening end's certificate, without the addresses of both ends. So a proof is good for
one connection only, and nobody in between can pass it on. The listening end shows its own after it has seen the other.

Each side is a generator, which gives what it waits for: READ or WRITE. Later versions keep the frame's size and its
first six bytes, so that an old and a new one can tell each other which they are.
"""

from __future__ import annotations

import contextlib
import enum
import hashlib
import hmac
import ipaddress
import secrets
import socket
import ssl
import struct
from collections.abc import Generator

from rlx.actors.cluster.credentials import ClusterKey
from rlx.actors.cluster.secure_socket import READ, WRITE, SecureSocket

MAGIC = b"rlxc"
VERSION = 1
FRAME = struct.Struct("<4sBBxx32s")  # magic, version, role or verdict, nonce or MAC
NONCE_BYTES = 32
TLS_RECORD = 0x16  # the first byte of TLS
MAX_LINGER_BYTES = 64 * 1024

Waits = Generator[int, None, None]


class Role(enum.IntEnum):
    """What the one that connects is to the cluster."""

    HEAD, NODE, DRIVER, VIEWER = range(1, 5)


class Verdict(enum.IntEnum):
    """What the listening end says to a frame."""

    GOOD, OTHER_VERSION, TLS_NEEDED, WRONG_TOKEN = range(4)


class Reason(enum.StrEnum):
    """Why a handshake came to nothing."""

    NOBODY_LISTENS = "nobody listens"
    UNREACHABLE = "unreachable"
    NOT_RLX = "not rlx"
    WRONG_TOKEN = "wrong token"
    EXPIRED = "expired"
    OTHER_VERSION = "other version"
    TLS_NEEDED = "TLS needed"
    TIMED_OUT = "timed out"
    CLOSED = "closed"


class Failure(Exception):
    """A handshake came to nothing; `detail` is what was seen."""

    def __init__(self, reason: Reason, detail: str = "") -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


def initiate(sock: SecureSocket, key: ClusterKey, role: Role, channel: bytes | None) -> Waits:
    """Prove the key to the listening end, and have it prove it; `channel`: None with TLS."""
    yield from _negotiate(sock)
    channel = b"tls" + sock.peer_certificate() if channel is None else channel
    nonce = secrets.token_bytes(NONCE_BYTES)
    yield from _send(sock, role, nonce)
    theirs = yield from _verdict(sock)
    yield from _send(sock, role, _mac(key, b"connects", role, nonce, theirs, channel))
    proof = yield from _verdict(sock)
    if not hmac.compare_digest(proof, _mac(key, b"listens.", role, nonce, theirs, channel)):
        raise Failure(Reason.WRONG_TOKEN)


def respond(
    raw: socket.socket, key: ClusterKey, plain_is_allowed: bool
) -> Generator[int, None, tuple[SecureSocket, Role]]:
    """Have the one that connects prove the key, then prove it; return the connection. The caller closes `raw`."""
    while True:
        try:
            first = raw.recv(1, socket.MSG_PEEK)
            break
        except BlockingIOError:
            yield READ
    with_tls = first == bytes([TLS_RECORD])
    sock = SecureSocket(raw, key.server_context() if with_tls else None, server_side=True)
    yield from _negotiate(sock)
    if with_tls:
        channel = b"tls" + ssl.PEM_cert_to_DER_cert(key.certificate)
    else:
        channel = addresses(raw.getpeername(), raw.getsockname())
    role = yield from _examine(sock, key, with_tls or plain_is_allowed, channel)
    return sock, role


def linger(raw: socket.socket) -> Waits:
    """Read on until the other end closes: were this one closed first, the verdict might be lost on its way."""
    with contextlib.suppress(OSError):
        raw.shutdown(socket.SHUT_WR)
        left = MAX_LINGER_BYTES
        while left > 0:
            try:
                dropped = len(raw.recv(4096))
            except BlockingIOError:
                yield READ
                continue
            left = left - dropped if dropped else 0


def addresses(connecting: tuple, listening: tuple) -> bytes:
    """Return the channel of a connection without TLS: whoever passes its bytes on has other addresses."""
    return b"tcp" + "|".join(f"{plain_ip(host)} {port}" for host, port, *_ in (connecting, listening)).encode()


def plain_ip(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    """Return the address; IPv4 also where a socket for both families has it in IPv6's form."""
    ip = ipaddress.ip_address(host.partition("%")[0])
    return getattr(ip, "ipv4_mapped", None) or ip


def is_loopback(sock: socket.socket) -> bool:
    """Return whether both ends are loopback addresses; False where the other one is gone."""
    try:
        return all(plain_ip(name[0]).is_loopback for name in (sock.getsockname(), sock.getpeername()))
    except OSError:
        return False


def _examine(sock: SecureSocket, key: ClusterKey, channel_is_good: bool, channel: bytes) -> Generator[int, None, Role]:
    """Return the role of the one that connects, once both have proven themselves."""
    version, code, nonce = yield from _receive(sock)
    if version != VERSION:
        yield from _send(sock, Verdict.OTHER_VERSION)
        raise Failure(Reason.OTHER_VERSION, str(version))
    if not channel_is_good:
        yield from _send(sock, Verdict.TLS_NEEDED)
        raise Failure(Reason.TLS_NEEDED)
    if code not in list(Role):
        raise Failure(Reason.NOT_RLX, f"role {code}")
    role, ours = Role(code), secrets.token_bytes(NONCE_BYTES)
    yield from _send(sock, Verdict.GOOD, ours)
    *_, proof = yield from _receive(sock)
    if not hmac.compare_digest(proof, _mac(key, b"connects", role, nonce, ours, channel)):
        yield from _send(sock, Verdict.WRONG_TOKEN)
        raise Failure(Reason.WRONG_TOKEN)
    yield from _send(sock, Verdict.GOOD, _mac(key, b"listens.", role, nonce, ours, channel))
    return role


def _mac(key: ClusterKey, sender: bytes, role: Role, nonce: bytes, answer: bytes, channel: bytes) -> bytes:
    """Return the proof; all that it covers has a fixed size, so that no two readings of it exist."""
    parts = [b"rlx cluster", sender, bytes([VERSION, role]), nonce, answer, hashlib.sha256(channel).digest()]
    return hmac.digest(key.token, b"".join(parts), "sha256")


def _verdict(sock: SecureSocket) -> Generator[int, None, bytes]:
    """Return what a favourable frame of the listening end holds."""
    version, code, data = yield from _receive(sock)
    if code == Verdict.OTHER_VERSION or version != VERSION:
        raise Failure(Reason.OTHER_VERSION, str(version))
    if code == Verdict.TLS_NEEDED:
        raise Failure(Reason.TLS_NEEDED)
    if code != Verdict.GOOD:
        raise Failure(Reason.WRONG_TOKEN)
    return data


def _negotiate(sock: SecureSocket) -> Waits:
    """Do TLS's handshake, if there is TLS."""
    try:
        while events := sock.negotiate():
            yield events
    except ConnectionError as error:
        raise _tls_failure(error) from error


def _send(sock: SecureSocket, code: int, data: bytes = b"") -> Waits:
    rest = memoryview(FRAME.pack(MAGIC, VERSION, code, data))
    while rest:
        try:
            rest = rest[sock.send(rest, socket.MSG_NOSIGNAL) :]
        except BlockingIOError:
            yield WRITE
        except ConnectionError as error:
            raise _tls_failure(error) from error


def _receive(sock: SecureSocket) -> Generator[int, None, tuple[int, int, bytes]]:
    """Return version, code and data of a frame, of which nothing is believed yet."""
    data = bytearray(FRAME.size)
    filled, view = 0, memoryview(data)
    while filled < FRAME.size:
        try:
            count = sock.recv_into(view[filled:])
        except BlockingIOError:
            yield READ
            continue
        except ConnectionError as error:
            raise _tls_failure(error) from error
        filled += count
        if not MAGIC.startswith(data[: min(filled, len(MAGIC))]):
            raise Failure(Reason.NOT_RLX, f"it begins with {bytes(data[: min(filled, 12)])!r}")
        if count == 0:
            raise Failure(Reason.CLOSED)
    _, version, code, payload = FRAME.unpack(data)
    return version, code, payload


def _tls_failure(error: ConnectionError) -> Failure:
    """Return what an error of the connection means."""
    cause = error.__cause__
    if not isinstance(cause, ssl.SSLError):
        return Failure(Reason.CLOSED, str(error))
    detail = str(cause.reason or cause)
    if isinstance(cause, ssl.SSLCertVerificationError):
        expired = cause.verify_code == 10  # X509_V_ERR_CERT_HAS_EXPIRED
        return Failure(Reason.EXPIRED if expired else Reason.WRONG_TOKEN, cause.verify_message)
    if "CERTIFICATE_EXPIRED" in detail:
        return Failure(Reason.EXPIRED, detail)
    if "ALERT" in detail and ("CERT" in detail or "UNKNOWN_CA" in detail or "DECRYPT" in detail):
        return Failure(Reason.WRONG_TOKEN, detail)
    return Failure(Reason.NOT_RLX, detail)
