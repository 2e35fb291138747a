"""Runs on text whose completions a server draws: what settings that leaves, and how the server is met."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlx.errors import ConfigError

if TYPE_CHECKING:
    from rlx.rollout.served_runners import ServedRunners
    from rlx.text_settings import TextSettings

SHAPE = ("model_type", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
"""What two models have in common where one can take the other's weights."""


def check_engine(s: TextSettings) -> None:
    """Raise ConfigError where the settings ask a server for what it cannot do, or do not say which server."""
    t = s.token_runners
    if t.engine == "rlx":
        if t.url is not None:
            raise ConfigError(
                f"token_runners.url={t.url} is used by no engine but vllm; set token_runners.engine=vllm."
            )
        return
    max_age = getattr(s.training, "max_age", 0)
    for is_wrong, text in (
        (t.url is None, "token_runners.url is not set; give the address of a running server, as http://localhost:8000"),
        (
            t.num_token_runners,
            f"token_runners.num_token_runners={t.num_token_runners} would generate in place of the server; set it to 0",
        ),
        (max_age, f"training.max_age={max_age} has completions drawn while learners learn; set it to 0"),
        (
            t.on_new_weights != "finish",
            f"token_runners.on_new_weights={t.on_new_weights} changes weights under completions; set it to finish",
        ),
        (s.generation.exact, "generation.exact=true cannot be had from a server; set it to false"),
    ):
        if is_wrong:
            raise ConfigError(f"token_runners.engine=vllm: {text}, or set engine to rlx.")


def build_served_runners(
    s: TextSettings, make_model: Callable[[], Any], export: Callable[[Path], object], longest: int
) -> ServedRunners:
    """Return what generates with the server at token_runners.url; ConfigError where it cannot serve this model.

    longest: tokens of the longest prompt that is trained on; export: writes the model as it is into a folder.
    """
    import torch

    from rlx.generation.vllm import VllmGenerator
    from rlx.rollout.served_runners import ServedRunners

    with torch.device("meta"):
        config = make_model().config.get_text_config()
    generator = VllmGenerator(
        s.token_runners.url or "",
        vocabulary=config.vocab_size,
        context=getattr(config, "max_position_embeddings", None),
        longest=longest + s.generation.max_new_tokens,
        max_slots=s.generation.max_slots,
        timeout_s=s.fault_tolerance.generate_timeout_s,
    )
    _check_model(s, config, generator.root)
    return ServedRunners(generator, export, s.token_runners.weights_path)


def _check_model(s: TextSettings, config: Any, root: str) -> None:
    """Compare the model that the server was started with, where its folder can be read, with the one that learns."""
    if not (Path(root) / "config.json").is_file():
        return
    from rlx.nets.language_model import language_model_config

    served = language_model_config(path=root)
    for name in SHAPE:
        here, there = getattr(config, name, None), getattr(served, name, None)
        if here != there:
            raise ConfigError(
                f"the vLLM server at {s.token_runners.url} serves {root} with {name} {there}, and the model that is "
                f"trained has {here}; start it with the model of this run."
            )
