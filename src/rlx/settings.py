"""The settings of a run: every name, type, range, default and meaning, each written once, on its field.

`Settings` is the frozen tree. The builder, the YAML, `--set`, the JSON schema and the error messages (config.py)
derive from it. An algorithm adds its own hyper-parameters as a subclass of `TrainingSection`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, ClassVar, Literal, Union, get_args, get_origin

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PlainSerializer,
    PositiveInt,
    ValidationInfo,
    WithJsonSchema,
    field_validator,
)
from pydantic.fields import FieldInfo

from rlx.errors import ConfigError
from rlx.schedule import Schedule


def _tidy_schedules(schema: dict[str, Any]) -> None:
    """Give a Schedule's default and bounds the JSON schema form, which pydantic does for its own types only."""
    keywords = {"gt": "exclusiveMinimum", "ge": "minimum", "lt": "exclusiveMaximum", "le": "maximum"}
    for entry in schema.get("properties", {}).values():
        for name in keywords.keys() & entry.keys():
            entry[keywords[name]] = entry.pop(name)
        match entry.get("default"):
            case {"end": end, "env_steps": 0}:
                entry["default"] = end


class Section(BaseModel):
    """One group of settings: frozen, and strict about types ("3" is not 3, True is not 1, but 1 is a fine float)."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        validate_default=True,
        use_attribute_docstrings=True,
        json_schema_extra=_tidy_schedules,
    )
    positional: ClassVar[str | None] = None
    """The field that the builder method also takes as its first positional argument."""

    @field_validator("*", mode="before")
    @classmethod
    def _read_yaml_type(cls, value: Any, info: ValidationInfo) -> Any:
        """YAML has no tuples, people write 1e6 for a million steps, and a sweep hands over numpy scalars."""
        types = [_bare(one) for one in _alternatives(cls.model_fields[str(info.field_name)].annotation)]
        if hasattr(value, "item") and getattr(value, "shape", None) == ():
            value = value.item()
        if isinstance(value, list) and any(get_origin(one) is tuple for one in types):
            return tuple(value)
        if isinstance(value, float) and value.is_integer() and int in types and float not in types:
            return int(value)
        return value


def spelled(environment: str | Callable[..., Any] | None) -> str | None:
    """Return an environment as YAML holds it: the string itself, or the `module:qualname` of a class or factory."""
    if environment is None or isinstance(environment, str):
        return environment
    return f"{environment.__module__}:{getattr(environment, '__qualname__', f'<{type(environment).__name__}>')}"


def _plain(value: Any) -> Any:
    """Return a copy in the types that YAML gives back, so that Python and YAML make the same environment."""
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {key: _plain(item) for key, item in value.items()}
    if value is None or type(value) in (bool, int, float, str):
        return value
    raise ValueError(
        f"it may hold only plain data (numbers, strings, true/false, null, lists, mappings), not {value!r}; "
        "pass a factory as environment.id where the environment needs other objects"
    )


@dataclass(frozen=True)
class Allowed:
    """What a field accepts, in words, where its type alone does not say it."""

    text: str


class EnvironmentSection(Section):
    """The environment that the policy acts in, and what is done to its observations and rewards."""

    positional: ClassVar[str | None] = "id"

    id: Annotated[
        str | Callable[..., Any] | None,
        Allowed("a gymnasium id, an import path pkg.module:Name, an environment class or a factory () -> Env"),
        PlainSerializer(spelled),
        WithJsonSchema({"type": ["string", "null"]}),
    ] = None
    """A gymnasium id, an import path pkg.module:Name, or in Python a class or a factory () -> Env (scalar or
    vector). null: not chosen yet; a run needs one."""
    kwargs: Annotated[dict[str, Any], AfterValidator(_plain)] = {}
    """Keyword arguments for making the environment; plain data only."""
    normalize_obs: bool = False
    """Subtract the running mean from observations and divide by the running standard deviation."""
    normalize_reward: bool = False
    """Divide rewards by the running standard deviation of the discounted return."""
    obs_clip: float = Field(default=10.0, gt=0)
    """Normalised observations are cut to [-obs_clip, obs_clip]; in standard deviations."""
    reward_clip: float = Field(default=10.0, gt=0)
    """Normalised rewards are cut to [-reward_clip, reward_clip]; in standard deviations."""
    vectorization: Literal["auto", "native", "in_place", "processes"] = "auto"
    """native: the environment's own vector version; in_place: a loop in the runner; processes: loops in processes of
    their own; auto: native where there is one, else what a short measurement finds faster, which is logged."""
    num_processes: int | None = Field(default=None, gt=0)
    """Processes that the environments of one runner are shared out to; null: one for each core that it may use. More
    pay only where environments wait for something else than the CPU."""

    def chosen(self) -> str | Callable[..., Any]:
        """Return the id; ConfigError where none is chosen yet."""
        if self.id is None:
            raise ConfigError("environment.id is not set; choose one, such as environment.id=CartPole-v1.")
        return self.id


class AtariSection(Section):
    """What lies between an Atari game (an id such as ALE/Pong-v5) and the policy; other environments ignore it.

    The defaults are the protocol of Machado et al. 2018 (arXiv:1709.06009) as Dopamine and gymnasium's v5 games apply
    it: frame skip 4 and the game's own actions, in place of 5 and all 18.
    """

    frame_skip: int = Field(default=4, gt=0)
    """Frames that an action is played for; env_steps counts actions, frames counts these."""
    max_pool: bool = True
    """Take the brighter of the last two frames for each pixel: some games draw a sprite in every other frame only."""
    sticky_actions: float = Field(default=0.25, ge=0, le=1)
    """Probability that the emulator repeats the last action for one more frame."""
    noop_max: int = Field(default=0, ge=0)
    """Most frames without an action at the beginning of a game, their number drawn; 30 before sticky actions."""
    fire_reset: bool = False
    """Press FIRE at the beginning of a game that has that button."""
    episodic_life: bool = False
    """In training, a lost life ends what the policy learns from, as if terminated; the game goes on, episodes and
    their returns are whole games, and evaluation never sees it."""
    clip_reward: bool = True
    """Learn from rewards cut to [-1, 1]; reported returns are the whole score."""
    stack: int = Field(default=4, gt=0)
    """Newest frames that one observation holds, by their brightness."""
    size: int = Field(default=84, gt=0)
    """Height and width of a frame as the policy sees it, in pixels."""
    full_action_space: bool = False
    """All 18 actions; false: those that the game answers to."""
    max_frames: int = Field(default=108_000, gt=0)
    """Frames after which a game is truncated; 108,000 are half an hour."""


class EnvRunnersSection(Section):
    """Who collects experience, and how much at a time."""

    num_env_runners: int = Field(default=0, ge=0)
    """Processes that collect experience; 0: the driver collects."""
    num_envs_per_env_runner: int = Field(default=8, gt=0)
    """Environments that one runner steps together."""
    rollout_fragment_length: int = Field(default=128, gt=0)
    """Steps that each environment takes per fragment."""


class ModelSection(Section):
    """The policy and value networks."""

    hidden: tuple[PositiveInt, ...] = (64, 64)
    """Widths of the hidden layers; []: linear."""
    activation: Literal["tanh", "relu", "gelu", "silu", "elu"] = "tanh"
    """Non-linearity between layers."""
    encoder: Literal["auto", "mlp", "cnn"] = "auto"
    """What reads the observation; auto: cnn for images, mlp otherwise."""
    share_encoder: bool = False
    """Whether policy and value function share one encoder."""
    log_std_init: float = Field(default=0.0, ge=-20, le=5)
    """Log standard deviation of a continuous policy at the start; 0: a standard deviation of 1."""


class TrainingSection(Section):
    """The hyper-parameters that every algorithm has; each adds its own in a subclass."""

    gamma: float = Field(default=0.99, ge=0, le=1)
    """Discount of a reward one step later."""
    lr: Annotated[Schedule, Field(ge=0)] = Schedule.constant(3e-4)
    """Adam's step size: a number or a schedule."""
    adam_eps: float = Field(default=1e-5, gt=0)
    """Adam's epsilon; 1e-5 is what PPO's reference implementations use, torch's own default is 1e-8."""
    max_grad_norm: float | None = Field(default=0.5, gt=0)
    """Gradients are scaled down to this global norm; null: never."""


