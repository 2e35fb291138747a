"""The settings of a run: every name, type, range, default and meaning, each written once, on its field.

`Settings` is the frozen tree. The builder, the YAML, `--set`, the JSON schema and the error messages (config.py)
derive from it. An algorithm adds its own hyper-parameters as a subclass of `TrainingSection`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    AfterValidator,
    Field,
    PlainSerializer,
    PositiveInt,
    WithJsonSchema,
)

from rlx.callback_settings import CallbacksSection
from rlx.errors import ConfigError
from rlx.schedule import Schedule
from rlx.section import Allowed, Section, plain, spelled


def _plain_kwargs(value: Any) -> Any:
    try:
        return plain(value)
    except ValueError as error:
        raise ValueError(
            f"{error}; pass a factory as environment.id where the environment needs other objects"
        ) from error


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
    kwargs: Annotated[dict[str, Any], AfterValidator(_plain_kwargs)] = Field(default={})
    """Keyword arguments for making the environment; plain data only."""
    normalize_obs: bool = False
    """Subtract the running mean from observations and divide by the running standard deviation."""
    normalize_reward: bool = False
    """Divide rewards by the running standard deviation of the discounted return."""
    obs_clip: float = Field(default=10.0, gt=0)
    """Normalised observations are cut to [-obs_clip, obs_clip]; in standard deviations."""
    reward_clip: float = Field(default=10.0, gt=0)
    """Normalised rewards are cut to [-reward_clip, reward_clip]; in standard deviations."""
    vectorization: Literal["auto", "native", "in_place", "processes", "first_ready"] = "auto"
    """native: the environment's own vector version; in_place: a loop in the runner; processes: loops in processes of
    their own; first_ready: such that do not wait for each other, for steps of uneven length; auto: native where there
    is one, else in_place or processes, which give equal numbers, as a short measurement finds faster; it is logged.
    What is passed in Python and not by name is not measured, but stepped in_place."""
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

    num_env_runners: Annotated[int, Field(ge=0)] | Literal["auto"] = 0
    """Processes that collect experience; 0: the driver collects; auto: one for each CPU that learners leave free, and
    with engine cluster more or fewer as its nodes come and go, with a batch that has a fragment of each."""
    num_envs_per_env_runner: int = Field(default=8, gt=0)
    """Environments that one runner steps together."""
    rollout_fragment_length: int = Field(default=128, gt=0)
    """Steps that each environment takes per fragment."""
    queue_size: int = Field(default=1, gt=0)
    """Batches that may wait for a learner which the runners do not wait for: where training.max_age is above 1."""
    when_queue_full: Literal["wait", "drop_oldest"] = "wait"
    """wait: the runners wait for the learner as well; drop_oldest: they go on; dropped_env_steps counts the rest."""

    @property
    def fewest(self) -> int:
        """Who collects, the driver included; with auto there may be more."""
        return 1 if self.num_env_runners == "auto" else max(1, self.num_env_runners)


class ModelSection(Section):
    """The policy and value networks."""

    hidden: tuple[PositiveInt, ...] = (64, 64)
    """Widths of the hidden layers; []: linear."""
    activation: Literal["tanh", "relu", "gelu", "silu", "elu"] = "tanh"
    """Non-linearity between layers."""
    encoder: Literal["auto", "mlp", "cnn", "impala_cnn"] = "auto"
    """What reads the observation. auto: cnn for images, mlp otherwise; cnn: that of Mnih et al. 2015, smaller for small
    images; impala_cnn: the deeper one of Espeholt et al. 2018. Images beside numbers also have the hidden layers."""
    share_encoder: bool | Literal["auto"] = "auto"
    """Whether policy and value function share one encoder; auto: where there are images."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """What convolutions are computed in; parameters and all else stay float32. bfloat16 is several times faster where
    the processor has instructions for it, and rounds features to three digits."""
    custom: Annotated[
        str | Callable[..., Any] | None,
        Allowed("an import path pkg.module:Class, or a class of a torch module"),
        PlainSerializer(spelled),
        WithJsonSchema({"type": ["string", "null"]}),
    ] = None
    """An encoder or a whole policy of your own, called as Class(observation_space, action_space, **custom_kwargs); see
    rlx.nets.custom. null: none."""
    custom_kwargs: Annotated[dict[str, Any], AfterValidator(plain)] = Field(default={})
    """Keyword arguments of custom; plain data only."""
    log_std_init: float = Field(default=0.0, ge=-20, le=5)
    """Log standard deviation of a continuous policy at the start; 0: a standard deviation of 1."""
    memory: Literal["none", "lstm", "gru"] = "none"
    """What the policy remembers an episode's past with, between encoder and heads. The value function has a memory of
    its own, unless share_encoder."""
    memory_size: PositiveInt = 128
    """Units of a memory."""
    sequence_length: PositiveInt = 32
    """Most steps that a gradient goes back through a memory: fragments are cut into sequences of equal length."""


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
    max_age: int = Field(default=0, ge=0)
    """How many updates the weights that act may be behind those that learn. 0: runners and learners take turns; 1: they
    work at the same time, one version apart, which needs env_runners.num_env_runners; more: as the algorithm says."""


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
    allow_plain_gradients: bool = False
    """On a cluster, let learners be on several machines, between which gradients travel neither encrypted nor
    authenticated; false: all learners are on one machine."""


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
    video: int = Field(default=0, ge=0)
    """The first episodes of each evaluation that are played once more for a film in the run folder, as
    videos/iteration-000050.mp4; needs an environment that renders, and rlx[video]. 0: none."""

    def check(self) -> None:
        """Raise ConfigError where the settings do not fit together."""
        if self.video and not self.interval:
            raise ConfigError(
                f"evaluation.video={self.video} records nothing, as evaluation.interval=0 never evaluates; set both."
            )


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

    engine: Literal["local", "inline", "cluster", "ray"] = "local"
    """local: processes on this machine; inline: everything in the driver, for debugging; cluster: on the machines that
    `rlx start` has made a cluster; ray: on a Ray cluster."""
    address: str | None = None
    """With engine cluster: HOST:PORT of its head. With engine ray: that of a running cluster, as auto or 10.0.0.1:6379;
    null: Ray is started on this machine."""
    token_file: str | None = None
    """With engine cluster: the file with its key; null: where `rlx start` puts it."""
    seed: int = Field(default=0, ge=0)
    """Seed that all random streams derive from."""

    def check(self, num_learners: int) -> None:
        """Raise ConfigError where learners would have to meet in one thread, or an address is nobody's."""
        if self.engine == "cluster":
            _check_address_of_head(self.address)
        if self.address is not None and self.engine not in ("cluster", "ray"):
            raise ConfigError(
                f"runtime.address={self.address} is that of a cluster, and runtime.engine is {self.engine}; set "
                "engine to cluster or ray, or leave the address out."
            )
        if self.token_file is not None and self.engine != "cluster":
            raise ConfigError(
                f"runtime.token_file={self.token_file} is read with runtime.engine=cluster, and it is {self.engine}; "
                "leave it out."
            )
        if self.engine == "inline" and num_learners > 1:
            raise ConfigError(
                f"runtime.engine=inline has one process, in which learners.num_learners={num_learners} cannot learn "
                "side by side; set runtime.engine=local, or num_learners to 0 or 1."
            )


