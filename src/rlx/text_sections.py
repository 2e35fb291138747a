"""The sections of a run that trains a language model; those that mean the same on both sides are of settings.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Field, PlainSerializer, PositiveFloat, WithJsonSchema

from rlx.errors import ConfigError
from rlx.nets.device import Device
from rlx.rollout.age import OnNewWeights, WhenOld
from rlx.schedule import Schedule
from rlx.section import Allowed, Section, plain, spelled
from rlx.settings import ReportingSection
from rlx.text.sources import object_name


def spelled_source(source: Any) -> Any:
    """Return a source as YAML holds it; rows and data sets that were passed in Python only by their type."""
    if source is None or isinstance(source, str):
        return source
    return spelled(source) if callable(source) else object_name(source)


Source = Annotated[
    Any,
    Allowed("a path of a .jsonl, .json or .parquet file, an import path pkg.module:function, or in Python a list or a "
            "datasets.Dataset"),
    PlainSerializer(spelled_source),
    WithJsonSchema({"type": ["string", "null"]}),
]  # fmt: skip
PlainMapping = Annotated[dict[str, Any], AfterValidator(plain)]


class TextModelSection(Section):
    """The language model, where it comes from, and what is trained of it."""

    positional: ClassVar[str | None] = "path"

    path: str | None = None
    """A folder that transformers reads, an id of the Hugging Face hub, or the folder of an rlx run. A folder is copied
    into RUN/origin as a run begins, which reads the copy from then on. null: `config`."""
    config: PlainMapping = Field(default={})
    """A configuration to begin with random weights from, as {model_type: llama, hidden_size: 128, ...}; vocab_size is
    the tokenizer's where it is left out. `--set model.config.hidden_size=64` changes one of them."""
    tokenizer: str | None = None
    """A folder, a hub id, or an import path pkg.module:function that returns one, with the same ids as one in `path`;
    null: that one."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """What the model is computed in, by learners and by who generates; bfloat16 is for GPUs. What is learned is kept in
    float32 beside it, with its optimizer and the sum of its gradients; heads of values and adapters are float32."""
    lora_rank: int = Field(default=0, ge=0)
    """Rank of the LoRA adapters, which then are all that is trained; needs rlx[lora]. 0: the whole model is trained."""
    lora_alpha: float = Field(default=16.0, gt=0)
    """What LoRA's update is scaled by: lora_alpha / lora_rank."""
    lora_targets: tuple[str, ...] = ()
    """Names of the linear layers that get an adapter, as q_proj; []: peft's choice for the architecture."""
    value: Literal["shared", "separate"] = "separate"
    """Where the value function of PPO lives: on the policy's own trunk, or in a model of its own."""
    value_path: str | None = None
    """What a separate value model starts from; null: what the policy does."""
    reference_path: str | None = None
    """The model that KL is measured against, and DPO's reference; null: the policy as the run began. With LoRA it is
    the model without its adapter, whatever stands here."""

    def check(self) -> None:
        """Raise ConfigError where no model is chosen, or two are."""
        if (self.path is None) == (not self.config):
            raise ConfigError(
                f"model.path={self.path!r} and model.config={self.config!r}: give one of them, a model to go on with "
                "(model.path=runs/sft) or one to begin from random weights (model.config={model_type: llama, ...})."
            )
        if self.path is None and self.tokenizer is None:
            raise ConfigError("model.config needs model.tokenizer: a folder, a hub id or pkg.module:function.")


class PromptsSection(Section):
    """What the model is asked, in reinforcement learning."""

    positional: ClassVar[str | None] = "source"

    source: Source = None
    """Rows with `prompt`, or `messages` for the tokenizer's chat template; what else they hold, the reward sees."""
    kwargs: PlainMapping = Field(default={})
    """Keyword arguments of a source that is a function."""
    prompts_per_iteration: int = Field(default=32, gt=0)
    """Prompts that are asked in one iteration."""
    samples_per_prompt: int = Field(default=8, gt=0)
    """Completions of each, which share its prefill and, in GRPO, its baseline."""
    max_prompt_tokens: int | None = Field(default=None, gt=0)
    """Longest prompt; null: what the model's context leaves."""
    when_too_long: Literal["refuse", "drop"] = "refuse"
    """What becomes of a longer one."""
    shuffle: bool = True
    """A new order in every pass over the rows."""


