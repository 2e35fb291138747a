"""A TCP connection that the wire's classes use like a socket, with TLS or, on loopback, without.

TLS runs over memory: OpenSSL never sees the socket. So no write is ever half done inside it, records travel many to a
system call, and what poll() cannot see is known to the byte.

As in the wire, an interrupt (a signal handler that raises) at any instruction leaves the stream in step. Python's ssl
runs signal handlers after OpenSSL has done its work and before it says how much, so nothing here depends on what it
returns: whether a chunk has been encrypted, and how many records have been decrypted, is seen by the memory that
OpenSSL writes to and reads from. It gets whole records only, whose sizes tell those of their texts. What is committed
at the end of a step is stored without a call in between, as Python runs handlers at calls.
"""

from __future__ import annotations

import contextlib
import errno
import socket
import ssl
import struct
import threading
from collections.abc import Sequence

from rlx.actors.engines.pickling import Buffer
from rlx.actors.engines.wire import Outbox

READ, WRITE = 1, 4  # as poll and epoll have them
CHUNK_BYTES = 256 * 1024  # encrypted, and received, at a time; twice that leaves a core's cache
RECORD_HEADER = struct.Struct(">xxxH")  # type, version, and how many bytes follow
RECORD_BYTES = 16 * 1024  # of text, at most
OVERHEAD_BYTES = 17  # of the bytes that follow a record's header: its true type, and the tag
MAX_RECORD_BYTES = RECORD_HEADER.size + RECORD_BYTES + 256
KEEPALIVE_S, KEEPALIVE_INTERVAL_S, KEEPALIVE_PROBES = 10, 5, 4


