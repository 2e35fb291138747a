"""What the generator has to know of a model, and the models that it refuses."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from transformers.cache_utils import get_layer_types_and_kwargs

from rlx.errors import ConfigError

FULL, SLIDING = "full_attention", "sliding_attention"


@dataclass(frozen=True)
class Architecture:
    """The facts of a causal language model."""

    vocabulary: int
    layer_types: tuple[str, ...]
    """FULL or SLIDING of every layer."""
    window: int | None
    """How many positions a sliding layer sees, the token's own one included."""
    context: int | None
    """How many tokens prompt and completion have together at most; None if the config names no limit."""

    @property
    def windows(self) -> list[int | None]:
        """How many positions each layer sees; None: all."""
        return [self.window if kind == SLIDING else None for kind in self.layer_types]

    @classmethod
    def of(cls, model: Any, max_length: int | None) -> Architecture:
        """Read a model's config; ConfigError if its layers cannot be served from slots of keys and values."""
        config = model.config.get_text_config(decoder=True)
        name = f"a model of type {config.model_type!r}"
        if getattr(config, "is_encoder_decoder", False):
            raise ConfigError(f"{name} has an encoder; generation needs a decoder-only causal language model.")
        layer_types, options = get_layer_types_and_kwargs(config)
        if unknown := sorted(set(layer_types) - {FULL, SLIDING}):
            raise ConfigError(
                f"{name} has layers of type {', '.join(unknown)}, whose state is not one key and value for each token; "
                f"layers of type {FULL} and {SLIDING} can be generated with."
            )
        if getattr(config, "num_kv_shared_layers", 0):
            raise ConfigError(f"{name} has layers that share keys and values, which cannot be generated with.")
        windows = {option["sliding_window"] for option in options if "sliding_window" in option}
        if len(windows) > 1:
            raise ConfigError(f"{name} has sliding windows of several sizes, {sorted(windows)}; one is supported.")
        if model.get_output_embeddings() is None:
            raise ConfigError(f"{name} has no language model head; load it with AutoModelForCausalLM.")
        context = _context(config, name, max_length)
        return cls(config.vocab_size, tuple(layer_types), windows.pop() if windows else None, context)


def _context(config: Any, name: str, max_length: int | None) -> int | None:
    """Return the context that the config allows, or max_length where that is shorter."""
    context = getattr(config, "max_position_embeddings", None)
    if (switch := _longrope_switch(config)) is not None:
        # Past the switch the longest sequence of a batch decides which table all rows are turned by, and keys that
        # were cached before keep the other one: a row would depend on its neighbours, and on what came before.
        if max_length is not None and max_length > switch:
            raise ConfigError(
                f"max_length is {max_length}, but {name} with longrope changes its rotary table past {switch} tokens, "
                f"which cached keys cannot follow; set max_length to {switch} or less."
            )
        context = switch if context is None else min(context, switch)
    if max_length is not None and context is not None and max_length > context:
        raise ConfigError(f"max_length is {max_length}, but {name} has a context of {context} tokens; lower it.")
    return context if max_length is None else max_length


def _longrope_switch(config: Any) -> int | None:
    """Return after how many tokens a longrope model changes its rotary table; None if it is no such model."""
    for rope in _rope_parameters(config):
        if rope.get("rope_type", rope.get("type")) == "longrope":
            switch = rope.get("original_max_position_embeddings")
            return switch or getattr(config, "original_max_position_embeddings", None)
    return None


def _rope_parameters(config: Any) -> Iterator[dict[str, Any]]:
    """Yield the settings of a config's rotary embeddings: one for all layers, or one for each type of layers."""
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    yield from (part for part in (rope, *rope.values()) if isinstance(part, dict))