class TextEnvironmentSection(Section):
    """What the model talks with, where a completion is not all: tools, games, users."""

    positional: ClassVar[str | None] = "env"

    env: Annotated[
        str | Callable[..., Any] | None,
        Allowed("an import path pkg.module:Class, or a class"),
        PlainSerializer(spelled),
        WithJsonSchema({"type": ["string", "null"]}),
    ] = None
    """A gymnasium.Env whose observations and actions are tokens, as of rlx.text.text_env; made with `kwargs`, and with
    `tokenizer` and `stops` where it takes them. null: a completion ends what a prompt began."""
    kwargs: PlainMapping = Field(default={})
    """Keyword arguments of the class."""
    max_turns: int = Field(default=8, gt=0)
    """Turns of the model at most; each ends with a stop token, or is cut at generation.max_new_tokens, which ends the
    conversation."""
    num_env_actors: int = Field(default=0, ge=0)
    """Processes that the environments are in; 0: the driver, with training.max_age 0 only."""
    timeout_s: float | None = Field(default=10.0, gt=0)
    """Longest time for one reset or step; an environment that takes longer costs its sample. null: as it likes."""


class DataSection(Section):
    """The examples or preferences that are learned from, in supervised training."""

    positional: ClassVar[str | None] = "source"

    source: Source = None
    """Rows with prompt and completion, text, or messages (SFT); with prompt, chosen and rejected (pairs)."""
    kwargs: PlainMapping = Field(default={})
    """Keyword arguments of a source that is a function."""
    rows_per_iteration: int = Field(default=64, gt=0)
    """Rows that one iteration learns from, once."""
    max_tokens: int | None = Field(default=None, gt=0)
    """Longest example; null: what the model's context allows."""
    when_too_long: Literal["refuse", "drop"] = "refuse"
    """What becomes of a longer one."""
    train_on_prompt: bool = False
    """Learn the tokens of the prompt, too."""
    shuffle: bool = True
    """A new order in every pass over the rows."""


class GenerationSection(Section):
    """How completions are drawn."""

    max_new_tokens: int = Field(default=64, gt=0)
    """Longest completion; what is cut there is truncated. So is what the model's context leaves no room for, and the
    log tells of it before the run."""
    temperature: float = Field(default=1.0, ge=0)
    """What logits are divided by, when tokens are drawn and when their probability is trained; 0: the likeliest."""
    top_k: int = Field(default=0, ge=0)
    """Draw from the k likeliest tokens only; 0: from all. Not in training, as it changes the law that is learned."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Draw from the likeliest tokens that hold this probability only. Not in training."""
    min_p: float = Field(default=0.0, ge=0, lt=1)
    """Draw only from tokens at least this likely, relative to the likeliest. Not in training."""
    stop: tuple[str, ...] = ()
    """Tokens that end a completion beside those of the tokenizer and the model, each one token long."""
    max_slots: int = Field(default=256, gt=0)
    """Sequences that a token runner works at together."""
    static_step: bool | None = None
    """Decode in a few fixed shapes, which a GPU repeats as CUDA graphs, with attention that reads only what is there;
    null: on a GPU, unless `exact`. rlx's own engine only."""
    exact: bool = False
    """Make every completion independent to the bit of what else is generated; slower. Else to about 1e-6 in logp."""


class RewardSection(Section):
    """What a completion is worth."""

    positional: ClassVar[str | None] = "function"

    function: Annotated[
        str | Callable[..., Any] | None,
        Allowed("an import path pkg.module:function, or a function"),
        PlainSerializer(spelled),
        WithJsonSchema({"type": ["string", "null"]}),
    ] = None
    """Called as function(prompts, completions, records), lists of a batch, and returns their scores; records are the
    rows that the prompts come from."""
    model: str | None = None
    """A run of `algorithm: reward_model`, whose score is added to that of the function."""
    num_actors: int = Field(default=0, ge=0)
    """Processes that hold the reward model; 0: the driver."""
    device: Device = "auto"
    """Where it is computed; auto: as the learners do. Of several GPUs each process has the next one, learners first."""
    timeout_s: float = Field(default=60.0, gt=0)
    """Longest time for a batch."""
    on_error: Literal["stop", "mask"] = "stop"
    """What follows when a reward raises, is late or is no number. stop: the run ends, naming the sample; mask: that
    sample is not learned from, and reward_failures counts it."""
    truncated_score: float | None = None
    """The score of completions that reached generation.max_new_tokens, and of conversations that no environment has
    ended, in place of their own; null: their own."""

    @property
    def is_set(self) -> bool:
        """Whether there is anything to score with."""
        return self.function is not None or self.model is not None


