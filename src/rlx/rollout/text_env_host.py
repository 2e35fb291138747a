"""TextEnvHost: conversations with environments, each held by its key, none of which can hold up the others."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import gymnasium
import numpy as np

from rlx.errors import EnvError
from rlx.rollout.deadline import EnvTimeout, Watchdog

MOST_TIMEOUTS = 4
"""How many environments of one call may be waited for in vain; then the rest is given up."""

LARGEST = float(np.finfo(np.float32).max)


class Key(NamedTuple):
    """Which conversation it is."""

    stream: int
    """What it is for, so that two that go on together are not taken for one another: training, or an evaluation."""
    number: int
    """Of the prompt."""
    sample: int


@dataclass(frozen=True)
class Answer:
    """What an environment has said."""

    tokens: np.ndarray
    """int64: to be read next."""
    reward: float = 0.0
    terminated: bool = False
    truncated: bool = False
    failure: str = ""
    """What went wrong, if something did: then the conversation is lost."""

    @property
    def ends(self) -> bool:
        """Whether there is no next turn."""
        return self.terminated or self.truncated or bool(self.failure)


class TextEnvHost:
    """Makes environments as they are needed, and uses them again for conversations that come later."""

    def __init__(
        self, make_env: Callable[[], gymnasium.Env], timeout_s: float | None, policy_channel: Any = None
    ) -> None:
        """timeout_s: of one reset or step; None: as long as it likes. policy_channel: not used."""
        self._make_env = make_env
        self._watchdog = Watchdog(timeout_s, "environment.timeout_s")
        self._envs: dict[Key, gymnasium.Env] = {}
        self._free: list[gymnasium.Env] = []

    def spaces(self) -> None:
        """Say that it is up; a class that cannot be made raises here."""
        self._free.append(self._make_env())

    def reset(self, begun: Mapping[Key, tuple[int, Mapping[str, Any]]], left: Iterable[Key] = ()) -> list[Answer]:
        """Begin conversations, by key with seed and options; return what is read first in each. `left` are over."""
        self.leave(left)
        return self._each("reset", self._reset, begun)

    def step(self, turns: Mapping[Key, np.ndarray], left: Iterable[Key] = ()) -> list[Answer]:
        """Answer a turn of the model in each of these conversations; those of `left` are over."""
        self.leave(left)
        return self._each("step", self._step, {key: (turn,) for key, turn in turns.items()})

    def leave(self, keys: Iterable[Key]) -> None:
        """Use the environments of these conversations for others, if they have not ended them themselves."""
        self._free += [self._envs.pop(key) for key in keys if key in self._envs]

    def close(self) -> None:
        """Close every environment."""
        for env in [*self._envs.values(), *self._free]:
            env.close()

    def _each(
        self, method: str, function: Callable[..., Answer], of_each: Mapping[Key, tuple[Any, ...]]
    ) -> list[Answer]:
        """Return all answers; an environment that fails is let go, and after some that hang no more are asked."""
        self._watchdog.watch()
        timeouts, answers = 0, []
        for key, arguments in of_each.items():
            try:
                if timeouts == MOST_TIMEOUTS:
                    raise EnvTimeout(f"{method}() was not called, since {timeouts} others before it were interrupted")
                answer = self._watchdog.run(method, 0, function, key, *arguments)
            except Exception as error:
                timeouts += isinstance(error, EnvTimeout)
                is_told = isinstance(error, EnvError)
                said = str(error).rstrip(".") if is_told else f"{method}() raised {type(error).__name__}: {error}"
                answer = Answer(np.zeros(0, np.int64), failure=said)
            if answer.failure:
                self._close(self._envs.pop(key, None))
            elif answer.ends:
                self._free.append(self._envs.pop(key))
            answers.append(answer)
        return answers

    def _close(self, env: gymnasium.Env | None) -> None:
        if env is not None:
            with contextlib.suppress(Exception):  # it has failed already
                self._watchdog.run("close", 0, env.close)

    def _reset(self, key: Key, seed: int, options: Mapping[str, Any]) -> Answer:
        env = self._envs.pop(key, None) or (self._free.pop() if self._free else self._make_env())
        self._envs[key] = env
        tokens, _ = env.reset(seed=seed, options=dict(options))
        return Answer(_tokens(tokens))

    def _step(self, key: Key, turn: np.ndarray) -> Answer:
        if key not in self._envs:
            raise EnvError("the environment was lost with its process")
        tokens, reward, terminated, truncated, _ = self._envs[key].step(turn)
        value = float(reward)
        if not abs(value) <= LARGEST:
            raise ValueError(f"the reward is {reward}; it must be a finite number of float32")
        return Answer(_tokens(tokens), value, bool(terminated), bool(truncated))


def _tokens(returned: Any) -> np.ndarray:
    """Return an observation as int64 [N]; TypeError where it is not made of tokens."""
    tokens = np.asarray(returned)
    if tokens.ndim != 1 or (len(tokens) and tokens.dtype.kind not in "iu"):
        raise TypeError(f"the observation is {type(returned).__name__} of shape {tokens.shape}; it must be token ids")
    return tokens.astype(np.int64)
