"""TextAlgorithm: training language models, from prompts that are completed and scored, or from examples."""

from __future__ import annotations

import functools
import logging
import time
import uuid
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from rlx.errors import ConfigError
from rlx.functional.aggregation import token_mean
from rlx.generation.request import Sampling
from rlx.metrics import Clock, Metrics
from rlx.nets.flat import FlatParameters
from rlx.out_of_memory import out_of_memory_told
from rlx.policy_distance import mismatch_kl, reference_kl
from rlx.rollout.served_runners import ServedRunners
from rlx.rollout.token_runners import TokenRunners
from rlx.samples import sample_records
from rlx.schedule import Schedule
from rlx.text.order import order
from rlx.text.prompts import Prompt, load_prompts
from rlx.text.sources import named
from rlx.text_building import (
    build_learners,
    build_rollouts,
    build_runners,
    build_scorer,
    build_text_envs,
    longest_sequence,
    plan_memory,
    warn_of_context,
)
from rlx.text_models import EXPORT, build_model, build_policy, build_tokenizer, export_model, fitted
from rlx.text_origin import as_begun, check_copies, drop_copies, is_origin, told_by_source, with_copies
from rlx.text_rollouts import EVALUATION, Rollout, Rollouts
from rlx.text_settings import TextSettings
from rlx.trainable import Trainable
from rlx.trajectory import Batch

log = logging.getLogger("rlx")


