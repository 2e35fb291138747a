"""Whether it pays to step environments in several processes: measured, on environments that nothing is learned from."""

from __future__ import annotations

import logging
from itertools import pairwise
from statistics import median
from time import perf_counter
from typing import Any

from rlx.rollout.env_worker import MakeEnvs
from rlx.rollout.failures import Failures
from rlx.rollout.in_place import InPlaceEnvs
from rlx.rollout.processes import ProcessEnvs, shared_runtime

log = logging.getLogger(__name__)

IN_PLACE_S, PROCESSES_S = 0.05, 0.25
"""How long each way is measured."""
CHEAP_STEP_S = 100e-6
"""What waking two processes costs for each of their steps: below this they cannot win."""
MARGIN = 1.2
"""How much faster processes have to be: they take the cores from the policy, too."""
SEED, FIRST_ENV_INDEX = 0, 1 << 30
"""Apart from every environment of a run."""


def processes_if_they_pay(
    make: MakeEnvs,
    num_envs: int,
    num_processes: int,
    name: str,
    seed: int,
    first_env_index: int,
    failures: Failures,
    *options: Any,
) -> ProcessEnvs | None:
    """Return ProcessEnvs of these arguments if they take random actions faster than one loop does; log the figures.

    Environments that take less than 100 us a step are not tried, and what fails here does not pay.
    """
    apart = (name, SEED, FIRST_ENV_INDEX)
    alone, together = (Failures(count, env_step_timeout_s=failures.watchdog.timeout_s) for count in (1, num_envs))
    lasting = None
    try:
        alone.watchdog.watch()
        in_place = _steps_per_s(InPlaceEnvs(make(1), *apart, lambda: make(1)[0], alone), IN_PLACE_S)
        if in_place * CHEAP_STEP_S > 1:
            log.info("%s: %.0f steps/s in_place, too many for processes to pay.", name, in_place)
            return None
        lasting = shared_runtime.take()
        processes = _steps_per_s(ProcessEnvs(make, num_envs, num_processes, *apart, together), PROCESSES_S)
        pays = processes > MARGIN * in_place
        log.info(
            "%s: in_place: %.0f steps/s, processes(%d): %.0f steps/s; it is stepped %s.",
            *(name, in_place, num_processes, processes, "in processes" if pays else "in place"),
        )
        run = (name, seed, first_env_index, failures, *options)
        return ProcessEnvs(make, num_envs, num_processes, *run) if pays else None
    except Exception as error:
        log.warning("%s: no measurement of environment.vectorization, so it is in_place: %r", name, error)
        return None
    finally:
        if lasting is not None:
            shared_runtime.give_back()


def _steps_per_s(envs: InPlaceEnvs | ProcessEnvs, seconds: float) -> float:
    try:
        envs.action_space.seed(SEED)
        envs.reset()
        envs.step_at_random()  # the first one may load and compile
        times = [perf_counter()]
        while times[-1] - times[0] < seconds:
            envs.step_at_random()
            times.append(perf_counter())
        # The median, for others may take the core away in the middle of a step.
        return envs.num_envs / median(end - begin for begin, end in pairwise(times))
    finally:
        envs.close()
