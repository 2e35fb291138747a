"""TokenRunner: completes prompts with a language model, as an EnvRunner steps environments with a policy."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter

import numpy as np
from torch import nn

from rlx.actors import Published
from rlx.actors.interface import AnyChannel
from rlx.generation.generation import Generation
from rlx.generation.generator import Generator
from rlx.generation.request import Completion, Request, Sampling
from rlx.nets.flat import FlatParameters
from rlx.nets.threads import limit_threads
from rlx.rollout.age import OnNewWeights


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
    """int64 [N]: version of the weights that each token was drawn with."""
    busy_s: float = 0.0
    """Seconds that generating took."""
    drawn: np.ndarray | None = None
    """bool [N]: whether the model drew a token, or an environment said it; None: it drew all."""
    reward: np.ndarray | None = None
    """float32 [N]: what an environment gave for the turn that ends here, else 0; None: there is no environment."""

    @property
    def drawn_length(self) -> np.ndarray:
        """Tokens of each completion that the model drew, int64 [S]."""
        if self.drawn is None:
            return self.length
        return np.array([int(drawn.sum()) for drawn in self.split(self.drawn)], np.int64)

    def split(self, values: np.ndarray) -> list[np.ndarray]:
        """Return `tokens`, `logp` or `version` by completion."""
        return np.split(values, np.cumsum(self.length)[:-1])

    @staticmethod
    def concatenate(parts: Sequence[Completions]) -> Completions:
        """Join what several runners made, in the order given."""
        names = ["tokens", "logp", "length", "stopped", "version"]
        names += [name for name in ("drawn", "reward") if getattr(parts[0], name) is not None]
        joined = {name: np.concatenate([getattr(part, name) for part in parts]) for name in names}
        return Completions(**joined, busy_s=max(part.busy_s for part in parts))


class TokenRunner:
    """Owns a generator over a language model.

    build_model: makes the model, which goes to `device`; or the model itself, whose parameters somebody else changes in
    place. policy_channel: where weights are published as {"weights": flat float32 of all that is trained}; a call
    begins with the newest. on_new_weights: what `advance` does with what is under way when new ones come; singly: it
    returns samples one by one and not requests as a whole. max_tokens, max_new_tokens: the longest prompt and
    completion together (None: as it comes), and the longest completion, that it is asked to advance.
    """

    def __init__(
        self,
        build_model: Callable[[], nn.Module] | nn.Module,
        *,
        max_slots: int = 256,
        exact: bool = False,
        static_step: bool | None = None,
        device: str = "cpu",
        torch_threads: int | None = None,
        policy_channel: AnyChannel | None = None,
        on_new_weights: OnNewWeights = "finish",
        singly: bool = False,
        max_tokens: int | None = 0,
        max_new_tokens: int = 0,
    ) -> None:
        if torch_threads is not None:
            limit_threads(torch_threads)
        self._channel = policy_channel
        is_own = not isinstance(build_model, nn.Module)
        model = build_model().to(device) if is_own else build_model
        self._parameters = FlatParameters(model, device, learns=False) if is_own else None
        self._generator = Generator(model, max_slots=max_slots, exact=exact, static_step=static_step)
        self._published: Published | None = None  # the last one taken
        self._on_new_weights, self._lengths = on_new_weights, {"length": max_tokens, "limit": max_new_tokens}
        self._generation: Generation | None = None
        self._singly = singly
        self._unfinished: dict[int, list[Completion | None]] = {}  # of `advance`, by number: its samples so far
        self._ended: list[tuple[int, int, Completions]] = []  # and what it has not returned
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
        self._make_way()
        started = perf_counter()
        made = [one for samples in self._generator.generate(requests, sampling) for one in samples]
        for one in made:
            one.version[:] = self.version
        return packed(made, perf_counter() - started)

    def advance(self, requests: Mapping[int, Request], sampling: Sampling) -> list[tuple[int, int, Completions]]:
        """Take up these requests beside those under way, by number; return (number, 0, samples) of what ends first.

        It returns as soon as all samples of a request have ended, or `singly` one of them, as (number, which, it); what
        has not ended by then goes on in the next call. A number under way is not taken up twice. New weights are looked
        for before every token.
        """
        if self._generation is None:
            self._generation = self._generator.open(sampling, **self._lengths)
        fresh = {number: request for number, request in requests.items() if number not in self._unfinished}
        self._generator.check(list(fresh.values()))
        for number, request in fresh.items():
            self._generation.add([request], number)
            self._unfinished[number] = [None] * request.n
        while self._unfinished and not self._ended:
            self._step(self._generation)
        ended, self._ended = self._ended, []
        return ended

    def forget(self) -> None:
        """Never mind what is under way."""
        self._generation, self._unfinished, self._ended = None, {}, []

    def close(self) -> None:
        """Nothing to close; every runner has it."""

    def _step(self, generation: Generation) -> None:
        """Draw a token for each sample of `advance`, with new weights if there are any and it is time for them."""
        new = self._new_weights()
        waits = new is not None and self._on_new_weights == "finish" and generation.has_begun
        if not waits and self._take_weights(new) and self._on_new_weights == "refresh_cache":
            generation.refresh()
        generation.version = self.version
        for number, sample, completion in generation.step(begin=not waits):
            samples = self._unfinished[number]
            samples[sample] = completion
            if self._singly:
                self._ended.append((number, sample, packed([completion])))
            if (made := [one for one in samples if one is not None]) and len(made) == len(samples):
                if not self._singly:
                    self._ended.append((number, 0, packed(made)))
                del self._unfinished[number]

    def _make_way(self) -> None:
        """Take new weights, if there are any, as is due to what is under way."""
        new, generation = self._new_weights(), self._generation
        if new is not None and generation is not None and generation.has_begun:
            while self._on_new_weights == "finish" and generation.has_begun:
                self._step(generation)
            if self._on_new_weights == "refresh_cache":
                self._take_weights(new)
                generation.refresh()
        self._take_weights(self._new_weights())

    def _new_weights(self) -> Published | None:
        """Return what was published since weights were taken last, if anything."""
        published = self._channel.latest() if self._channel is not None else None
        return None if published is self._published else published

    def _take_weights(self, published: Published | None) -> bool:
        """Generate with these weights from now on; return whether there were any."""
        if published is None:
            return False
        self.set_weights(published.version, published.value["weights"])
        self._published = published
        return True


def packed(made: Sequence[Completion], busy_s: float = 0.0) -> Completions:
    """Return completions as flat arrays, in the order given."""
    return Completions(
        tokens=np.concatenate([np.zeros(0, np.int64), *(one.tokens for one in made)]),
        logp=np.concatenate([np.zeros(0, np.float32), *(one.logp for one in made)]),
        length=np.array([len(one.tokens) for one in made], np.int64),
        stopped=np.array([one.stopped for one in made], bool),
        version=np.concatenate([np.zeros(0, np.int64), *(one.version for one in made)]),
        busy_s=busy_s,
    )
