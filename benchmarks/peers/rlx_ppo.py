"""rlx's PPO on the job of benchmarks/ppo.py; prints one line of JSON."""

import logging
import time
from typing import Any

import gymnasium
import torch
from measured import Clock, read_job

import rlx
from rlx.algorithms.ppo import PPOConfig

STEP_COST_S = 1e-3


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


class Warnings(logging.Handler):
    """Keeps what rlx warns of: it says so when env runners do not pay."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep the message."""
        self.messages.append(record.getMessage())


def main() -> None:
    """Measure."""
    job = read_job()
    warnings = Warnings()
    logging.getLogger("rlx").addHandler(warnings)
    config = (
        PPOConfig()
        .environment({"CostlyCartPole": CostlyCartPole}.get(job.env, job.env))
        .env_runners(
            num_env_runners=job.runners,
            num_envs_per_env_runner=job.envs // max(1, job.runners),
            rollout_fragment_length=job.fragment_length,
        )
        .model(hidden=tuple(job.hidden), activation=job.activation)
        .training(
            epochs=job.epochs,
            minibatch_size=job.minibatch_size,
            lr=job.lr,
            gamma=job.gamma,
            lambda_=job.lambda_,
            clip_range=job.clip_range,
            entropy_coef=job.entropy_coef,
            value_coef=job.value_coef,
            max_grad_norm=job.max_grad_norm,
        )
        .learners(compile=job.compile, torch_threads=job.threads, device="cpu")
        .runtime(seed=job.seed)
    )
    clock, done, metrics = Clock(job), False, {}
    with config.build() as algorithm:
        while not done:
            metrics = algorithm.train()
            done = clock.end_iteration(metrics["env_steps"])
    returns = metrics["episode_return_mean"]
    clock.report("rlx", rlx.__version__, torch.get_num_threads(), returns, warnings=warnings.messages)


if __name__ == "__main__":
    main()
