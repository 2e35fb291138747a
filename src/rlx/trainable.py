"""Trainable: a run and its loop (iterations, limits, checkpoints, callbacks, schedules), whatever it trains."""

from __future__ import annotations

import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from rlx.building import LazyRuntime
from rlx.callbacks import Callbacks
from rlx.checkpoint import load_state, save_checkpoint
from rlx.config import AlgorithmConfig
from rlx.errors import ConfigError, RlxError
from rlx.fitting import fit
from rlx.learner.learner_group import LearnerGroup, LearnersLost
from rlx.metrics import COUNTERS, Clock, EpisodeWindow, Metrics
from rlx.run import check_resumable, check_run_folder
from rlx.saves import Saves
from rlx.schedule import Schedule

log = logging.getLogger("rlx")


class Trainable(ABC):
    """One training run: `train()` makes one iteration, `fit()` as many as `stop` allows.

    `Algorithm` trains on environments, `TextAlgorithm` language models; both are subclassed with
    `class PPO(Algorithm, config=PPOConfig)`.
    """

    config_class: ClassVar[type[AlgorithmConfig]]
    clock_parts: ClassVar[tuple[str, ...]] = Clock.PARTS
    """What the seconds of an iteration are shared out to: time/<part> in the metrics."""
    preload: ClassVar[tuple[str, ...]] = ("numpy", "torch")
    """Modules that actors find imported when they start."""
    learners: LearnerGroup

    def __init_subclass__(cls, config: type[AlgorithmConfig] | None = None, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if config is not None:
            owner = vars(config).get("algorithm_class", cls)
            if (owner.__module__, owner.__qualname__) != (cls.__module__, cls.__qualname__):
                raise TypeError(
                    f"{config.__name__} builds {owner.__name__} already; give {cls.__name__} a config of its own: "
                    f"class {cls.__name__}Config({config.__name__}): ..."
                )
            cls.config_class = config
            config.algorithm_class = cls

    def __init__(
        self, config: AlgorithmConfig, run_dir: str | Path | None = None, restore: str | Path | None = None
    ) -> None:
        self.config = config
        self.settings: Any = config.settings
        s = self.settings
        self.training: Any = s.training
        if run_dir is not None and restore is None:
            check_run_folder(Path(run_dir), config)
        self.iteration = self.env_steps = self.episodes = 0
        self.env_failures = self.runner_restarts = self.learner_restarts = self.dropped_env_steps = 0
        self.total_s = 0.0
        self.best_return: float | None = None
        self.best_iteration: int | None = None
        self.window = EpisodeWindow(s.reporting.window_episodes)
        self.stop_reason = self.stop_request = ""
        self.callbacks = Callbacks(s.callbacks.classes)
        self.saves = Saves(self, None if run_dir is None else Path(run_dir))
        self._goes_on_from = None if restore is None else Path(restore)
        self._runtime = LazyRuntime(s.runtime, self.run_dir, self.preload)
        self._weights_are_stale = True
        self._clock = Clock(self.clock_parts)
        self._schedules: dict[str, Any] = {}  # those that were changed, as written
        try:
            self._build()
            if self._runtime.is_unused:
                self._warn_of_unused_cluster()
            self.callbacks("on_algorithm_start", self)
            if restore is not None:
                self.restore(restore)
        except BaseException:
            self.close()
            raise

    # What a subclass writes -------------------------------------------------------------------------------------

    @abstractmethod
    def training_step(self) -> Metrics:
        """Make one iteration, from experience to published weights; return the learner's stats."""

    @abstractmethod
    def _build(self) -> None:
        """Make the learners and what gathers experience."""

    @abstractmethod
    def _parts_state(self) -> dict[str, Any]:
        """Return the state of what `_build` has made, beside the learners."""

    @abstractmethod
    def _set_parts_state(self, state: Mapping[str, Any]) -> None:
        """Continue from `_parts_state`."""

    @abstractmethod
    def _row(self) -> Metrics:
        """Return what an iteration's row of metrics has of this kind of run, beside what every run has."""

    @abstractmethod
    def evaluate(self, num_episodes: int | None = None) -> Metrics:
        """Measure the policy, touching nothing that training depends on; return the evaluation/ metrics."""

    @abstractmethod
    def close(self) -> None:
        """End every process and file of this run; closing twice is fine."""

    # What training_step is made of ------------------------------------------------------------------------------

    def seed(self, purpose: str) -> int:
        """Return the seed of the next update for `purpose`; it depends on the run's seed and updates so far only."""
        entropy = [self.settings.runtime.seed, self.learners.version, *purpose.encode()]
        return int(np.random.SeedSequence(entropy).generate_state(1)[0])

    def _warn_of_unused_cluster(self) -> None:
        on_text = hasattr(self.settings, "token_runners")
        runners = "token_runners.num_token_runners" if on_text else "env_runners.num_env_runners"
        log.warning(
            "runtime.engine=%s, and nothing of this run is there: runners and learners are in the driver; set %s or "
            "learners.num_learners above 0",
            *(self.settings.runtime.engine, runners),
        )

    def _finite(self, stats: dict[str, float]) -> dict[str, float]:
        for name, value in stats.items():
            if not math.isfinite(value):
                raise RlxError(
                    f"learner/{name} became {value} in iteration {self.iteration + 1}; checkpoints are untouched. "
                    "Start again with a lower training.lr, or look for extreme rewards and observations."
                )
        return stats

    # What a user calls ------------------------------------------------------------------------------------------

    def train(self) -> Metrics:
        """Make one iteration and return its metrics (names and units: rlx.metrics.METRICS).

        An interrupt or an error in the middle leaves the run usable: the next call starts a clean iteration.
        If the learners are lost and may be started again, it is the iteration after the last checkpoint, or without
        a run folder after the last of every checkpointing.interval iterations.
        """
        self.check_open()
        self.saves.check_folder()
        while True:
            try:
                self.saves.keep_copy()
                return self._train_once()
            except LearnersLost as lost:
                self.saves.go_back(lost)

    def _train_once(self) -> Metrics:
        self._clock = Clock(self.clock_parts)
        before, window_before = (self.env_steps, self.episodes), self.window.get_state()
        try:
            # An interrupt inside torch's own no_grad() may leave gradients off; the next iteration needs them.
            with torch.inference_mode(False), torch.enable_grad():
                stats = self.training_step()
        except BaseException:
            self.env_steps, self.episodes = before
            self.window.set_state(window_before)
            self._weights_are_stale = True
            raise
        self.iteration += 1
        times = self._clock.summary()
        self.total_s += float(times["time/iteration_s"] or 0)
        metrics = {
            **{name: getattr(self, name) for name in COUNTERS},
            "gradient_steps": self.learners.gradient_steps,
            "weights_version": self.learners.version,
            "env_steps_per_s": (self.env_steps - before[0]) / float(times["time/iteration_s"] or 1),
            **self.window.summary(),
            **{f"learner/{name}": value for name, value in stats.items()},
            **self._row(),
            "time/total_s": self.total_s,
            **times,
        }
        self.callbacks.with_metrics("on_train_result", self, metrics)
        return metrics

    def fit(self) -> Metrics:
        """Train until a limit of `stop` is reached; return the last iteration's metrics.

        With a run folder, every iteration is logged and checkpoints are saved. Ctrl-C ends the run after the
        current iteration, with a checkpoint; a second one at once. So does SIGTERM.
        """
        return fit(self)

    def check_open(self) -> None:
        """Raise RlxError where it was closed."""
        if self._runtime.is_closed:
            raise RlxError("this algorithm was closed, and its processes with it; build it again from its config.")

    def finish(self) -> None:  # noqa: B027 - most have nothing to do
        """Do what `fit` ends with, after its last checkpoint."""

    @property
    def run_dir(self) -> Path | None:
        """The run folder, if there is one; `fit` makes it."""
        return self.saves.folder

    def request_stop(self, reason: str) -> None:
        """Have `fit` end after this iteration, with a checkpoint, as at a limit; it gives `reason` for it.

        A loop of your own around `train` can look at `stop_request`.
        """
        self.stop_request = reason or "a stop was requested"

    def set_schedule(self, name: str, value: Any) -> None:
        """Change a setting of `training` that may be a schedule, such as lr, for the iterations to come.

        value: a number or {start, end, env_steps}. A resumed run goes on with it; the config stays as it was.
        """
        if not isinstance(getattr(self.training, name, None), Schedule):
            names = ", ".join(key for key, one in self.training if isinstance(one, Schedule))
            raise ConfigError(f"training.{name} is no schedule, so it cannot change in mid-run; {names} can.")
        new = getattr(self.config.copy().set(f"training.{name}", value).settings.training, name)
        self.training = self.training.model_copy(update={name: new})
        self._schedules[name] = new.written()

    def save(self, path: str | Path) -> Path:
        """Save everything that exact resume needs as the folder `path`; return it."""
        return save_checkpoint(Path(path), self.get_state())

    def restore(self, path: str | Path) -> None:
        """Continue from a checkpoint folder, or from the newest checkpoint of a run folder."""
        path = Path(path)
        self.set_state(load_state(path))
        self.saves.restored(path)

    def get_state(self) -> dict[str, Any]:
        """Return the whole state as a tree of plain values and numpy arrays."""
        return {
            "config": self.config.to_dict(),
            **{name: getattr(self, name) for name in COUNTERS},
            "total_s": self.total_s,
            "best_return": self.best_return,
            "best_iteration": self.best_iteration,
            "window": self.window.get_state(),
            "learners": self.learners.get_state(),
            **self._parts_state(),
            "schedules": dict(self._schedules),
            "callbacks": self.callbacks.get_state(),
        }

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Continue from `get_state`; CheckpointError if it comes from another config."""
        check_resumable(type(self.config).from_dict(state["config"]), self.config, "the checkpoint")
        for name in (*COUNTERS, "total_s", "best_return", "best_iteration"):
            setattr(self, name, state.get(name, 0))  # older checkpoints lack some counters
        self.window.set_state(state["window"])
        self._weights_are_stale = True
        self.learners.set_state(state["learners"])
        self._set_parts_state(state)
        self.training, self._schedules = self.settings.training, {}
        for name, value in state.get("schedules", {}).items():
            self.set_schedule(name, value)
        self.callbacks.set_state(state.get("callbacks", {}))
        self.saves.rewind()
        self.callbacks("on_restore", self)

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()