class SecureSocket:
    """`sock` without blocking, and TLS on top unless `tls` is None; call `negotiate` first where there is TLS.

    One thread may read while another writes. What cannot be done now raises BlockingIOError; every other failure is a
    ConnectionError. A write that raised must be repeated with the same bytes, more may follow them: it has been
    encrypted already; a read that an interrupt has cut short, with the same view. A read may leave text behind that
    poll() does not see: look at `pending`, also right after the connection has been handed over.
    """

    def __init__(self, sock: socket.socket, tls: ssl.SSLContext | None = None, server_side: bool = False) -> None:
        self._sock = sock
        sock.setblocking(False)
        _keep_alive(sock)
        if tls is None:
            self._tls = None
            # In place of the methods below: the kernel's own, whose counts no interrupt can lose.
            self.__dict__.update(send=sock.send, sendmsg=sock.sendmsg, recv_into=sock.recv_into)
            return
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = tls.wrap_bio(self._incoming, self._outgoing, server_side)
        self._lock = threading.Lock()  # OpenSSL's object is for one thread at a time, and its calls let others run
        self._taken, self._is_encrypted = 0, False  # bytes of the chunk on its way, of which its writer has not heard
        self._ciphertext = Outbox(sock)
        # Both take their pages when they are written. The first ends with what has come of an unfinished record.
        self._records = memoryview(bytearray(CHUNK_BYTES + MAX_RECORD_BYTES))
        self._text = memoryview(bytearray(CHUNK_BYTES + MAX_RECORD_BYTES))
        self._received: list[int] = []
        """How many bytes of records there are, as recv_into returned them."""
        self._index, self._is_fed = 0, False  # of the records the one in work, and whether OpenSSL has got it
        self._start = self._end = 0  # of the text that has not been read

    @property
    def cipher(self) -> str:
        """The name of the cipher, or "none"."""
        used = self._tls and self._tls.cipher()
        return used[0] if used else "none"

    def peer_certificate(self) -> bytes:
        """Return the other end's certificate in DER; it has been verified."""
        certificate = self._tls and self._tls.getpeercert(True)
        assert certificate, "peer_certificate() needs TLS, and negotiate() before"
        return certificate

    def fileno(self) -> int:
        """Return the descriptor, to wait for."""
        return self._sock.fileno()

    def negotiate(self) -> int:
        """Go on with TLS's handshake; return 0 when it is done, else what to wait for: READ or WRITE."""
        while self._tls is not None:
            done = False
            try:
                self._tls.do_handshake()
                done = True
            except ssl.SSLWantReadError:
                pass
            except ssl.SSLError as error:
                raise self._broken(error) from error
            if not self._flush():
                return WRITE
            if done:
                rest = self._incoming.read()  # what the other end has sent behind its part of the handshake
                self._records[: len(rest)] = rest
                self._received = [len(rest)]
                return 0
            try:
                if self._incoming.write(self._sock.recv(RECORD_BYTES)) == 0:
                    raise ConnectionAbortedError("the connection was closed during TLS's handshake")
            except BlockingIOError:
                return READ
        return 0

    def send(self, data: Buffer, flags: int = 0) -> int:
        """Write the beginning of `data`; return how many bytes of it. TLS has no flags."""
        count = self._write((data,))
        self._taken, self._is_encrypted = 0, False  # no call from here to the return
        return count

    def sendmsg(self, buffers: Sequence[Buffer], ancdata: Sequence[object] = (), flags: int = 0) -> int:
        """Write the beginning of the buffers, one after another; return how many bytes in all."""
        count = self._write(buffers)
        self._taken, self._is_encrypted = 0, False
        return count

    def recv_into(self, view: memoryview, nbytes: int = 0, flags: int = 0) -> int:
        """Read what there is, at most about a chunk; return how many bytes, 0 at the end of the stream."""
        view = view[:nbytes] if nbytes else view
        if self._start == self._end:
            place, count, whole, received = self._decrypt(view)
            rest = received - whole  # no call from here to the return, or to where the text is kept
            self._records[:rest] = self._records[whole:received]
            self._received, self._index, self._is_fed = [rest], 0, False
            if place is view:
                return count
            self._start, self._end = 0, count
        count = min(len(view), self._end - self._start)
        end = self._start + count
        view[:count] = self._text[self._start : end]
        self._start = end  # no call from here to the return
        return count

    def pending(self) -> int:
        """Return about how many bytes can be read although poll() may not say so; 0 only where there are none."""
        if self._tls is None:
            return 0
        try:
            return self._end - self._start or sum(_text_sizes(self._records, sum(self._received)))
        except ConnectionError:  # which the next read will raise
            return 1

    def shutdown(self, how: int) -> None:
        """Shut the connection down, as sockets do. Without TLS's farewell: frames say themselves when they are torn."""
        self._sock.shutdown(how)

    def close(self) -> None:
        """Close the connection."""
        self._sock.close()

    def _write(self, buffers: Sequence[Buffer]) -> int:
        """Return how many bytes the kernel has, encrypted; they are `_taken` until the caller clears that."""
        assert self._tls is not None
        with self._lock:
            try:
                if not self._is_encrypted:
                    if not self._outgoing.pending:  # else an interrupt came behind the write below
                        chunk = _beginning(buffers)
                        if not len(chunk):
                            return 0
                        self._taken = len(chunk)
                        self._tls.write(chunk)
                    self._is_encrypted = True
                if not self._flush():
                    raise BlockingIOError(errno.EAGAIN, "the connection takes no more for now")
                return self._taken
            except (BlockingIOError, ConnectionError):
                raise
            except OSError as error:
                raise self._broken(error) from error

    def _flush(self) -> bool:
        """Hand OpenSSL's output to the kernel; False if it does not take all of it."""
        if self._outgoing.pending:
            self._ciphertext.add(map(self._outgoing.read, (-1,)))  # type: ignore[arg-type]
        return self._ciphertext.flush()

    def _decrypt(self, view: memoryview) -> tuple[memoryview, int, int, int]:
        """Decrypt all whole records into the view, or into `_text` where it is too small; wait for none.

        Returns which of them, its bytes, and the bytes of whole and of all records. At the end of the stream no text.
        """
        with self._lock:
            try:
                received = sum(self._received)
                while not (sizes := _text_sizes(self._records, received)):
                    self._received.extend(map(self._sock.recv_into, (self._records[received:],)))
                    if self._received[-1] == 0:
                        return view, 0, 0, received
                    received = sum(self._received)
                count = sum(sizes)
                place = view if count <= len(view) else self._text
                return place, count, self._decrypt_records(sizes, place), received
            except (BlockingIOError, ConnectionError):
                raise
            except OSError as error:
                raise self._broken(error) from error

    def _decrypt_records(self, sizes: list[int], place: memoryview) -> int:
        """Decrypt the records with texts of these sizes, but for those that an interrupted call has; return the end."""
        assert self._tls is not None
        start = offset = 0
        for index, size in enumerate(sizes):
            end = start + RECORD_HEADER.size + OVERHEAD_BYTES + size
            if index >= self._index:
                if index > self._index:
                    self._index, self._is_fed = index, False
                if not self._is_fed:
                    if not self._incoming.pending:  # else an interrupt came behind the next line
                        self._incoming.write(self._records[start:end])
                    self._is_fed = True
                is_to_do = self._incoming.pending  # else an interrupt came behind the next line
                if is_to_do and self._tls.read(RECORD_BYTES, place[offset:]) != size:  # type: ignore[arg-type]
                    raise ConnectionAbortedError("a record of TLS is not of the kind that rlx writes")
            start, offset = end, offset + size
        return start

    def _broken(self, error: OSError) -> ConnectionError:
        """Return the error as what a link expects; tells the other end first, if OpenSSL wants to."""
        if isinstance(error, ssl.SSLError):
            with contextlib.suppress(OSError):
                self._flush()
            return ConnectionAbortedError(f"TLS failed: {error.reason or error}")
        return ConnectionResetError(error.errno, error.strerror)


def _text_sizes(records: memoryview, count: int) -> list[int]:
    """Return the bytes of text in each whole record among the first `count` bytes."""
    sizes, start = [], 0
    while start + RECORD_HEADER.size <= count:
        (size,) = RECORD_HEADER.unpack_from(records, start)
        start += RECORD_HEADER.size + size
        if RECORD_HEADER.size + size > MAX_RECORD_BYTES or size < OVERHEAD_BYTES:
            raise ConnectionAbortedError(f"a record of TLS claims {size} bytes")
        if start <= count:
            sizes.append(size - OVERHEAD_BYTES)
    return sizes


def _beginning(buffers: Sequence[Buffer]) -> Buffer:
    """Return the first CHUNK_BYTES of the buffers; a large one is not copied."""
    parts, size = list[Buffer](), 0
    for buffer in buffers:
        if size + len(buffer) > CHUNK_BYTES:
            parts.append(memoryview(buffer)[: CHUNK_BYTES - size])
            break
        parts.append(buffer)
        size += len(buffer)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _keep_alive(sock: socket.socket) -> None:
    """Have small frames go at once, and a machine that is gone be noticed though nobody writes to it."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    # No TCP_USER_TIMEOUT: it would end a connection whose other end is stopped and reads nothing.
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEPALIVE_S)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, KEEPALIVE_INTERVAL_S)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, KEEPALIVE_PROBES)
