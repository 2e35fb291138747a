"""rlx's GRPO on a job of benchmarks/grpo.py: a step whenever it is asked for one, each answered with its seconds."""

from measured import read_job
from stepping import Turns, reward

from rlx.algorithms.grpo import GRPO, GRPOConfig


def main() -> None:
    """Train until no more steps are asked for."""
    job, turns = read_job(), Turns("rlx")
    config = (
        GRPOConfig()
        .model(config=job.model, dtype=job.dtype, tokenizer="rlx.envs.addition:tokenizer")
        .prompts([{"prompt": f"{a:02}+{b:02}="} for a in range(100) for b in range(100)])
        .prompts(prompts_per_iteration=job.prompts, samples_per_prompt=job.samples)
        .generation(max_new_tokens=job.new_tokens)
        .reward(score)
        .training(lr=job.lr)
        .learners(device=job.device, torch_threads=job.threads, max_tokens_per_microbatch=job.microbatch)
        .runtime(seed=job.seed)
    )
    algorithm = config.build()
    assert isinstance(algorithm, GRPO) and algorithm.rollouts is not None
    if not job.stops:
        algorithm.rollouts.stops = frozenset()  # EOS becomes a token like any other
    while True:
        metrics = algorithm.train()
        parts = {name.removeprefix("time/"): value for name, value in metrics.items() if name.startswith("time/")}
        tokens = int(metrics["env_steps"]) / (algorithm.iteration * job.prompts * job.samples)
        if not turns.end_step(tokens, **{name: parts[name] for name in (*GRPO.clock_parts, "iteration_s")}):
            break
    algorithm.close()


def score(prompts: list[str], completions: list[str]) -> list[float]:
    """Return the scores, as rlx calls for them."""
    return reward(prompts, completions)


if __name__ == "__main__":
    main()
