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

from rlx.checkpoint import STATE_FILE, newest_whole, remove_abandoned, unfinished
from rlx.errors import CheckpointError, ConfigError
from rlx.run import holds_run
from rlx.text_models import model_folder
from rlx.text_sections import TextModelSection
from rlx.text_settings import TextSettings

ORIGIN = "origin"
"""The folder of a run that holds them, each under the name of its setting."""
MODELS = ("path", "reference_path", "value_path", "tokenizer")
REWARD = "reward_model"
OWNER = ".owner"
"""The file in it by which rlx knows that it made it, and who: a folder of that name may be anybody's."""
WEIGHTS = ".safetensors"
OTHER_WEIGHTS = {".bin", ".h5", ".msgpack", ".gguf", ".pt", ".pth"}
"""Endings of files that hold the weights once more, beside safetensors."""


def as_begun(s: TextSettings, restored: Path | None, run: Path | None) -> TextSettings:
    """Return the settings with the models that a run began with, where one goes on: `restored`, or what `run` holds."""
    begun = run if restored is None and run is not None and holds_run(run) else restored
    return s if begun is None else _with_origins(s, begun)


def with_copies(s: TextSettings, run: Path | None, owner: str) -> TextSettings:
    """Return the settings with copies of their models in the folder of a new run, which all its processes read.

    owner: who may delete them again, of all that are built for this folder: the last one.
    """
    if run is None or holds_run(run):
        return s
    _keep_origin(s, run, owner)
    return _with_origins(s, run)


def check_copies(s: TextSettings, run: Path) -> None:
    """Raise ConfigError where copies that a run is about to begin with were deleted meanwhile."""
    lost = [path for path in _paths(s) if path and _origin(run) in Path(path).parents and not Path(path).exists()]
    if lost:
        raise ConfigError(f"{lost[0]} is gone: another run was built for {run} and closed; build this one again.")


def drop_copies(run: Path | None, owner: str) -> None:
    """Delete the copies again where no run has begun, as after a build that failed."""
    if run is not None and not holds_run(run) and _owner(run) == owner:
        shutil.rmtree(run / ORIGIN, ignore_errors=True)
        with contextlib.suppress(OSError):  # with logs in it, say
            run.rmdir()


def _owner(run: Path) -> str | None:
    """Return who made the copies in this folder; None where rlx has made none."""
    file = run / ORIGIN / OWNER
    return file.read_text() if file.is_file() else None


@contextlib.contextmanager
def told_by_source(s: TextSettings, copies: TextSettings) -> Iterator[None]:
    """Have an error that names a copy name what it was copied from: nothing else can be wrong with it."""
    try:
        yield
    except ConfigError as error:
        told = str(error)
        for source, copy in zip(_paths(s), _paths(copies), strict=True):
            if source and copy and copy != source:
                told = told.replace(copy, source)
        raise ConfigError(told) from error.__cause__


def _paths(s: TextSettings) -> list[str | None]:
    """Return all that is kept, by where these settings find it."""
    return [*(getattr(s.model, name) for name in MODELS), s.reward.model]


def with_origin(m: TextModelSection, path: str | Path) -> TextModelSection:
    """Return the settings with the paths of the copies that a run, or the run of a checkpoint, has; any may lack."""
    origin = _origin(path)
    kept = MODELS if (origin / OWNER).is_file() else ()
    return m.model_copy(update={name: str(origin / name) for name in kept if (origin / name).is_dir()})


