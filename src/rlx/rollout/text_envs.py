"""TextEnvs: the environments of a run on text, in the driver or in processes of their own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import gymnasium
import numpy as np

from rlx.actors import Restart, Runtime
from rlx.rollout.runner_actors import Advice, RunnerActors
from rlx.rollout.text_env_host import Answer, Key, TextEnvHost

ADVICE = Advice(
    method="step",
    when_late="An environment holds up its whole process: raise environment.timeout_s, or cure it.",
    when_dead="prompts.prompts_per_iteration if memory is short, cure the environment",
    when_back=", without the conversations that it was in",
)
MARGIN_S = 30.0
"""Beyond the time that all environments of a process may take, one after the other."""
FOR_EVER_S = 3600.0
"""What each may take that has no deadline."""


class TextEnvs:
    """Asks `num_actors` TextEnvHosts, or one in this process if it is 0. Conversations are kept apart by their keys."""

    def __init__(
        self,
        make_env: Callable[[], gymnasium.Env],
        *,
        timeout_s: float | None,
        num_actors: int = 0,
        runtime: Callable[[], Runtime] | None = None,
        start_timeout_s: float = 120.0,
        restart: Restart | None = None,
    ) -> None:
        self._hosts: TextEnvHost | RunnerActors
        if not num_actors:
            self._hosts = TextEnvHost(make_env, timeout_s)
            self._hosts.spaces()
            return
        assert runtime is not None
        self._timeout_s = FOR_EVER_S if timeout_s is None else timeout_s
        self._hosts = RunnerActors(runtime(), start_timeout_s, MARGIN_S, restart, TextEnvHost, ADVICE)
        try:
            for index in range(num_actors):
                self._hosts.spawn(f"text_env/{index}", (make_env, timeout_s), {})
            self._hosts.start()
        except BaseException:
            self.close()
            raise

    def reset(self, begun: Mapping[Key, tuple[int, Mapping[str, Any]]]) -> dict[Key, Answer]:
        """Begin conversations, by key with seed and options; return what is read first in each."""
        return self._ask("reset", begun)

    def step(self, turns: Mapping[Key, np.ndarray]) -> dict[Key, Answer]:
        """Answer a turn of the model in each of these conversations."""
        return self._ask("step", turns)

    def take_restarts(self) -> int:
        """Return how many processes were started again since the last call."""
        return self._hosts.take_restarts() if isinstance(self._hosts, RunnerActors) else 0

    def close(self) -> None:
        """Close every environment and end the processes."""
        self._hosts.close()

    def _ask(self, method: str, of_each: Mapping[Key, Any]) -> dict[Key, Answer]:
        if isinstance(self._hosts, TextEnvHost):
            return dict(zip(of_each, getattr(self._hosts, method)(of_each), strict=True))
        shares: list[dict[Key, Any]] = [{} for _ in range(len(self._hosts))]
        for key, value in of_each.items():
            shares[sum(key) % len(shares)][key] = value
        calls = [
            (share, self._hosts.ask(index, method, lambda share=share: (share,), self._deadline_s(share)))
            for index, share in enumerate(shares)
            if share
        ]
        answers = self._hosts.gather([call for _, call in calls])
        found: dict[Key, Answer] = {}
        for (share, _), each in zip(calls, answers, strict=True):
            found |= dict(zip(share, each, strict=True))
        return {key: found[key] for key in of_each}

    def _deadline_s(self, share: Mapping[Key, Any]) -> float:
        return MARGIN_S + self._timeout_s * len(share)