class LearnersSection(Section):
    """Who computes the gradients, and on what."""

    num_learners: int = Field(default=0, ge=0)
    """Processes that learn, each on its share of the batch; 0: the driver learns."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the networks live; auto: chosen from the hardware and the size of the network, and logged."""
    compile: bool = False
    """Compile the networks with torch.compile."""
    torch_threads: int = Field(default=1, gt=0)
    """CPU threads that torch uses in each learner; small networks are fastest with 1."""


class EvaluationSection(Section):
    """Episodes that measure the policy and are not learned from."""

    interval: int = Field(default=0, ge=0)
    """Iterations between evaluations; 0: never."""
    num_episodes: int = Field(default=10, gt=0)
    """Episodes per evaluation."""
    num_envs: int = Field(default=8, gt=0)
    """Environments stepped together during an evaluation."""
    deterministic: bool = True
    """Take the most likely action; false: sample."""
    seed: int | None = Field(default=None, ge=0)
    """Seed of the first evaluation episode; null: derived from runtime.seed."""


class FaultToleranceSection(Section):
    """Deadlines, in seconds, so that nothing waits for ever; and what becomes of what fails."""

    start_timeout_s: float = Field(default=60.0, gt=0)
    """Longest time for an actor to start."""
    sample_timeout_s: float = Field(default=120.0, gt=0)
    """Longest time for a runner to collect one fragment."""
    update_timeout_s: float = Field(default=300.0, gt=0)
    """Longest time for the learners to do one update."""
    max_restarts: int = Field(default=3, ge=0)
    """How often within restart_window_s an env runner that dies, or misses sample_timeout_s, is started again: only its
    own fragment is collected anew; and how often all learners are, with which the run goes back to its last
    checkpoint. 0: never, the run ends."""
    restart_window_s: float = Field(default=3600.0, gt=0)
    """Seconds over which max_restarts counts; shorter than the timeouts of so many hangs, it would let them go on."""
    on_env_error: Literal["rebuild", "raise"] = "rebuild"
    """What follows when a training environment raises or hangs. rebuild: it is made anew and the step masked, which
    env_failures counts; raise: the run ends, as it always does where one breaks the API, returns NaN or never works."""
    max_env_failures: int = Field(default=10, gt=0)
    """How often one environment may fail in a row, less than 100 steps apart, before its error ends the run."""
    env_step_timeout_s: float | None = Field(default=60.0, gt=0)
    """Longest time for a step or reset of an environment; below sample_timeout_s, which has to do where native code
    cannot be interrupted. null: no limit."""


