"""The model and the tokenizer of a run on text, from its settings."""

from __future__ import annotations

import glob
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from rlx.checkpoint import load_state, remove_abandoned, replace_folder, unfinished
from rlx.config_lookup import command_of_run
from rlx.errors import CheckpointError, ConfigError
from rlx.nets.language_model import export_language_model, find_model, language_model_config, load_language_model
from rlx.nets.transformer import TransformerPolicy
from rlx.text.tokenizers import check_same_ids, check_vocabulary, encode, load_tokenizer, stop_ids
from rlx.text_sections import TextModelSection
from rlx.text_settings import TextSettings

EXPORT = "model"
"""The folder of a run that holds its model in the form of transformers."""


def model_path(path: str) -> str:
    """Return where transformers finds a model: of an rlx run the exported one, else `path` itself."""
    folder = Path(path).expanduser()
    if not folder.exists() and (command := command_of_run(folder)):
        raise ConfigError(f"there is no run {path} yet; train it first: {command}")
    if not (folder / "checkpoints").is_dir():
        return path
    if not (folder / EXPORT / "config.json").is_file():
        _check_exports(folder)
        raise ConfigError(f"the run {path} has not exported a model yet; let it end, or run: rlx export {path}")
    return str(folder / EXPORT)


def trained_in(state: Mapping[str, Any]) -> str:
    """Return what a checkpoint's state is of: a "language model", a "reward model", or a "policy" on environments."""
    if "rollouts" not in state:
        return "policy"
    return "reward model" if "score_std" in state["numbers"] else "language model"


def _check_exports(run: Path) -> None:
    """Raise ConfigError where a run has no language model to export."""
    try:
        state = load_state(run)
    except CheckpointError:  # none yet
        return
    algorithm, trained = state["config"]["algorithm"], trained_in(state)
    if trained == "policy":
        raise ConfigError(f"the run {run} is of {algorithm}, which trains no language model; give a run of sft, say.")
    if trained == "reward model":
        raise ConfigError(
            f"the run {run} is of {algorithm}: a model that scores texts and writes none, so nothing begins with it. "
            f"Give the model or run that it was made from, and score with it by reward.model={run}."
        )


def model_folder(path: str) -> Path | None:
    """Return the folder that transformers loads a model from; None where it comes from a hub."""
    folder = Path(model_path(path)).expanduser()
    return folder if folder.is_dir() else None


def build_tokenizer(m: TextModelSection) -> Any:
    """Return the tokenizer that a model is used with."""
    return load_tokenizer(tokenizer_source(m))


def tokenizer_source(m: TextModelSection) -> str:
    """Return where that tokenizer comes from: a folder, a hub id, or an import path."""
    return find_model(model_path(m.path or "")) if m.tokenizer is None else m.tokenizer


def fitted(s: TextSettings, tokenizer: Any) -> TextSettings:
    """Return the settings with the lengths that the model's context allows, where they leave them open.

    Raises ConfigError where the tokenizer does not fit the model, or a length its context.
    """
    m = s.model
    config = _config_of(m, len(tokenizer))
    check_vocabulary(tokenizer, config.vocab_size)
    if m.path is not None and m.tokenizer is not None:
        _check_ids(tokenizer, m.path)
    context = getattr(config, "max_position_embeddings", None)
    for name in ("reference_path", "value_path"):
        if (beside := getattr(m, name)) is not None:
            _check_beside(name, beside, config)
            _check_ids(tokenizer, beside)
    if context is None:
        return s
    sections = {}
    for section, name, most in (("data", "max_tokens", context), ("prompts", "max_prompt_tokens", context - 1)):
        values = getattr(s, section)
        wanted = getattr(values, name)
        if wanted is not None and wanted > most:
            raise ConfigError(
                f"{section}.{name}={wanted} is more than the model's context of {context} tokens allows; set it to "
                f"{most} or less, or to null for as many as there can be."
            )
        sections[section] = values.model_copy(update={name: most if wanted is None else wanted})
    return s.model_copy(update=sections)


