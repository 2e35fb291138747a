"""A run is a folder: what was run, what came of it, and what it needs to go on.

config.yaml      every setting
manifest.json    versions, seed, command, start time
metrics.jsonl    one line an iteration
samples.jsonl    some completions of each iteration, in runs on text
model/           the model as transformers loads it, at the end of runs on text
origin/          copies of the models that a run on text began with, where they were folders
checkpoints/     iter_000010/ ...
videos/          evaluation episodes, if evaluation.video asks for them
logs/driver.log  what the driver logged
"""

from __future__ import annotations

import json
import logging
import os
import platform
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from rlx.checkpoint import checkpoint_name, prune, save_checkpoint
from rlx.config import AlgorithmConfig
from rlx.config_document import flow
from rlx.errors import CheckpointError, ConfigError
from rlx.metrics import JsonlWriter, Metrics, TensorBoardWriter, read_metrics
from rlx.settings import FREE_ON_RESUME

log = logging.getLogger("rlx")

SAMPLES = "samples.jsonl"
RECORDED_PACKAGES = (
    *("rlx", "torch", "gymnasium", "numpy", "cloudpickle", "pydantic", "mujoco", "ale-py"),
    *("transformers", "tokenizers", "peft"),
)


class Run:
    """An open run folder. One process at a time may hold it."""

    def __init__(self, folder: Path, *, tensorboard: bool = False) -> None:
        self.folder = folder
        self.checkpoints = folder / "checkpoints"
        self.checkpoints.mkdir(exist_ok=True)
        (folder / "logs").mkdir(exist_ok=True)
        self._lock = _lock(folder / "lock")
        self._log_handler = logging.FileHandler(folder / "logs" / "driver.log")
        self._log_handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        log.addHandler(self._log_handler)
        self._metrics_file: JsonlWriter | None = None
        self._samples_file: JsonlWriter | None = None
        self._tensorboard = TensorBoardWriter(folder / "tensorboard") if tensorboard else None

    @classmethod
    def create(cls, folder: Path, config_yaml: str, seed: int, *, tensorboard: bool = False) -> Run:
        """Make the folder of a new run; a folder that already holds one is refused."""
        check_new_run(folder)
        with _writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            run = cls(folder, tensorboard=tensorboard)
        try:
            _replace_text(folder / "manifest.json", json.dumps(_manifest(seed), indent=2) + "\n")
            run.write_config(config_yaml)
        except BaseException:
            run.close()
            raise
        return run

    @classmethod
    def open(cls, folder: Path, *, tensorboard: bool = False) -> Run:
        """Open the folder of an existing run, to go on with it."""
        if not holds_run(folder):
            raise CheckpointError(f"{folder} is no run folder: it has no config.yaml.")
        with _writing(folder):
            return cls(folder, tensorboard=tensorboard)

    def write_config(self, config_yaml: str) -> None:
        """Write config.yaml: every setting, with the limits that the run goes on with."""
        _replace_text(self.folder / "config.yaml", config_yaml)

    def write_metrics(self, metrics: Metrics) -> None:
        """Append one iteration's metrics to metrics.jsonl, and to TensorBoard if that is on."""
        with _writing(self.folder):
            self._metrics_file = self._metrics_file or JsonlWriter(self.folder / "metrics.jsonl")
            self._metrics_file.write(metrics)
            if self._tensorboard is not None:
                self._tensorboard.write(metrics)

    def write_samples(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Append completions of one iteration to samples.jsonl."""
        with _writing(self.folder):
            self._samples_file = self._samples_file or JsonlWriter(self.folder / SAMPLES)
            for row in rows:
                self._samples_file.write(row)

    def save(self, iteration: int, state: dict[str, Any], *, keep: int, best_iteration: int | None) -> Path:
        """Save a checkpoint; keep the newest `keep` and the best one."""
        folder = save_checkpoint(self.checkpoints / checkpoint_name(iteration), state)
        prune(self.checkpoints, keep, set() if best_iteration is None else {checkpoint_name(best_iteration)})
        return folder

    def rewind(self, iteration: int) -> None:
        """Go back to `iteration`: rows of metrics and samples after it are dropped, for they will come again."""
        for writer in (self._metrics_file, self._samples_file):
            if writer is not None:
                writer.close()
        self._metrics_file = self._samples_file = None
        for file in (self.folder / "metrics.jsonl", self.folder / SAMPLES):
            if file.exists():
                rows = [row for row in read_metrics(file) if row["iteration"] <= iteration]
                _replace_text(file, "".join(json.dumps(row) + "\n" for row in rows))

    def close(self) -> None:
        """Close every file of the run and release it."""
        for writer in (self._metrics_file, self._samples_file, self._tensorboard):
            if writer is not None:
                writer.close()
        log.removeHandler(self._log_handler)
        self._log_handler.close()
        os.close(self._lock)


def holds_run(folder: Path) -> bool:
    """Return whether a run has begun in `folder`."""
    return (folder / "config.yaml").exists()


def check_new_run(folder: Path) -> None:
    """Raise ConfigError where no new run can be made in `folder`; makes nothing."""
    if holds_run(folder):
        raise ConfigError(
            f"{folder} already holds a run; go on with `rlx train --resume {folder}` or choose another --run-dir."
        )
    parent = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not (parent.is_dir() and os.access(parent, os.W_OK | os.X_OK)):
        fault = "is not writable" if parent.is_dir() else "is a file"
        raise ConfigError(f"the run folder {folder} cannot be made: {parent} {fault}; choose another --run-dir.")


def check_run_folder(folder: Path, config: AlgorithmConfig) -> None:
    """Raise where `folder` can hold no run of this config: a new one, or that which is there, to be gone on with."""
    if not holds_run(folder):
        check_new_run(folder)
        return
    try:
        saved = type(config).from_yaml((folder / "config.yaml").read_text())
    except ConfigError:  # of another algorithm, say
        check_new_run(folder)
        raise
    check_resumable(saved, config, str(folder))


def check_resumable(saved: AlgorithmConfig, wanted: AlgorithmConfig, subject: str) -> None:
    """Raise CheckpointError where going on with `wanted` would bend the training curve that `saved` began."""
    changes = {key: pair for key, pair in saved.diff(wanted).items() if key.partition(".")[0] not in FREE_ON_RESUME}
    if changes:
        listed = ", ".join(f"{key} was {flow(old)} and would be {flow(new)}" for key, (old, new) in changes.items())
        raise CheckpointError(
            f"{subject} was trained with other settings: {listed}. Only {', '.join(FREE_ON_RESUME)} may change when a "
            "run goes on; leave the rest as it was, or start a new run."
        )


def default_run_folder(algorithm: str, env: str) -> Path:
    """Return runs/<algorithm>-<env>-<time>, a path that does not exist yet."""
    algorithm = algorithm.removesuffix(".py").rpartition("/")[2]
    stem = f"{algorithm}-{env}-{datetime.now():%Y%m%d-%H%M%S}".replace("/", "-").replace(":", "-")
    folder, number = Path("runs") / stem, 1
    while folder.exists():
        number += 1
        folder = Path("runs") / f"{stem}-{number}"
    return folder


def _replace_text(file: Path, text: str) -> None:
    """Write `file` all or nothing: a full disk leaves the old one."""
    temporary = file.with_suffix(".tmp")
    try:
        with _writing(file):
            temporary.write_text(text)
            os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Say which file of a run could not be written."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"could not write {error.filename or path}: {error.strerror or error}; saved checkpoints are untouched."
        ) from error


def _lock(file: Path) -> int:
    """Return a descriptor that holds the folder until it is closed or the process ends, however it ends."""
    import fcntl

    descriptor = os.open(file, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        owner = os.read(descriptor, 32).decode() or "unknown"
        os.close(descriptor)
        raise CheckpointError(
            f"{file.parent} is in use by process {owner}; wait for it to end, or end it, before resuming."
        ) from None
    os.ftruncate(descriptor, 0)
    os.write(descriptor, str(os.getpid()).encode())
    return descriptor


def _manifest(seed: int) -> dict[str, Any]:
    versions = {}
    for package in RECORDED_PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {
        "command": sys.argv,
        "seed": seed,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": versions,
    }
