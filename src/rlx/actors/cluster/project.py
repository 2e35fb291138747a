"""The user's project on other machines: the files that git tracks, sent once for each content they ever have."""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import stat
import subprocess
import tarfile
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rlx.errors import ActorError

MAX_BYTES = 100 * 2**20
NAMED = 10  # of the largest files, where they are too large together
KEPT = 8  # projects on a machine, those used last
GIT_TIMEOUT_S = 30.0
READ_BYTES = 2**20


@dataclass(frozen=True)
class Project:
    """A folder's tracked files as they are on disk now, which need not be committed."""

    root: Path
    files: tuple[str, ...]
    """Relative to the root, sorted."""
    digest: str
    """Of names, modes and contents: two projects with the same digest are the same."""

    @classmethod
    def around(cls, folder: Path, max_bytes: int = MAX_BYTES) -> Project | None:
        """Return the project that `folder` is in; None outside of git. ActorError where it is too large to be sent."""
        root = _git(folder, "rev-parse", "--show-toplevel")
        if root is None:
            return None
        top = Path(root.rstrip("\n"))
        names = [name for name in (_git(top, "ls-files", "-z") or "").split("\0") if name]
        files = sorted(name for name in names if _is_file(top / name))  # not those that are deleted, and no submodules
        sizes = {name: (top / name).lstat().st_size for name in files}
        total = sum(sizes.values())
        if total > max_bytes:
            largest = sorted(files, key=lambda name: -sizes[name])[:NAMED]
            named = ", ".join(f"{name} ({sizes[name] / 2**20:.1f} MiB)" for name in largest)
            raise ActorError(
                f"the files that git tracks in {top} have {total / 2**20:.0f} MiB, and at most {max_bytes / 2**20:.0f} "
                f"are sent to a cluster's machines; the largest are {named}: untrack them, or start elsewhere."
            )
        return cls(top, tuple(files), _digest(top, files))

    def archive(self) -> bytes:
        """Return all files as a tar archive."""
        data = io.BytesIO()
        with tarfile.open(fileobj=data, mode="w") as tar:
            for name in self.files:
                tar.add(self.root / name, name, recursive=False)
        return data.getvalue()


def unpack(data: bytes, digest: str, home: Path) -> Path:
    """Return the folder of a project under `home`, made from its archive; ActorError if that is not what it says.

    The folder is there whole or not at all, whoever else unpacks the same meanwhile.
    """
    home.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder = home / digest
    unfinished = Path(tempfile.mkdtemp(prefix=".new-", dir=home))
    try:
        with tarfile.open(fileobj=io.BytesIO(data)) as tar:
            names = sorted(tar.getnames())
            tar.extractall(unfinished, filter="data")
        if _digest(unfinished, names) != digest:
            raise ActorError("a project has changed while it was sent; start again.")
        try:
            unfinished.rename(folder)
        except OSError:  # another driver was faster
            if not folder.is_dir():
                raise
    except (tarfile.TarError, OSError) as error:
        raise ActorError(f"a project cannot be unpacked into {folder}: {error}") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    _forget_old_ones(home, folder)
    return folder


def known(digest: str, home: Path) -> Path | None:
    """Return the folder of a project that has been here before."""
    folder = home / digest
    if not folder.is_dir():
        return None
    os.utime(folder)
    return folder


def translate(path: str, root: str | None, folder: Path | None) -> str:
    """Return where the driver's `path` is on this machine: in the project's folder, or where it is there."""
    if root is None or folder is None or not path:
        return path
    inside = os.path.relpath(path, root)
    return path if inside.startswith("..") else os.path.normpath(folder / inside)


def _forget_old_ones(home: Path, kept: Path) -> None:
    folders = sorted(
        (one for one in home.iterdir() if not one.name.startswith(".")), key=lambda one: one.stat().st_mtime
    )
    for folder in folders[:-KEPT]:
        if folder != kept:
            shutil.rmtree(folder, ignore_errors=True)


def _digest(root: Path, files: Sequence[str]) -> str:
    whole = hashlib.sha256()
    for name in files:
        path = root / name
        mode = path.lstat().st_mode
        content = hashlib.sha256()
        if stat.S_ISLNK(mode):
            content.update(os.readlink(path).encode())
        else:
            with path.open("rb") as file:
                while block := file.read(READ_BYTES):
                    content.update(block)
        kind = "link" if stat.S_ISLNK(mode) else "program" if mode & stat.S_IXUSR else "file"
        whole.update(f"{kind} {content.hexdigest()} {name}\0".encode("utf-8", "surrogateescape"))
    return whole.hexdigest()


def _is_file(path: Path) -> bool:
    try:
        mode = path.lstat().st_mode
    except OSError:
        return False
    return stat.S_ISREG(mode) or stat.S_ISLNK(mode)


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        command = ["git", "-C", str(folder), *arguments]
        done = subprocess.run(command, capture_output=True, timeout=GIT_TIMEOUT_S, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return os.fsdecode(done.stdout)