def _config_of(m: TextModelSection, vocabulary: int) -> Any:
    path = None if m.path is None else model_path(m.path)
    return language_model_config(path=path, config={"vocab_size": vocabulary, **m.config})


def _check_beside(name: str, path: str, config: Any) -> None:
    """Raise ConfigError where a model that reads the same tokens as the one that learns cannot."""
    of_it = language_model_config(path=model_path(path), config={})
    for size, is_wrong in (("vocab_size", int.__ne__), ("max_position_embeddings", int.__lt__)):
        here, there = getattr(config, size, None), getattr(of_it, size, None)
        if here is not None and there is not None and is_wrong(there, here):
            raise ConfigError(
                f"model.{name}={path} has {size} {there}, and the model that learns {here}; it has to read the same "
                "tokens, so give one that was made from the same model."
            )


def _check_ids(tokenizer: Any, path: str) -> None:
    """Raise ConfigError where the tokenizer has other ids than the one in the folder of a model, if there is one."""
    try:
        of_model = load_tokenizer(find_model(model_path(path)))
    except ConfigError:
        return
    check_same_ids(tokenizer, of_model, path)


def build_model(m: TextModelSection, vocabulary: int, seed: int, path: str | None = None) -> Any:
    """Return the language model with its adapter, if it gets one; path: another model in place of the section's.

    vocabulary: tokens of the tokenizer, the size that a model from a configuration gets where it does not say.
    """
    lora = None
    if m.lora_rank and path is None:
        lora = {"r": m.lora_rank, "lora_alpha": m.lora_alpha}
        lora |= {"target_modules": list(m.lora_targets)} if m.lora_targets else {}
    path = m.path if path is None else path
    if path is not None:
        return load_language_model(path=model_path(path), dtype=m.dtype, lora=lora, seed=seed)
    config = {"vocab_size": vocabulary, **_special_tokens(m), **m.config}
    return load_language_model(config=config, dtype=m.dtype, lora=lora, seed=seed)


