"""What a run on text began with: copies of its models' folders.

A reference, the model under an adapter and the tokenizer are needed for as long as a run is, as they were when it
began; and the run that they come from may be trained further, moved or deleted.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from rlx.errors import CheckpointError, ConfigError
from rlx.run import holds_run
from rlx.text_models import model_folder
from rlx.text_sections import TextModelSection
from rlx.text_settings import TextSettings

ORIGIN = "origin"
"""The folder of a run that holds them, each under the name of its setting."""
MODELS = ("path", "reference_path", "value_path")
OTHER_WEIGHTS = {".bin", ".h5", ".msgpack", ".gguf", ".pt", ".pth"}
"""Endings of files that hold the weights once more, beside safetensors."""


def as_begun(s: TextSettings, restored: Path | None, run: Path | None) -> TextSettings:
    """Return the settings with the models that a run began with, where one goes on: `restored`, or what `run` holds."""
    begun = run if restored is None and run is not None and holds_run(run) else restored
    return s if begun is None else s.model_copy(update={"model": with_origin(s.model, begun)})


def with_copies(s: TextSettings, run: Path | None) -> TextSettings:
    """Return the settings with copies of their models in the folder of a new run, which all its processes read."""
    if run is None or holds_run(run):
        return s
    _keep_origin(s.model, run)
    return s.model_copy(update={"model": with_origin(s.model, run)})


def drop_copies(run: Path | None) -> None:
    """Delete the copies again where no run has begun, as after a build that failed."""
    if run is not None and not holds_run(run) and (run / ORIGIN).exists():
        shutil.rmtree(run / ORIGIN, ignore_errors=True)
        with contextlib.suppress(OSError):  # with logs in it, say
            run.rmdir()


@contextlib.contextmanager
def told_by_source(m: TextModelSection, copies: TextModelSection) -> Iterator[None]:
    """Have an error that names a copy name what it was copied from: nothing else can be wrong with it."""
    try:
        yield
    except ConfigError as error:
        told = str(error)
        for name in MODELS:
            if (copy := getattr(copies, name)) != (source := getattr(m, name)):
                told = told.replace(copy, source)
        raise ConfigError(told) from error.__cause__


def with_origin(m: TextModelSection, path: str | Path) -> TextModelSection:
    """Return the settings with the paths of the copies that a run, or the run of a checkpoint, has; any may lack."""
    path = Path(path).expanduser().absolute()
    origin = (path.parent.parent if path.parent.name == "checkpoints" else path) / ORIGIN
    return m.model_copy(update={name: str(origin / name) for name in MODELS if (origin / name).is_dir()})


def is_origin(path: str | Path, m: TextModelSection, built: TextModelSection) -> bool:
    """Return whether what was built is what the run, or the run of the checkpoint, `path` began with.

    m: as its config has them, and where nothing was kept they are taken for the same.
    """
    begun = with_origin(m, path)
    return all(
        getattr(begun, name) in (getattr(m, name), getattr(built, name))
        or _versions(_folder(begun, name)) == _versions(_folder(built, name))
        for name in MODELS
    )


def _keep_origin(m: TextModelSection, run: Path) -> None:
    """Copy every folder that these settings name a model by into the folder of a new run.

    A hub's models are in its cache. The copies appear by one rename, in the place of what an attempt before has left.
    CheckpointError where they cannot be written.
    """
    temporary, name = run / f".{ORIGIN}.{os.getpid()}.tmp", ""
    try:
        for left in (temporary, run / ORIGIN):
            if left.exists():
                shutil.rmtree(left)
        for name in MODELS:
            if (folder := _folder(m, name)) is not None:
                (temporary / name).mkdir(parents=True)
                for file in _files(folder):
                    shutil.copy2(file, temporary / name / file.name)  # with its time, by which `is_origin` knows it
        if temporary.exists():
            temporary.rename(run / ORIGIN)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(
            f"could not copy model.{name} into {run / ORIGIN}, which the run goes on with: {error.strerror or error}."
        ) from error


def _folder(m: TextModelSection, name: str) -> Path | None:
    """Return the folder of a model that these settings name; None where a hub has it, or they name none."""
    return None if (path := getattr(m, name)) is None else model_folder(path)


def _files(folder: Path) -> list[Path]:
    """Return the files of a model: those that hold its weights once more are left out."""
    files = [file for file in folder.iterdir() if file.is_file()]
    has_weights = any(file.suffix == ".safetensors" for file in files)
    return [file for file in files if not (has_weights and file.suffix in OTHER_WEIGHTS)]


def _versions(folder: Path | None) -> set[tuple[str, int, int]]:
    """Return name, size and time of a model's files."""
    files = [] if folder is None else _files(folder)
    return {(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files}