class TokenRunnersSection(Section):
    """Who generates."""

    engine: Literal["rlx", "vllm"] = "rlx"
    """rlx: its own generator; vllm: a vLLM server that runs already, in batches that learners wait for."""
    url: str | None = None
    """Address of that server, as http://localhost:8000."""
    weights_path: str | None = None
    """Folder through which it gets the weights, under the same path there and here; null: that of temporary files."""
    num_token_runners: int = Field(default=0, ge=0)
    """Processes that generate, which get the weights by a channel; 0: the driver, which on one device reads the
    learner's own."""
    device: Device = "auto"
    """Where they generate, unless with the learner's own weights; auto: as the learners do. Of several GPUs each
    process has the next one, learners first."""
    torch_threads: int | None = Field(default=None, gt=0)
    """CPU threads that each uses; null: the cores of this machine, shared out, with training.max_age to learners
    too."""
    when_old: WhenOld = "wait"
    """With training.max_age above 0, how it is kept. wait: runners begin what can be learned from in time, and learners
    wait for a slow completion that would be too old in the next update; pace: nobody waits for that one, it is dropped;
    drop: runners are not held back either, and the oldest are dropped. dropped_env_steps counts dropped tokens."""
    on_new_weights: OnNewWeights = "finish"
    """With training.max_age above 0, what becomes of sequences under way when new weights come. finish: they end with
    the old ones, and others begin after them; keep_cache: they go on with the new weights, on keys and values of the
    old; refresh_cache: those are computed again."""


class TextTrainingSection(Section):
    """The hyper-parameters that every algorithm on text has; each adds its own in a subclass."""

    lr: Annotated[Schedule, Field(ge=0)] = Schedule.constant(1e-5)
    """AdamW's step size: a number or a schedule over tokens (env_steps)."""
    lr_warmup: int = Field(default=0, ge=0)
    """Tokens over which all step sizes rise to what they are set to; at once, Adam's first steps are its largest."""
    weight_decay: float = Field(default=0.0, ge=0)
    """AdamW's decoupled weight decay."""
    adam_beta2: float = Field(default=0.999, ge=0, lt=1)
    """Decay of AdamW's squared gradients; 0.95 is usual for language models."""
    adam_eps: float = Field(default=1e-8, gt=0)
    """AdamW's epsilon."""
    max_grad_norm: float | None = Field(default=1.0, gt=0)
    """Gradients are scaled down to this global norm; null: never."""
    epochs: int = Field(default=1, gt=0)
    """Passes over each iteration's sequences."""
    minibatch_sequences: int | None = Field(default=None, gt=0)
    """Sequences, or pairs, in one optimizer step; null: all of an iteration."""


class RolloutTrainingSection(TextTrainingSection):
    """What algorithms have beside it that learn from completions."""

    max_age: int = Field(default=0, ge=0)
    """How many updates the weights that drew a token may be behind those that learn from it. 0: generating and learning
    take turns; above: token runners go on while learners learn, which token_runners.num_token_runners is needed for."""
    importance_cap: PositiveFloat | None = 2.0
    """With max_age above 0, or engine vllm, losses of tokens are weighted by how much likelier the policy finds them
    than the one that drew them, at most by this (truncated importance sampling); null: not at all."""


