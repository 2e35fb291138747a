"""The generator: requests in, completions out, as many at a time as there are slots."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from rlx.errors import ConfigError, RlxError
from rlx.generation.architecture import Architecture
from rlx.generation.live import Live, Share
from rlx.generation.request import Completion, Request, Sampling, check_requests
from rlx.generation.rows import regroup
from rlx.generation.sampler import draw, log_law, most_probable
from rlx.generation.slots import Slots
from rlx.generation.trial import try_out
from rlx.generation.twin import Twin
from rlx.generation.uniform import uniform

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
    """

    def __init__(self, model: Any, *, max_slots: int = 256, max_length: int | None = None, exact: bool = False) -> None:
        if max_slots < 1:
            raise ConfigError(f"max_slots is {max_slots}; it must be 1 or more.")
        if max_length is not None and max_length < 2:
            raise ConfigError(f"max_length is {max_length}; it must be 2 or more: a prompt and a completion.")
        self.architecture = Architecture.of(model, max_length)
        self.max_slots, self._max_length, self._exact = max_slots, max_length, exact
        self._twin = Twin(model)
        self._slots: Slots | None = None
        self._slots_of: Any = None
        self._is_busy = False
        try_out(self._ready_slots(), self._twin.model(), self.architecture)

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
        check_requests(requests, self.architecture.vocabulary, self.architecture.context)
        if not requests:
            return []
        slots = self._ready_slots()
        completions: list[list[Any]] = [[None] * request.n for request in requests]

        def finish(request: int, sample: int, completion: Completion) -> None:
            completions[request][sample] = completion
            if on_finished is not None:
                on_finished(request, sample, completion)

        with torch.inference_mode():
            self._is_busy = True
            try:
                self._run(slots, requests, sampling or Sampling(), finish)
            except BaseException:
                slots.forget()  # what is in them may be half written, or not be numbers
                raise
            finally:
                self._is_busy = False
        return completions

    def _ready_slots(self) -> Slots:
        model = self._twin.model()
        if self._slots is None or self._slots_of is not model:
            self._slots, self._slots_of = Slots(self.architecture, model, self._exact), model
        return self._slots

    def _run(self, slots: Slots, requests: Sequence[Request], sampling: Sampling, finish: OnFinished) -> None:
        """Generate: in each turn fill free slots, put one token into every row, and draw the next ones."""
        queue = _shares(requests, self.architecture.context, self.max_slots)
        longest = max(share.length for share in queue)
        live = Live(min(self.max_slots, sum(share.count for share in queue)), max(share.limit for share in queue))
        slots.reserve(live.capacity, self._max_length or longest)
        while queue or live.count:
            fresh = _take(queue, live.capacity - live.count, live.count)
            logits = [slots.decode(live.token_R, live.position_R)] if live.count else []
            if fresh:
                logits.append(slots.prefill([share.request.prompt for share in fresh], live.rows))
                live.add(fresh)
            token_A, logp_A = self._draw(torch.cat(logits), sampling, live)
            for request, sample, completion in live.record(token_A, logp_A):
                finish(request, sample, completion)
            row_A, source, target = regroup(live.row_A, live.last_A, self.architecture.vocabulary)
            if len(source):
                slots.copy(source, target, int(live.length_A.max()))
            live.move(row_A)

    def _draw(self, logits: torch.Tensor, sampling: Sampling, live: Live) -> tuple[np.ndarray, np.ndarray]:
        """Return each live sample's next token and its log-probability."""
        row_A = torch.from_numpy(live.row_A).to(logits.device)
        if sampling.temperature == 0:
            token_A, logp_A = most_probable(logits[row_A])
        else:
            u_A = torch.from_numpy(uniform(live.key_A, live.step_A)).to(logits.device)
            token_A, logp_A = draw(log_law(logits, sampling), row_A, u_A)
        if not torch.isfinite(logp_A).all() or (sampling.temperature == 0 and not torch.isfinite(logits).all()):
            raise RlxError("the model's logits are not finite numbers; its weights hold NaN or infinity.")
        return token_A.cpu().numpy(), logp_A.cpu().numpy()


def _shares(requests: Sequence[Request], context: int | None, max_slots: int) -> list[Share]:
    """Return the requests' samples in shares that fit into the slots; shortest prompts last, where they are taken."""
    shares = []
    for number, request in enumerate(requests):
        limit = request.max_new_tokens
        if context is not None:
            limit = min(limit, context - len(request.prompt))
        for first in range(0, request.n, max_slots):
            shares.append(Share(request, number, first, min(max_slots, request.n - first), limit))
    return sorted(shares, key=lambda share: len(share.request.prompt), reverse=True)


def _take(queue: list[Share], free: int, live: int) -> list[Share]:
    """Take shares off the queue's end for the free slots; none while few are free, as a prefill of one row is dear."""
    taken: list[Share] = []
    if live and free < max(1, (free + live) // 8):
        return taken
    while queue and queue[-1].count <= free:
        free -= queue[-1].count
        taken.append(queue.pop())
    return taken
