"""Stable-Baselines3's PPO on the job of benchmarks/ppo.py; prints one line of JSON."""

from types import SimpleNamespace
from typing import Any

import stable_baselines3
import torch
from measured import Clock, clock_of, read_job
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_atari_env, make_vec_env
from stable_baselines3.common.vec_env import VecEnv, VecFrameStack

FOR_EVER = 10**9


class Iterations(BaseCallback):
    """Tells the clock about every iteration, which ends where the next one's rollout starts, and then when to stop."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self._clock = clock

    def _on_rollout_start(self) -> None:
        if self.num_timesteps:
            self._clock.end_iteration(self.num_timesteps)

    def _on_step(self) -> bool:
        return not self._clock.is_over


def main() -> None:
    """Measure."""
    job = read_job()
    torch.set_num_threads(job.threads)
    model = PPO(
        *("CnnPolicy" if is_atari(job) else "MlpPolicy", envs(job)), seed=job.seed, device="cpu", **options(job)
    )
    clock = clock_of(job)
    model.learn(FOR_EVER, callback=Iterations(clock))
    episodes = [episode["r"] for episode in model.ep_info_buffer or ()]
    returns = float(sum(episodes) / len(episodes)) if episodes else None
    clock.report("sb3", stable_baselines3.__version__, torch.get_num_threads(), returns)


def is_atari(job: SimpleNamespace) -> bool:
    """Return whether the environment is one of ale-py's."""
    return job.env.startswith("ALE/")


def envs(job: SimpleNamespace) -> VecEnv:
    """Return the environments as SB3 makes them; an Atari game by its older name, whose frames SB3 skips itself."""
    if not is_atari(job):
        return make_vec_env(job.env, job.envs, seed=job.seed)
    import ale_py
    import gymnasium

    gymnasium.register_envs(ale_py)
    game = job.env.removeprefix("ALE/").removesuffix("-v5")
    return VecFrameStack(make_atari_env(f"{game}NoFrameskip-v4", job.envs, seed=job.seed), 4)


def options(job: SimpleNamespace) -> dict[str, Any]:
    """Return the hyper-parameters in SB3's names; the network for images is the Nature CNN by default."""
    net = {
        "net_arch": {"pi": job.hidden, "vf": job.hidden},
        "activation_fn": {"tanh": torch.nn.Tanh}[job.activation],
    }
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
        "policy_kwargs": {} if is_atari(job) else net,
    }


if __name__ == "__main__":
    main()
