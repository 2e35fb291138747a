"""Algorithm: builds runners and learners, and runs iterations; a subclass writes one `training_step()` and a loss."""

from __future__ import annotations

import functools
import logging
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from statistics import fmean
from typing import Any, ClassVar, Literal

import numpy as np
import torch

from rlx.building import LazyRuntime, build_learners, build_runners
from rlx.callbacks import PREFIX, Callbacks
from rlx.checkpoint import load_state, save_checkpoint
from rlx.config import AlgorithmConfig
from rlx.errors import ConfigError, RlxError
from rlx.fitting import fit
from rlx.inference import Evaluator, policy_builder
from rlx.learner.learner_group import LearnersLost
from rlx.metrics import COUNTERS, Clock, EpisodeWindow, Metrics
from rlx.rollout.atari import is_atari
from rlx.rollout.env_changes import EnvChange
from rlx.rollout.sample import Sample
from rlx.rollout.spaces import space_to_state
from rlx.run import check_resumable
from rlx.saves import Saves
from rlx.schedule import Schedule
from rlx.section import plain
from rlx.trajectory import Batch, Trajectory

log = logging.getLogger("rlx")


class Algorithm(ABC):
    """One training run: `train()` makes one iteration, `fit()` as many as `stop` allows.

    Subclass with `class PPO(Algorithm, config=PPOConfig)` and write `training_step` and `loss`.
    """

    config_class: ClassVar[type[AlgorithmConfig]]

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

    def __init__(self, config: AlgorithmConfig, run_dir: str | Path | None = None) -> None:
        self.config = config
        self.settings = s = config.settings
        self._is_atari = is_atari(s.environment.id)
        self.training: Any = s.training
        self.iteration = self.env_steps = self.episodes = 0
        self.env_failures = self.runner_restarts = self.learner_restarts = self.dropped_env_steps = 0
        self.total_s = 0.0
        self.best_return: float | None = None
        self.best_iteration: int | None = None
        self.window = EpisodeWindow(s.reporting.window_episodes)
        self.stop_reason = self.stop_request = ""
        self.callbacks = Callbacks(s.callbacks.classes)
        self.saves = Saves(self, None if run_dir is None else Path(run_dir))
        self._runtime = LazyRuntime(s.runtime.engine, self.run_dir)
        self._weights_are_stale = True
        self._advised = False
        self._clock = Clock()
        self._max_age = s.training.max_age if s.env_runners.num_env_runners else 0  # the driver cannot do both at once
        self._ages: list[np.ndarray] = []  # of this iteration's samples
        self._episode_metrics: dict[str, list[float]] = {}
        self._schedules: dict[str, Any] = {}  # those that were changed, as written
        build = policy_builder(s)
        try:
            self.runners = build_runners(s, build, self._runtime, self.callbacks.for_runners())
            self._build_policy = functools.partial(build, *self.runners.spaces())
            self.learners = build_learners(s, self._build_policy, type(self), self._runtime)
            self._evaluator = Evaluator(self._build_policy)
            self.callbacks("on_algorithm_start", self)
        except BaseException:
            self.close()
            raise

    # What a subclass writes -------------------------------------------------------------------------------------

    @abstractmethod
    def training_step(self) -> Metrics:
        """Make one iteration, from experience to published weights; return the learner's stats."""

    @staticmethod
    @abstractmethod
    def loss(policy: Any, minibatch: Batch, coefficients: Mapping[str, Any], training: Any) -> tuple[Any, dict]:
        """Return the scalar to minimise and stats to report, all sums weighted by `minibatch.weight`."""

    prepare: ClassVar[Callable[..., Batch] | None] = None
    """Optional static method (policy, batch, training) -> batch: what the learners do with a batch before its first
    epoch, without gradients, where it depends on their policy: the target policy, if there is one."""

    # What training_step is made of ------------------------------------------------------------------------------

    def sample(self) -> Trajectory:
        """Collect one fragment from every env runner, [T, B]; count its steps and episodes.

        With training.max_age 1 it was collected during the last iteration, and the next one is begun now.
        """
        steps, is_ahead = self.settings.env_runners.rollout_fragment_length, self._max_age > 0
        if self._weights_are_stale and not self.runners.has_begun:
            self.publish()
        sample = self.runners.sample(steps)
        if is_ahead:
            self.publish()
            self.runners.begin(steps)
        self._count(sample)
        return sample.trajectory

    def arrivals(self, count: int, fragments: int, updates: int = 1) -> Iterator[Batch]:
        """Yield `count` batches [T, B], each of the `fragments` that the next env runners finish; count their steps.

        Nobody waits for a slow runner, and while a batch is learned from, in `updates` updates, all go on, as far ahead
        as training.max_age allows. With max_age 0 or 1 it is `sample`, which all runners join.
        """
        while count:
            batch = self.sample().tensors() if self._max_age <= 1 else self._arrival(fragments, updates)
            if batch.mask.any():
                count -= 1
                yield batch
            self.runners.used()

    def _arrival(self, fragments: int, updates: int) -> Batch:
        r = self.settings.env_runners
        if self._weights_are_stale:
            self.publish()
        sample = self.runners.arrive(
            *(r.rollout_fragment_length,),
            per_batch=fragments,
            max_ahead=self._max_age // updates + 1,
            queue_size=r.queue_size,
            when_full=r.when_queue_full,
        )
        self._count(sample)
        batch = sample.trajectory.tensors()
        fresh = batch.mask & (self.learners.version - batch.weights_version <= self._max_age)
        too_old = int(batch.mask.sum() - fresh.sum())
        self.env_steps -= too_old  # which are not learned from
        self.dropped_env_steps += sample.dropped_steps + too_old
        batch.tensors["mask"] = fresh
        return batch

    def _count(self, sample: Sample) -> None:
        self._clock.add(
            env_s=sample.env_s, inference_s=sample.inference_s, transfer_s=sample.transfer_s, wait_s=sample.wait_s
        )
        self.env_steps += sample.env_steps
        self.episodes += len(sample.episodes)
        self.env_failures += sample.env_failures
        self.runner_restarts += sample.runner_restarts
        self.window.add(sample.episodes)
        for name, values in sample.episode_metrics.items():
            self._episode_metrics.setdefault(name, []).extend(values)
        if sample.runner_restarts:
            self.callbacks("on_runner_restart", self, sample.runner_restarts)
        self.callbacks("on_sample_end", self, sample.trajectory)
        if not self._advised and (advice := self.runners.advice()):
            log.warning(advice)
            self._advised = True

    def update(self, batch: Batch, **options: Any) -> dict[str, float]:
        """Run `Learner.update` on all learners, with a seed of its own; return its stats.

        Samples whose `weights_version` is more than training.max_age behind are masked; the ages of others are noted.
        """
        started = time.perf_counter()
        batch = self._without_old(batch)
        stats = self.learners.update(batch, seed=self.seed("update"), **options)
        busy_s = stats.pop("busy_s")
        self._clock.add(learn_s=busy_s, transfer_s=time.perf_counter() - started - busy_s)
        stats.pop("gradient_steps")
        for name, value in stats.items():
            if not math.isfinite(value):
                raise RlxError(
                    f"learner/{name} became {value} in iteration {self.iteration + 1}; checkpoints are untouched. "
                    "Start again with a lower training.lr, or look for extreme rewards and observations."
                )
        return stats

    def _without_old(self, batch: Batch) -> Batch:
        columns = dict(batch.tensors)
        age = self.learners.version - columns.pop("weights_version")
        columns["mask"] = batch.mask & (age <= self.training.max_age)
        self._ages.append(age[columns["mask"]].numpy())
        return Batch(**columns)

    def publish(self) -> None:
        """Send the learners' weights to all env runners.

        A fragment that is being collected ahead keeps the weights that it has begun with; `sample` publishes after it.
        """
        if self._max_age == 1 and self.runners.has_begun:
            self._weights_are_stale = True
            return
        with self._clock.measure("transfer_s"):
            self.runners.publish(self.learners.version, self.learners.weights())
        self._weights_are_stale = False

    def seed(self, purpose: str) -> int:
        """Return the seed of the next update for `purpose`; it depends on the run's seed and updates so far only."""
        entropy = [self.settings.runtime.seed, self.learners.version, *purpose.encode()]
        return int(np.random.SeedSequence(entropy).generate_state(1)[0])

    # What a user calls ------------------------------------------------------------------------------------------

    def train(self) -> Metrics:
        """Make one iteration and return its metrics (names and units: rlx.metrics.METRICS).

        An interrupt or an error in the middle leaves the algorithm usable: the next call starts a clean fragment.
        If the learners are lost and may be started again, it is the iteration after the last checkpoint, or without
        a run folder after the last of every checkpointing.interval iterations.
        """
        while True:
            try:
                self.saves.keep_copy()
                return self._train_once()
            except LearnersLost as lost:
                self.saves.go_back(lost)

    def _train_once(self) -> Metrics:
        self._clock, self._ages, self._episode_metrics = Clock(), [], {}
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
        age = np.concatenate([*self._ages, np.zeros(0, np.int64)])
        times = self._clock.summary()
        self.total_s += float(times["time/iteration_s"] or 0)
        metrics = {
            **{name: getattr(self, name) for name in COUNTERS},
            **({"frames": self.env_steps * self.settings.atari.frame_skip} if self._is_atari else {}),
            "gradient_steps": self.learners.gradient_steps,
            "weights_version": self.learners.version,
            "env_steps_per_s": (self.env_steps - before[0]) / float(times["time/iteration_s"] or 1),
            **self.window.summary(),
            "age_mean": float(age.mean()) if len(age) else 0.0,
            "age_max": int(age.max(initial=0)),
            **{f"learner/{name}": value for name, value in stats.items()},
            **{f"{PREFIX}{name}": fmean(values) for name, values in self._episode_metrics.items()},
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

    @property
    def run_dir(self) -> Path | None:
        """The run folder, if there is one; `fit` makes it."""
        return self.saves.folder

    def request_stop(self, reason: str) -> None:
        """Have `fit` end after this iteration, with a checkpoint, as at a limit; it gives `reason` for it.

        A loop of your own around `train` can look at `stop_request`.
        """
        self.stop_request = reason or "a stop was requested"

    def set_env_attribute(self, name: str, value: Any) -> None:
        """Set an attribute of all environments, through their wrappers: see `call_envs`."""
        self._change_envs("set", name, value)

    def call_envs(self, method: str, *arguments: Any) -> None:
        """Call a method of all environments, such as set_task(level), with plain data.

        It happens when the next episode of each begins; in a VectorEnv, which begins its episodes by itself, before
        the next sample. Environments that are made later, in evaluations, too, get the newest call of each method, and
        so do those of a resumed run: have the method set a state and not add to one.
        """
        self._change_envs("call", method, *arguments)

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

    def evaluate(self, num_episodes: int | None = None, on_frame: Callable | None = None) -> Metrics:
        """Run evaluation episodes on envs of their own, with a frozen copy of the normalizer; return the metrics.

        Nothing that training depends on is touched.
        """
        self.callbacks("on_evaluate_start", self)
        metrics = self.play(num_episodes, on_frame=on_frame)
        self.callbacks.with_metrics("on_evaluate_end", self, metrics)
        return metrics

    def play(self, num_episodes: int | None = None, **options: Any) -> Metrics:
        """Do what `evaluate` does, and tell no callback; options: num_envs, on_frame."""
        return self._evaluator.play(
            *(self.settings, self.learners.weights(), self.runners.normalizer_state(), num_episodes),
            changes=self.runners.env_changes,
            **options,
        )

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
            "spaces": [space_to_state(space) for space in self.runners.spaces()],
            "learners": self.learners.get_state(),
            "runners": self.runners.get_state(),
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
        self.runners.set_state(state["runners"])
        self.training, self._schedules = self.settings.training, {}
        for name, value in state.get("schedules", {}).items():
            self.set_schedule(name, value)
        self.callbacks.set_state(state.get("callbacks", {}))
        self.saves.rewind()
        self.callbacks("on_restore", self)

    def close(self) -> None:
        """End every process and file of this algorithm; closing twice is fine."""
        for name in ("runners", "learners"):
            if part := getattr(self, name, None):
                part.close()
        self._runtime.close()
        self.saves.close()

    # Inside -----------------------------------------------------------------------------------------------------

    def _change_envs(self, kind: Literal["set", "call"], name: str, *arguments: Any) -> None:
        try:
            change = EnvChange(kind, name, tuple(plain(arguments)))
        except ValueError as error:
            raise ConfigError(
                f"{name} of the environments cannot be changed: {error}, as checkpoints keep it."
            ) from error
        self.runners.change_envs(change)
        self._weights_are_stale = True

    def __enter__(self) -> Algorithm:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()