class TextAlgorithm(Trainable):
    """One training run of a language model: `train()` makes one iteration, `fit()` as many as `stop` allows.

    Subclass with `class GRPO(TextAlgorithm, config=GRPOConfig)` and write `training_step` and `loss`. Rows are
    sequences [S, L], see `rlx.rollout.token_rows`; a step is a token, so env_steps counts tokens: those generated, or
    in supervised training those learned from. An episode is a completion, its return the score.
    """

    settings: TextSettings
    clock_parts: ClassVar[tuple[str, ...]] = ("generate_s", "score_s", "logp_s", "train_s", "sync_s")
    preload: ClassVar[tuple[str, ...]] = ("numpy", "torch", "rlx.text_algorithm", "rlx.reward_models")
    with_value: ClassVar[bool] = False
    """Whether the policy has a value function."""
    _owner = ""

    # What a subclass writes -------------------------------------------------------------------------------------

    @staticmethod
    @abstractmethod
    def loss(policy: Any, minibatch: Batch, coefficients: Mapping[str, Any], training: Any) -> tuple[Any, dict]:
        """Return the scalar to minimise and stats to report, all sums weighted by `minibatch.weight`."""

    @staticmethod
    def weigh(mask: Tensor, training: Any, max_new_tokens: int) -> Tensor:
        """Return the weights of a minibatch's tokens, by which losses are summed: those of the mean over all."""
        return token_mean(mask)

    @staticmethod
    def needs_reference(training: Any) -> bool:
        """Return whether the policy as it was at the beginning has to be kept, to measure KL against."""
        return False

    @classmethod
    def generates(cls, s: TextSettings) -> bool:
        """Return whether completions are drawn: to learn from, or to evaluate what supervised training has made."""
        is_scored = s.reward.is_set or s.environment.env is not None
        return not cls.config_class.is_supervised() or (s.evaluation.source is not None and is_scored)

    @classmethod
    def policy_builder(cls, s: TextSettings, vocabulary: int) -> Callable[[], Any]:
        """Return what makes the policy that learners train; it is sent to them, so it holds plain values only."""
        return functools.partial(
            build_policy,
            s.model,
            vocabulary=vocabulary,
            seed=s.runtime.seed,
            temperature=s.generation.temperature,
            with_value=cls.with_value,
            with_reference=cls.needs_reference(s.training),
            layout=s.learners.layout,
            activation_checkpointing=s.learners.activation_checkpointing,
            compile=s.learners.compile,
        )

    @classmethod
    def load_rows(cls, source: Any, kwargs: Mapping[str, Any], settings: TextSettings, tokenizer: Any) -> Sequence[Any]:
        """Return the rows that a supervised algorithm learns from; `collate` makes a batch of some of them."""
        raise NotImplementedError(f"{cls.__name__} learns from prompts")

    @staticmethod
    def collate(rows: Sequence[Any]) -> Batch:
        """Return the batch of these rows."""
        raise NotImplementedError

    # What training_step is made of ------------------------------------------------------------------------------

    def sample(self) -> Batch:
        """Have the next prompts completed and scored; count tokens and completions; return the rows [S, L]."""
        assert self.rollouts is not None
        if self._weights_are_stale:
            self.publish()
        with self._generating():
            rollout = self.rollouts.sample(self._clock)
        self._rollout = rollout
        made = rollout.completions
        age = self.learners.version - (made.version if made.drawn is None else made.version[made.drawn])
        self._ages = {"age_mean": float(age.mean()), "age_max": int(age.max())} if len(age) else {}
        self.dropped_env_steps += self.rollouts.take_dropped()
        length = rollout.completions.drawn_length
        self.env_failures += rollout.env_failures
        self.env_steps += int(length.sum())
        self.episodes += len(length)
        self.runner_restarts += self.rollouts.take_restarts()
        counted = zip(rollout.score[rollout.counts], length[rollout.counts], strict=True)
        self.window.add([(float(score), int(steps)) for score, steps in counted])
        self.callbacks("on_sample_end", self, rollout.trajectory)
        return rollout.batch

    def examples(self) -> Batch:
        """Return the next rows of `data`, and count their tokens."""
        d = self.settings.data
        chosen = order(len(self.rows), self.position, d.rows_per_iteration, self.settings.runtime.seed, d.shuffle)
        self.position += d.rows_per_iteration
        batch = self.batch_of([self.rows[int(index)] for index in chosen])
        self.env_steps += int(batch.mask.sum())
        return batch

    def batch_of(self, rows: Sequence[Any]) -> Batch:
        """Return all that `loss` needs of these rows of `data`."""
        return self.collate(rows)

    def with_columns(self, batch: Batch, *names: str) -> Batch:
        """Return the batch with "logp", "entropy", "value" or "ref_logp" of its rows, by the learners' policy."""
        with self._clock.measure("logp_s"), self._learning("the learners' forward passes"):
            found = self.learners.evaluate(batch, *names)
        return Batch(**(batch.tensors | found.tensors))

    def with_old_logp(self, batch: Batch) -> Batch:
        """Return the batch with `old_logp`, by the policy before the update, where `old_policy` needs it."""
        is_drawn_here = self.settings.token_runners.engine == "rlx"
        if is_drawn_here and (not self.training.max_age or self._takes_one_step(batch)):
            return batch
        with self._clock.measure("logp_s"):
            found = self.learners.evaluate(batch, "logp")
        batch = Batch(**batch.tensors, old_logp=found.logp)
        self._mismatch_kl = mismatch_kl(batch, self.learners.version)
        return batch

    def update(self, batch: Batch, **options: Any) -> Metrics:
        """Run `Learner.update` on all learners with the settings' epochs and minibatches; return its stats."""
        t = self.training
        options = {"lr": self.lr(t.lr)} | options
        started = time.perf_counter()
        with self._learning("an update"):
            stats = self.learners.update(
                batch,
                epochs=t.epochs,
                minibatch_sequences=t.minibatch_sequences,
                seed=self.seed("update"),
                **options,
            )
        self._clock.add(train_s=time.perf_counter() - started)
        self._batch, self._weights_are_stale = batch, True
        for name in ("busy_s", "gradient_steps", "stopped_early"):
            stats.pop(name)
        is_fresh = self._ages.get("age_max") == 0 and "old_logp" not in batch.tensors
        if is_fresh and "kl" in stats and self._takes_one_step(batch):  # the step's KL is to who drew the tokens
            total = self.weigh(batch.mask, t, self.settings.generation.max_new_tokens).sum().item()
            self._mismatch_kl = stats["kl"] / total if total else None
        return {**self._finite(stats), "lr": options["lr"]}

    def _takes_one_step(self, batch: Batch) -> bool:
        rows = len(batch.mask)
        return self.training.epochs == 1 and (self.training.minibatch_sequences or rows) >= rows

    def lr(self, schedule: Schedule) -> float:
        """Return what a step size is at this moment of the run."""
        warmup = self.training.lr_warmup
        return schedule.at(self.env_steps) * (min(1.0, self.env_steps / warmup) if warmup else 1.0)

    def publish(self) -> None:
        """Have all completions that begin from now on made with the learners' weights."""
        if self.runners is not None:
            with self._clock.measure("sync_s"):
                weights = functools.partial(self.learners.weights, copy=False)
                self._sync_bytes = self.runners.publish(self.learners.version, weights)
        self._weights_are_stale = False

    # What a user calls ------------------------------------------------------------------------------------------

    def evaluate(self, num_episodes: int | None = None, seed: int = 0) -> Metrics:
        """Complete and score the evaluation's prompts, or measure the loss on its examples; touch no training state.

        num_episodes: how many rows; default: evaluation.num_rows. seed: of the first prompt's draws, the next ones
        count up.
        """
        self.check_open()
        self.callbacks("on_evaluate_start", self)
        metrics = self._evaluate(num_episodes or self.settings.evaluation.num_rows, seed)
        self.callbacks.with_metrics("on_evaluate_end", self, metrics)
        return metrics

    @property
    def rollout(self) -> Rollout | None:
        """The completions of this iteration with their prompts and scores, for callbacks; None where none are drawn."""
        return self._rollout

    def export(self, folder: str | Path) -> Path:
        """Write the model as it is now, adapter merged, and its tokenizer, as from_pretrained(folder) reads them.

        folder: a new or an empty one, else ConfigError.
        """
        return self._export(folder)

    def restore(self, path: str | Path) -> None:
        """Continue from a checkpoint folder, or from the newest checkpoint of a run folder, beside its own models.

        If these are others, all is built anew; where that fails nothing is left to go on with, and it is closed.
        """
        if is_origin(path, self.settings, self._fitted):
            super().restore(path)
            return
        try:
            self._goes_on_from = Path(path)
            self._close_parts()
            self._build()
            super().restore(path)
        except BaseException:
            self.close()
            raise

    def check_open(self) -> None:
        """Raise RlxError where it was closed, ConfigError where the models that it was built with are gone."""
        super().check_open()
        if self.run_dir is not None:
            check_copies(self._fitted, self.run_dir)

    def close(self) -> None:
        """End every process and file of this run; closing twice is fine."""
        self._close_parts()
        self._runtime.close()
        self.saves.close()
        drop_copies(self.run_dir, self._owner)

    def finish(self) -> None:
        """Export the model into the run folder, as `fit` does at its end."""
        if self.run_dir is not None:
            self._export(self.run_dir / EXPORT, replace=True)

    # Inside -----------------------------------------------------------------------------------------------------

    def _close_parts(self) -> None:
        for name in ("rollouts", "learners"):
            if (part := getattr(self, name, None)) is not None:
                part.close()

    def _build(self) -> None:
        self._owner = uuid.uuid4().hex  # of the copies of models in the run folder
        s = as_begun(self.settings, self._goes_on_from, self.run_dir)
        self.position = 0
        self.numbers: dict[str, float] = {}  # what an algorithm keeps from iteration to iteration, as a KL coefficient
        self.rows: Sequence[Any] = ()
        self.runners: TokenRunners | ServedRunners | None = None
        self.rollouts: Rollouts | None = None
        self._evaluation_rows: Sequence[Any] = ()
        self._rollout: Rollout | None = None
        self._batch: Batch | None = None
        self._ages: Metrics = {}
        self._sync_bytes = 0
        self._mismatch_kl: float | None = None  # of this iteration, where it is known
        self.tokenizer = build_tokenizer(s.model)
        self._fitted = s = fitted(s, self.tokenizer)
        self._prompts: Sequence[Prompt] = ()
        with named(f"{self.config.reads}.source"):
            if self.config.is_supervised():
                self.rows = self._examples(s.data)
            else:
                self._prompts = self._questions(s.prompts)
        with named("evaluation.source"):
            if s.evaluation.source is not None:
                load = self._questions if self.generates(s) else self._examples
                self._evaluation_rows = load(s.evaluation)
        self._fitted = copied = with_copies(s, self.run_dir, self._owner)
        with told_by_source(s, copied):
            self._build_parts(copied)

    def _examples(self, section: Any) -> Sequence[Any]:
        """Return the rows to learn from that the source of `data` or `evaluation` holds."""
        return self.load_rows(section.source, section.kwargs, self._fitted, self.tokenizer)

    def _questions(self, section: Any) -> Sequence[Prompt]:
        """Return the prompts that the source of `prompts` or `evaluation` holds."""
        p = self._fitted.prompts
        return load_prompts(section.source, self.tokenizer, p.max_prompt_tokens, p.when_too_long, section.kwargs)

    def _build_parts(self, s: TextSettings) -> None:
        vocabulary = len(self.tokenizer)
        self._make_model = functools.partial(build_model, s.model, vocabulary, s.runtime.seed)
        make_policy = self.policy_builder(s, vocabulary)
        if s.learners.num_learners:  # before any process starts
            self._announce_plan(make_policy())
        weigh = functools.partial(self.weigh, training=s.training, max_new_tokens=s.generation.max_new_tokens)
        self.learners = build_learners(s, make_policy, self.loss, weigh, self._runtime)
        if self.learners.local_policy is not None:
            self._announce_plan(self.learners.local_policy)
        if self.generates(s):
            scorer = build_scorer(s, self._prompts, self.tokenizer, self._runtime, self.learners.device)
            questions = [*self._prompts, *(self._evaluation_rows if s.evaluation.source is not None else ())]
            warn_of_context(s, questions, self.tokenizer)
            longest = max((len(prompt.tokens) for prompt in self._prompts), default=0)
            with self._generating():
                parts = (self.learners, self._runtime, longest, self.export)
                self.runners = build_runners(s, self._make_model, *parts)
            envs = build_text_envs(s, self.tokenizer, self._runtime)
            self.rollouts = build_rollouts(s, self._prompts, self.tokenizer, self.runners, scorer, envs)

    def _announce_plan(self, policy: Any) -> None:
        """Log how updates are cut and what memory they need; ConfigError where a device has too little."""
        s = self._fitted
        if self.config.is_supervised():
            sequences, longest = s.data.rows_per_iteration, max(map(len, self.rows))
        else:
            sequences = s.prompts.prompts_per_iteration * s.prompts.samples_per_prompt
            longest = longest_sequence(s, self._prompts, self.tokenizer)
        self._plan = plan_memory(s, policy, sequences, longest, generates=not self.config.is_supervised())
        log.info("%s", self._plan)

    def _learning(self, doing: str) -> AbstractContextManager[None]:
        """Have it told with the plan where the learners' memory runs out."""
        return out_of_memory_told(doing, self._plan.memory, self._plan.less_in_updates)

    def _generating(self) -> AbstractContextManager[None]:
        """Have it told with the plan where memory runs out while completions are drawn and scored."""
        return out_of_memory_told("generation or its reward", self._plan.memory, self._plan.less_in_generation)

    def _export(self, folder: str | Path, *, replace: bool = False) -> Path:
        with torch.no_grad():
            return export_model(self._model_now(), self.tokenizer, folder, replace=replace)

    def _train_once(self) -> Metrics:
        self._rollout = self._batch = self._mismatch_kl = None
        position, rollouts = self.position, None if self.rollouts is None else self.rollouts.get_state()
        try:
            metrics = super()._train_once()
        except BaseException:  # no row is passed over: what was not learned from is taken once more
            self.position = position
            if self.rollouts is not None and rollouts is not None:
                self.rollouts.set_state(rollouts)
            raise
        self._keep_samples()
        return metrics

    def _evaluate(self, count: int, seed: int) -> Metrics:
        e, g = self.settings.evaluation, self.settings.generation
        if e.source is None:
            raise ConfigError("evaluation.source is not set, so there is nothing to evaluate on.")
        if self.rollouts is None:
            with self._learning("an evaluation"):
                stats = self.learners.measure(self.batch_of(self._evaluation_rows[:count]))
            return {f"evaluation/{name}": value for name, value in stats.items()}
        if self._weights_are_stale:
            self.publish()
        prompts = self._evaluation_rows[:count]
        numbers = range(seed, seed + len(prompts))
        sampling = Sampling(g.temperature if e.temperature is None else e.temperature, g.top_k, g.top_p, g.min_p)
        with self._generating():
            rollout = self.rollouts.complete(
                *(prompts, e.samples_per_prompt, numbers, EVALUATION, sampling, Clock(self.clock_parts))
            )
        return rollout.metrics()

    def _row(self) -> Metrics:
        metrics: Metrics = {} if self.runners is None else {"sync_bytes": self._sync_bytes}
        rollout, batch = self._rollout, self._batch
        if rollout is not None:
            metrics |= {
                **rollout.row(self.settings.prompts.samples_per_prompt),
                "reward_failures": self.rollouts.reward_failures if self.rollouts is not None else 0,
                **self._ages,
            }
        if self._mismatch_kl is not None:
            metrics["learner/mismatch_kl"] = self._mismatch_kl
        if batch is not None and "ref_logp" in batch.tensors and "logp" in batch.tensors:
            metrics |= reference_kl(batch)
        return metrics

    def _keep_samples(self) -> None:
        """Write some completions of this iteration into the run folder."""
        count, run, rollout = self.settings.reporting.samples_per_iteration, self.saves.run, self._rollout
        if rollout is not None and run is not None and count:
            ref = None if self._batch is None else self._batch.tensors.get("ref_logp")
            run.write_samples(sample_records(self.iteration, rollout, count, ref))

    def _model_now(self) -> Any:
        policy = self.learners.local_policy
        if policy is not None:
            return policy.model
        model = self._make_model()
        flat = FlatParameters(model, learns=False)
        flat.load(self.learners.weights()[: flat.data.numel()])
        return model

    def _parts_state(self) -> dict[str, Any]:
        return {
            "position": self.position,
            "rollouts": None if self.rollouts is None else self.rollouts.get_state(),
            "numbers": dict(self.numbers),
        }

    def _set_parts_state(self, state: Mapping[str, Any]) -> None:
        self.position = int(state["position"])
        if self.rollouts is not None and state["rollouts"] is not None:
            self.rollouts.set_state(state["rollouts"])
        self.numbers = dict(state["numbers"])
