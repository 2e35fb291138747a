"""Saves: what is kept of an algorithm's progress, and what it goes back to: a run folder, or a copy in memory."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlx.checkpoint import is_run, load_newest
from rlx.learner.learner_group import LearnersLost
from rlx.metrics import Metrics
from rlx.run import Run, check_new_run

if TYPE_CHECKING:
    from rlx.trainable import Trainable

log = logging.getLogger("rlx")


class Saves:
    """The run folder of an algorithm, from the first `open` on. Without a folder only a copy in memory is kept."""

    def __init__(self, algorithm: Trainable, folder: Path | None) -> None:
        self.folder = folder
        self.run: Run | None = None
        self._algorithm = algorithm
        self._restored_run: Path | None = None
        self._saved_iteration: int | None = None
        self._copy: dict[str, Any] | None = None  # to go back to, without a run folder

    def open(self) -> None:
        """Make the run folder, or go on with the one that the algorithm was restored from."""
        if self.folder is None or self.run is not None:
            return
        a, s = self._algorithm, self._algorithm.settings
        if self._restored_run == self.folder.resolve():
            self.run = Run.open(self.folder, tensorboard=s.reporting.tensorboard)
            self.run.rewind(a.iteration)
            log.info("resuming %s from iteration %d", self.folder, a.iteration)
            self.run.write_config(a.config.to_yaml())
        else:
            yaml = a.config.to_yaml()
            self.run = Run.create(self.folder, yaml, s.runtime.seed, tensorboard=s.reporting.tensorboard)
            self.save()  # a run killed before its first interval resumes from here

    def check_folder(self) -> None:
        """Raise ConfigError where the folder cannot be opened, as it holds a run that was not restored."""
        if self.folder is not None and self.run is None and self._restored_run != self.folder.resolve():
            check_new_run(self.folder)

    def write_metrics(self, metrics: Metrics) -> None:
        """Append one iteration's metrics to the run folder."""
        if self.run is not None:
            self.run.write_metrics(metrics)

    def save(self) -> None:
        """Save a checkpoint in the run folder, unless there is none, or nothing new."""
        a, c = self._algorithm, self._algorithm.settings.checkpointing
        if self.run is None or self._saved_iteration == a.iteration:
            return
        folder = self.run.save(a.iteration, a.get_state(), keep=c.keep, best_iteration=a.best_iteration)
        self._saved_iteration = a.iteration
        a.callbacks("on_checkpoint", a, folder)

    def keep_copy(self) -> None:
        """Keep what `go_back` needs where no run folder holds it."""
        s, iteration = self._algorithm.settings, self._algorithm.iteration
        if self.run is not None or not s.learners.num_learners or not s.fault_tolerance.max_restarts:
            return
        interval, kept = s.checkpointing.interval, self._copy
        if kept is None or (interval and iteration % interval == 0 and kept["iteration"] != iteration):
            self._copy = copy.deepcopy(self._algorithm.get_state())  # deep: arrays of actors are views of their memory

    def go_back(self, lost: LearnersLost) -> None:
        """Continue from the last checkpoint with the learners that were started again."""
        a = self._algorithm
        state = self._copy if self.run is None else load_newest(self.run.checkpoints)[1]
        if state is None:  # they went down before there was anything to keep
            raise lost
        while True:
            log.warning(
                "%s The learners are started again, and the run goes back to iteration %d.", lost, state["iteration"]
            )
            restarts = a.runner_restarts, a.learner_restarts + 1
            try:
                a.set_state(copy.deepcopy(state))  # who continues may go on with the very objects
                return
            except LearnersLost as again:
                lost = again
            finally:  # these are about what happened, which no going back undoes
                a.runner_restarts, a.learner_restarts = restarts
                self._copy = None if self.run else state

    def restored(self, path: Path) -> None:
        """Know that the algorithm was restored from `path`, a run or a checkpoint."""
        self._restored_run = path.resolve() if is_run(path) else None

    def rewind(self) -> None:
        """Forget what came after the iteration that the algorithm has just been set to."""
        self._saved_iteration = self._copy = None
        if self.run is not None:
            self.run.rewind(self._algorithm.iteration)

    def close(self) -> None:
        """Close the run folder; closing twice is fine."""
        if self.run is not None:
            self.run.close()
            self.run = None
