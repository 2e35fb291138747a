"""Post-train a language model: examples teach it a form, then a reward function of this script what is good.

python examples/08_post_training.py

The model is a very small Llama with random weights and characters as tokens, so that nothing is downloaded. SFT shows
it a digit followed by four others, whichever; GRPO then draws eight completions of each prompt and makes those likelier
whose digits rise. Any causal model and tokenizer of transformers goes the same way: .model("path or hub id").
"""

import tempfile
from itertools import pairwise
from pathlib import Path

import numpy as np

from rlx.algorithms.grpo import GRPOConfig
from rlx.algorithms.sft import SFTConfig

LLAMA = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 16,
}


def random_examples(count: int) -> list[dict[str, str]]:
    """Return examples as 3= and 1975: what is learned of each is the completion."""
    digits = np.random.default_rng(0).integers(10, size=(count, 5))
    return [{"prompt": f"{first}=", "completion": "".join(map(str, rest))} for first, *rest in digits]


def rising(prompts: list[str], completions: list[str]) -> list[float]:
    """Return for each completion how many of its four steps, from the prompt's digit on, do not fall, as a share."""
    scores = []
    for prompt, completion in zip(prompts, completions, strict=True):
        digits = prompt[0] + completion
        steps = sum(a <= b for a, b in pairwise(digits))
        scores.append(steps / 4 if len(completion) == 4 and completion.isdigit() else 0.0)
    return scores


with tempfile.TemporaryDirectory() as folder:
    sft = (
        SFTConfig()
        .model(config=LLAMA, tokenizer="rlx.envs.addition:tokenizer")
        .data(random_examples(2048), rows_per_iteration=128)
        .training(lr=1e-2)
        .learners(torch_threads=1)
        .stop(iterations=40)
    )
    with sft.build() as algo:
        metrics = algo.fit()
        start = algo.export(Path(folder) / "sft")
    print(f"SFT: loss {metrics['learner/loss']:.2f} nats a token; digits at random and a sure end are 1.84")

    grpo = (
        GRPOConfig()
        .model(str(start))
        .prompts([{"prompt": f"{digit}="} for digit in range(10)], prompts_per_iteration=10, samples_per_prompt=8)
        .generation(max_new_tokens=6)
        .reward(rising)
        .training(lr=3e-3)
        .learners(torch_threads=1)
        .stop(iterations=60)
    )
    with grpo.build() as algo:
        for _ in range(60):
            metrics = algo.train()
            if metrics["iteration"] in (1, 60):
                print(f"GRPO: score {metrics['score_mean']:.2f} in iteration {metrics['iteration']}")