def _check_address_of_head(address: str | None) -> None:
    form = "HOST:PORT of the cluster's head, as `rlx start --head` prints it."
    if address is None:
        raise ConfigError(f"runtime.engine=cluster needs runtime.address, {form}")
    from rlx.actors.cluster.daemon import parse_address

    try:
        parse_address(address)
    except ValueError:
        raise ConfigError(f"runtime.address is {address!r}; with runtime.engine=cluster it must be {form}") from None


class StopSection(Section):
    """Limits that end a run; the first one reached ends it."""

    iterations: int | None = Field(default=None, gt=0)
    """Training iterations; null: no limit."""
    env_steps: int | None = Field(default=None, gt=0)
    """Environment steps over all environments, on text tokens; null: no limit."""
    episode_return_mean: float | None = None
    """Mean return over the last reporting.window_episodes episodes, once there are that many; null: no limit."""
    evaluation_return_mean: float | None = None
    """Mean return of one evaluation, of which there is one every evaluation.interval iterations; null: no limit."""
    time_s: float | None = Field(default=None, gt=0)
    """Wall-clock seconds; null: no limit."""

    def require_limit(self, evaluation_interval: int) -> None:
        """Raise ConfigError where no limit is set, or one that no evaluation looks at: the run would never end."""
        if self.evaluation_return_mean is not None and not evaluation_interval:
            raise ConfigError(
                f"stop.evaluation_return_mean={self.evaluation_return_mean:g} is never looked at with "
                "evaluation.interval=0; set the interval to 10, say, or the limit to null."
            )
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


FREE_ON_RESUME = ("stop", "reporting", "checkpointing", "fault_tolerance", "evaluation", "callbacks")
"""Sections that a run may change when it goes on: they do not touch the training curve, or are code, which nobody can
compare."""


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
    callbacks: CallbacksSection = Field(default_factory=CallbacksSection)
    stop: StopSection = Field(default_factory=StopSection)

    @property
    def subject(self) -> str:
        """What is trained on, in a word: the environment."""
        return spelled(self.environment.id) or ""
