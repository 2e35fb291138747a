"""Checkpoints: a folder written all or nothing, read without executing code.

    iter_000020/
        state.json            everything but arrays: counters, seeds, settings of spaces; the checksums of both files
        tensors.safetensors   every array of the state, under its path in the state tree

A state is a tree of dicts and lists over str, int, float, bool, None and numpy arrays of numbers or bools.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from rlx.actors import processes
from rlx.errors import CheckpointError

log = logging.getLogger("rlx")
T = TypeVar("T")

FORMAT = 1
STATE_FILE, TENSOR_FILE = "state.json", "tensors.safetensors"
TENSOR_KEY = "$tensor"
ABANDONED_S = 86400.0
"""How old an unfinished folder is whose process nobody here can look up, and that counts as left behind."""


def save_checkpoint(folder: Path, state: dict[str, Any]) -> Path:
    """Write `state` as the folder `folder`, replacing one of that name; return it.

    The folder appears by one rename after everything reached the disk: a crash or a full disk at any moment
    leaves either the old checkpoint or the new one, never half of one.
    """
    from safetensors.numpy import save as to_safetensors

    arrays: dict[str, np.ndarray] = {}
    tree = _split(state, "", arrays)
    tensors = to_safetensors(arrays)
    content = {"tensors_sha256": _sha256(tensors), "state": tree}
    document = {"format": FORMAT, "sha256": _sha256(_to_json(content)), "content": content}
    try:
        _refuse_to_replace_other_files(folder)
        with unfinished(folder) as temporary:
            _write_durably(temporary / TENSOR_FILE, tensors)
            _write_durably(temporary / STATE_FILE, _to_json(document))
            _sync_folder(temporary)
            replace_folder(temporary, folder)
    except OSError as error:
        raise CheckpointError(
            f"could not write the checkpoint {folder}: {error.strerror or error}; the previous checkpoint is untouched."
        ) from error
    return folder


def load_checkpoint(folder: Path) -> dict[str, Any]:
    """Return the state saved in `folder`; CheckpointError names the file that is missing, torn or foreign."""
    from safetensors import SafetensorError
    from safetensors.numpy import load as from_safetensors

    content, tensor_file = _read_state(folder)
    raw = tensor_file.read_bytes()
    if _sha256(raw) != content["tensors_sha256"]:
        raise CheckpointError(f"{tensor_file} is torn: its checksum is not the one saved; use an older checkpoint.")
    try:
        return _join(content["state"], from_safetensors(raw))
    except (SafetensorError, KeyError) as error:
        raise CheckpointError(f"{tensor_file} cannot be read ({error}); use an older checkpoint.") from error


def is_run(path: Path) -> bool:
    """Return whether `path` is a run folder, with checkpoints below it, and not itself a checkpoint."""
    return (path / "checkpoints").is_dir()


def load_state(path: Path) -> dict[str, Any]:
    """Return the state of a checkpoint folder, or of a run folder's newest checkpoint that loads."""
    return load_newest(path / "checkpoints")[1] if is_run(path) else load_checkpoint(path)


