"""Stable-Baselines3's PPO on the job of benchmarks/ppo.py; prints one line of JSON."""

from types import SimpleNamespace
from typing import Any

import stable_baselines3
import torch
from measured import Clock, read_job
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env


class Iterations(BaseCallback):
    """Tells the clock about every iteration but the last: one ends where the next one's rollout starts."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self._clock = clock

    def _on_rollout_start(self) -> None:
        if self.num_timesteps:
            self._clock.end_iteration(self.num_timesteps)

    def _on_step(self) -> bool:
        return True


def main() -> None:
    """Measure."""
    job = read_job()
    torch.set_num_threads(job.threads)
    model = PPO(
        "MlpPolicy", make_vec_env(job.env, job.envs, seed=job.seed), seed=job.seed, device="cpu", **options(job)
    )
    clock = Clock(job)
    model.learn((1 + job.iterations) * job.envs * job.fragment_length, callback=Iterations(clock))
    clock.end_iteration(model.num_timesteps)
    episodes = [episode["r"] for episode in model.ep_info_buffer or ()]
    returns = float(sum(episodes) / len(episodes)) if episodes else None
    clock.report("sb3", stable_baselines3.__version__, torch.get_num_threads(), returns)


def options(job: SimpleNamespace) -> dict[str, Any]:
    """Return the hyper-parameters in SB3's names."""
    return {
        "n_steps": job.fragment_length,
        "n_epochs": job.epochs,
        "batch_size": job.minibatch_size,
        "learning_rate": job.lr,
        "gamma": job.gamma,
        "gae_lambda": job.lambda_,
        "clip_range": job.clip_range,
        "ent_coef": job.entropy_coef,
        "vf_coef": job.value_coef,
        "max_grad_norm": job.max_grad_norm,
        "policy_kwargs": {
            "net_arch": {"pi": job.hidden, "vf": job.hidden},
            "activation_fn": {"tanh": torch.nn.Tanh}[job.activation],
        },
    }


if __name__ == "__main__":
    main()
