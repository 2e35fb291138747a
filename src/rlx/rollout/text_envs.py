"""TextEnvs: the environments of a run on text, in the driver or in processes of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import gymnasium
import numpy as np

from rlx.actors import Restart, Runtime
from rlx.rollout.runner_actors import Advice, Call, RunnerActors
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
        self._left: list[list[Key]] = [[] for _ in range(num_actors)]  # by host, what it was not told of
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

    def leave(self, keys: Iterable[Key]) -> None:
        """Say that these conversations are over, which their environments may not know; they need not be there."""
        if isinstance(self._hosts, TextEnvHost):
            self._hosts.leave(keys)
            return
        for key in keys:
            self._left[self.host(key)].append(key)

    def host(self, key: Key) -> int:
        """Return which process a conversation is in."""
        return (key.number + key.sample) % len(self._left)

    def ask(self, host: int, method: str, of_each: Mapping[Key, Any]) -> Call:
        """Ask one process for "reset" or "step" of conversations that are in it, and wait for nothing."""
        assert isinstance(self._hosts, RunnerActors), "environments in this process answer while they are asked"
        left, self._left[host] = self._left[host], []
        deadline_s = MARGIN_S + self._timeout_s * len(of_each)
        return self._hosts.ask(host, method, lambda: (of_each, left), deadline_s)

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
            shares[self.host(key)][key] = value
        calls = [(share, self.ask(host, method, share)) for host, share in enumerate(shares) if share]
        answers = self._hosts.gather([call for _, call in calls])
        found: dict[Key, Answer] = {}
        for (share, _), each in zip(calls, answers, strict=True):
            found |= dict(zip(share, each, strict=True))
        return {key: found[key] for key in of_each}
