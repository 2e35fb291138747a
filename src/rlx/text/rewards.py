"""Scores from a Python function: called with a deadline, checked, and what goes wrong is blamed on its sample.

A reward function takes a batch and returns a finite number for each sample:

    def reward(prompts: list[str], completions: list[str], records: list[dict]) -> Sequence[float]

where a record is the row that the prompt came from; a function of (prompts, completions) works as well.
"""

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from rlx.errors import ConfigError, RewardError
from rlx.text.import_path import import_function
from rlx.text.time_limit import DeadlinePassed, call_within

log = logging.getLogger(__name__)

Reward = Callable[..., Any]

LARGEST = float(np.finfo(np.float32).max)
SHOWN_CHARACTERS = 200
MOST_TIMEOUTS = 4
"""How many samples of a batch may be waited for in vain, when those that hang are looked for; then the rest is given
up, so that a service that is down costs a few deadlines and not one for each sample."""


@dataclass(frozen=True)
class Scores:
    """What a reward function said of S samples."""

    score: np.ndarray
    """[S] float32; 0 where it failed."""
    mask: np.ndarray
    """[S] bool: False where it failed."""
    failures: Mapping[int, RewardError] = field(default_factory=dict)
    """Which samples failed -> why."""


class RewardFunction:
    """A reward function behind a deadline and checks.

    reward: the function, or its import path pkg.module:name.
    timeout_s: how long one call may take. None: as long as it likes, and in the caller's own thread.
    on_error: what a failure does. "stop": `score` raises RewardError. "mask": the samples that failed are masked.
    kwargs: further arguments by name, the same at every call.
    """

    def __init__(
        self,
        reward: str | Reward,
        timeout_s: float | None = 60.0,
        on_error: Literal["stop", "mask"] = "stop",
        kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        self.function = import_function(reward, "the reward function") if isinstance(reward, str) else reward
        self.name = reward if isinstance(reward, str) else _name(reward)
        self.timeout_s, self.on_error, self.kwargs = timeout_s, on_error, dict(kwargs or {})
        self._takes_records = _takes_records(self.function, self.name, self.kwargs)
        self._has_told = False  # where in the function samples fail

    def score(
        self,
        prompts: Sequence[str],
        completions: Sequence[str],
        records: Sequence[Mapping[str, Any]],
        indices: Sequence[int] | None = None,
    ) -> Scores:
        """Return the scores of S samples; `indices` are the numbers of their prompts, for messages.

        Where the call fails as a whole, or one of its scores is no number, the samples are tried one by one: those that
        fail alone are at fault. RewardError names the first of them; with on_error "mask" only they are masked.
        """
        samples = _Samples(list(prompts), list(completions), list(records), indices)
        count = len(samples.prompts)
        if not count:
            return Scores(np.zeros(0, np.float32), np.zeros(0, bool))
        failed: Exception | None = None
        try:
            returned = self._call(samples, 0, count)
        except Exception as error:
            returned, failed = [], error
        if failed is not None:  # not within the except: what a sample raises would be told with this traceback, too
            return self._one_by_one(samples, failed)
        wrong = [index for index, value in enumerate(returned) if _number(value) is None]
        failures = {index: self._blame(samples, index, _no_number(returned[index])) for index in wrong}
        return self._outcome([_number(value) or 0.0 for value in returned], failures)

    def _call(self, samples: _Samples, start: int, stop: int) -> list[Any]:
        """Return what the function returns for a slice of the samples: one value for each, whatever it is."""
        # Lists of its own: a function that changes what it is given changes nothing here.
        arguments: list[list[Any]] = [samples.prompts[start:stop], samples.completions[start:stop]]
        if self._takes_records:
            arguments.append([dict(record) for record in samples.records[start:stop]])
        try:
            returned = call_within(self.timeout_s, _with(self.function, self.kwargs), *arguments)
        except SystemExit as error:  # it is no Exception, and would end the run without a word
            raise _Malformed(f"called sys.exit({error.code!r})") from error
        try:
            values = list(returned.tolist() if hasattr(returned, "tolist") else returned)
        except TypeError:
            raise _Malformed(f"returned {_short(returned)}, not a sequence of {stop - start} scores") from None
        if isinstance(returned, str | bytes | Mapping) or len(values) != stop - start:
            kind = (
                f"{len(values)} score{'s' * (len(values) != 1)}"
                if not isinstance(returned, str | bytes | Mapping)
                else _short(returned)
            )
            raise _Malformed(f"returned {kind} for {stop - start} samples")
        return values

    def _one_by_one(self, samples: _Samples, error: Exception) -> Scores:
        """Return the scores of a batch that failed as a whole, each sample alone."""
        scores: list[float] = []
        failures: dict[int, RewardError] = {}
        timeouts = 0
        for index in range(len(samples.prompts)):
            failure: Exception | str | None = None
            value: float | None = None
            if timeouts == MOST_TIMEOUTS:
                failure = f"was not tried, since {timeouts} samples of its batch took longer than {self.timeout_s:g} s"
            else:
                try:
                    (returned,) = self._call(samples, index, index + 1)
                    value = _number(returned)
                    failure = _no_number(returned) if value is None else None
                except Exception as alone:
                    failure = alone
                    timeouts += isinstance(alone, DeadlinePassed)
            if failure is not None:
                failures[index] = self._blame(samples, index, failure)
                if self.on_error == "stop":
                    break
            scores.append(value or 0.0)
        if not failures:
            said = _said(error) if isinstance(error, _Malformed) else f"{_said(error)} for {len(scores)} samples"
            message = (
                f"the reward function {self.name} {said} together, and not for each of them alone; it must return a "
                "score for every sample of a batch."
            )
            if self.on_error == "stop":
                raise RewardError(message) from error
            log.warning("%s The scores of the samples alone are taken.", message)
        return self._outcome(scores, failures)

    def _outcome(self, scores: list[float], failures: dict[int, RewardError]) -> Scores:
        if failures:
            first = next(iter(failures.values()))
            if self.on_error == "stop":
                raise first
            place = None if self._has_told else first.__cause__
            log.warning("%d of %d samples are masked: %s", len(failures), len(scores), first, exc_info=place)
            self._has_told = True
        score = np.array(scores, np.float32)
        mask = np.ones(len(scores), bool)
        mask[list(failures)] = False
        return Scores(score, mask, failures)

    def _blame(self, samples: _Samples, index: int, failure: Exception | str) -> RewardError:
        number = index if samples.indices is None else samples.indices[index]
        said = _said(failure) if isinstance(failure, Exception) else failure
        cure = "; correct it, or set reward.on_error=mask to go on without such samples." * (self.on_error == "stop")
        blamed = RewardError(
            f"the reward function {self.name} {said} for prompt {number} {_short(samples.prompts[index])} with the "
            f"completion {_short(samples.completions[index])}{cure or '.'}"
        )
        blamed.__cause__ = failure if isinstance(failure, Exception) else None
        return blamed


@dataclass(frozen=True)
class _Samples:
    prompts: list[str]
    completions: list[str]
    records: list[Mapping[str, Any]]
    indices: Sequence[int] | None


class _Malformed(Exception):
    """What the function returned is no list of scores."""


def _with(function: Reward, kwargs: Mapping[str, Any]) -> Reward:
    return (lambda *arguments: function(*arguments, **kwargs)) if kwargs else function


def _number(value: Any) -> float | None:
    """Return a score, None where it is no finite number."""
    if isinstance(value, str | bytes):
        return None
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    # What float32 cannot hold would be infinite in the batch.
    return number if math.isfinite(number) and abs(number) <= LARGEST else None


def _no_number(value: Any) -> str:
    return f"returned {_short(value)}, which is no finite number,"


def _said(error: Exception) -> str:
    if isinstance(error, DeadlinePassed | _Malformed):
        return str(error)
    return f"raised {type(error).__name__}: {error}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}... ({len(text)} characters)"


def _name(function: Reward) -> str:
    return f"{function.__module__}:{getattr(function, '__qualname__', type(function).__name__)}"


def _takes_records(function: Reward, name: str, kwargs: Mapping[str, Any]) -> bool:
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # builtins
        return True
    third = [*signature.parameters.values()][2:3]
    # A third one with a default is a setting of the function, unless it is called what it gets.
    is_setting = bool(third) and third[0].default is not inspect.Parameter.empty and third[0].name != "records"
    for count in (2,) if is_setting else (3, 2):
        try:
            signature.bind(*[None] * count, **kwargs)
            return count == 3
        except TypeError:
            continue
    given = f" and {dict(kwargs)}" if kwargs else ""
    raise ConfigError(
        f"the reward function {name}{signature} cannot be called with (prompts, completions, records) or with "
        f"(prompts, completions){given}."
    )
