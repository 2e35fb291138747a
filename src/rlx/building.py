"""What a run is made of, from its settings: the actor runtime, the env runners, the learners."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rlx import actors
from rlx.actors.machine import cpu_count
from rlx.learner.learner_group import LearnerGroup
from rlx.rollout.runner_group import RunnerGroup
from rlx.settings import RuntimeSection, Settings

GetRuntime = Callable[[], actors.Runtime]
MAX_BACKOFF_S = 2.0


class LazyRuntime:
    """The actor runtime, started by the first call: a run without actors starts none.

    preload: modules that all actors need; where actors are processes of this machine they are imported once for all.
    """

    def __init__(self, where: RuntimeSection, run_dir: Path | None, preload: Sequence[str]) -> None:
        actors.check_engine(where.engine)
        self._engine = where.engine
        self._options: dict[str, Any] = {}
        if where.engine == "local":
            self._options = {"preload": preload} | ({"log_folder": run_dir / "logs"} if run_dir else {})
        elif where.engine == "ray":
            self._options = {"address": where.address}
        elif where.engine == "cluster":
            self._options = {"address": where.address, "preload": preload}
            self._options |= {} if where.token_file is None else {"token_file": where.token_file}
            self._options |= {"log_folder": run_dir / "logs"} if run_dir else {}
        self._runtime: actors.Runtime | None = None
        self._is_closed = False

    def __call__(self) -> actors.Runtime:
        """Return the runtime."""
        if self._runtime is None:
            self._runtime = actors.runtime(self._engine, **self._options)
        return self._runtime

    @property
    def is_unused(self) -> bool:
        """Whether a cluster is named, and no part of the run is there: not even its address was tried."""
        return self._engine in ("cluster", "ray") and self._runtime is None

    @property
    def is_closed(self) -> bool:
        """Whether no more actors can be made."""
        return self._is_closed

    def close(self) -> None:
        """End it, if it runs."""
        self._is_closed = True
        if self._runtime is not None:
            self._runtime.close()


def build_runners(
    s: Settings, build_policy: Callable, runtime: GetRuntime, callbacks: Callable[[], list[Any]] | None
) -> RunnerGroup:
    """Return the env runners; callbacks: makes those that hear of environments and episodes there."""
    return RunnerGroup(
        s.environment.chosen(),
        build_policy,
        num_runners=s.env_runners.num_env_runners,
        # A driver that takes turns with the runners is idle while they work.
        kept_cpus=s.learners.num_learners * s.learners.torch_threads or int(s.training.max_age > 0),
        runtime=runtime,
        num_envs=s.env_runners.num_envs_per_env_runner,
        gamma=s.training.gamma,
        seed=s.runtime.seed,
        start_timeout_s=s.fault_tolerance.start_timeout_s,
        sample_timeout_s=s.fault_tolerance.sample_timeout_s,
        restart=restart_rule(s),
        on_env_error=s.fault_tolerance.on_env_error,
        max_env_failures=s.fault_tolerance.max_env_failures,
        env_step_timeout_s=s.fault_tolerance.env_step_timeout_s,
        num_cores=1 if s.env_runners.num_env_runners == "auto" else share_of_cores(s.env_runners.num_env_runners),
        atari=s.atari.model_dump(),
        callbacks=callbacks,
        **s.environment.model_dump(exclude={"id"}),
    )


def build_learners(s: Settings, build_policy: Callable, algorithm: Any, runtime: GetRuntime) -> LearnerGroup:
    """Return the learners, with the loss of the class `algorithm`; build_policy: without arguments."""
    return LearnerGroup(
        build_policy,
        functools.partial(algorithm.loss, training=s.training),
        prepare=None if algorithm.prepare is None else functools.partial(algorithm.prepare, training=s.training),
        target_update_interval=getattr(s.training, "target_update_interval", None),
        runtime=runtime,
        start_timeout_s=s.fault_tolerance.start_timeout_s,
        update_timeout_s=s.fault_tolerance.update_timeout_s,
        restart=restart_rule(s),
        adam_eps=s.training.adam_eps,
        max_grad_norm=s.training.max_grad_norm,
        **s.learners.model_dump(),
    )


def restart_rule(s: Any) -> actors.Restart | None:
    """Return how often what dies is started again, by the fault_tolerance of these settings."""
    f = s.fault_tolerance
    if not f.max_restarts:
        return None
    # A pause doubles with every restart within the window, here an hour in which deaths need have nothing in common.
    return actors.Restart(max=f.max_restarts, per_s=f.restart_window_s, max_backoff_s=MAX_BACKOFF_S)


def share_of_cores(processes: int) -> int:
    """Return how many threads each of so many processes may use."""
    return max(1, int(cpu_count()) // max(1, processes))
