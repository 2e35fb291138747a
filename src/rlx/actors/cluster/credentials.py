"""The cluster's key: one file, copied to every machine, that holds all that a machine must know to belong.

It holds a token, which both ends of a connection prove to know, and certificates for TLS. The certificates' authority
is made for this file alone, and its key is thrown away once it has signed: nobody can make another one later.
"""

from __future__ import annotations

import base64
import contextlib
import datetime
import functools
import os
import re
import secrets
import ssl
import stat
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from rlx.errors import ConfigError, MissingExtra

HOME = Path(os.path.abspath(os.path.expanduser(os.environ["RLX_HOME"])) if os.environ.get("RLX_HOME") else "~/.rlx")
"""Where this user's key, and the notes and logs of the daemons are; `expanduser` before use."""
DEFAULT_PATH = HOME / "cluster.key"
FIRST_LINE = "rlx cluster key 1"
TOKEN_BYTES = 32
VALID_DAYS = 3650
MAX_FILE_BYTES = 64 * 1024
_PEM = re.compile(r"-----BEGIN (?P<label>[A-Z ]+)-----\n[A-Za-z0-9+/=\n]+-----END (?P=label)-----\n")
_LABELS = ["CERTIFICATE", "PRIVATE KEY", "CERTIFICATE"]


