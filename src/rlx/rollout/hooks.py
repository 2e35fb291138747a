"""EnvHooks: what callbacks see inside an env runner: every environment that is made, every episode that ends."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy as np
from gymnasium.vector import AutoresetMode

from rlx.errors import CALLBACK_NOTE

StepFunction = Callable[[Any], Any]


@dataclass(frozen=True)
class Episode:
    """An episode that has ended."""

    return_: float
    """Sum of its unscaled rewards."""
    length: int
    """Number of its transitions."""
    env_index: int
    """Number of its environment, counted over all env runners."""
    terminated: bool
    """False: it was truncated."""
    info: dict[str, Any]
    """What the environment said of its last step."""


class EnvHooks:
    """Calls the callbacks of one env runner, which `make_callbacks` makes.

    None of it costs anything where there are no hooks: environments are stepped through `watched`, or directly.
    """

    def __init__(self, make_callbacks: Callable[[], Sequence[Any]]) -> None:
        self.make_callbacks = make_callbacks
        self._callbacks = make_callbacks()
        self._infos: defaultdict[int, deque[dict[str, Any]]] = defaultdict(deque)

    def env_created(self, env: Any, index: int) -> None:
        """Tell of a new environment, number `index` over all runners, or the first of a vector environment's."""
        for callback in self._callbacks:
            call(callback, "on_env_created", env, index)

    def watched(self, index: int, step: StepFunction) -> StepFunction:
        """Return a scalar environment's `step` that keeps the info of each episode's last step."""
        infos = self._infos[index]

        def watched_step(action: Any) -> Any:
            returned = step(action)
            if _ends_episode(returned):
                infos.append(returned[4])
            return returned

        return watched_step

    def vector_step(self, done_B: np.ndarray, info: dict[str, Any], mode: AutoresetMode) -> None:
        """Keep the infos of the episodes that a vector environment's step has ended."""
        if mode is AutoresetMode.SAME_STEP:
            info = info.get("final_info", {})
        for index in done_B.nonzero()[0].tolist():
            self._infos[index].append(_info_of(info, index, len(done_B)))

    def take_infos(self) -> list[tuple[int, dict[str, Any]]]:
        """Return (index, info) of the episodes that have ended, for hooks in another process to `keep`."""
        taken = [(index, info) for index, infos in self._infos.items() for info in infos]
        self.forget()
        return taken

    def keep(self, index: int, info: dict[str, Any]) -> None:
        """Keep the info of the last step of an episode that a scalar environment has ended elsewhere."""
        self._infos[index].append(info)

    def forget(self) -> None:
        """Forget the episodes of a fragment that was cut."""
        for infos in self._infos.values():
            infos.clear()

    def episodes_ended(
        self, episodes: list[tuple[float, int]], done_T_B: np.ndarray, terminated_T_B: np.ndarray, first_env_index: int
    ) -> dict[str, list[float]]:
        """Tell of a fragment's episodes, (return, length) in the order of their end; return what callbacks measured."""
        metrics: dict[str, list[float]] = {}
        for (t, index), (return_, length) in zip(np.argwhere(done_T_B).tolist(), episodes, strict=True):
            info = self._infos[index].popleft() if self._infos[index] else {}
            episode = Episode(return_, length, first_env_index + index, bool(terminated_T_B[t, index]), info)
            for callback in self._callbacks:
                for name, value in _measured(callback, episode).items():
                    metrics.setdefault(name, []).append(value)
        return metrics


def call(callback: Any, point: str, *arguments: Any) -> Any:
    """Return what the callback's method returns; an exception passes on with a note that names both."""
    try:
        return getattr(callback, point)(*arguments)
    except Exception as error:
        error.add_note(f"{CALLBACK_NOTE} {type(callback).__qualname__}.{point}()")
        raise


def is_from_callback(error: BaseException) -> bool:
    """Return whether an exception has passed through `call`: no environment is to blame."""
    return any(note.startswith(CALLBACK_NOTE) for note in getattr(error, "__notes__", ()))


def _measured(callback: Any, episode: Episode) -> dict[str, float]:
    """Return the numbers by name that a callback's on_episode_end returns."""
    point = "on_episode_end"
    numbers = call(callback, point, episode) or {}
    if not isinstance(numbers, Mapping) or not all(isinstance(value, Real | np.bool_) for value in numbers.values()):
        raise TypeError(
            f"{type(callback).__qualname__}.{point}() returned {numbers!r}; it may return None, or numbers by name."
        )
    return {str(name): float(value) for name, value in numbers.items()}


def _ends_episode(returned: Any) -> bool:
    """Return whether an environment's answer to a step says so; whether it is an answer is checked by others."""
    flags = returned[2:4] if isinstance(returned, tuple) and len(returned) == 5 else ()
    return any(isinstance(flag, bool | np.bool_) and flag for flag in flags)


def _info_of(info: Mapping[str, Any], index: int, num_envs: int) -> dict[str, Any]:
    """Return one environment's part of a vector environment's info: arrays [B], each with a mask `_name` beside it."""
    mine: dict[str, Any] = {}
    for name, value in info.items():
        mask = info.get(f"_{name}")
        if (name.startswith("_") and name[1:] in info) or (mask is not None and not mask[index]):
            continue
        if isinstance(value, Mapping):
            mine[name] = _info_of(value, index, num_envs)
        else:
            mine[name] = value[index] if np.ndim(value) and len(value) == num_envs else value
    return mine