def checkpoint_name(iteration: int) -> str:
    """Return the folder name of an iteration's checkpoint."""
    return f"iter_{iteration:06d}"


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints below `folder`, oldest first."""
    stepped_aside = {path.with_name(path.name[1 : -len(".old")]) for path in folder.glob(".iter_*.old")}
    found = stepped_aside | {path for path in folder.glob("iter_*") if path.is_dir()}
    return sorted(found, key=lambda path: (len(path.name), path.name))  # iter_1000000 comes after iter_999999


def load_newest(folder: Path) -> tuple[Path, dict[str, Any]]:
    """Return the newest checkpoint below `folder` that loads, with its state; torn ones are logged and passed over."""
    return _newest_by(load_checkpoint, folder)


def newest_whole(folder: Path) -> tuple[str, Path] | None:
    """Return the name of the newest whole checkpoint below `folder`, and where it is; None where there is none.

    Its arrays are not read: what is cut short is passed over, and what has changed in them is found as they are loaded.
    """
    try:
        path, _ = _newest_by(_check_whole, folder)
    except CheckpointError:
        return None
    return path.name, _present(path)


def _newest_by(load: Callable[[Path], T], folder: Path) -> tuple[Path, T]:
    """Return the newest checkpoint below `folder` that `load` takes, and what it returns of it."""
    problems = []
    for path in reversed(list_checkpoints(folder)):
        try:
            return path, load(path)
        except CheckpointError as error:
            log.warning("passing over a checkpoint: %s", error)
            problems.append(str(error))
    raise CheckpointError(
        "\n".join(problems) or f"{folder} holds no checkpoint yet; delete the run folder and start afresh."
    )


def prune(folder: Path, keep: int, also: set[str]) -> None:
    """Delete all but the newest `keep` checkpoints below `folder` and those named in `also`.

    What a killed save left behind goes too.
    """
    remove_abandoned(folder, "iter_*")
    unwanted = [path for path in list_checkpoints(folder)[:-keep] if path.name not in also]
    for path in [*map(_aside, unwanted), *unwanted]:
        if path.exists():
            shutil.rmtree(path)


@contextlib.contextmanager
def unfinished(folder: Path) -> Iterator[Path]:
    """Yield a new folder beside `folder`, to be filled and renamed to it; what is not renamed is deleted."""
    temporary = folder.with_name(f".{folder.name}.{_here()}-{os.getpid()}-{_started(os.getpid())}.tmp")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def remove_abandoned(folder: Path, names: str) -> None:
    """Delete what processes that were killed left in `folder` of `unfinished` folders; names: a pattern of theirs."""
    for left in folder.glob(f".{names}.*.tmp"):
        here, _, rest = left.name.removesuffix(".tmp").rpartition(f".{_here()}-")
        pid, _, started = rest.partition("-")
        with contextlib.suppress(OSError):  # another process may have deleted it
            if here and pid.isdecimal():
                is_left = not (started.isdecimal() and processes.is_running(int(pid), int(started)))
            else:
                is_left = time.time() - left.stat().st_mtime > ABANDONED_S
            if is_left:
                shutil.rmtree(left, ignore_errors=True)


def replace_folder(temporary: Path, folder: Path) -> None:
    """Rename `temporary` to `folder`; an existing `folder` steps aside first, and both renames reach the disk."""
    aside = _aside(folder)
    if folder.exists():
        shutil.rmtree(aside, ignore_errors=True)
        folder.rename(aside)
    temporary.rename(folder)
    _sync_folder(folder.parent)
    shutil.rmtree(aside, ignore_errors=True)


def _split(node: Any, path: str, arrays: dict[str, np.ndarray]) -> Any:
    """Return the tree with arrays replaced by references, collecting them in `arrays`."""
    if isinstance(node, dict):
        for key in node:
            if not isinstance(key, str) or key == TENSOR_KEY:  # JSON would turn 1 into "1" in silence
                raise TypeError(f"a checkpoint cannot hold the key {key!r} at {path or '/'}; keys are strings")
        return {key: _split(value, f"{path}/{key}", arrays) for key, value in node.items()}
    if isinstance(node, list | tuple):
        return [_split(value, f"{path}/{index}", arrays) for index, value in enumerate(node)]
    if isinstance(node, np.ndarray) and node.dtype.kind in "biuf":
        name = path.lstrip("/")
        while name in arrays:  # {"a/b": x, "a": {"b": y}}
            name += "'"
        arrays[name] = np.asarray(node, order="C")  # not ascontiguousarray, which makes 0-d arrays 1-d
        return {TENSOR_KEY: name}
    if isinstance(node, np.generic):
        return node.item()
    if node is None or isinstance(node, str | int | float | bool):
        return node
    raise TypeError(f"a checkpoint cannot hold {type(node).__name__} at {path or '/'}")


def _join(node: Any, arrays: dict[str, np.ndarray]) -> Any:
    if isinstance(node, dict):
        if node.keys() == {TENSOR_KEY}:
            return arrays[node[TENSOR_KEY]]
        return {key: _join(value, arrays) for key, value in node.items()}
    if isinstance(node, list):
        return [_join(value, arrays) for value in node]
    return node


def _read_state(folder: Path) -> tuple[dict[str, Any], Path]:
    """Return what the state.json of a checkpoint holds, checked, and the file with its arrays."""
    folder = _present(folder)
    state_file, tensor_file = folder / STATE_FILE, folder / TENSOR_FILE
    for file in (state_file, tensor_file):
        if not file.is_file():
            raise CheckpointError(f"{folder} is no rlx checkpoint: it has no {file.name}.")
    return _read_content(state_file), tensor_file


def _check_whole(folder: Path) -> None:
    """Raise CheckpointError where a checkpoint lacks something, or its arrays are cut short."""
    from safetensors import SafetensorError, safe_open

    _, tensor_file = _read_state(folder)
    try:
        with safe_open(tensor_file, framework="numpy"):
            pass
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{tensor_file} is torn ({error}); use an older checkpoint.") from error


def _read_content(file: Path) -> dict[str, Any]:
    """Return what a state.json holds, checked against its checksum."""
    try:
        document = json.loads(file.read_bytes())
        if document["format"] == FORMAT and _sha256(_to_json(document["content"])) != document["sha256"]:
            raise ValueError("its checksum is not the one saved")
    except UnicodeDecodeError:  # its text would quote the whole file
        raise CheckpointError(f"{file} is torn or foreign (not text); use an older checkpoint.") from None
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{file} is torn or foreign ({error!r}); use an older checkpoint.") from None
    if document["format"] != FORMAT:
        raise CheckpointError(
            f"{file} has format {document['format']!r}, this rlx reads format {FORMAT}; "
            "load it with the rlx version that wrote it (see manifest.json of its run)."
        )
    return document["content"]


def _to_json(value: Any) -> bytes:
    return json.dumps(value).encode()


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _refuse_to_replace_other_files(folder: Path) -> None:
    if folder.exists() and (others := {path.name for path in folder.iterdir()} - {STATE_FILE, TENSOR_FILE}):
        raise CheckpointError(
            f"{folder} holds files of others ({min(others)}) and saving a checkpoint would replace them; "
            "choose a path that does not exist yet."
        )


def _write_durably(file: Path, content: bytes) -> None:
    with open(file, "wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())


def _sync_folder(folder: Path) -> None:
    """Bring the names in `folder` to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _here() -> str:
    """Return a name for where a process id means the same process: a machine, or a container."""
    return f"{socket.gethostname()}-{os.stat('/proc/self/ns/pid').st_ino}"


def _started(pid: int) -> int:
    found = processes.stat(pid)
    return 0 if found is None else found.start_ticks


def _aside(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.old")


def _present(folder: Path) -> Path:
    """Return `folder`, or what stepped aside for it if a crash came between the two renames of `replace_folder`."""
    return _aside(folder) if _aside(folder).exists() and not folder.exists() else folder