class CheckpointingSection(Section):
    """When the run is saved, and what stays on disk."""

    interval: int = Field(default=10, ge=0)
    """Iterations between checkpoints; 0: only at the end."""
    keep: int = Field(default=3, gt=0)
    """How many of the newest checkpoints stay."""
    keep_best: bool = True
    """Keep the checkpoint with the best return as well."""


class ReportingSection(Section):
    """What is measured and shown."""

    window_episodes: int = Field(default=100, gt=0)
    """Newest episodes that the mean return and length are taken over."""
    progress: Literal["auto", "rich", "plain", "none"] = "auto"
    """Console output; auto: rich on a terminal, plain elsewhere."""
    tensorboard: bool = False
    """Also write TensorBoard event files."""


class RuntimeSection(Section):
    """Where actors run, and the seed of all randomness."""

    engine: Literal["local", "inline"] = "local"
    """local: processes on this machine; inline: everything in the driver, for debugging."""
    seed: int = Field(default=0, ge=0)
    """Seed that all random streams derive from."""


class StopSection(Section):
    """Limits that end a run; the first one reached ends it."""

    iterations: int | None = Field(default=None, gt=0)
    """Training iterations; null: no limit."""
    env_steps: int | None = Field(default=None, gt=0)
    """Environment steps over all environments; null: no limit."""
    episode_return_mean: float | None = None
    """Mean return over the last reporting.window_episodes episodes, once there are that many; null: no limit."""
    time_s: float | None = Field(default=None, gt=0)
    """Wall-clock seconds; null: no limit."""

    def require_limit(self) -> None:
        """Raise ConfigError where no limit is set: the run would never end."""
        if all(value is None for _, value in self):
            names = ", ".join(f"stop.{name}" for name in type(self).model_fields)
            raise ConfigError(f"stop sets no limit, so the run would never end; set at least one of {names}.")

    def reached(self, episode_return_mean: float | None, **values: float) -> str:
        """Return which limit is reached, in words, or an empty string; None is no return yet."""
        goal = self.episode_return_mean
        if goal is not None and episode_return_mean is not None and episode_return_mean >= goal:
            return f"episode_return_mean {episode_return_mean:.1f} reached {goal:g}"
        for name, value in values.items():
            limit = getattr(self, name)
            if limit is not None and value >= limit:
                return f"{name} {value:g} reached {limit:g}"
        return ""


