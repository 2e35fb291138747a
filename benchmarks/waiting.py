"""What it gains that token runners, environments and the learner do not wait for each other, by age.

    python benchmarks/waiting.py     # about two minutes; prints a table

The guessing game of configs/grpo_guess.yaml, whose environment takes 5 ms for every reply as a tool would; 256
conversations an iteration, two processes of environments, one token runner, one learner of four epochs.
"""

from __future__ import annotations

import argparse
import time

from report import describe, machine, markdown_table

from rlx.config import load_config
from rlx.envs.guess import Guess
from rlx.text.text_env import Reply

REPLY_S = 0.005
WARM_UP = 3
"""Iterations that are not counted: the first ones start processes and fill what is under way."""


class SlowGuess(Guess):
    """Takes its time."""

    def reply(self, text: str) -> Reply:
        """Answer a guess."""
        time.sleep(REPLY_S)
        return super().reply(text)


def samples_per_s(max_age: int, iterations: int) -> tuple[float, float]:
    """Return conversations a second, and the mean age of what was learned from."""
    made = load_config("grpo_guess").environment(SlowGuess, num_env_actors=2).reporting(progress="none")
    made.token_runners(num_token_runners=1, torch_threads=1).evaluation(interval=0)
    made.prompts(prompts_per_iteration=32, samples_per_prompt=8)
    made.training(max_age=max_age, epochs=4, minibatch_sequences=64)
    with made.build() as run:
        rows = [run.train() for _ in range(WARM_UP + iterations)]
    seconds = rows[-1]["time/total_s"] - rows[WARM_UP - 1]["time/total_s"]
    return iterations * 256 / seconds, sum(row["age_mean"] for row in rows[WARM_UP:]) / iterations


def main() -> None:
    """Run the benchmark; print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--ages", nargs="+", type=int, default=[0, 1, 4], help="default: 0 1 4")
    parser.add_argument("--iterations", type=int, default=12)
    options = parser.parse_args()
    facts = describe(machine())
    found = {age: samples_per_s(age, options.iterations) for age in options.ages}
    first = found[options.ages[0]][0]
    rows = [
        [f"at most {age}", f"{mean:.2f}", f"{rate:.0f}", f"{rate / first:.2f}"] for age, (rate, mean) in found.items()
    ]
    print(markdown_table(["age", "age seen", "samples/s", "times"], rows))
    print(f"\n{facts}")


if __name__ == "__main__":
    main()