def is_origin(path: str | Path, s: TextSettings, built: TextSettings) -> bool:
    """Return whether what was built is what the run, or the run of the checkpoint, `path` began with.

    s: as its config has them, and where nothing was kept they are taken for the same.
    """
    begun = _with_origins(s, path)
    same_models = all(
        getattr(begun.model, name) in (getattr(s.model, name), getattr(built.model, name))
        or _versions(_folder(begun.model, name), name) == _versions(_folder(built.model, name), name)
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
    path = Path(path).expanduser().resolve()
    return (path.parent.parent if path.parent.name == "checkpoints" else path) / ORIGIN


def _keep_origin(s: TextSettings, run: Path, owner: str) -> None:
    """Copy every folder that these settings name a model by into the folder of a new run.

    A hub's models are in its cache. The copies appear by one rename, in the place of what an attempt before has left.
    CheckpointError where they cannot be written.
    """
    folders, judge = {name: _folder(s.model, name) for name in MODELS}, _newest(s.reward.model)
    origin, name = run / ORIGIN, ""
    is_needed = judge is not None or any(folders.values())
    if is_needed and origin.exists() and _owner(run) is None:
        raise ConfigError(
            f"{origin} is in the way: rlx keeps the models that a run begins with under that name; rename it, or give "
            "another run folder."
        )
    try:
        remove_abandoned(run, ORIGIN)
        if _owner(run):  # of a build before this one
            shutil.rmtree(origin)
        if not is_needed:
            return
        with unfinished(origin) as temporary:
            for name, folder in folders.items():
                if folder is not None:
                    (temporary / name).mkdir()
                    for file in _files(folder, name):
                        shutil.copy2(file, temporary / name / file.name)  # with its time, for `is_origin`
            if judge is not None:
                name = REWARD
                _keep_reward_model(*judge, temporary / REWARD)
            (temporary / OWNER).write_text(owner)
            temporary.rename(origin)
    except OSError as error:
        setting = "reward.model" if name == REWARD else f"model.{name}"
        raise CheckpointError(
            f"could not copy {setting} into {origin}, which the run goes on with: {error.strerror or error}."
        ) from error


def _keep_reward_model(name: str, checkpoint: Path, copy: Path) -> None:
    """Keep of a run this checkpoint, the config, and what it began with itself; checkpoints are never written to."""
    run = checkpoint.parent.parent
    for kept, folder in {f"checkpoints/{name}": checkpoint, ORIGIN: run / ORIGIN}.items():
        if folder.is_dir():
            shutil.copytree(folder, copy / kept, copy_function=_link)
    if (run / "config.yaml").is_file():
        shutil.copy2(run / "config.yaml", copy)


def _link(file: str, copy: str) -> None:
    """Have the file under a second name, which takes no room; copy it where that cannot be."""
    try:
        os.link(file, copy)
    except OSError:
        shutil.copy2(file, copy)


def _newest(run: str | None) -> tuple[str, Path] | None:
    """Return name and place of a run's newest checkpoint, or of the one that is named; None where there is none."""
    if run is None:
        return None
    folder = Path(run).expanduser().resolve()
    return (folder.name, folder) if folder.parent.name == "checkpoints" else newest_whole(folder / "checkpoints")


def _checkpoint(run: str | None) -> tuple[str, int] | None:
    """Return name and time of the newest checkpoint."""
    newest = _newest(run)
    return None if newest is None else (newest[0], (newest[1] / STATE_FILE).stat().st_mtime_ns)


def _folder(m: TextModelSection, name: str) -> Path | None:
    """Return the folder of a model or tokenizer of these settings; None where a hub has it, or they name none."""
    if (path := getattr(m, name)) is None:
        return None
    folder = Path(path).expanduser() if name == "tokenizer" else model_folder(path)
    return folder if folder is not None and folder.is_dir() else None


def _files(folder: Path, name: str) -> list[Path]:
    """Return the files of a model, its weights once, or of a tokenizer."""
    files = [file for file in folder.iterdir() if file.is_file()]
    left_out: set[str] = set()
    if name == "tokenizer":
        left_out = {WEIGHTS, *OTHER_WEIGHTS}
    elif any(file.suffix == WEIGHTS for file in files):
        left_out = OTHER_WEIGHTS
    return [file for file in files if file.suffix not in left_out]


def _versions(folder: Path | None, name: str) -> set[tuple[str, int, int]]:
    """Return name, size and time of a model's files."""
    files = [] if folder is None else _files(folder, name)
    return {(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files}
