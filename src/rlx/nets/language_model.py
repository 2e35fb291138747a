"""Language models from a folder, the hub or a configuration, with LoRA or without; and back to a folder."""

from __future__ import annotations

import copy
import difflib
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rlx.errors import ConfigError, MissingExtra
from rlx.nets.trunk import unwrapped

log = logging.getLogger("rlx")


def load_language_model(
    *,
    path: str | None = None,
    config: Mapping[str, Any] | None = None,
    dtype: str = "float32",
    lora: Mapping[str, Any] | None = None,
    seed: int = 0,
    attention: str | None = None,
) -> Any:
    """Return a decoder-only causal language model, in eval mode.

    path: a folder or a hub id; or config: {"model_type": "llama", "hidden_size": 128, ...}, with weights drawn from
    `seed`. dtype: "float32", "bfloat16" or "float16". lora: settings of peft.LoraConfig (r, lora_alpha,
    target_modules, ...), which leave every parameter but the adapter's frozen; the adapter is drawn from `seed`.
    attention: "sdpa" or "eager"; None leaves the choice to the model.
    Raises ConfigError where no such model can be made, MissingExtra where LoRA is asked for without peft.
    """
    if (path is None) == (config is None):
        raise ConfigError("a language model needs either a path (a folder or a hub id) or a config: set one of them.")
    options: dict[str, Any] = {"dtype": _dtype(dtype)}
    if attention is not None:
        options["attn_implementation"] = attention
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = _from_path(path, options) if path is not None else _from_config(config or {}, options)
        if lora is not None:
            model = _with_adapter(model, lora)
    return model.eval()


def check_vocabulary(model: nn.Module, size: int) -> None:
    """Raise ConfigError where a tokenizer with `size` token ids does not fit the model's embedding."""
    rows = unwrapped(model).get_input_embeddings().weight.shape[0]  # type: ignore[operator, union-attr]
    if size > rows:
        raise ConfigError(
            f"the tokenizer has {size} token ids and the model an embedding of {rows}: take the tokenizer that belongs "
            f"to the model, or in a config set vocab_size to {size} or more."
        )


def export_language_model(model: nn.Module, tokenizer: Any, folder: str | Path) -> None:
    """Write a folder that AutoModelForCausalLM and AutoTokenizer load; an adapter is merged into the weights.

    model: a causal language model, or a policy around one. tokenizer: None leaves it out.
    """
    model = getattr(model, "model", model) if not hasattr(model, "save_pretrained") else model
    if hasattr(model, "peft_config"):
        model = copy.deepcopy(model).merge_and_unload()  # type: ignore[operator]
    # Learners keep all parameters in one buffer, which would be taken for one tensor that all names share.
    copies: dict[tuple[int, torch.Size], torch.Tensor] = {}
    state = {}
    for name, tensor in model.state_dict().items():
        key = (tensor.data_ptr(), tensor.shape)  # tied weights stay tied
        copies.setdefault(key, tensor.detach().cpu().clone())
        state[name] = copies[key]
    model.save_pretrained(folder, state_dict=state)  # type: ignore[operator]
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def _dtype(name: str) -> torch.dtype:
    allowed = ("float32", "bfloat16", "float16")
    if name not in allowed:
        raise ConfigError(f"dtype {name!r} is none of {', '.join(allowed)}.")
    return getattr(torch, name)


def _from_path(path: str, options: dict[str, Any]) -> Any:
    from transformers import AutoModelForCausalLM

    folder = Path(path).expanduser()
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise ConfigError(f"{path} holds no config.json, so it is no folder of a language model.")
    try:
        return AutoModelForCausalLM.from_pretrained(str(folder) if folder.is_dir() else path, **options)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"no language model can be loaded from {path!r}, which is neither a folder here nor a model that the hub "
            f"gave: {_first_line(error)}"
            if not folder.is_dir()
            else f"the folder {path!r} cannot be loaded as a causal language model: {_first_line(error)}"
        ) from error


def _from_config(config: Mapping[str, Any], options: dict[str, Any]) -> Any:
    from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM

    settings = dict(config)
    kind = settings.pop("model_type", None)
    known = [name for name, made in CONFIG_MAPPING.items() if made in MODEL_FOR_CAUSAL_LM_MAPPING]
    if kind not in known:
        near = difflib.get_close_matches(str(kind), known, n=1)
        hint = f"Did you mean {near[0]!r}?" if near else "Usual ones are gpt2, llama, qwen3, gemma2, mistral and phi3."
        raise ConfigError(f"model_type {kind!r} of the language model's config is no causal language model. {hint}")
    try:
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings), **options)
    except Exception as error:  # whatever a configuration that does not fit together raises
        raise ConfigError(f"no {kind} model can be made from this config: {_first_line(error)}") from error


def _with_adapter(model: Any, lora: Mapping[str, Any]) -> Any:
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise MissingExtra("LoRA needs peft: pip install 'rlx[lora]'.") from error
    from transformers.pytorch_utils import Conv1D

    transposed = any(isinstance(module, Conv1D) for module in model.modules())  # of GPT-2
    defaults = {"target_modules": "all-linear", "fan_in_fan_out": transposed, "task_type": "CAUSAL_LM"}
    try:
        return get_peft_model(model, LoraConfig(**(defaults | dict(lora))))
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"no adapter can be made from the lora settings {dict(lora)}: {_first_line(error)}"
        ) from error


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else 'no reason given'}"
