"""RLlib's PPO (new API stack) on the job of benchmarks/ppo.py; prints one line of JSON."""

import logging
import math
from types import SimpleNamespace

import ray
import torch
from measured import Clock, read_job
from ray.rllib.algorithms.ppo import PPOConfig
from ray.rllib.core.rl_module.default_model_config import DefaultModelConfig


def main() -> None:
    """Measure. RLlib counts real transitions only: the reset rows of its vector environments are left out."""
    job = read_job()
    torch.set_num_threads(job.threads)  # Ray gives each of its workers one thread
    ray.init(num_cpus=job.runners + 2, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    clock, done, returns = Clock(job), False, None
    algorithm = config(job).build_algo()
    while not done:
        result = algorithm.train()
        done = clock.end_iteration(int(result["num_env_steps_sampled_lifetime"]))
        newest = float(result["env_runners"].get("episode_return_mean", math.nan))
        returns = returns if math.isnan(newest) else newest  # NaN after an iteration in which no episode ended
    clock.report("rllib", ray.__version__, torch.get_num_threads(), returns)
    algorithm.stop()
    ray.shutdown()


def config(job: SimpleNamespace) -> PPOConfig:
    """Return the hyper-parameters in RLlib's names."""
    model = DefaultModelConfig(fcnet_hiddens=job.hidden, fcnet_activation=job.activation, vf_share_layers=False)
    return (
        PPOConfig()
        .environment(job.env)
        .env_runners(
            num_env_runners=job.runners,
            num_envs_per_env_runner=job.envs // max(1, job.runners),
            rollout_fragment_length=job.fragment_length,
        )
        .rl_module(model_config=model)
        .training(
            train_batch_size_per_learner=job.envs * job.fragment_length,
            minibatch_size=job.minibatch_size,
            num_epochs=job.epochs,
            lr=job.lr,
            gamma=job.gamma,
            lambda_=job.lambda_,
            clip_param=job.clip_range,
            entropy_coeff=job.entropy_coef,
            vf_loss_coeff=job.value_coef,
            grad_clip=job.max_grad_norm,
            grad_clip_by="global_norm",
            use_kl_loss=False,
            vf_clip_param=float("inf"),
        )
        .learners(num_learners=0)
        .debugging(seed=job.seed)
    )


if __name__ == "__main__":
    main()
