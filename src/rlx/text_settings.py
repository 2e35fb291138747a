"""The settings of a run that trains a language model: what settings.py is for environments.

Sections that mean the same on both sides are the same classes. `TextConfig` is the builder over them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from pydantic import Field

from rlx.callback_settings import CallbacksSection
from rlx.config import AlgorithmConfig
from rlx.config_lookup import check_callable
from rlx.errors import ConfigError
from rlx.section import Section
from rlx.settings import CheckpointingSection, RuntimeSection, StopSection
from rlx.text_sections import (
    DataSection,
    GenerationSection,
    PromptsSection,
    RewardSection,
    TextEnvironmentSection,
    TextEvaluationSection,
    TextFaultToleranceSection,
    TextLearnersSection,
    TextModelSection,
    TextReportingSection,
    TextTrainingSection,
    TokenRunnersSection,
    spelled_source,
)
from rlx.text_served import check_engine


class TextSettings(Section):
    """The whole tree; what a run on text is, in one frozen value."""

    algorithm: str = ""
    """grpo for rlx.algorithms.grpo, pkg.module, or ./file.py next to the YAML file."""
    model: TextModelSection = Field(default_factory=TextModelSection)
    prompts: PromptsSection = Field(default_factory=PromptsSection)
    environment: TextEnvironmentSection = Field(default_factory=TextEnvironmentSection)
    data: DataSection = Field(default_factory=DataSection)
    generation: GenerationSection = Field(default_factory=GenerationSection)
    reward: RewardSection = Field(default_factory=RewardSection)
    token_runners: TokenRunnersSection = Field(default_factory=TokenRunnersSection)
    training: TextTrainingSection = Field(default_factory=TextTrainingSection)
    learners: TextLearnersSection = Field(default_factory=TextLearnersSection)
    evaluation: TextEvaluationSection = Field(default_factory=TextEvaluationSection)
    fault_tolerance: TextFaultToleranceSection = Field(default_factory=TextFaultToleranceSection)
    checkpointing: CheckpointingSection = Field(default_factory=CheckpointingSection)
    reporting: TextReportingSection = Field(default_factory=TextReportingSection)
    runtime: RuntimeSection = Field(default_factory=RuntimeSection)
    callbacks: CallbacksSection = Field(default_factory=CallbacksSection)
    stop: StopSection = Field(default_factory=StopSection)

    @property
    def subject(self) -> str:
        """What is trained, in a word: the last part of the model's path, or its type."""
        return (self.model.path or str(self.model.config.get("model_type", ""))).rstrip("/").rpartition("/")[2]


class TextConfig(AlgorithmConfig, settings=TextSettings):
    """The settings of one algorithm's run on text; the base of GRPOConfig and its kin.

    `reads`: the section that its rows come from, "prompts" or "data".
    """

    reads = "prompts"

    def network(self) -> str:
        """Return what model these settings build, a line a part, and where each model of the run lives."""
        from rlx.text_models import model_summary
        from rlx.text_placement import placement_table

        settings: Any = self.settings
        algorithm: Any = type(self).algorithm_class
        places = [] if algorithm is None else [placement_table(settings, algorithm)]
        return "\n".join([model_summary(settings), *places])

    def _names_not_found(self) -> list[str]:
        s: Any = self.settings
        problems: list[str] = []
        for check in self._checks(s):
            try:
                check()
            except ConfigError as error:
                problems.append(str(error))
        return problems

    def _checks(self, s: TextSettings) -> Iterable[Callable[[], None]]:
        yield s.model.check
        yield lambda: check_engine(s)
        yield s.learners.check
        rows = getattr(s, self.reads)
        if rows.source is None:
            yield lambda: _missing(self.reads)
        yield lambda: _check_unread(s, self.reads)
        sources = {f"{self.reads}.source": rows.source, "evaluation.source": s.evaluation.source}
        for key, value in {
            **sources,
            "reward.function": s.reward.function,
            "environment.env": s.environment.env,
            "model.tokenizer": s.model.tokenizer,
        }.items():
            if isinstance(value, str) and ":" in value:
                yield lambda key=key, value=value: check_callable(value, f'{key} is "{value}"')
        if self.reads == "prompts":
            yield lambda: _check_rollouts(s)


def _check_unread(s: TextSettings, reads: str) -> None:
    other = "data" if reads == "prompts" else "prompts"
    if getattr(s, other).source is not None:
        raise ConfigError(
            f"{other}.source={spelled_source(getattr(s, other).source)} is not read by this algorithm, which learns "
            f"from {reads}.source; leave it out."
        )


def _missing(section: str) -> None:
    raise ConfigError(
        f"{section}.source is not set; give a .jsonl or .parquet file, pkg.module:function, or in Python a list of "
        "rows."
    )


def _check_rollouts(s: TextSettings) -> None:
    if not s.reward.is_set and s.environment.env is None:
        raise ConfigError(
            "reward.function, reward.model and environment.env are not set; at least one has to say what is good."
        )
    max_age, count, engine = getattr(s.training, "max_age", 0), s.environment.num_env_actors, s.runtime.engine
    if s.environment.env is not None and max_age and (not count or engine == "inline"):
        raise ConfigError(
            f"training.max_age={max_age} has conversations go on while learners learn, so environments need processes "
            f"of their own, and environment.num_env_actors={count} with runtime.engine={engine} gives them none: set "
            "num_env_actors to 1 or more and engine to local, or max_age to 0."
        )
    g = s.generation
    if g.top_k or g.top_p < 1 or g.min_p or g.temperature == 0:
        raise ConfigError(
            f"generation.top_k={g.top_k}, top_p={g.top_p}, min_p={g.min_p}, temperature={g.temperature}: training "
            "needs completions drawn from the policy itself; set top_k=0, top_p=1, min_p=0, temperature above 0."
        )
    is_local = s.token_runners.engine == "rlx"
    if is_local and max_age and not s.token_runners.num_token_runners:
        raise ConfigError(
            f"training.max_age={max_age} has token runners work while learners do, so they need processes of their "
            "own: set token_runners.num_token_runners to 1 or more, or max_age to 0."
        )
