"""Sample Factory's APPO on the job of benchmarks/asynchronous.py; prints one line of JSON."""

import os
import sys
import tempfile
from importlib import metadata
from types import SimpleNamespace
from typing import Any

import gymnasium
from measured import Clock, clock_of, read_job
from sample_factory.algo.runners.runner import AlgoObserver
from sample_factory.cfg.arguments import parse_full_cfg, parse_sf_args
from sample_factory.envs.env_utils import register_env
from sample_factory.train import make_runner


class Iterations(AlgoObserver):
    """Tells the clock of every batch learned from, and ends the run when the time is up."""

    def __init__(self, clock: Clock, gradient_steps: int) -> None:
        self._clock, self._gradient_steps = clock, gradient_steps
        self.ages: list[tuple[float, float]] = []
        """Mean and largest, in batches, as the others count them; Sample Factory counts gradient steps."""
        self.returns: float | None = None

    def on_training_step(self, runner: Any, training_iteration_since_resume: int) -> None:
        """Note what the runner knows now."""
        if lag := runner.policy_lag[0]:
            newest = tuple(float(lag[f"version_diff_{name}"]) / self._gradient_steps for name in ("avg", "max"))
            self.ages.append(newest)  # type: ignore[arg-type]
        if (episodes := runner.policy_avg_stats.get("reward")) and episodes[0]:
            self.returns = float(sum(episodes[0]) / len(episodes[0]))
        if runner.env_steps.get(0, 0) and not self._clock.is_over and self._clock.end_iteration(runner.env_steps[0]):
            runner.cfg.train_for_env_steps = 1


def main() -> None:
    """Measure. Its own report of the process tree goes to stderr."""
    job = read_job()
    stdout = os.dup(1)
    os.dup2(2, 1)
    register_env(job.env, make)
    clock = clock_of(job)
    iterations = Iterations(clock, job.epochs * job.batch_size // job.minibatch_size)
    with tempfile.TemporaryDirectory() as folder:
        arguments = options(job, folder)
        parser, _ = parse_sf_args(argv=arguments)
        _, runner = make_runner(parse_full_cfg(parser, arguments))
        runner.register_observer(iterations)
        runner.init()
        runner.run()
    sys.stdout.flush()
    os.dup2(stdout, 1)
    means, largest = zip(*iterations.ages, strict=True)
    clock.report(
        *("sample factory", metadata.version("sample-factory"), job.threads, iterations.returns),
        age_mean=sum(means) / len(means),
        age_max=max(largest),
    )


def make(full_env_name: str, cfg: Any = None, env_config: Any = None, render_mode: str | None = None) -> gymnasium.Env:
    """Return an environment, as Sample Factory asks for it."""
    return gymnasium.make(full_env_name, render_mode=render_mode)


def options(job: SimpleNamespace, folder: str) -> list[str]:
    """Return the hyper-parameters in Sample Factory's names."""
    values = {
        "env": job.env,
        "experiment": "benchmark",
        "train_dir": folder,
        "seed": job.seed,
        "device": "cpu",
        "num_workers": job.runners,
        "num_envs_per_worker": job.envs // job.runners,
        "worker_num_splits": 2,
        "rollout": job.fragment_length,
        "recurrence": 1,
        "use_rnn": False,
        "batch_size": job.minibatch_size,
        "num_batches_per_epoch": job.batch_size // job.minibatch_size,
        "num_epochs": job.epochs,
        "learning_rate": job.lr,
        "gamma": job.gamma,
        "gae_lambda": job.lambda_,
        "ppo_clip_ratio": job.clip_range,
        "exploration_loss_coeff": job.entropy_coef,
        "value_loss_coeff": job.value_coef,
        "max_grad_norm": job.max_grad_norm,
        "nonlinearity": job.activation,
        "actor_critic_share_weights": False,
        "normalize_input": False,
        "normalize_returns": False,
        "async_rl": True,
        "with_wandb": False,
        "decorrelate_experience_max_seconds": 0,
        "decorrelate_envs_on_one_worker": False,
    }
    arguments = [f"--{name}={value}" for name, value in values.items()]
    return [*arguments, "--encoder_mlp_layers", *map(str, job.hidden)]


if __name__ == "__main__":
    main()
