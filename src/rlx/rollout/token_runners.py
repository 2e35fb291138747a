"""TokenRunners: one or many token runners behind one `generate`."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from torch import nn

from rlx.actors import Restart, Runtime
from rlx.generation.request import Request, Sampling
from rlx.rollout.conversation_groups import ConversationGroups
from rlx.rollout.group_arrivals import CompletionGroups, GroupArrivals, GroupMaker
from rlx.rollout.runner_actors import Advice, RunnerActors
from rlx.rollout.token_runner import Completions, TokenRunner

ADVICE = Advice(
    method="generate",
    when_late="Raise fault_tolerance.generate_timeout_s, or lower generation.max_new_tokens or "
    "prompts.prompts_per_iteration.",
    when_dead="generation.max_slots if memory is short",
    when_back=" and generates what it was asked for once more",
)


class TokenRunners:
    """Generates with `num_runners` TokenRunners in processes of their own, or with one in this process if it is 0.

    The completions of a request depend on its seed and the weights, not on who makes them: up to rounding, or exactly
    with `exact`. So what a lost runner was asked for is asked again, and comes once. build_model: makes the model in
    the runners' processes; local_model: the learner's own, for a runner in this process, which needs no weights sent.
    devices: of each runner that makes its model.
    """

    def __init__(
        self,
        build_model: Callable[[], nn.Module],
        *,
        num_runners: int = 0,
        local_model: nn.Module | None = None,
        devices: Sequence[str] = ("cpu",),
        runtime: Callable[[], Runtime] | None = None,
        start_timeout_s: float = 120.0,
        generate_timeout_s: float = 600.0,
        restart: Restart | None = None,
        **runner_options: Any,
    ) -> None:
        self._local: TokenRunner | None = None
        self._actors: RunnerActors | None = None
        self._arrivals: GroupArrivals | None = None
        if num_runners == 0:
            options = {"device": devices[0], **runner_options}
            self._local = TokenRunner(build_model if local_model is None else local_model, **options)
            self.num_weights = self._local.spaces()
            return
        assert runtime is not None, "runners in processes of their own need a runtime"
        self._actors = RunnerActors(runtime(), start_timeout_s, generate_timeout_s, restart, TokenRunner, ADVICE)
        try:
            for index, device in zip(range(num_runners), itertools.cycle(devices), strict=False):
                options = {"device": device, **runner_options}
                self._actors.spawn(f"token_runner/{index}", (build_model,), options)
            self.num_weights: int | None = self._actors.start()
        except BaseException:
            self.close()
            raise

    def publish(self, version: int, weights: Callable[[], np.ndarray]) -> int:
        """Have every call that begins from now on generate with what `weights` returns (flat float32), which is copied.

        Of those the model's come first; what a value net has beside them is not sent. Where the learner's own model is
        read there is nothing to send: then a version is all of it. Returns the bytes that were sent, to all together.
        """
        sent = None if self.num_weights is None else weights()[: self.num_weights]
        if self._local is not None:
            self._local.set_weights(version, sent)
        else:
            assert self._actors is not None
            (self._arrivals or self._actors).publish(version, {"weights": sent})
        return 0 if sent is None else sent.nbytes

    def arrive(self, make_request: Callable[[int], Request], sampling: Sampling, **limits: Any) -> GroupArrivals:
        """Return what keeps the runners at work, within `limits` of GroupArrivals, while others learn."""
        return self._arriving(CompletionGroups(self._own_processes(), make_request, sampling), limits)

    def arrive_in_turns(self, sampling: Sampling, limits: Mapping[str, Any], **conversations: Any) -> GroupArrivals:
        """Return what keeps runners, made with `singly`, and environments at work.

        limits: of GroupArrivals; conversations: what ConversationGroups are made of.
        """
        return self._arriving(ConversationGroups(self._own_processes(), sampling, **conversations), limits)

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> Completions:
        """Return the completions of all requests, in their order."""
        if self._local is not None:
            return self._local.generate(requests, sampling)
        assert self._actors is not None
        if self._arrivals is not None:
            self._arrivals.pause()
        count = len(self._actors)
        shares = [requests[len(requests) * i // count : len(requests) * (i + 1) // count] for i in range(count)]
        calls = [
            self._actors.ask(index, "generate", lambda share=share: (share, sampling))
            for index, share in enumerate(shares)
            if share
        ]
        return Completions.concatenate(self._actors.gather(calls))

    def _own_processes(self) -> RunnerActors:
        assert self._actors is not None, "a runner in this process works at nothing while others do"
        return self._actors

    def _arriving(self, maker: GroupMaker, limits: Mapping[str, Any]) -> GroupArrivals:
        self._arrivals = GroupArrivals(self._own_processes(), maker, **limits)
        return self._arrivals

    def take_restarts(self) -> int:
        """Return how many runners were started again since the last call."""
        return 0 if self._actors is None else self._actors.take_restarts()

    def close(self) -> None:
        """End the runners' processes."""
        if self._arrivals is not None:
            self._arrivals.pause()
        if self._actors is not None:
            self._actors.close()
