"""Reward models at work: read from a run of `algorithm: reward_model`, in the driver or on actors of their own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rlx.building import GetRuntime, restart_rule, share_of_cores
from rlx.checkpoint import load_state
from rlx.config_lookup import command_of_run
from rlx.errors import CheckpointError, ConfigError, RewardError
from rlx.nets.reward_model import RewardModel
from rlx.nets.threads import limit_threads
from rlx.rollout.runner_actors import Advice, RunnerActors
from rlx.rollout.token_runner import Completions
from rlx.text.prompts import Prompt
from rlx.text.rewards import Scores
from rlx.text.tokenizers import encode, encode_start
from rlx.text_models import build_model, build_tokenizer, load_trained, trained_in
from rlx.text_origin import with_origin
from rlx.text_sections import TextModelSection
from rlx.text_settings import TextSettings

ADVICE = Advice(
    method="score",
    when_late="Raise reward.timeout_s, or lower prompts.prompts_per_iteration.",
    when_dead="prompts.prompts_per_iteration if memory is short",
)


def build_reward_model(
    m: TextModelSection, *, vocabulary: int, seed: int, layout: Any = "auto", **options: bool
) -> RewardModel:
    """Return a reward model around the language model of these settings, untrained; options: as RewardModel has."""
    model = build_model(m, vocabulary, seed)
    return RewardModel(model, layout=layout, **options)


def load_reward_model(run: str | Path) -> tuple[RewardModel, Any]:
    """Return the reward model of a run's newest checkpoint, its scores normalised, and its tokenizer."""
    state = load_state(_folder(run))
    if trained_in(state) != "reward model":
        raise CheckpointError(f"{run} is a run of {state['config']['algorithm']}, which trains no reward model.")
    sections = {name: value for name, value in state["config"].items() if name != "training"}
    settings = TextSettings.model_validate(sections)
    m = with_origin(settings.model, _folder(run))
    tokenizer = build_tokenizer(m)
    model = build_reward_model(m, vocabulary=len(tokenizer), seed=settings.runtime.seed)
    saved = {name: torch.from_numpy(array) for name, array in state["learners"]["learner"]["policy"].items()}
    load_trained(model, saved, str(run))
    model.normalize(state["numbers"]["score_mean"], state["numbers"]["score_std"])
    return model.requires_grad_(False), tokenizer


def empty_reward_model(run: str | Path) -> RewardModel:
    """Return the reward model of a run, or of one of its checkpoints, with its sizes and without weights."""
    from rlx.config import load_config

    folder = _folder(run)
    files = [one / "config.yaml" for one in (folder, folder.parent.parent)]
    settings: Any = load_config(next((file for file in files if file.is_file()), files[0])).settings
    m = with_origin(settings.model, folder)
    with torch.device("meta"):
        model = build_reward_model(m, vocabulary=len(build_tokenizer(m)), seed=settings.runtime.seed)
    return model.requires_grad_(False)


def _folder(run: str | Path) -> Path:
    folder = Path(run).expanduser()
    if not folder.is_dir():
        command = command_of_run(folder)
        first = f", and train it first: {command}" if command else ""
        raise ConfigError(f"reward.model={run} is no folder; give a run of algorithm: reward_model{first}.")
    return folder


class RewardModelActor:
    """Holds a reward model, that of a run or one that is loaded, and scores sequences with it."""

    def __init__(
        self,
        run: str | RewardModel,
        *,
        device: str = "cpu",
        torch_threads: int | None = None,
        policy_channel: Any = None,
    ) -> None:
        if torch_threads is not None:
            limit_threads(torch_threads)
        self._model = (run if isinstance(run, RewardModel) else load_reward_model(run)[0]).to(device)
        self._device = device

    def spaces(self) -> None:
        """Say that it is up."""

    def score(self, tokens: np.ndarray, length: np.ndarray) -> np.ndarray:
        """Return normalised scores float32 [S] of tokens int64 [S, L], of which the first length [S] count."""
        arrays = (torch.from_numpy(np.array(array)).to(self._device) for array in (tokens, length))
        return self._model.score(*arrays).cpu().numpy().astype(np.float32)

    def close(self) -> None:
        """Nothing to close."""


