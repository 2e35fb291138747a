"""Interrupt a run, go on from its checkpoint, and get the very numbers of a run that was never interrupted.

python examples/04_resume.py

On the command line the same is `rlx train --resume RUN`. It holds for a synchronous run on the CPU.
"""

import tempfile

from rlx.algorithms.ppo import PPOConfig

config = PPOConfig().environment("CartPole-v1").env_runners(num_env_runners=2, rollout_fragment_length=64)


def numbers(metrics):
    """Return an iteration's metrics without those that a clock gave."""
    return {name: value for name, value in metrics.items() if not name.startswith("time/") and "_per_s" not in name}


with tempfile.TemporaryDirectory() as folder:
    with config.copy().build() as algo:
        uninterrupted = [numbers(algo.train()) for _ in range(10)]

    with config.copy().build() as algo:
        first_half = [numbers(algo.train()) for _ in range(5)]
        checkpoint = algo.save(f"{folder}/half-way")

    with config.copy().build() as algo:  # new processes, new environments, new networks
        algo.restore(checkpoint)
        second_half = [numbers(algo.train()) for _ in range(5)]

assert first_half + second_half == uninterrupted
last = uninterrupted[-1]
print(f"{len(uninterrupted)} iterations of {len(last)} metrics are equal to the last bit, e.g. at the end:")
print(f"episode_return_mean {last['episode_return_mean']!r}, learner/loss {last['learner/loss']!r}")
