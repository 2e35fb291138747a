"""EnvTurns: what environments are asked for, while nobody waits for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rlx.rollout.runner_actors import Call
from rlx.rollout.text_env_host import Answer, Key
from rlx.rollout.text_envs import TextEnvs

METHODS = ("reset", "step")


class EnvTurns:
    """Gathers what is for each process of environments while it is at work, and asks for it when it has answered."""

    def __init__(self, envs: TextEnvs) -> None:
        self._envs = envs
        self._waiting: dict[tuple[int, str], dict[Key, Any]] = {}  # by process and method, what was not sent

    def reset(self, key: Key, seed: int, options: Mapping[str, Any]) -> None:
        """Have a conversation begun."""
        self._put(key, "reset", (seed, options))

    def step(self, key: Key, turn: np.ndarray) -> None:
        """Have a turn of the model answered."""
        self._put(key, "step", turn)

    def leave(self, keys: Sequence[Key]) -> None:
        """Say that these conversations are over, whether their environments know it or not."""
        for waiting in self._waiting.values():
            for key in keys:
                waiting.pop(key, None)
        self._envs.leave(keys)

    def ask(self, calls: Sequence[Call]) -> list[Call]:
        """Ask all processes that none of these calls is at."""
        busy = {call.runner for call in calls if call.method in METHODS}
        ready = [place for place, waiting in self._waiting.items() if waiting and place[0] not in busy]
        return [self._envs.ask(*place, self._waiting.pop(place)) for place in ready]

    def hear(self, call: Call) -> dict[Key, Answer]:
        """Return what the environments have said, by conversation."""
        of_each, _ = call.arguments
        return dict(zip(of_each, call.value, strict=True))

    def _put(self, key: Key, method: str, value: Any) -> None:
        self._waiting.setdefault((self._envs.host(key), method), {})[key] = value