def _special_tokens(m: TextModelSection) -> dict[str, int | None]:
    """Return which tokens begin and end a text, for the config of a new model, and with it for what it exports.

    The defaults of an architecture are those of the vocabulary it was published with: Llama ends at token 2, which in
    another vocabulary is a digit.
    """
    tokenizer = build_tokenizer(m)
    return {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": None}


def build_policy(
    m: TextModelSection,
    *,
    vocabulary: int,
    seed: int,
    temperature: float,
    with_value: bool,
    with_reference: bool,
    **options: Any,
) -> TransformerPolicy:
    """Return the policy that learners train: with a value net and a frozen reference where the algorithm needs them.

    options: as TransformerPolicy has.
    """
    value_model = reference = None
    if with_value and m.value == "separate":
        value_model = build_model(m, vocabulary, seed, m.value_path)
    if with_reference and not m.lora_rank:
        reference = build_model(m, vocabulary, seed, m.reference_path)
    return TransformerPolicy(
        build_model(m, vocabulary, seed),
        temperature=temperature,
        value=m.value if with_value else "none",
        value_model=value_model,
        reference=reference,
        **options,
    )


def load_trained(model: nn.Module, saved: Mapping[str, Tensor], source: str) -> None:
    """Set the learned parameters of a model to those saved in the run or checkpoint `source`, by their names.

    CheckpointError where they are not those of this model.
    """
    parameters = dict(model.named_parameters())
    learned = {name for name, parameter in parameters.items() if parameter.requires_grad}
    wrong = sorted(learned ^ saved.keys()) or [
        name for name, tensor in saved.items() if tensor.shape != parameters[name].shape
    ]
    if wrong:
        raise CheckpointError(
            f"{source} holds a model of another architecture than its config describes, as {wrong[0]} shows; the model "
            "that it was trained from has changed since."
        )
    model.load_state_dict(dict(saved), strict=False)


def export_model(model: nn.Module, tokenizer: Any, folder: str | Path, *, replace: bool = False) -> Path:
    """Write a folder that AutoModelForCausalLM and AutoTokenizer load, and return it; it holds all files or none.

    folder: a new or an empty one; replace: an older export, as of a run's own folder, makes room. ConfigError where it
    is neither or cannot be written.
    """
    folder = Path(folder).expanduser()
    if replace:
        remove_abandoned(folder.parent, glob.escape(folder.name))  # models are large
    else:
        check_export_folder(folder)
    into = folder if folder.is_dir() and not replace else folder.parent  # an empty one stays: it may be a mount
    try:
        with unfinished(into / folder.resolve().name) as temporary:
            export_language_model(model, tokenizer, temporary)
            if into is folder:
                for file in sorted(temporary.iterdir(), key=lambda file: file.name == "config.json"):  # makes a model
                    file.rename(folder / file.name)
            else:
                replace_folder(temporary, folder)
    except (OSError, SafetensorError) as error:
        why = getattr(error, "strerror", None) or error
        raise ConfigError(f"no model can be written to {folder}: {why}; give another folder, or make room.") from error
    return folder


def check_export_folder(folder: Path) -> None:
    """Raise ConfigError where a model would be written over files, or among those of others."""
    try:
        found = "is a file" if folder.is_file() else "is not empty" if folder.exists() and any(folder.iterdir()) else ""
    except OSError as error:
        found = f"cannot be read ({error.strerror})"
    if found:
        raise ConfigError(f"{folder} {found}; a model is exported to a new or an empty folder: give another one.")


def context_of(s: TextSettings, tokenizer: Any) -> int | None:
    """Return how many tokens the model can read; None where its config does not say."""
    return getattr(_config_of(s.model, len(tokenizer)), "max_position_embeddings", None)


def stop_tokens(s: TextSettings, tokenizer: Any) -> frozenset[int]:
    """Return all that ends a completion: what tokenizer, model and generation.stop name."""
    return stop_ids(tokenizer, _generation_config(s.model), {_token(tokenizer, text) for text in s.generation.stop})


def _generation_config(m: TextModelSection) -> Any:
    """Return what a model's folder or configuration says of generation: its EOS tokens; None where there is nothing."""
    if m.path is None:
        return m.config
    from transformers import GenerationConfig

    try:
        return GenerationConfig.from_pretrained(model_path(m.path))
    except (OSError, ValueError):  # many have none
        return None


def model_summary(s: TextSettings) -> str:
    """Return the model of these settings in words: what it is, and how much of it is trained."""
    tokenizer = build_tokenizer(s.model)
    with torch.device("meta"):
        model = build_model(s.model, len(tokenizer), s.runtime.seed)
    total = sum(parameter.numel() for parameter in model.parameters())
    learned = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    config = model.config
    sizes = [
        f"{getattr(config, name)} {words}"
        for name, words in (("num_hidden_layers", "layers"), ("hidden_size", "wide"), ("num_attention_heads", "heads"))
        if hasattr(config, name)
    ]
    rows = [
        ("model", f"{config.model_type}, {', '.join(sizes)}", f"{total:,}"),
        ("learned", f"LoRA of rank {s.model.lora_rank}" if s.model.lora_rank else "all of it", f"{learned:,}"),
        ("tokenizer", f"{len(tokenizer):,} tokens, context {getattr(config, 'max_position_embeddings', '-')}", ""),
    ]
    lines = [f"language model {s.subject}: {total:,} parameters"]
    return "\n".join(lines + [f"  {name:<14} {text:<80}{count:>11}".rstrip() for name, text, count in rows])


def _token(tokenizer: Any, text: str) -> int:
    ids = encode(tokenizer, text, f"generation.stop={text!r}")
    if len(ids) != 1:
        raise ConfigError(f"generation.stop: {text!r} is {len(ids)} tokens long; a stop is one token.")
    return ids[0]
