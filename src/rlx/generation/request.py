"""What is asked of the generator, and what comes back."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rlx.errors import ConfigError


@dataclass(frozen=True)
class Sampling:
    """The law that tokens are drawn from, made of the model's logits in this order, as in transformers."""

    temperature: float = 1.0
    """Divides the logits; 0 takes the most probable token, whose logp under that law is 0."""
    top_k: int = 0
    """Keep the k most probable tokens, and those that tie with the last of them; 0 keeps all."""
    top_p: float = 1.0
    """Keep the fewest most probable tokens that have this probability together; 1 keeps all."""
    min_p: float = 0.0
    """Keep tokens with at least this part of the most probable one's probability; 0 keeps all."""

    def __post_init__(self) -> None:
        _check("temperature", self.temperature, 0 <= self.temperature < math.inf, "a number of at least 0; 0 is greedy")
        whole = isinstance(self.top_k, int) and self.top_k >= 0
        _check("top_k", self.top_k, whole, "a whole number of at least 0; 0 keeps all tokens")
        _check("top_p", self.top_p, 0 < self.top_p <= 1, "above 0 and at most 1; 1 keeps all tokens")
        _check("min_p", self.min_p, 0 <= self.min_p <= 1, "from 0 to 1; 0 keeps all tokens")


@dataclass(frozen=True)
class Request:
    """A prompt, and how many completions of it are wanted."""

    prompt: Sequence[int]
    """Token ids, one at least."""
    n: int = 1
    """Completions; they share the prompt's keys and values."""
    max_new_tokens: int = 128
    seed: int = 0
    """Sample i draws its token number t from (seed, i, t) and nothing else."""
    stop_ids: frozenset[int] = frozenset()
    """A completion ends with the first of these; it is part of the completion."""

    def __post_init__(self) -> None:
        _check("prompt", self.prompt, len(self.prompt) > 0, "one token id at least; begin with the BOS token")
        _check("n", self.n, self.n >= 1, "1 or more")
        _check("max_new_tokens", self.max_new_tokens, self.max_new_tokens >= 1, "1 or more")


@dataclass(frozen=True)
class Completion:
    """What followed a prompt."""

    tokens: np.ndarray
    """int64 [C], the stop token included."""
    logp: np.ndarray
    """float32 [C]: log-probability of each token under the law that it was drawn from (`Sampling`)."""
    version: np.ndarray
    """int64 [C]: version of the weights that each token was drawn with (`Generation.version`)."""
    stopped: bool
    """Whether a stop token ended it; False: it was cut at max_new_tokens, or where the context ends."""


def check_requests(requests: Sequence[Request], vocabulary: int, context: int | None) -> None:
    """Raise ConfigError at the first request that a model of this vocabulary and context cannot serve."""
    for number, request in enumerate(requests):
        if context is not None and len(request.prompt) >= context:
            raise ConfigError(
                f"request {number}: the prompt has {len(request.prompt)} tokens, but prompt and completion together "
                f"have {context} at most; shorten it to {context - 1} or fewer."
            )
        for name, ids in (("prompt", request.prompt), ("stop_ids", request.stop_ids)):
            if len(ids) and (min(ids) < 0 or max(ids) >= vocabulary):
                wrong = next(one for one in ids if not 0 <= one < vocabulary)
                raise ConfigError(
                    f"request {number}: {name} has the token id {wrong}, but the model's vocabulary has ids from 0 to "
                    f"{vocabulary - 1}; use the tokenizer that belongs to the model."
                )


def _check(name: str, value: object, right: bool, allowed: str) -> None:
    if not right:
        raise ConfigError(f"{name} is {value!r}; it must be {allowed}.")
