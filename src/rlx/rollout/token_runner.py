"""TokenRunner: completes prompts with a language model, as an EnvRunner steps environments with a policy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter

import numpy as np
from torch import nn

from rlx.actors import Published
from rlx.actors.interface import AnyChannel
from rlx.generation.generator import Generator
from rlx.generation.request import Completion, Request, Sampling
from rlx.nets.flat import FlatParameters
from rlx.nets.threads import limit_threads


@dataclass
class Completions:
    """What was generated, request by request and sample by sample, as flat arrays: few messages, whatever the count."""

    tokens: np.ndarray
    """int64 [N]: the completions one after the other, stop tokens included."""
    logp: np.ndarray
    """float32 [N]: of each token under the law that it was drawn from."""
    length: np.ndarray
    """int64 [S]: tokens of each completion; they add up to N."""
    stopped: np.ndarray
    """bool [S]: a stop token ended it; False: the limit did."""
    version: np.ndarray
    """int64 [S]: version of the weights that it was drawn with."""
    busy_s: float = 0.0
    """Seconds that generating took."""

    def split(self, values: np.ndarray) -> list[np.ndarray]:
        """Return `tokens` or `logp` by completion."""
        return np.split(values, np.cumsum(self.length)[:-1])

    @staticmethod
    def concatenate(parts: Sequence[Completions]) -> Completions:
        """Join what several runners made, in the order given."""
        names = ("tokens", "logp", "length", "stopped", "version")
        joined = {name: np.concatenate([getattr(part, name) for part in parts]) for name in names}
        return Completions(**joined, busy_s=max(part.busy_s for part in parts))


class TokenRunner:
    """Owns a generator over a language model.

    build_model: makes the model; or the model itself, whose parameters somebody else changes in place. channel: where
    weights are published as {"weights": flat float32 of all that is trained}; a call begins with the newest.
    """

    def __init__(
        self,
        build_model: Callable[[], nn.Module] | nn.Module,
        *,
        max_slots: int = 256,
        exact: bool = False,
        torch_threads: int | None = None,
        policy_channel: AnyChannel | None = None,
    ) -> None:
        if torch_threads is not None:
            limit_threads(torch_threads)
        self._channel = policy_channel
        is_own = not isinstance(build_model, nn.Module)
        model = build_model() if is_own else build_model
        self._parameters = FlatParameters(model) if is_own else None
        self._generator = Generator(model, max_slots=max_slots, exact=exact)
        self._published: Published | None = None  # the last one taken
        self.version = 0

    def spaces(self) -> int | None:
        """Return how many weights it wants, the model's learned ones; None where they are somebody else's."""
        return None if self._parameters is None else self._parameters.data.numel()

    def set_weights(self, version: int, weights: np.ndarray | None) -> None:
        """Generate with `weights` (flat float32) from now on; None: they are in the model already."""
        if weights is not None:
            assert self._parameters is not None, "this runner reads the parameters of somebody else's model"
            self._parameters.load(weights)
        self.version = version

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> Completions:
        """Return the completions of all requests, with the newest weights."""
        published = self._channel.latest() if self._channel is not None else None
        if published is not None and published is not self._published:
            self.set_weights(published.version, published.value["weights"])
            self._published = published
        started = perf_counter()
        made = [one for samples in self._generator.generate(requests, sampling) for one in samples]
        return _packed(made, self.version, perf_counter() - started)

    def close(self) -> None:
        """Nothing to close; every runner has it."""


def _packed(made: Sequence[Completion], version: int, busy_s: float) -> Completions:
    return Completions(
        tokens=np.concatenate([np.zeros(0, np.int64), *(one.tokens for one in made)]),
        logp=np.concatenate([np.zeros(0, np.float32), *(one.logp for one in made)]),
        length=np.array([len(one.tokens) for one in made], np.int64),
        stopped=np.array([one.stopped for one in made], bool),
        version=np.full(len(made), version, np.int64),
        busy_s=busy_s,
    )
