"""What a run on text began with: copies of its models' folders.

A reference, the model under an adapter, the tokenizer and a reward model are needed for as long as a run is, as they
were when it began; and the run that they come from may be trained further, moved or deleted.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rlx.checkpoint import STATE_FILE, list_checkpoints
from rlx.errors import CheckpointError, ConfigError
from rlx.run import holds_run
from rlx.text_models import model_folder
from rlx.text_sections import TextModelSection
from rlx.text_settings import TextSettings

ORIGIN = "origin"
"""The folder of a run that holds them, each under the name of its setting."""
MODELS = ("path", "reference_path", "value_path")
REWARD = "reward_model"
OTHER_WEIGHTS = {".bin", ".h5", ".msgpack", ".gguf", ".pt", ".pth"}
"""Endings of files that hold the weights once more, beside safetensors."""


def as_begun(s: TextSettings, restored: Path | None, run: Path | None) -> TextSettings:
    """Return the settings with the models that a run began with, where one goes on: `restored`, or what `run` holds."""
    begun = run if restored is None and run is not None and holds_run(run) else restored
    return s if begun is None else _with_origins(s, begun)


def with_copies(s: TextSettings, run: Path | None) -> TextSettings:
    """Return the settings with copies of their models in the folder of a new run, which all its processes read."""
    if run is None or holds_run(run):
        return s
    _keep_origin(s, run)
    return _with_origins(s, run)


def drop_copies(run: Path | None) -> None:
    """Delete the copies again where no run has begun, as after a build that failed."""
    if run is not None and not holds_run(run) and (run / ORIGIN).exists():
        shutil.rmtree(run / ORIGIN, ignore_errors=True)
        with contextlib.suppress(OSError):  # with logs in it, say
            run.rmdir()


@contextlib.contextmanager
def told_by_source(s: TextSettings, copies: TextSettings) -> Iterator[None]:
    """Have an error that names a copy name what it was copied from: nothing else can be wrong with it."""
    try:
        yield
    except ConfigError as error:
        told = str(error)
        names = [
            (one.model.path, one.model.reference_path, one.model.value_path, one.reward.model) for one in (s, copies)
        ]
        for source, copy in zip(*names, strict=True):
            if source and copy and copy != source:
                told = told.replace(copy, source)
        raise ConfigError(told) from error.__cause__


def with_origin(m: TextModelSection, path: str | Path) -> TextModelSection:
    """Return the settings with the paths of the copies that a run, or the run of a checkpoint, has; any may lack."""
    origin = _origin(path)
    return m.model_copy(update={name: str(origin / name) for name in MODELS if (origin / name).is_dir()})


def is_origin(path: str | Path, s: TextSettings, built: TextSettings) -> bool:
    """Return whether what was built is what the run, or the run of the checkpoint, `path` began with.

    s: as its config has them, and where nothing was kept they are taken for the same.
    """
    begun = _with_origins(s, path)
    same_models = all(
        getattr(begun.model, name) in (getattr(s.model, name), getattr(built.model, name))
        or _versions(_folder(begun.model, name)) == _versions(_folder(built.model, name))
        for name in MODELS
    )
    rewards = [one.reward.model for one in (begun, s, built)]
    return same_models and (rewards[0] in rewards[1:] or len({_checkpoint(one) for one in rewards[::2]}) == 1)


def _with_origins(s: TextSettings, path: str | Path) -> TextSettings:
    """Return the settings with the paths of all copies that a run, or the run of a checkpoint, has."""
    found: dict[str, Any] = {"model": with_origin(s.model, path)}
    if (reward := _origin(path) / REWARD).is_dir():
        found["reward"] = s.reward.model_copy(update={"model": str(reward)})
    return s.model_copy(update=found)


def _origin(path: str | Path) -> Path:
    path = Path(path).expanduser().absolute()
    return (path.parent.parent if path.parent.name == "checkpoints" else path) / ORIGIN


def _keep_origin(s: TextSettings, run: Path) -> None:
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
            if (folder := _folder(s.model, name)) is not None:
                (temporary / name).mkdir(parents=True)
                for file in _files(folder):
                    shutil.copy2(file, temporary / name / file.name)  # with its time, by which `is_origin` knows it
        if (checkpoint := _newest(s.reward.model)) is not None:
            name = REWARD
            _keep_reward_model(checkpoint, temporary / REWARD)
        if temporary.exists():
            temporary.rename(run / ORIGIN)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        setting = "reward.model" if name == REWARD else f"model.{name}"
        raise CheckpointError(
            f"could not copy {setting} into {run / ORIGIN}, which the run goes on with: {error.strerror or error}."
        ) from error


def _keep_reward_model(checkpoint: Path, copy: Path) -> None:
    """Keep of a run the checkpoint, the config, and what it began with itself; checkpoints are never written to."""
    run = checkpoint.parent.parent
    parts = {f"checkpoints/{checkpoint.name}": checkpoint, ORIGIN: run / ORIGIN}
    for name, folder in parts.items():
        if folder.is_dir():
            shutil.copytree(folder, copy / name, copy_function=_link)
    if (run / "config.yaml").is_file():
        shutil.copy2(run / "config.yaml", copy)


def _link(file: str, copy: str) -> None:
    """Have the file under a second name, which takes no room; copy it where that cannot be."""
    try:
        os.link(file, copy)
    except OSError:
        shutil.copy2(file, copy)


def _newest(run: str | None) -> Path | None:
    """Return the checkpoint that a run's newest is, or that is named; None where there is none, which is told later."""
    if run is None:
        return None
    folder = Path(run).expanduser()
    if folder.parent.name == "checkpoints":
        return folder
    return next(reversed(list_checkpoints(folder / "checkpoints")), None)


def _checkpoint(run: str | None) -> tuple[str, int] | None:
    """Return name and time of the newest checkpoint."""
    newest = _newest(run)
    return None if newest is None else (newest.name, (newest / STATE_FILE).stat().st_mtime_ns)


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
