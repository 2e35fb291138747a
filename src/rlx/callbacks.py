"""Callback: your own code at the points of a run, for metrics, early stops, curricula and whatever else comes.

    class Patience(Callback):
        def on_train_result(self, algo, metrics):
            if metrics["episode_return_mean"] == 500:
                algo.request_stop("every episode is perfect")

    PPOConfig().callbacks(Patience)                    callbacks: [my_module:Patience]      (YAML)

docs/callbacks.md has the table of all points, with their names in RLlib and Stable-Baselines3.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rlx.callback_settings import CallbackSpec
from rlx.errors import ConfigError, RlxError
from rlx.metrics import Metrics
from rlx.rollout.hooks import Episode, call
from rlx.section import spelled
from rlx.trajectory import Trajectory

if TYPE_CHECKING:
    from rlx.algorithm import Algorithm

__all__ = ["Callback", "Callbacks", "Episode"]

log = logging.getLogger("rlx")

PREFIX = "custom/"
"""What the names of a callback's own metrics begin with."""


class Callback:
    """Override what you need; the rest costs nothing.

    One object lives in the driver, beside the algorithm, and one more in each env runner, in its process; they are
    made alike and share nothing. A method runs either here or there, as it says. What the driver's object keeps for
    later belongs into `get_state`, so that a resumed run goes on with it; those of env runners begin anew.

    An exception ends the run; saved checkpoints stay as they are.
    """

    # In the driver ----------------------------------------------------------------------------------------------

    def on_algorithm_start(self, algo: Algorithm) -> None:
        """Driver: runners and learners are up, nothing is trained or restored yet."""

    def on_restore(self, algo: Algorithm) -> None:
        """Driver: the algorithm continues from a checkpoint, of which this object has its state already.

        So it does after learners were lost.
        """

    def on_sample_end(self, algo: Algorithm, sample: Trajectory) -> None:
        """Driver: experience has come, fields [T, B]; read it, for it may lie in shared memory."""

    def on_runner_restart(self, algo: Algorithm, count: int) -> None:
        """Driver: `count` env runners died or hung, and were started again; their environments are new."""

    def on_train_result(self, algo: Algorithm, metrics: Metrics) -> None:
        """Driver: an iteration has ended. Add metrics of your own to its row: metrics["custom/level"] = 3."""

    def on_evaluate_start(self, algo: Algorithm) -> None:
        """Driver: an evaluation begins."""

    def on_evaluate_end(self, algo: Algorithm, metrics: Metrics) -> None:
        """Driver: an evaluation has ended, with these evaluation/ metrics; add your own as in `on_train_result`."""

    def on_checkpoint(self, algo: Algorithm, path: Path) -> None:
        """Driver: the run folder has a new checkpoint; `path` is its folder."""

    def on_stop(self, algo: Algorithm, reason: str) -> None:
        """Driver: `fit` ends at a limit, a request or an interrupt, after its last checkpoint; not after an error."""

    def get_state(self) -> Any:
        """Driver: return what a resumed run needs of this object, as plain values and arrays; None: nothing."""

    def set_state(self, state: Any) -> None:
        """Driver: continue from `get_state`."""

    # In each env runner -----------------------------------------------------------------------------------------

    def on_env_created(self, env: Any, index: int) -> None:
        """Env runner: an environment was made, and is not reset yet; also one that takes a broken one's place.

        Those of evaluations are not told of; what has to be changed in them, too, `algo.call_envs` changes.

        env: one of gymnasium, number `index` over all runners; or a VectorEnv, and `index` is that of its first.
        """

    def on_episode_end(self, episode: Episode) -> Mapping[str, float] | None:
        """Env runner: an episode has ended; told after the fragment that it ended in.

        Numbers that this returns by name become the metrics custom/<name>: their mean over the iteration's episodes.
        """


IN_ENV_RUNNERS = ("on_env_created", "on_episode_end")


class Callbacks:
    """The driver's callbacks of one run, in the order of the config."""

    def __init__(self, specs: Sequence[CallbackSpec]) -> None:
        self._specs = specs
        self._all = make_callbacks(specs)

    def __call__(self, point: str, *arguments: Any) -> None:
        """Call every callback that has something at this point."""
        for callback in self._all:
            if _overrides(callback, point):
                call(callback, point, *arguments)

    def with_metrics(self, point: str, algo: Any, metrics: Metrics) -> None:
        """Call every callback at a point where it may add to `metrics`; RlxError where that is no metric."""
        for callback in self._all:
            if _overrides(callback, point):
                before = dict(metrics)
                call(callback, point, algo, metrics)
                _check_metrics(before, metrics, f"{type(callback).__qualname__}.{point}()")

    def for_runners(self) -> Callable[[], list[Callback]] | None:
        """Return the function that makes an env runner's callbacks; None where no runner needs any."""
        if any(_overrides(callback, point) for callback in self._all for point in IN_ENV_RUNNERS):
            return functools.partial(make_callbacks, self._specs)
        return None

    def get_state(self) -> dict[str, Any]:
        """Return the states by name of those that have one."""
        states = {name: call(callback, "get_state") for name, callback in self._named().items()}
        return {name: state for name, state in states.items() if state is not None}

    def set_state(self, states: Mapping[str, Any]) -> None:
        """Continue from `get_state`; who was not there then begins anew."""
        named = self._named()
        for name, state in states.items():
            if name in named:
                call(named[name], "set_state", state)
            else:
                log.warning("the checkpoint holds the state of a callback %s, which this run does not have.", name)

    def _named(self) -> dict[str, Callback]:
        """Return the callbacks by their class; the second one of a class is `name#2`."""
        named: dict[str, Callback] = {}
        for callback in self._all:
            name, number = type(callback).__qualname__, 1
            while (key := name if number == 1 else f"{name}#{number}") in named:
                number += 1
            named[key] = callback
        return named


def make_callbacks(specs: Sequence[CallbackSpec]) -> list[Callback]:
    """Return one new callback of each kind; ConfigError where that is none."""
    made = []
    for spec in specs:
        make: Any = spec.make
        if isinstance(make, str):
            module, _, name = make.partition(":")
            make = attrgetter(name)(importlib.import_module(module))
        try:
            inspect.signature(make).bind(**spec.kwargs)
        except TypeError as error:
            raise ConfigError(f"callbacks: {spelled(make)} cannot be made with {spec.kwargs}: {error}.") from error
        callback = make(**spec.kwargs)
        if not isinstance(callback, Callback):
            raise ConfigError(f"callbacks: {spelled(make)} made a {type(callback).__name__}, not a rlx.Callback.")
        made.append(callback)
    return made


def _overrides(callback: Callback, point: str) -> bool:
    return getattr(type(callback), point) is not getattr(Callback, point)


def _check_metrics(before: Metrics, metrics: Metrics, where: str) -> None:
    """Raise RlxError unless what is new in `metrics` can be written; numpy's numbers become Python's."""
    for name in before.keys() - metrics.keys():
        raise RlxError(f"{where} removed the metric {name}; it may only add its own, as {PREFIX}<name>.")
    for name, value in metrics.items():
        if name in before and value is before[name]:
            continue
        if not name.startswith(PREFIX):
            raise RlxError(f"{where} set the metric {name}; call it {PREFIX}{name.rpartition('/')[2]}.")
        if value is not None and not isinstance(value, Real | np.generic):
            raise RlxError(f"{where} set {name} to {value!r}; a metric is a number or None.")
        metrics[name] = value.item() if isinstance(value, np.generic) else value
