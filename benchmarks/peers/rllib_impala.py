"""RLlib's IMPALA (new API stack) on the job of benchmarks/asynchronous.py; prints one line of JSON."""

import logging
import math
from types import SimpleNamespace

import ray
import torch
from measured import clock_of, read_job
from ray.rllib.algorithms.impala import IMPALAConfig
from ray.rllib.core.rl_module.default_model_config import DefaultModelConfig


def main() -> None:
    """Measure. RLlib reports no age of its samples."""
    job = read_job()
    torch.set_num_threads(job.threads)  # Ray gives each of its workers one thread
    # One CPU more for every actor that may want one: Ray starts none that it has no CPU for.
    ray.init(num_cpus=job.runners + 4, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    clock, done, returns = clock_of(job), False, None
    algorithm = config(job).build_algo()
    while not done:
        result = algorithm.train()
        done = clock.end_iteration(int(result.get("num_env_steps_sampled_lifetime", 0)))
        newest = float(result["env_runners"].get("episode_return_mean", math.nan))
        returns = returns if math.isnan(newest) else newest  # NaN after an iteration in which no episode ended
    clock.report("rllib", ray.__version__, torch.get_num_threads(), returns)
    algorithm.stop()
    ray.shutdown()


def config(job: SimpleNamespace) -> IMPALAConfig:
    """Return the hyper-parameters in RLlib's names."""
    model = DefaultModelConfig(fcnet_hiddens=job.hidden, fcnet_activation=job.activation, vf_share_layers=False)
    return (
        IMPALAConfig()
        .environment(job.env)
        .env_runners(
            num_env_runners=job.runners,
            num_envs_per_env_runner=job.envs // job.runners,
            rollout_fragment_length=job.fragment_length,
        )
        .rl_module(model_config=model)
        .training(
            train_batch_size_per_learner=job.batch_size,
            lr=job.lr,
            gamma=job.gamma,
            entropy_coeff=job.entropy_coef,
            vf_loss_coeff=job.value_coef,
            grad_clip=job.max_grad_norm,
            grad_clip_by="global_norm",
        )
        .learners(num_learners=0, num_aggregator_actors_per_learner=1)
        .reporting(min_time_s_per_iteration=1)
        .debugging(seed=job.seed)
    )


if __name__ == "__main__":
    main()
