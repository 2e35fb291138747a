"""What a run on text is made of beside its model: token runners, scorers, environments, learners."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rlx.actors.machine import memory_bytes
from rlx.building import GetRuntime, restart_rule, share_of_cores
from rlx.generation.request import Sampling
from rlx.learner.learner_group import LearnerGroup, choose_device
from rlx.learner.memory_plan import Plan, memory_plan
from rlx.learner.sizes import Cost, Generators, NetSize, UpdateSize, number_bytes
from rlx.nets.device import check_device, nth
from rlx.rollout.conversations import Terms
from rlx.rollout.served_runners import ServedRunners
from rlx.rollout.text_envs import TextEnvs
from rlx.rollout.token_runners import TokenRunners
from rlx.text.prompts import Prompt
from rlx.text.rewards import RewardFunction
from rlx.text.text_env import TextEnvMaker
from rlx.text_models import context_of, stop_tokens, tokenizer_source
from rlx.text_rollouts import Rollouts
from rlx.text_scorers import FunctionScorer, NoScorer, Scorer, SumScorer
from rlx.text_served import build_served_runners
from rlx.text_settings import TextSettings

log = logging.getLogger("rlx")


class GeneratorProcess(NamedTuple):
    """Where completions are drawn."""

    name: str
    """Of the process, or of several."""
    device: str
    reads_learner: bool
    """Whether it generates with the learner's own weights, or has a copy."""


def indexed(name: str, count: int) -> str:
    """Return the names of `count` processes in one: learner/0..3."""
    return f"{name}/0" if count == 1 else f"{name}/0..{count - 1}"


def build_learners(
    s: TextSettings,
    make_policy: Callable[[], nn.Module],
    loss: Callable[..., Any],
    weigh: Callable[[Tensor], Tensor],
    runtime: GetRuntime,
) -> LearnerGroup:
    """Return the learners; make_policy: without arguments; weigh: mask of a minibatch -> weights of its loss."""
    t = s.training
    return LearnerGroup(
        make_policy,
        functools.partial(loss, training=t),
        runtime=runtime,
        num_learners=s.learners.num_learners,
        device=s.learners.device,
        torch_threads=threads_of(s, "learners"),
        start_timeout_s=s.fault_tolerance.start_timeout_s,
        update_timeout_s=s.fault_tolerance.update_timeout_s,
        restart=restart_rule(s),
        adam_eps=t.adam_eps,
        adam_betas=(0.9, t.adam_beta2),
        weight_decay=t.weight_decay,
        max_grad_norm=t.max_grad_norm,
        weigh=weigh,
        max_tokens_per_microbatch=s.learners.max_tokens_per_microbatch,
        sharded=shares(s) > 1,
        allow_plain_gradients=s.learners.allow_plain_gradients,
        optimizer_offload=s.learners.optimizer_offload,
    )


def build_runners(
    s: TextSettings,
    make_model: Callable[[], nn.Module],
    learners: LearnerGroup,
    runtime: GetRuntime,
    longest: int,
    export: Callable[[Path], object],
) -> TokenRunners | ServedRunners:
    """Return the token runners; one in the driver reads the model of a learner that is there as well.

    longest: tokens of the longest prompt that is trained on. export: writes the model as it is, for a server.
    """
    if s.token_runners.engine == "vllm":
        return build_served_runners(s, make_model, export, longest)
    check_device("token_runners.device", s.token_runners.device)
    count = s.token_runners.num_token_runners
    policy = learners.local_policy
    return TokenRunners(
        make_model,
        num_runners=count,
        local_model=None if count or policy is None else policy.model,
        devices=devices_beside(s, generator_process(s, learners.device).device, count),
        runtime=runtime,
        start_timeout_s=s.fault_tolerance.start_timeout_s,
        generate_timeout_s=s.fault_tolerance.generate_timeout_s,
        restart=restart_rule(s),
        max_slots=s.generation.max_slots,
        exact=s.generation.exact,
        static_step=s.generation.static_step,
        torch_threads=threads_of(s, "runners") if count else None,
        on_new_weights=s.token_runners.on_new_weights,
        singly=s.environment.env is not None,
        max_tokens=longest + s.generation.max_new_tokens if s.environment.env is None else None,
        max_new_tokens=s.generation.max_new_tokens,
    )


