"""What becomes of an environment that raises or hangs: it is counted, told once, and built anew unless that is vain."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from rlx.errors import EnvError
from rlx.rollout.deadline import EnvTimeout, Watchdog
from rlx.rollout.hooks import is_from_callback

log = logging.getLogger(__name__)

FORGIVEN_AFTER_STEPS = 100
"""Steps between two failures of an environment after which the later one begins a new row."""
MAX_WARNINGS = 20
"""Distinct errors told per runner: a text that holds a changing number is distinct every time."""


class Failures:
    """The failures of a runner's environments, and the deadline of their calls.

    on_env_error: "rebuild" goes on with a new environment until one has failed more than max_env_failures times in a
    row, "raise" never does. EnvError is raised in any case: such an environment is wrong, not unlucky.
    """

    def __init__(
        self,
        num_envs: int,
        *,
        on_env_error: str = "raise",
        max_env_failures: int = 10,
        env_step_timeout_s: float | None = None,
    ) -> None:
        self.options: dict[str, Any] = {
            "on_env_error": on_env_error,
            "max_env_failures": max_env_failures,
            "env_step_timeout_s": env_step_timeout_s,
        }
        """What to make others like this one with."""
        self.watchdog = Watchdog(env_step_timeout_s)
        self.rebuilds = [0] * num_envs
        """How often each environment was built anew; a vector environment counts as its first one."""
        self._rebuilds_allowed = max_env_failures if on_env_error == "rebuild" else 0
        self._in_a_row = [0] * num_envs
        self._failed_at = [0] * num_envs
        self._uncounted = 0
        self._told: set[str] = set()

    def recover(self, error: Exception, renew: Callable[[], None], *, where: str, index: int, step: int) -> None:
        """Call `renew`, which builds environment `index` anew after its `error`, until it succeeds.

        step: how many steps the environment had begun. Raises the last error where going on is vain or not wanted.
        """
        while True:
            self._admit(error, where, index, step)
            try:
                return renew()
            except Exception as again:
                error = again

    def close(self, close: Callable[[], None], where: str, index: int) -> None:
        """Close an environment that failed. What it raises is only logged: a broken one may well be unable to."""
        try:
            self.watchdog.run("close", index, close)
        except Exception as error:
            log.warning("%s failed, and so did its close(): %r", where, error)

    def count(self, failures: int) -> None:
        """Add failures that were seen to elsewhere."""
        self._uncounted += failures

    def take_count(self) -> int:
        """Return the number of failures since the last call."""
        count, self._uncounted = self._uncounted, 0
        return count

    def _admit(self, error: Exception, where: str, index: int, step: int) -> None:
        is_a_mistake = is_from_callback(error) or (isinstance(error, EnvError) and not isinstance(error, EnvTimeout))
        if is_a_mistake or not self._rebuilds_allowed:
            raise error
        is_in_a_row = step - self._failed_at[index] < FORGIVEN_AFTER_STEPS
        self._in_a_row[index] = self._in_a_row[index] + 1 if is_in_a_row else 1
        self._failed_at[index] = step
        self._uncounted += 1
        if self._in_a_row[index] > self._rebuilds_allowed:
            error.add_note(
                f"{where} failed {self._in_a_row[index]} times in a row, each time less than {FORGIVEN_AFTER_STEPS} "
                f"steps after the last; fault_tolerance.max_env_failures={self._rebuilds_allowed}"
            )
            raise error
        self.rebuilds[index] += 1
        text = f"{type(error).__name__}: {error}"
        if text not in self._told and len(self._told) < MAX_WARNINGS:
            self._told.add(text)
            log.warning(
                "%s failed at its step %d and is built anew; this error will only be counted from now on, as "
                "env_failures: %s",
                *(where, step, text),
                exc_info=error,
            )
