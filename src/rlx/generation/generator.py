"""The generator: requests in, completions out, as many at a time as there are slots."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

from rlx.errors import ConfigError, RlxError
from rlx.generation.architecture import Architecture
from rlx.generation.generation import Generation, shares_of
from rlx.generation.graphs import capture_for
from rlx.generation.request import Completion, Request, Sampling, check_requests
from rlx.generation.slots import Slots
from rlx.generation.trial import try_out
from rlx.generation.twin import Twin

OnFinished = Callable[[int, int, Completion], None]
"""Called with the request's index, the sample's index and the completion, as soon as a sample has ended."""


class Generator:
    """Generates with a causal language model of transformers, or one that peft wraps, and leaves the model as it is.

    It reads the model's own parameters, so weights that change in place count from the next `generate` on. Everything
    else (mode, config, attention, buffers) is the generator's own; gradients are never made.

    model: a decoder-only model with full or sliding attention; ConfigError for others, and for those whose logits
        come out otherwise from slots than from their own forward pass.
    max_slots: sequences that are generated at a time; memory is max_slots * length * 2 * layers * size of keys.
    max_length: longest prompt and completion together; None takes the model's context, and memory as it is needed.
    exact: a completion is the same to the bit whatever else is in the batch, which takes longer; not with
        mixtures of experts, whose tokens meet in the experts. Without it log-probabilities may differ by about 1e-6
        (float32), and a token where a draw falls that near to an edge.
    static_step: decode in steps of few, fixed shapes, which a GPU repeats as CUDA graphs, with attention that reads
        nothing but tokens that are there where torch has it. Not with exact. None: on a GPU, unless exact.
    """

    def __init__(
        self,
        model: Any,
        *,
        max_slots: int = 256,
        max_length: int | None = None,
        exact: bool = False,
        static_step: bool | None = None,
    ) -> None:
        if max_slots < 1:
            raise ConfigError(f"max_slots is {max_slots}; it must be 1 or more.")
        if max_length is not None and max_length < 2:
            raise ConfigError(f"max_length is {max_length}; it must be 2 or more: a prompt and a completion.")
        if exact and static_step:
            raise ConfigError(
                "static_step=True and exact=True exclude each other: its shapes depend on all of a batch."
            )
        self.architecture = Architecture.of(model, max_length)
        self.max_slots, self._max_length, self._exact = max_slots, max_length, exact
        self._static_step = static_step
        self._twin = Twin(model)
        self._slots: dict[str, tuple[Any, Slots]] = {}  # of `generate` and of `open`, with the model they serve
        self._is_busy = False
        try_out(self._ready_slots("generate"), self._twin.model(), self.architecture)

    def generate(
        self, requests: Sequence[Request], sampling: Sampling | None = None, on_finished: OnFinished | None = None
    ) -> list[list[Completion]]:
        """Return the n completions of every request, in order.

        An interrupt, or an exception of `on_finished`, ends the call; what had not ended by then is lost, and the
        generator can be used again. ConfigError: a prompt that is too long, or token ids outside the vocabulary.
        RlxError: it is generating already (`on_finished` cannot ask for more), or the logits are not finite.
        """
        if self._is_busy:
            raise RlxError("this generator is generating already; let that call end, or make a second Generator.")
        self.check(requests)
        if not requests:
            return []
        completions: list[list[Any]] = [[None] * request.n for request in requests]
        self._is_busy = True
        try:
            generation = self._begin(requests, sampling or Sampling())
            while generation.is_busy:
                for request, sample, completion in generation.step():
                    completions[request][sample] = completion
                    if on_finished is not None:
                        on_finished(request, sample, completion)
        except BaseException:
            self._ready_slots("generate").forget()  # what is in them may be half written, or not be numbers
            raise
        finally:
            self._is_busy = False
        return completions

    def check(self, requests: Sequence[Request]) -> None:
        """Raise ConfigError at the first request that the model cannot serve."""
        check_requests(requests, self.architecture.vocabulary, self.architecture.context)

    def open(self, sampling: Sampling, *, length: int | None, limit: int) -> Generation:
        """Return a Generation to which requests can be added at any time, and that `generate` leaves alone.

        It takes over the slots of the one that was opened before, which is over. length: tokens of a prompt and its
        completion together at most, None: as many as they turn out to have; limit: of a completion.
        """
        slots = self._ready_slots("open")
        return Generation(slots, sampling, capacity=self.max_slots, length=length, limit=limit)

    def _begin(self, requests: Sequence[Request], sampling: Sampling) -> Generation:
        shares = shares_of(requests, self.architecture.context, self.max_slots, 0)
        generation = Generation(
            self._ready_slots("generate"),
            sampling,
            capacity=min(self.max_slots, sum(request.n for request in requests)),
            length=self._max_length or max(share.length for share in shares),
            limit=max(share.limit for share in shares),
        )
        generation.add(requests)
        return generation

    def _ready_slots(self, whose: str) -> Slots:
        model = self._twin.model()
        known = self._slots.get(whose)
        if known is None or known[0] is not model:
            device = next(model.parameters()).device
            is_static = device.type == "cuda" and not self._exact if self._static_step is None else self._static_step
            new_capture = functools.partial(capture_for, device) if is_static else None
            known = self._slots[whose] = model, Slots(self.architecture, model, self._exact, new_capture)
        return known[1]
