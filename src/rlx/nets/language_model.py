"""Language models from a folder, the hub or a configuration, with LoRA or without; and back to a folder."""

from __future__ import annotations

import contextlib
import copy
import difflib
import textwrap
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from rlx.errors import ConfigError, MissingExtra
from rlx.hub import check_hub


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
    Within `torch.device("meta")` the model is made of its configuration alone, with sizes and without weights.
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


def language_model_config(*, path: str | None = None, config: Mapping[str, Any] | None = None) -> Any:
    """Return the configuration that `load_language_model` would make a model of, without making one.

    Of a model for text and more it is the part for text. Raises ConfigError like `load_language_model`.
    """
    if path is None:
        return _made_config(config or {}).get_text_config()
    from transformers import AutoConfig

    path = find_model(path)
    try:
        return AutoConfig.from_pretrained(path).get_text_config()
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"{path} cannot be loaded as a causal language model: {_reason(error)}") from error


def find_model(path: str) -> str:
    """Return where transformers finds a model: a folder that is one, or a hub id; ConfigError where there is neither.

    It does not take long to say so, as loading from a hub that cannot be reached does.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        check_hub(path)
        return path
    if not (folder / "config.json").is_file():
        raise ConfigError(f"the folder {path} holds no config.json, so there is no language model in it.")
    return str(folder)


def export_language_model(model: nn.Module, tokenizer: Any, folder: str | Path) -> None:
    """Write a folder that AutoModelForCausalLM and AutoTokenizer load; an adapter is merged into the weights.

    model: a causal language model, or a policy around one. tokenizer: None leaves it out.
    """
    model = getattr(model, "model", model) if not hasattr(model, "save_pretrained") else model
    if hasattr(model, "get_base_model"):
        model = copy.deepcopy(model).merge_and_unload()  # type: ignore[operator]
    # Learners keep all parameters in one buffer, which would be taken for one tensor that all names share.
    copies: dict[tuple[int, torch.Size], torch.Tensor] = {}
    state = {}
    for name, tensor in model.state_dict().items():
        key = (tensor.data_ptr(), tensor.shape)  # tied weights stay tied
        copies.setdefault(key, tensor.detach().cpu().clone())
        state[name] = copies[key]
    with _without_bars():
        model.save_pretrained(folder, state_dict=state)  # type: ignore[operator]
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
        generation: Any = copy.deepcopy(model.generation_config)
        if generation.eos_token_id is None:  # as of a model made from a configuration: what ends its completions
            generation.eos_token_id = tokenizer.eos_token_id
            generation.save_pretrained(folder)


def _dtype(name: str) -> torch.dtype:
    allowed = ("float32", "bfloat16", "float16")
    if name not in allowed:
        raise ConfigError(f"dtype {name!r} is none of {', '.join(allowed)}.")
    return getattr(torch, name)


def _from_path(path: str, options: dict[str, Any]) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    path = find_model(path)
    try:
        if torch.get_default_device().type == "meta":
            return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path), **options)
        with _without_bars():
            return AutoModelForCausalLM.from_pretrained(path, **options)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise ConfigError(f"{path} cannot be loaded as a causal language model: {_reason(error)}") from error


def _from_config(config: Mapping[str, Any], options: dict[str, Any]) -> Any:
    from transformers import AutoModelForCausalLM

    made = _made_config(config)
    try:
        return AutoModelForCausalLM.from_config(made, **options)
    except Exception as error:  # whatever a configuration that does not fit together raises
        raise ConfigError(f"no {made.model_type} model can be made from this config: {_reason(error)}") from error


def _made_config(config: Mapping[str, Any]) -> Any:
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as known

    settings = dict(config)
    kind = settings.pop("model_type", None)
    if kind not in known:
        near = difflib.get_close_matches(str(kind), known, n=1)
        hint = f"Did you mean {near[0]!r}?" if near else "Usual ones are gpt2, llama, qwen3, gemma2, mistral and phi3."
        raise ConfigError(f"model_type {kind!r} of the language model's config is no causal language model. {hint}")
    made_of = AutoConfig.for_model(kind)
    for name in settings:
        if not hasattr(made_of, name):  # transformers would keep it, unused
            near = difflib.get_close_matches(name, made_of.to_dict(), n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ConfigError(f"{name!r} is no setting of a {kind} model.{hint}")
    # A family's ids of special tokens are those of its own tokenizer; in another one Llama's EOS, 2, is any character.
    special = {f"{name}_token_id": None for name in ("bos", "eos", "pad") if hasattr(made_of, f"{name}_token_id")}
    try:
        return AutoConfig.for_model(kind, **special | settings)
    except Exception as error:  # whatever a configuration that does not fit together raises
        raise ConfigError(f"no {kind} model can be made from this config: {_reason(error)}") from error


def _with_adapter(model: Any, lora: Mapping[str, Any]) -> Any:
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise MissingExtra("LoRA needs peft: pip install 'rlx[lora]'.") from error
    from transformers.pytorch_utils import Conv1D

    transposed = any(isinstance(module, Conv1D) for module in model.modules())  # of GPT-2
    # peft asks for a name that transformers has since changed, and transformers warns of it.
    defaults = {"target_modules": "all-linear", "fan_in_fan_out": transposed, "task_type": "CAUSAL_LM"}
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing")
            return get_peft_model(model, LoraConfig(**(defaults | dict(lora))))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"no adapter can be made from the lora settings {dict(lora)}: {_reason(error)}") from error


@contextlib.contextmanager
def _without_bars() -> Iterator[None]:
    """Keep transformers' progress bars off a terminal that shows a run."""
    from transformers.utils import logging as of_transformers

    if not of_transformers.is_progress_bar_enabled():
        yield
        return
    of_transformers.disable_progress_bar()
    try:
        yield
    finally:
        of_transformers.enable_progress_bar()


def _reason(error: Exception) -> str:
    """Return what an exception says, in one line of some length at most."""
    return textwrap.shorten(f"{type(error).__name__}: {error}", 300)
