"""What a step of an Atari game costs at least: emulator, gradient step, acting; each alone, on one core.

Prints one line of JSON for benchmarks/asynchronous.py.
"""

from collections.abc import Callable
from importlib import metadata
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from measured import clock_of, read_job

from rlx.nets.policy import build_policy
from rlx.rollout.atari import atari_vector_env
from rlx.settings import AtariSection

STEPS_PER_LOOK = 32


def main() -> None:
    """Measure one of them for job.seconds."""
    job = read_job()
    torch.set_num_threads(job.threads)
    do = {"emulator": emulator, "arithmetic": arithmetic, "acting": acting}[job.of](job)
    clock, env_steps, done = clock_of(job), 0, False
    while not done:
        env_steps += do()
        done = clock.end_iteration(env_steps)
    clock.report(job.of, metadata.version("ale-py"), torch.get_num_threads(), None)


def emulator(job: SimpleNamespace) -> Callable[[], int]:
    """Return a function that steps all games with random actions and returns how many steps it made."""
    env: Any = atari_vector_env(job.env, AtariSection().model_dump(), num_envs=job.envs, num_threads=1)
    rng = np.random.default_rng(job.seed)
    env.reset(seed=job.seed)

    def steps() -> int:
        for _ in range(STEPS_PER_LOOK):
            _, _, terminated_B, truncated_B, _ = env.step(rng.integers(env.single_action_space.n, size=job.envs))
            if (done_B := terminated_B | truncated_B).any():
                env.reset(options={"reset_mask": done_B})
        return STEPS_PER_LOOK * job.envs

    return steps


def arithmetic(job: SimpleNamespace) -> Callable[[], int]:
    """Return a function that makes one forward and backward pass over a batch and returns its samples."""
    policy, pixels = _policy(job), _pixels(job.batch_size)

    def gradient() -> int:
        head, value = policy(pixels)
        (head.square().mean() + value.square().mean()).backward()
        return job.batch_size

    return gradient


def acting(job: SimpleNamespace) -> Callable[[], int]:
    """Return a function that makes a few forward passes over one runner's observations and returns their number."""
    envs = job.envs // job.runners
    policy, pixels = _policy(job), _pixels(envs)

    @torch.inference_mode()
    def act() -> int:
        for _ in range(STEPS_PER_LOOK):
            policy(pixels)
        return STEPS_PER_LOOK * envs

    return act


def _policy(job: SimpleNamespace) -> Any:
    pixels = spaces.Box(0, 255, (4, 84, 84), np.uint8)
    return build_policy(pixels, spaces.Discrete(6), precision=getattr(job, "precision", "float32"))


def _pixels(count: int) -> torch.Tensor:
    return torch.randint(0, 255, (count, 4, 84, 84), dtype=torch.uint8)


if __name__ == "__main__":
    main()