FREE_ON_RESUME = ("stop", "reporting", "checkpointing", "fault_tolerance", "evaluation")
"""Sections that do not touch the training curve: a run that goes on may change them."""


class Settings(Section):
    """The whole tree; what a run is, in one frozen value."""

    algorithm: str = ""
    """ppo for rlx.algorithms.ppo, pkg.module, or ./file.py next to the YAML file."""
    environment: EnvironmentSection = Field(default_factory=EnvironmentSection)
    atari: AtariSection = Field(default_factory=AtariSection)
    env_runners: EnvRunnersSection = Field(default_factory=EnvRunnersSection)
    model: ModelSection = Field(default_factory=ModelSection)
    training: TrainingSection = Field(default_factory=TrainingSection)
    learners: LearnersSection = Field(default_factory=LearnersSection)
    evaluation: EvaluationSection = Field(default_factory=EvaluationSection)
    fault_tolerance: FaultToleranceSection = Field(default_factory=FaultToleranceSection)
    checkpointing: CheckpointingSection = Field(default_factory=CheckpointingSection)
    reporting: ReportingSection = Field(default_factory=ReportingSection)
    runtime: RuntimeSection = Field(default_factory=RuntimeSection)
    stop: StopSection = Field(default_factory=StopSection)


def allowed(field: FieldInfo) -> str:
    """Return what a field accepts, in words: "an integer >= 0 or null"."""
    for constraint in field.metadata:
        if isinstance(constraint, Allowed):
            return constraint.text
    return " or ".join(_in_words(one, field.metadata) for one in _alternatives(field.annotation))


def _in_words(annotation: Any, constraints: list[Any]) -> str:
    if get_origin(annotation) is Annotated:
        return _in_words(_bare(annotation), list(get_args(annotation)[1:]))
    if get_origin(annotation) is Literal:
        return "one of " + ", ".join(map(str, get_args(annotation)))
    if get_origin(annotation) is tuple:
        return f"a list with each item {_in_words(get_args(annotation)[0], [])}"
    if annotation in (int, float, Schedule):
        noun = "an integer" if annotation is int else "a number"
        tail = " or {start, end, env_steps}" if annotation is Schedule else ""
        return " ".join([noun, " and ".join(_bounds(constraints))]).strip() + tail
    words = {bool: "true or false", str: "a string", NoneType: "null", dict: "a mapping whose keys are strings"}
    return words.get(get_origin(annotation) or annotation, f"a {getattr(annotation, '__name__', annotation)}")


def _bounds(constraints: list[Any]) -> Iterator[str]:
    signs = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
    for one in constraints:
        if isinstance(one, FieldInfo):
            yield from _bounds(one.metadata)
        yield from (f"{sign} {getattr(one, name)}" for name, sign in signs.items() if hasattr(one, name))


def _bare(annotation: Any) -> Any:
    """Return a type without what `Annotated` adds to it."""
    return get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation


def _alternatives(annotation: Any) -> tuple[Any, ...]:
    """Return the members of a union, or the one type."""
    return get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
