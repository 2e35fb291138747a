"""Generation: requests on their way to completions, a token a step, while more come in and weights may change."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from rlx.errors import ConfigError, RlxError
from rlx.generation.live import Live, Share
from rlx.generation.request import Completion, Request, Sampling
from rlx.generation.rows import regroup
from rlx.generation.sampler import sample
from rlx.generation.slots import Slots
from rlx.generation.uniform import uniform


class Generation:
    """Fills free slots with what was added, and draws one more token for every live sample in each step."""

    def __init__(self, slots: Slots, sampling: Sampling, *, capacity: int, length: int | None, limit: int) -> None:
        """capacity: samples at a time; length: of prompt and completion at most; limit: of a completion at most.

        length None: slots are made longer when something longer is added.
        """
        self._slots, self._sampling = slots, sampling
        self._vocabulary, self._context = slots.architecture.vocabulary, slots.architecture.context
        self._queue: list[Share] = []  # the next one last
        self._live, self._length, self._grows = Live(capacity, limit), length or 1, length is None
        self.version = 0
        """Version of the weights, which completions tell of each token; whoever changes the weights counts it up."""
        slots.reserve(capacity, self._length)

    @property
    def is_busy(self) -> bool:
        """Whether there is anything left to do."""
        return bool(self._queue or self._live.count)

    @property
    def has_begun(self) -> bool:
        """Whether a sample lives that was begun and has not ended."""
        return self._live.count > 0

    def add(self, requests: Sequence[Request], first: int = 0) -> None:
        """Take up requests, which get the numbers first, first + 1, ...; they begin after those that wait already."""
        shares = shares_of(requests, self._context, self._live.capacity, first)
        if shares and (longest := max(share.length for share in shares)) > self._length:
            if not self._grows:
                raise ConfigError(
                    f"a prompt and its completion may have {longest} tokens, and the slots have room for "
                    f"{self._length}; ask for less, or make longer slots."
                )
            twice = 2 * self._length  # so that it does not happen often
            self._length = max(longest, twice if self._context is None else min(twice, self._context))
            self._slots.reserve(self._live.capacity, self._length, keep=True)
        self._queue[:0] = shares

    @torch.inference_mode()
    def step(self, begin: bool = True) -> list[tuple[int, int, Completion]]:
        """Draw a token for every sample; return (request, sample, completion) of those that ended with it.

        begin: False leaves waiting requests waiting. RlxError: the logits are not finite.
        """
        live, drawn = self._live, []
        fresh = _take(self._queue, live.capacity - live.count, live.count) if begin else []
        if live.count:
            u_A = uniform(live.key_A, live.step_A)
            drawn.append(self._slots.step(live.token_R, live.position_R, live.row_A, u_A, self._sampling))
        if fresh:
            drawn.append(self._begin(fresh))
        if not drawn:
            return []
        token_A, logp_A = torch.cat(drawn, 1).cpu().numpy()  # all that a step reads from the device
        if not np.isfinite(logp_A).all():
            raise RlxError("the model's logits are not finite numbers; its weights hold NaN or infinity.")
        ended = live.record(token_A.astype(np.int64), logp_A.astype(np.float32), self.version)
        row_A, source, target = regroup(live.row_A, live.last_A, self._vocabulary)
        if len(source):
            self._slots.copy(source, target, int(live.length_A.max()))
        live.move(row_A)
        return ended

    @torch.inference_mode()
    def refresh(self) -> None:
        """Compute the keys and values of all live samples again, with the weights as they are now."""
        if self._live.count:
            self._slots.prefill(self._live.sequences(), 0)

    def _begin(self, fresh: Sequence[Share]) -> torch.Tensor:
        """Give fresh samples their rows; return what they draw first, as `sample` does."""
        live = self._live
        count, rows = live.count, live.rows
        logits = self._slots.prefill([share.request.prompt for share in fresh], rows)
        live.add(fresh)
        row_A, u_A = live.row_A[count:] - rows, uniform(live.key_A[count:], live.step_A[count:])
        return sample(logits, self._sampling, *(torch.from_numpy(one).to(logits.device) for one in (row_A, u_A)))


def shares_of(requests: Sequence[Request], context: int | None, capacity: int, first: int) -> list[Share]:
    """Return the requests' samples in shares that fit into the slots; shortest prompts last, where they are taken."""
    shares = []
    for number, request in enumerate(requests, first):
        limit = request.max_new_tokens
        if context is not None:
            limit = min(limit, context - len(request.prompt))
        for begin in range(0, request.n, capacity):
            shares.append(Share(request, number, begin, min(capacity, request.n - begin), limit))
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
