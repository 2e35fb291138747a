"""rlox's PPO on the job of benchmarks/ppo.py; prints one line of JSON."""

from importlib import metadata
from typing import Any

import torch
from measured import Clock, read_job
from rlox.algorithms.ppo import PPO
from rlox.callbacks import Callback

RETURNS_OF_EPISODES = 100


class Iterations(Callback):
    """Tells the clock about every iteration: rlox calls `on_step` once an update.

    Its environments reset within a step, so that every row is a real transition.
    """

    def __init__(self, clock: Clock, env_steps: int) -> None:
        self._clock = clock
        self._env_steps = env_steps
        self._total = 0

    def on_step(self, **kwargs: Any) -> bool:
        """Return whether to go on."""
        self._total += self._env_steps
        return not self._clock.end_iteration(self._total)


def main() -> None:
    """Measure. rlox's networks are two hidden layers of 64 tanh units, and cannot be chosen."""
    job = read_job()
    if (job.hidden, job.activation) != ([64, 64], "tanh"):
        raise SystemExit(f"rlox has 2 x 64 tanh units, not {job.hidden} {job.activation}; leave it out with --systems.")
    torch.set_num_threads(job.threads)
    clock, batch = Clock(job), job.envs * job.fragment_length
    ppo = PPO(
        job.env,
        job.envs,
        seed=job.seed,
        callbacks=[Iterations(clock, batch)],
        n_steps=job.fragment_length,
        n_epochs=job.epochs,
        batch_size=job.minibatch_size,
        learning_rate=job.lr,
        gamma=job.gamma,
        gae_lambda=job.lambda_,
        clip_eps=job.clip_range,
        ent_coef=job.entropy_coef,
        vf_coef=2 * job.value_coef,  # rlox halves the squared error; the others do not
        max_grad_norm=job.max_grad_norm,
        anneal_lr=False,
        clip_vloss=False,
    )
    ppo.train((1 + job.iterations) * batch)
    episodes = ppo.collector.episode_rewards[-RETURNS_OF_EPISODES:]
    returns = sum(episodes) / len(episodes) if episodes else None
    clock.report("rlox", metadata.version("rlox"), torch.get_num_threads(), returns)


if __name__ == "__main__":
    main()
