"""A trained language model, ready to be asked: `load_text_policy("runs/grpo").generate("37+58=")`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from rlx.checkpoint import load_state
from rlx.errors import CheckpointError, ConfigError
from rlx.generation.generator import Generator
from rlx.generation.request import Request, Sampling
from rlx.nets.language_model import load_language_model
from rlx.text.chat import render
from rlx.text.prompts import prompt_tokens
from rlx.text.tokenizers import decode, load_tokenizer, stop_ids
from rlx.text_models import build_model, build_tokenizer, export_model, load_trained, stop_tokens, trained_in
from rlx.text_origin import with_origin
from rlx.text_sections import GenerationSection
from rlx.text_settings import TextSettings


class TextPolicy:
    """A language model with its tokenizer and what ends its completions; made by `load_text_policy`."""

    def __init__(self, model: Any, tokenizer: Any, stops: frozenset[int], defaults: GenerationSection) -> None:
        self.model, self.tokenizer, self.stops, self.defaults = model, tokenizer, stops, defaults
        self._generator = Generator(model)

    def generate(self, prompts: str | Sequence[str], n: int = 1, seed: int = 0, **options: Any) -> list[list[str]]:
        """Return n completions of each prompt, without their stop tokens.

        options: max_new_tokens, temperature (0: the likeliest), top_k, top_p, min_p; those of the run by default.
        """
        named = (
            {"the prompt": prompts} if isinstance(prompts, str) else {f"prompt {i}": p for i, p in enumerate(prompts)}
        )
        tokens = [prompt_tokens(text, False, self.tokenizer, name) for name, text in named.items()]
        return self._complete(tokens, n, seed, options)

    def chat(self, messages: Sequence[Mapping[str, str]], seed: int = 0, **options: Any) -> str:
        """Return the answer to a conversation, [{"role": "user", "content": ...}, ...], by the tokenizer's template."""
        text = render(self.tokenizer, list(messages), "the conversation", answer_follows=True)
        tokens = prompt_tokens(text, True, self.tokenizer, "the conversation")
        return self._complete([tokens], 1, seed, options)[0][0]

    def export(self, folder: str | Path, *, replace: bool = False) -> Path:
        """Write the model, adapter merged, and its tokenizer, as AutoModelForCausalLM.from_pretrained reads them.

        folder: a new or an empty one, else ConfigError; replace: in place of an older export, too.
        """
        return export_model(self.model, self.tokenizer, folder, replace=replace)

    def _complete(
        self, prompts: Sequence[Sequence[int]], n: int, seed: int, options: dict[str, Any]
    ) -> list[list[str]]:
        known = {name: getattr(self.defaults, name) for name in ("temperature", "top_k", "top_p", "min_p")}
        limit = options.pop("max_new_tokens", None) or self.defaults.max_new_tokens
        if unknown := options.keys() - known.keys():
            raise ConfigError(
                f"{min(unknown)} is no option of generation; they are max_new_tokens, {', '.join(known)}."
            )
        sampling = Sampling(**known | {name: value for name, value in options.items() if value is not None})
        requests = [Request(tokens, n, limit, seed + i, self.stops) for i, tokens in enumerate(prompts)]
        made = self._generator.generate(requests, sampling)
        return [[decode(self.tokenizer, one.tokens, self.stops) for one in samples] for samples in made]


def load_text_policy(path: str | Path) -> TextPolicy:
    """Return the language model of a run's newest checkpoint, a checkpoint, a folder of transformers, or a hub id."""
    folder = Path(path).expanduser()
    if not ((folder / "checkpoints").is_dir() or (folder / "state.json").is_file()):
        model = load_language_model(path=str(path))
        tokenizer = load_tokenizer(path)
        return TextPolicy(model, tokenizer, stop_ids(tokenizer, model.generation_config), GenerationSection())
    state = load_state(folder)
    if (trained := trained_in(state)) == "policy":
        raise CheckpointError(f"{path} is no run on text; use rlx.load_policy for it.")
    if trained == "reward model":
        raise CheckpointError(f"{path} is a run of {state['config']['algorithm']}: it scores texts and writes none.")
    # Without the algorithm's own section no module of its has to be imported: loading executes no code.
    sections = {name: value for name, value in state["config"].items() if name != "training"}
    settings = TextSettings.model_validate(sections)
    settings = settings.model_copy(update={"model": with_origin(settings.model, folder)})
    tokenizer = build_tokenizer(settings.model)
    model = build_model(settings.model, len(tokenizer), settings.runtime.seed)
    saved = {
        name.removeprefix("model."): torch.from_numpy(array)
        for name, array in state["learners"]["learner"]["policy"].items()
        if name.startswith("model.")
    }
    load_trained(model, saved, str(path))
    return TextPolicy(model, tokenizer, stop_tokens(settings, tokenizer), settings.generation)