def build_rollouts(
    s: TextSettings,
    prompts: Sequence[Prompt],
    tokenizer: Any,
    runners: TokenRunners | ServedRunners,
    scorer: Scorer,
    envs: TextEnvs | None,
) -> Rollouts:
    """Return what has these prompts completed and scored; none in supervised training, which evaluates others."""
    g, conversations = s.generation, None
    if envs is not None:
        sizes = {"context": context_of(s, tokenizer), "vocabulary": len(tokenizer)}
        conversations = envs, Terms(s.environment.max_turns, g.max_new_tokens, stops=stop_tokens(s, tokenizer), **sizes)
    return Rollouts(
        prompts,
        runners,
        scorer,
        tokenizer,
        stops=stop_tokens(s, tokenizer),
        max_new_tokens=g.max_new_tokens,
        sampling=Sampling(g.temperature, g.top_k, g.top_p, g.min_p),
        truncated_score=s.reward.truncated_score,
        shuffle=s.prompts.shuffle,
        seed=s.runtime.seed,
        num_prompts=s.prompts.prompts_per_iteration,
        samples_per_prompt=s.prompts.samples_per_prompt,
        max_age=getattr(s.training, "max_age", 0),
        when_old=s.token_runners.when_old,
        conversations=conversations,
    )


def build_text_envs(s: TextSettings, tokenizer: Any, runtime: GetRuntime) -> TextEnvs | None:
    """Return the environments that the model talks with; None where there are none."""
    e = s.environment
    if e.env is None:
        return None
    return TextEnvs(
        TextEnvMaker(e.env, e.kwargs, tokenizer_source(s.model), stop_tokens(s, tokenizer)),
        timeout_s=e.timeout_s,
        num_actors=e.num_env_actors,
        runtime=runtime,
        start_timeout_s=s.fault_tolerance.start_timeout_s,
        restart=restart_rule(s),
    )


def build_scorer(
    s: TextSettings, prompts: Sequence[Prompt], tokenizer: Any, runtime: GetRuntime, device: str
) -> Scorer:
    """Return what says how good a completion is: a function, a reward model, or the sum of both.

    device: the learners', where a reward model goes that has no other.
    Raises ConfigError where a reward model cannot read the longest of these prompts with its completion.
    """
    r, parts = s.reward, []
    if r.function is not None:
        parts.append(FunctionScorer(RewardFunction(r.function, r.timeout_s, r.on_error)))
    if r.model is not None:
        from rlx.reward_models import RewardModels

        check_device("reward.device", r.device)
        devices = devices_beside(s, device if r.device == "auto" else r.device, r.num_actors)
        parts.append(RewardModels(r.model, tokenizer, s, runtime, longest_sequence(s, prompts, tokenizer), devices))
    if not parts:
        return NoScorer()
    return parts[0] if len(parts) == 1 else SumScorer(parts)


def longest_sequence(s: TextSettings, prompts: Sequence[Prompt], tokenizer: Any) -> int:
    """Return how many tokens a prompt can have with what follows it, by the settings and by the model's context."""
    longest = max((len(prompt.tokens) for prompt in prompts), default=0) + s.generation.max_new_tokens
    context = context_of(s, tokenizer)
    if s.environment.env is not None:  # answers are of any length
        longest = context or s.environment.max_turns * longest
    return longest if context is None else min(longest, context)


def warn_of_context(s: TextSettings, prompts: Sequence[Prompt], tokenizer: Any) -> None:
    """Log where the model's context ends completions before generation.max_new_tokens does."""
    context, longest = context_of(s, tokenizer), max((len(prompt.tokens) for prompt in prompts), default=0)
    if context is not None and context - longest < s.generation.max_new_tokens and s.environment.env is None:
        log.warning(
            "generation.max_new_tokens=%d behind a prompt of up to %d tokens is more than the model's context of %d: "
            "completions are cut after %d tokens there, and count as truncated.",
            *(s.generation.max_new_tokens, longest, context, context - longest),
        )


