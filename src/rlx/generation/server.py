"""Server: JSON over HTTP with a server that runs elsewhere; whoever waits for it has a deadline."""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

from rlx.errors import ConfigError, RlxError

CONNECT_S = 10.0
"""Longest time for a connection to be made."""
CHUNK = 1 << 16


class Answer(NamedTuple):
    """What a server says: its status, and the body as it came."""

    status: int
    body: bytes

    @property
    def words(self) -> str:
        """The beginning of the body, as text in one line."""
        return " ".join(self.body.decode(errors="replace").split())[:300] or "nothing"


@dataclass(frozen=True)
class Ask:
    """One POST among many."""

    what: str
    """What is asked for, as errors name it."""
    body: Mapping[str, Any]
    read: Callable[[Any], Any]
    """Makes a value of the JSON that is answered; what it raises ends all the others."""


class Server:
    """Speaks with one server; each exchange has a connection of its own, so a server that starts again is reached."""

    def __init__(self, url: str, name: str = "server") -> None:
        parts = urllib.parse.urlsplit(url)
        try:
            self._host, self._port = parts.hostname, parts.port
        except ValueError:
            self._host = None
        if parts.scheme not in ("http", "https") or not self._host or parts.query or parts.fragment:
            raise ConfigError(f"{url!r} is no address of a {name}; write it as http://localhost:8000.")
        self._is_secure, self._path = parts.scheme == "https", parts.path.rstrip("/")
        self.name = f"the {name} at {url}"

    def exchange(
        self, method: str, path: str, body: Any = None, *, what: str, deadline: float, lines: _Lines | None = None
    ) -> Answer:
        """Return the answer, whatever its status; deadline: of time.monotonic(). RlxError: there is none."""
        connect = http.client.HTTPSConnection if self._is_secure else http.client.HTTPConnection
        connection = connect(self._host or "", self._port, timeout=max(0.001, min(CONNECT_S, _left(deadline))))
        lines = lines or _Lines()
        try:
            connection.connect()
            line = connection.sock
            with lines.holding(line):
                line.settimeout(_left(deadline))
                headers = {"Content-Type": "application/json", "Connection": "close"}
                connection.request(method, self._path + path, None if body is None else json.dumps(body), headers)
                with connection.getresponse() as response:
                    return Answer(response.status, _read(response, line, deadline))
        except TimeoutError:
            raise RlxError(
                f"{self.name} has not answered in time, asked for {what}; look into its log, or give it longer: "
                "fault_tolerance.generate_timeout_s."
            ) from None
        except (OSError, http.client.HTTPException) as error:
            reason = str(error) or type(error).__name__
            raise RlxError(
                f"{self.name} cannot be reached or ended the connection, asked for {what} ({reason}); look into its "
                "log, start it again, and go on with the run."
            ) from None
        finally:
            connection.close()

    def json(self, method: str, path: str, body: Any = None, **options: Any) -> Any:
        """Return the JSON that is answered with status 200; RlxError where it is another one, or no JSON."""
        return self.parsed(self.exchange(method, path, body, **options), options["what"])

    def parsed(self, answer: Answer, what: str) -> Any:
        """Return the JSON of an answer to what was asked for."""
        if answer.status != 200:
            raise RlxError(
                f"{self.name} answered status {answer.status}, asked for {what}: {answer.words}; look into its log."
            )
        try:
            return json.loads(answer.body) if answer.body else None
        except ValueError:
            raise RlxError(
                f"{self.name} answered what is no JSON, asked for {what}: {answer.words}; is something else there, or "
                "in between?"
            ) from None

    def post_all(self, path: str, asks: Sequence[Ask], *, at_once: int, deadline: float) -> list[Any]:
        """Return what `asks` read, in order; the first that fails, or an interrupt, ends them all at once."""

        def one(ask: Ask) -> Any:
            return ask.read(self.json("POST", path, ask.body, what=ask.what, deadline=deadline, lines=lines))

        lines = _Lines()
        with ThreadPoolExecutor(max(1, min(at_once, len(asks)))) as pool:
            futures = [pool.submit(one, ask) for ask in asks]
            try:
                for future in as_completed(futures):
                    future.result()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                lines.hang_up()
                raise
        return [future.result() for future in futures]


class _Lines:
    """The open connections of one call, to be ended together."""

    def __init__(self) -> None:
        self._open: set[socket.socket] = set()
        self._lock, self._is_over = threading.Lock(), False

    @contextmanager
    def holding(self, line: socket.socket) -> Iterator[None]:
        """Have the connection ended by `hang_up` within the block."""
        with self._lock:
            if self._is_over:
                raise ConnectionAbortedError("given up")
            self._open.add(line)
        try:
            yield
        finally:
            with self._lock:
                self._open.discard(line)

    def hang_up(self) -> None:
        """End all that are open, and those that are still to come."""
        with self._lock:
            self._is_over = True
            for line in self._open:
                with suppress(OSError):  # it has ended by itself
                    line.shutdown(socket.SHUT_RDWR)


def _left(deadline: float) -> float:
    """Return how many seconds there are; TimeoutError where there are none."""
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


def _read(response: http.client.HTTPResponse, line: socket.socket, deadline: float) -> bytes:
    parts = []
    while part := response.read1(CHUNK):
        parts.append(part)
        if not response.isclosed():
            line.settimeout(_left(deadline))
    if response.length:
        raise http.client.IncompleteRead(b"".join(parts), response.length)
    return b"".join(parts)