class RewardModels:
    """Scores completions with a reward model, in this process or on `reward.num_actors` actors.

    Where its tokenizer is the policy's it reads the tokens as they were drawn, else the text, tokenized anew. longest:
    how many tokens of the policy's it may have to read; more than its context raise ConfigError at once, and what
    cannot be told before, other tokenizers' numbers and prompts of evaluations, as it is scored. devices: of the
    actors, in turns; of the one in this process the first.
    """

    def __init__(
        self,
        run: str,
        tokenizer: Any,
        settings: TextSettings,
        runtime: GetRuntime,
        longest: int,
        devices: Sequence[str] = ("cpu",),
    ) -> None:
        local, self._tokenizer = load_reward_model(run)  # here in any case: a run that is none is refused at once
        self._reads_tokens = self._tokenizer.get_vocab() == tokenizer.get_vocab()
        self._run, self._context = run, getattr(local.model.config, "max_position_embeddings", None)
        if self._reads_tokens:
            self._check_length(longest)
        self._actors: RunnerActors | None = None
        self._local: RewardModelActor | None = None
        r, f = settings.reward, settings.fault_tolerance
        self._on_error = r.on_error
        if not r.num_actors:
            self._local = RewardModelActor(local, device=devices[0])
            return
        restart = restart_rule(settings)
        self._actors = RunnerActors(runtime(), f.start_timeout_s, r.timeout_s, restart, RewardModelActor, ADVICE)
        try:
            for index in range(r.num_actors):
                options = {"torch_threads": share_of_cores(r.num_actors), "device": devices[index % len(devices)]}
                self._actors.spawn(f"reward_model/{index}", (run,), options)
            self._actors.start()
        except BaseException:
            self.close()
            raise

    def score(self, prompts: Sequence[Prompt], texts: Sequence[str], completions: Completions) -> Scores:
        """Return the normalised score of each completion."""
        rows = self._sequences(prompts, texts, completions)
        length = np.array([len(row) for row in rows], np.int64)
        self._check_length(int(length.max(initial=1)))
        tokens = np.zeros((len(rows), int(length.max(initial=1))), np.int64)
        for place, row in zip(tokens, rows, strict=True):
            place[: len(row)] = row
        score = self._score(tokens, length)
        is_number = np.isfinite(score)
        failures = {
            index: RewardError(
                f"the reward model gave {score[index]} to prompt {prompts[index].index} {prompts[index].text!r} with "
                f"the completion {texts[index]!r}; its training has diverged: train it with a lower training.lr."
            )
            for index in np.flatnonzero(~is_number).tolist()
        }
        if failures and self._on_error == "stop":
            raise next(iter(failures.values()))
        return Scores(np.where(is_number, score, 0.0), is_number, failures)

    def take_restarts(self) -> int:
        """Return how many actors were started again since the last call."""
        return 0 if self._actors is None else self._actors.take_restarts()

    def close(self) -> None:
        """End the actors."""
        if self._actors is not None:
            self._actors.close()

    def _check_length(self, longest: int) -> None:
        if self._context is not None and longest > self._context:
            raise ConfigError(
                f"reward.model={self._run} has a context of {self._context} tokens, and a prompt with its completion "
                f"can have {longest}; set prompts.max_prompt_tokens and generation.max_new_tokens to {self._context} "
                "or less together, or take a reward model with a longer context."
            )

    def _sequences(
        self, prompts: Sequence[Prompt], texts: Sequence[str], completions: Completions
    ) -> list[Sequence[int]]:
        if self._reads_tokens:
            drawn = completions.split(completions.tokens)
            return [[*prompt.tokens, *tokens.tolist()] for prompt, tokens in zip(prompts, drawn, strict=True)]
        end = self._tokenizer.eos_token_id
        rows = []
        for prompt, text, stopped in zip(prompts, texts, completions.stopped, strict=True):
            place = f"the completion of prompt {prompt.index}"
            start = encode_start(self._tokenizer, prompt.text, place)
            rows.append(
                [*start, *encode(self._tokenizer, text, place), *([end] if stopped and end is not None else [])]
            )
        return rows

    def _score(self, tokens: np.ndarray, length: np.ndarray) -> np.ndarray:
        if self._local is not None:
            return self._local.score(tokens, length)
        assert self._actors is not None
        count = len(self._actors)
        bounds = [len(tokens) * index // count for index in range(count + 1)]
        calls = []
        for index in range(count):
            part = slice(bounds[index], bounds[index + 1])
            if part.start < part.stop:
                calls.append(self._actors.ask(index, "score", lambda part=part: (tokens[part], length[part])))
        return np.concatenate(self._actors.gather(calls))
