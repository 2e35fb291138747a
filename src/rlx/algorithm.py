"""Algorithm: training on environments, with runners and learners; a subclass writes a `training_step()` and a loss."""

from __future__ import annotations

import functools
import logging
import time
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from statistics import fmean
from typing import Any, ClassVar, Literal

import numpy as np

from rlx.building import build_learners, build_runners
from rlx.callbacks import PREFIX
from rlx.errors import ConfigError
from rlx.inference import Evaluator, policy_builder
from rlx.metrics import Metrics
from rlx.rollout.atari import is_atari
from rlx.rollout.env_changes import EnvChange
from rlx.rollout.sample import Sample
from rlx.rollout.spaces import space_to_state
from rlx.section import plain
from rlx.settings import Settings
from rlx.trainable import Trainable
from rlx.trajectory import Batch, Trajectory

log = logging.getLogger("rlx")


class Algorithm(Trainable):
    """One training run on environments: `train()` makes one iteration, `fit()` as many as `stop` allows.

    Subclass with `class PPO(Algorithm, config=PPOConfig)` and write `training_step` and `loss`.
    """

    settings: Settings

    def _build(self) -> None:
        s = self.settings
        self._is_atari = is_atari(s.environment.id)
        self._advised = False
        self._max_age = s.training.max_age if s.env_runners.num_env_runners else 0  # the driver cannot do both at once
        self._ages: list[np.ndarray] = []  # of this iteration's samples
        self._episode_metrics: dict[str, list[float]] = {}
        build = policy_builder(s)
        self.runners = build_runners(s, build, self._runtime, self.callbacks.for_runners())
        self._build_policy = functools.partial(build, *self.runners.spaces())
        self.learners = build_learners(s, self._build_policy, type(self), self._runtime)
        if s.learners.num_learners:  # which have claimed on a cluster what was kept for them
            self.runners.keep_cpus(0)
        self._evaluator = Evaluator(self._build_policy)

    # What a subclass writes -------------------------------------------------------------------------------------

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

    def arrivals(self, count: int, fragments: int | None, updates: int = 1) -> Iterator[Batch]:
        """Yield `count` batches [T, B], each of the `fragments` that the next env runners finish; count their steps.

        None: as many as there are env runners.

        Nobody waits for a slow runner, and while a batch is learned from, in `updates` updates, all go on, as far ahead
        as training.max_age allows. With max_age 0 or 1 it is `sample`, which all runners join.
        """
        while count:
            batch = self.sample().tensors() if self._max_age <= 1 else self._arrival(fragments, updates)
            if batch.mask.any():
                count -= 1
                yield batch
            self.runners.used()

    def _arrival(self, fragments: int | None, updates: int) -> Batch:
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
        return self._finite(stats)

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

    # What a user calls ------------------------------------------------------------------------------------------

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

    def evaluate(self, num_episodes: int | None = None, on_frame: Callable | None = None) -> Metrics:
        """Run evaluation episodes on envs of their own, with a frozen copy of the normalizer; return the metrics.

        Nothing that training depends on is touched.
        """
        self.check_open()
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

    def close(self) -> None:
        """End every process and file of this algorithm; closing twice is fine."""
        for name in ("runners", "learners"):
            if part := getattr(self, name, None):
                part.close()
        self._runtime.close()
        self.saves.close()

    # Inside -----------------------------------------------------------------------------------------------------

    def _train_once(self) -> Metrics:
        self._ages, self._episode_metrics = [], {}
        return super()._train_once()

    def _row(self) -> Metrics:
        age = np.concatenate([*self._ages, np.zeros(0, np.int64)])
        return {
            **({"frames": self.env_steps * self.settings.atari.frame_skip} if self._is_atari else {}),
            "num_env_runners": self.runners.num_runners,
            "age_mean": float(age.mean()) if len(age) else 0.0,
            "age_max": int(age.max(initial=0)),
            **{f"{PREFIX}{name}": fmean(values) for name, values in self._episode_metrics.items()},
        }

    def _parts_state(self) -> dict[str, Any]:
        return {
            "spaces": [space_to_state(space) for space in self.runners.spaces()],
            "runners": self.runners.get_state(),
        }

    def _set_parts_state(self, state: Mapping[str, Any]) -> None:
        self.runners.set_state(state["runners"])

    def _change_envs(self, kind: Literal["set", "call"], name: str, *arguments: Any) -> None:
        try:
            change = EnvChange(kind, name, tuple(plain(arguments)))
        except ValueError as error:
            raise ConfigError(
                f"{name} of the environments cannot be changed: {error}, as checkpoints keep it."
            ) from error
        self.runners.change_envs(change)
        self._weights_are_stale = True