def plan_memory(s: TextSettings, policy: Any, sequences: int, longest: int, *, generates: bool) -> Plan:
    """Return how updates are cut and what memory the run needs; ConfigError where a device has too little.

    sequences: rows of an iteration; longest: tokens of the longest there can be. generates: whether they are drawn.
    """
    device, _ = choose_device(s.learners.device, lambda: policy)
    is_local = s.token_runners.engine == "rlx"
    longest = min(longest, getattr(policy.trunk.config, "max_position_embeddings", None) or longest)
    update = UpdateSize(
        sequences=sequences,
        longest=longest,
        minibatch_sequences=min(s.training.minibatch_sequences or sequences, sequences),
        max_tokens_per_microbatch=s.learners.max_tokens_per_microbatch,
        activation_checkpointing=s.learners.activation_checkpointing,
    )
    return memory_plan(
        NetSize.of(policy, shares(s), offloads=s.learners.optimizer_offload, has_host=device == "cuda"),
        update,
        available=_free_bytes(s, device),
        num_learners=max(1, s.learners.num_learners),
        num_devices=torch.cuda.device_count() if device == "cuda" else 1,
        generators=_generators(s, policy.model, device, longest) if generates and is_local else None,
    )


def generator_process(s: TextSettings, device: str) -> GeneratorProcess:
    """Return where completions are drawn; device: the learners'."""
    count = s.token_runners.num_token_runners
    if not count and not s.learners.num_learners:
        return GeneratorProcess("driver", device, True)
    own = s.token_runners.device
    name = indexed("token_runner", count) if count else "driver"
    return GeneratorProcess(name, device if own == "auto" else own, False)


def devices_beside(s: TextSettings, device: str, count: int) -> list[str]:
    """Return the devices of `count` processes, or of one, that compute beside the learners; device: cpu or cuda."""
    first = max(1, s.learners.num_learners)
    return [nth(device, first + index) for index in range(max(1, count))]


def _generators(s: TextSettings, model: nn.Module, device: str, longest: int) -> Generators:
    """Return what those who generate keep; model: the policy's; device: that of the learners."""
    place = generator_process(s, device)
    return Generators(
        slots=min(s.generation.max_slots, _samples_at_once(s)),
        longest=longest,
        number_bytes=number_bytes(model),
        exact=s.generation.exact,
        count=max(1, s.token_runners.num_token_runners),
        weights=0 if place.reads_learner else Cost.of(model.parameters()).weights,
        available=None if place.device == device else _free_bytes(s, place.device),
    )


def _samples_at_once(s: TextSettings) -> int:
    """Return the most samples that one who generates is asked for."""
    p, e, count = s.prompts, s.evaluation, max(1, s.token_runners.num_token_runners)
    of_evaluation = 0 if e.source is None else -(-e.num_rows // count) * e.samples_per_prompt
    return max(-(-p.prompts_per_iteration // count) * p.samples_per_prompt, of_evaluation)


def _free_bytes(s: TextSettings, device: str) -> float:
    """Return how many bytes a device may take: as learners.max_memory_gb says, or what it has."""
    if s.learners.max_memory_gb is not None:
        return s.learners.max_memory_gb * 1e9
    if device == "cpu":
        return memory_bytes()
    # What torch holds on the device is the policy itself, which the plan counts.
    return torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved()


def shares(s: TextSettings) -> int:
    """Return in how many parts every parameter is cut, of which a learner holds one."""
    return s.learners.num_learners if s.learners.sharding == "full" else 1


def threads_of(s: Any, who: str) -> int:
    """Return how many threads each of the learners, or the runners, uses: its share of the cores, if nothing is set.

    With `max_age` both compute at once. A runner with as many threads as there are cores was measured to stand still
    while a learner computed, as its threads wait for each other.
    """
    runners, learners = s.token_runners.num_token_runners, max(1, s.learners.num_learners)
    section, processes = (s.learners, learners) if who == "learners" else (s.token_runners, runners)
    if runners and getattr(s.training, "max_age", 0):
        processes = runners + learners
    return section.torch_threads or share_of_cores(processes)