class TextLearnersSection(Section):
    """Who computes the gradients, on what, and how much at once."""

    num_learners: int = Field(default=0, ge=0)
    """Processes that learn, each on its share of the batch; 0: the driver learns."""
    sharding: Literal["none", "full"] = "none"
    """What several learners hold. none: the whole model each; full: a share of every parameter, of its gradient and of
    its optimizer (FSDP2), gathered a layer at a time while it runs: slower, for models that no device can hold."""
    device: Device = "auto"
    """Where the model lives; auto: a GPU where there is one."""
    torch_threads: int | None = Field(default=None, gt=0)
    """CPU threads of each learner; null: the cores of this machine, shared out, with training.max_age to token runners,
    too."""
    max_tokens_per_microbatch: int = Field(default=4096, gt=0)
    """Tokens, padding included, that go through the model at once; gradients of microbatches are added up."""
    layout: Literal["auto", "padded", "shared", "packed"] = "auto"
    """How sequences lie in a microbatch of those of like length: side by side and padded, with a prompt that several
    share once, or in one row without padding. All give one gradient; auto: shared on the CPU, where that is less
    arithmetic than padded, packed on a GPU."""
    activation_checkpointing: bool = False
    """Compute activations twice in place of keeping them."""
    compile: bool = False
    """Run layers through torch.compile while there are gradients: once for all layers and shapes, which takes a minute
    before the first step; for long runs. Not with sharding."""
    optimizer_offload: bool = False
    """Keep the optimizer's moments and the float32 weights in host memory, and make the steps there: a GPU is left with
    the weights that it computes with and their gradient. Slower by a copy of both for every step."""
    allow_plain_gradients: bool = False
    """On a cluster, let learners be on several machines, between which gradients, and parameters that are sharded,
    travel neither encrypted nor authenticated; false: all learners are on one machine."""
    max_memory_gb: float | None = Field(default=None, gt=0)
    """Memory that a device may need by the plan that is printed before the start; null: what it has."""

    def check(self) -> None:
        """Raise ConfigError where there is nobody to share the parameters with."""
        if self.sharding == "full" and self.num_learners < 2:
            raise ConfigError(
                f"learners.sharding=full shares the model out among learners, and learners.num_learners is "
                f"{self.num_learners}; set it to 2 or more, or sharding to none."
            )
        if self.sharding == "full" and self.compile:
            raise ConfigError(
                "learners.compile=true compiles whole layers, and learners.sharding=full gathers each while it runs; "
                "set compile to false, or sharding to none."
            )
        if self.sharding == "full" and self.optimizer_offload:
            raise ConfigError(
                "learners.optimizer_offload=true keeps the whole optimizer in one memory, and learners.sharding=full "
                "shares it out; set one of them."
            )


class TextEvaluationSection(Section):
    """What is measured beside the training, on rows that are not learned from."""

    interval: int = Field(default=0, ge=0)
    """Iterations between evaluations; 0: never."""
    source: Source = None
    """Rows like those that are trained on; with prompts, completions are drawn and scored by the reward."""
    kwargs: PlainMapping = Field(default={})
    """Keyword arguments of a source that is a function."""
    num_rows: int = Field(default=128, gt=0)
    """Rows of each evaluation, the first ones of the source."""
    samples_per_prompt: int = Field(default=1, gt=0)
    """Completions of each prompt."""
    temperature: float | None = Field(default=None, ge=0)
    """Temperature of the completions; 0: the likeliest tokens; null: generation.temperature."""

    def check(self) -> None:
        """Raise ConfigError where there is an interval and nothing to evaluate on."""
        if self.interval and self.source is None:
            raise ConfigError(
                f"evaluation.interval={self.interval} has no rows to evaluate on; set evaluation.source, or the "
                "interval to 0."
            )


class TextFaultToleranceSection(Section):
    """Deadlines, in seconds, so that nothing waits for ever; and what becomes of what fails."""

    start_timeout_s: float = Field(default=120.0, gt=0)
    """Longest time for an actor to start, which includes loading its model."""
    generate_timeout_s: float = Field(default=600.0, gt=0)
    """Longest time for a token runner to finish what it was asked for."""
    update_timeout_s: float = Field(default=600.0, gt=0)
    """Longest time for the learners to do one update."""
    max_restarts: int = Field(default=3, ge=0)
    """How often within restart_window_s a token runner that dies or is late is started again and asked again, and how
    often all learners are, with which the run goes back to its last checkpoint. 0: never, the run ends."""
    restart_window_s: float = Field(default=3600.0, gt=0)
    """Seconds over which max_restarts counts."""


class TextReportingSection(ReportingSection):
    """What is measured, shown and kept to be read."""

    window_episodes: int = Field(default=256, gt=0)
    """Newest completions that the mean reward and length are taken over."""
    samples_per_iteration: int = Field(default=8, ge=0)
    """Completions of each iteration that RUN/samples.jsonl keeps, with reward, KL and the logp of every token; `rlx
    samples RUN` shows them. 0: none."""
