"""TextEnv: a conversation as a gymnasium environment, whose observations and actions are tokens.

An environment for a language model is any gymnasium.Env of this form: `reset(seed=..., options={"prompt": tokens,
"record": row})` returns the tokens that the model reads first, and `step(tokens)` takes a turn of the model, its stop
token included, and returns the tokens of the answer, a reward, and whether the conversation ends. Tokens are never
made from text twice: the model reads on behind the very tokens that it drew. TextEnv is the form for those who would
rather write of words.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import gymnasium
import numpy as np
from gymnasium.spaces import Discrete, Sequence

from rlx.errors import ConfigError, EnvError
from rlx.text.import_path import import_function
from rlx.text.tokenizers import decode, encode, encode_start, load_tokenizer


@dataclass(frozen=True)
class Reply:
    """What an environment says to a turn."""

    text: str = ""
    """Put behind the turn; what follows is the model's next one."""
    reward: float = 0.0
    """What the turn was worth."""
    ends: bool = False
    """Whether the conversation is over."""


class TextEnv(gymnasium.Env[np.ndarray, np.ndarray], ABC):
    """Subclass and write `reply`, and `begin` where the prompt of the row is not what the model reads first."""

    metadata: ClassVar[dict[str, Any]] = {"render_modes": []}

    def __init__(self, tokenizer: Any, stops: frozenset[int] = frozenset()) -> None:
        """`stops`: the tokens that end a turn, which are no part of its text unless `keeps_stops` is set."""
        self.tokenizer, self.stops = tokenizer, stops
        self.observation_space = self.action_space = Sequence(Discrete(len(tokenizer)))  # type: ignore[assignment]
        self.record: Mapping[str, Any] = {}
        """The row of prompts.source that this conversation is about."""
        self.rng = np.random.default_rng(0)
        """Of this conversation: the same in every run with the same seed."""

    keeps_stops: ClassVar[bool] = False
    """Whether the text of a turn has its stop token, as where that is a character that means something."""

    @abstractmethod
    def reply(self, text: str) -> Reply:
        """Return what follows a turn of the model with this text."""

    def begin(self) -> str | None:
        """Begin a conversation about `record`; return what the model reads first, None for the row's prompt."""
        return None

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Return the tokens that the model reads first, int64 [P]; options: {"prompt": tokens, "record": row}."""
        super().reset(seed=seed)
        options = options or {}
        self.record, self.rng = options.get("record", {}), np.random.default_rng(seed)
        text = self.begin()
        tokens = options.get("prompt", ()) if text is None else encode_start(self.tokenizer, text, type(self).__name__)
        return np.array(tokens, np.int64), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Return the tokens of the reply to a turn, int64 [R], its reward, and whether the conversation is over."""
        reply = self.reply(decode(self.tokenizer, action, () if self.keeps_stops else self.stops))
        if not isinstance(reply, Reply):
            raise EnvError(
                f"reply() of {type(self).__name__} returned {reply!r:.80}; it must return a Reply of "
                "rlx.text.text_env, as in return Reply(text)"
            )
        tokens = encode(self.tokenizer, reply.text, f"the reply of {type(self).__name__}") if reply.text else []
        return np.array(tokens, np.int64), float(reply.reward), reply.ends, False, {}


class TextEnvMaker:
    """Makes environments, with the tokenizer and the stop tokens where their class takes them; travels to processes."""

    def __init__(self, env: Any, kwargs: Mapping[str, Any], tokenizer: str, stops: frozenset[int]) -> None:
        """env: a class or its import path. tokenizer: what load_tokenizer makes it of."""
        self._env, self._kwargs, self._source, self._stops = env, kwargs, tokenizer, stops
        self._tokenizer: Any = None  # one for all environments of a process

    def __call__(self) -> Any:
        """Return a new environment; ConfigError where it is none."""
        make = import_function(self._env, "environment.env") if isinstance(self._env, str) else self._env
        takes = inspect.signature(make).parameters
        given: dict[str, Any] = {"stops": self._stops} if "stops" in takes else {}
        if "tokenizer" in takes:
            self._tokenizer = self._tokenizer or load_tokenizer(self._source)
            given["tokenizer"] = self._tokenizer
        try:
            made = make(**given, **self._kwargs)
        except TypeError as error:
            raise ConfigError(
                f"environment.env={self._env} cannot be made with {dict(self._kwargs)}: {error}."
            ) from error
        if not (hasattr(made, "reset") and hasattr(made, "step")):
            raise ConfigError(f"environment.env={self._env} made a {type(made).__name__}; it must be a gymnasium.Env.")
        return made