@dataclass(frozen=True)
class ClusterKey:
    """A token and certificates; whoever has them owns every machine of the cluster."""

    path: Path
    token: bytes = field(repr=False)
    certificate: str = field(repr=False)
    """PEM, as the other two."""
    private_key: str = field(repr=False)
    authority: str = field(repr=False)

    @classmethod
    def create(cls, path: str | Path = DEFAULT_PATH, days: int = VALID_DAYS) -> ClusterKey:
        """Make a new key and its file; ConfigError where there is one already."""
        path = Path(path).expanduser()
        key = cls(path, secrets.token_bytes(TOKEN_BYTES), *_make_certificates(days))
        if path.exists():  # said before anything is written; the link below keeps it so in a race
            raise _exists(path)
        with key._written() as new:
            try:
                os.link(new, path)
            except FileExistsError:
                raise _exists(path) from None
        return key

    @classmethod
    def renew(cls, path: str | Path = DEFAULT_PATH, days: int = VALID_DAYS) -> ClusterKey:
        """Put new certificates into the file, under the token that is in it; ConfigError where it is not a key."""
        old = cls._read(Path(path).expanduser())
        key = cls(old.path, old.token, *_make_certificates(days))
        with key._written() as new:
            os.replace(new, old.path.resolve())  # of a link, the file that it leads to
        return key

    @classmethod
    def load(cls, path: str | Path = DEFAULT_PATH) -> ClusterKey:
        """Read the file; ConfigError if it is missing, readable by others, malformed or expired."""
        key = cls._read(Path(path).expanduser())
        try:
            context = key.client_context()
            key.server_context()
        except (ssl.SSLError, ValueError) as error:
            reason = getattr(error, "reason", None) or error
            raise ConfigError(f"{key.path} is damaged ({reason}): copy it again from the cluster's head.") from None
        until = ssl.cert_time_to_seconds(str(context.get_ca_certs()[0]["notAfter"]))
        if until <= datetime.datetime.now(datetime.UTC).timestamp():
            day = datetime.datetime.fromtimestamp(until, datetime.UTC).date()
            raise ConfigError(
                f"the certificates in {key.path} have expired on {day}: run `rlx certs --renew --out {key.path}` and "
                "copy the file to every machine."
            )
        return key

    def server_context(self) -> ssl.SSLContext:
        """Return the side of TLS that takes connections; it asks for the cluster's certificate."""
        return self._server_context

    def client_context(self) -> ssl.SSLContext:
        """Return the side of TLS that connects; which machine answers does not matter, that it has the key does."""
        return self._client_context

    @functools.cached_property
    def _server_context(self) -> ssl.SSLContext:
        context = self._context(ssl.PROTOCOL_TLS_SERVER)
        context.num_tickets = 0  # every connection is proven anew
        return context

    @functools.cached_property
    def _client_context(self) -> ssl.SSLContext:
        return self._context(ssl.PROTOCOL_TLS_CLIENT)

    def _context(self, side: int) -> ssl.SSLContext:
        context = ssl.SSLContext(side)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.check_hostname = False  # a machine belongs by its certificate, whatever its name
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_verify_locations(cadata=self.authority)
        # OpenSSL reads its own certificate from a file only, twice; this one is memory, and the disk's may be newer.
        with open(os.memfd_create("rlx-cluster-key"), "w") as file:
            file.write(self.certificate + self.private_key)
            file.flush()
            context.load_cert_chain(f"/proc/self/fd/{file.fileno()}")
        return context

    @classmethod
    def _read(cls, path: Path) -> ClusterKey:
        """Return what is in the file; whether the certificates are good, `load` finds out."""
        try:
            with open(path, encoding="utf-8", errors="replace") as file:
                mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
                text = file.read(MAX_FILE_BYTES)
        except FileNotFoundError:
            raise ConfigError(
                f"there is no cluster key {path}: copy it from the cluster's head, or make one with `rlx certs`."
            ) from None
        except OSError as error:
            raise ConfigError(f"the cluster key {path} cannot be read: {error.strerror}.") from None
        if mode & 0o077:
            raise ConfigError(
                f"the cluster key {path} has mode {mode:04o}, so that others may read it, and with it own the cluster: "
                f"chmod 600 {path}"
            )
        first, _, rest = text.partition("\n")
        if first != FIRST_LINE:
            raise ConfigError(f"{path} is no cluster key: its first line is {first[:40]!r}, not {FIRST_LINE!r}.")
        blocks = list(_PEM.finditer(rest))
        token = re.search(r"^token (\S+)$", rest, re.MULTILINE)
        if token is None or [block["label"] for block in blocks] != _LABELS:
            raise ConfigError(
                f"{path} is damaged: it needs a token, a certificate, a key and an authority's certificate."
            )
        return cls(path, _decode(token[1], path), *(block[0] for block in blocks))

    @contextlib.contextmanager
    def _written(self) -> Iterator[str]:
        """Give a new file beside `path` with this key in it, for its owner alone; it is gone in the end."""
        try:
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            descriptor, name = tempfile.mkstemp(prefix=f".{self.path.name}-", dir=self.path.parent)  # mode 0600
            try:
                with open(descriptor, "w", encoding="utf-8") as file:
                    file.write(self._text())
                    file.flush()
                    os.fsync(file.fileno())
                yield name
            finally:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(name)
        except OSError as error:
            raise ConfigError(f"the cluster key {self.path} cannot be written: {error.strerror}.") from None

    def _text(self) -> str:
        return "".join(
            [
                f"{FIRST_LINE}\n",
                "# Whoever can read this file owns every machine of the cluster: keep it at mode 0600.\n",
                f"token {base64.urlsafe_b64encode(self.token).decode()}\n\n",
                f"# What a machine shows in TLS, and its key\n{self.certificate}{self.private_key}\n",
                f"# Who has signed it, with a key that nobody has\n{self.authority}",
            ]
        )


def _exists(path: Path) -> ConfigError:
    return ConfigError(
        f"{path} exists and is not overwritten: use it, renew its certificates with `rlx certs --renew`, or remove it."
    )


def _decode(token: str, path: Path) -> bytes:
    try:
        data = base64.b64decode(token, altchars=b"-_", validate=True)
    except ValueError:
        data = b""
    if len(data) != TOKEN_BYTES:
        raise ConfigError(f"{path} is damaged: its token is not {TOKEN_BYTES} bytes in urlsafe base64.")
    return data


def _make_certificates(days: int) -> tuple[str, str, str]:
    """Return a new certificate with its key, and the certificate of the authority that signed it, in PEM."""
    try:
        from rlx.actors.cluster.certificates import Authority
    except ImportError as error:
        raise MissingExtra("A cluster key needs cryptography to be made: pip install 'rlx[cluster]'.") from error
    authority = Authority(days)
    return *authority.issue(), authority.certificate
