"""rlx's PPO, IMPALA or APPO on a job of benchmarks/workloads.py; prints one line of JSON."""

import logging
import os
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gymnasium
import torch
from measured import clock_of, read_job

import rlx
from rlx.algorithms.appo import APPOConfig
from rlx.algorithms.impala import IMPALAConfig
from rlx.algorithms.ppo import PPOConfig

CONFIGS = {"ppo": PPOConfig, "impala": IMPALAConfig, "appo": APPOConfig}
TRAINING = (
    *("gamma", "lambda_", "lr", "epochs", "minibatch_size", "batch_size", "max_age", "updates_per_iteration"),
    *("clip_range", "value_coef", "entropy_coef", "max_grad_norm"),
)
STEP_COST_S = 1e-3
SLOW_STEP_S = 10 * STEP_COST_S


class CostlyCartPole(gymnasium.Wrapper):
    """CartPole whose step takes one more millisecond of CPU time, as a physics engine would."""

    def __init__(self) -> None:
        super().__init__(gymnasium.make("CartPole-v1"))

    def step(self, action: Any) -> Any:
        """Return what CartPole returns, later."""
        end = time.thread_time() + STEP_COST_S
        while time.thread_time() < end:
            pass
        return super().step(action)


class SleepyCartPole(gymnasium.Wrapper):
    """CartPole whose step sleeps a millisecond, and in the first `slow_runners` processes that make one, ten."""

    def __init__(self, slow_runners: int) -> None:
        super().__init__(gymnasium.make("CartPole-v1"))
        self._step_s = SLOW_STEP_S if _is_among_the_first(slow_runners) else STEP_COST_S

    def step(self, action: Any) -> Any:
        """Return what CartPole returns, later."""
        time.sleep(self._step_s)
        return super().step(action)


class Warnings(logging.Handler):
    """Keeps what rlx warns of: it says so when env runners do not pay."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep the message."""
        self.messages.append(record.getMessage())


def main() -> None:
    """Measure. Steps that were collected and not learned from do not count."""
    job = read_job()
    warnings = Warnings()
    logging.getLogger("rlx").addHandler(warnings)
    clock, done, metrics, ages = clock_of(job), False, {}, []
    with config(job).build() as algorithm:
        while not done:
            metrics = algorithm.train()
            done = clock.end_iteration(metrics["env_steps"] - metrics["dropped_env_steps"])
            ages.append((metrics["age_mean"], metrics["age_max"]))
    means, largest = zip(*ages[1:], strict=True)
    clock.report(
        *("rlx", rlx.__version__, torch.get_num_threads(), metrics["episode_return_mean"]),
        warnings=warnings.messages,
        age_mean=sum(means) / len(means),
        age_max=max(largest),
        max_age=algorithm.training.max_age,
    )


def config(job: SimpleNamespace) -> Any:
    """Return the hyper-parameters in rlx's names."""
    environment = {"id": job.env}
    if job.env == "CostlyCartPole":
        environment = {"id": CostlyCartPole}
    elif job.env == "SleepyCartPole":
        environment = {"id": SleepyCartPole, "kwargs": {"slow_runners": job.slow_runners}, "vectorization": "in_place"}
    return (
        CONFIGS[job.algorithm]()
        .environment(**environment)
        .atari(**getattr(job, "atari", {}))
        .env_runners(
            num_env_runners=job.runners,
            num_envs_per_env_runner=job.envs // max(1, job.runners),
            rollout_fragment_length=job.fragment_length,
        )
        .model(hidden=tuple(job.hidden), activation=job.activation, precision=getattr(job, "precision", "float32"))
        .training(**{name: value for name, value in vars(job).items() if name in TRAINING})
        .learners(compile=job.compile, torch_threads=job.threads, device="cpu")
        .runtime(seed=job.seed)
    )


def _is_among_the_first(count: int) -> bool:
    """Return whether this process is one of the first `count` that ask, among all with this TMPDIR."""
    for number in range(count):
        claim = Path(tempfile.gettempdir()) / f"slow-{number}"
        try:
            claim.touch(exist_ok=False)
            claim.write_text(str(os.getpid()))
            return True
        except FileExistsError:
            if claim.read_text() == str(os.getpid()):
                return True
    return False


if __name__ == "__main__":
    main()
