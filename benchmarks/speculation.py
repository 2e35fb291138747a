"""What speculative decoding could give: tokens that a verifying step would keep, over what such a step costs.

    rlx train sft_docstrings --run-dir runs/docstrings/sft
    rlx train sft_docstrings --run-dir runs/docstrings/draft --set model.config.hidden_size=64 \
        --set model.config.intermediate_size=128 --set model.config.num_hidden_layers=1
    python benchmarks/speculation.py                          # into docs/benchmarks.md

Token t of a sample belongs to its own uniform number, so a proposal drawn with that number from another law is kept
where the model would have drawn the same token, and what is generated is the same with any proposals. That makes it
enough to generate once: what was proposed is held against what was drawn.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers
from report import DOCS, busy_cores, describe, machine, markdown_table, publish
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

from rlx.envs import docstrings
from rlx.generation.generator import Generator
from rlx.generation.request import Request, Sampling
from rlx.generation.uniform import sample_keys, uniform
from rlx.text.tokenizers import encode
from rlx.text_inference import TextPolicy, load_text_policy

PROPOSED = (1, 2, 3, 5)
"""Tokens that are proposed for each row and step."""
ROWS = (1, 16, 128)
BATCH, BATCHES_BEFORE, NEW_TOKENS = 128, 3, 48
"""As of rlhf_ppo_docstrings: prompts of an iteration, and the longest completion."""
PAST = 64
"""Tokens in each row's cache where a step's time is taken."""
LONGEST_CONTEXT = 5
LARGE_ROWS = 16
"""Most rows that the large model is timed with."""


class Sample(NamedTuple):
    """What was generated, and the uniform number that each token was drawn by."""

    prompt: list[int]
    tokens: list[int]
    u: np.ndarray


class Ngrams:
    """The law of the next token by what followed its last tokens before: Witten and Bell's mixture of all lengths."""

    def __init__(self, vocabulary: int) -> None:
        self._vocabulary = vocabulary
        self._followed: dict[tuple[int, ...], dict[int, int]] = {}

    def add(self, tokens: Sequence[int], begin: int = 0) -> None:
        """Count tokens[begin:], each after the contexts that it has in `tokens`."""
        for at in range(begin, len(tokens)):
            for length in range(min(LONGEST_CONTEXT, at) + 1):
                counts = self._followed.setdefault(tuple(tokens[at - length : at]), {})
                counts[tokens[at]] = counts.get(tokens[at], 0) + 1

    def law(self, tokens: Sequence[int]) -> np.ndarray:
        """Return the probabilities of what follows `tokens`, float64 [V]."""
        law = np.full(self._vocabulary, 1 / self._vocabulary)
        for length in range(min(LONGEST_CONTEXT, len(tokens)) + 1):
            counts = self._followed.get(tuple(tokens[len(tokens) - length :]))
            if counts is None:
                break
            total = sum(counts.values())
            law = law * (len(counts) / (total + len(counts)))
            law[[*counts]] += np.array([*counts.values()]) / (total + len(counts))
        return law


def tokens_a_step(kept: list[np.ndarray], proposed: int) -> float:
    """Return how many tokens a verifying step makes, those of the step itself included.

    kept: for each sample, whether what would be proposed for each token is what was drawn.
    """
    steps = tokens = 0
    for right in kept:
        at = 0
        while at < len(right):
            run = 0
            while run < proposed and at + run < len(right) and right[at + run]:
                run += 1
            at, steps = at + run + 1, steps + 1
        tokens += len(right)
    return tokens / steps


def kept_of(samples: list[Sample], laws: list[np.ndarray], greedy: bool) -> list[np.ndarray]:
    """Return, for each sample, whether its law [C, V] proposes what was drawn: by the same u, or the likeliest."""
    kept = []
    for sample, law in zip(samples, laws, strict=True):
        cumulative = law.cumsum(-1)
        proposed = law.argmax(-1) if greedy else (cumulative <= (sample.u * cumulative[:, -1])[:, None]).sum(-1)
        kept.append(proposed == np.array(sample.tokens))
    return kept


def own_laws(samples: list[Sample], vocabulary: int) -> list[np.ndarray]:
    """Return the laws of n-grams that know the sample's own prompt and tokens so far."""
    laws = []
    for prompt, tokens, _ in samples:
        ngrams, made = Ngrams(vocabulary), []
        ngrams.add(prompt)
        for count in range(len(tokens)):
            made.append(ngrams.law(prompt + tokens[:count]))
            ngrams.add(prompt + tokens[: count + 1], begin=len(prompt) + count)
        laws.append(np.stack(made))
    return laws


def earlier_laws(samples: list[Sample], earlier: list[Sample], vocabulary: int) -> list[np.ndarray]:
    """Return the laws of n-grams that know what was generated in earlier batches."""
    ngrams = Ngrams(vocabulary)
    for prompt, tokens, _ in earlier:
        ngrams.add(prompt + tokens)
    return [
        np.stack([ngrams.law(prompt + tokens[:count]) for count in range(len(tokens))]) for prompt, tokens, _ in samples
    ]


@torch.inference_mode()
def draft_laws(model: Any, samples: list[Sample]) -> list[np.ndarray]:
    """Return the laws of a draft model."""
    laws = []
    for prompt, tokens, _ in samples:
        logits = model(input_ids=torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
        laws.append(logits.double().softmax(-1).numpy())
    return laws


def generated(policy: TextPolicy, prompts: list[list[int]], seed: int, temperature: float) -> list[Sample]:
    """Generate one sample of each prompt."""
    requests = [Request(prompt, 1, NEW_TOKENS, seed + number, policy.stops) for number, prompt in enumerate(prompts)]
    samples = []
    made = Generator(policy.model).generate(requests, Sampling(temperature))
    for request, (completion,) in zip(requests, made, strict=True):
        count = len(completion.tokens)
        u = uniform(np.repeat(sample_keys(request.seed, 0, 1), count), np.arange(count))
        samples.append(Sample(list(request.prompt), completion.tokens.tolist(), u))
    return samples


def acceptance(policy: TextPolicy, draft: TextPolicy, temperature: float) -> dict[str, list[float]]:
    """Return the tokens of a verifying step for each kind of proposals, one figure for each of PROPOSED."""
    rng = np.random.default_rng(0)
    texts = [row["prompt"] for row in docstrings.rows(window=128, prompt_characters=24)]
    prompts = [encode(policy.tokenizer, texts[at], "a prompt") for at in rng.permutation(len(texts))]
    batches = [
        generated(policy, prompts[number * BATCH : (number + 1) * BATCH], 1000 * number, temperature)
        for number in range(BATCHES_BEFORE + 1)
    ]
    samples, vocabulary = batches.pop(), policy.model.config.vocab_size
    laws = {
        "n-grams of the own text": own_laws(samples, vocabulary),
        "n-grams of earlier batches": earlier_laws(samples, [one for batch in batches for one in batch], vocabulary),
        "draft model": draft_laws(draft.model, samples),
    }
    found = {}
    for name, law in laws.items():
        kept = kept_of(samples, law, temperature == 0)
        found[name] = [tokens_a_step(kept, proposed) for proposed in PROPOSED]
    return found


def large_model(vocabulary: int) -> Any:
    """Return a model of 38 million random parameters, whose weights are what a step of one row waits for."""
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=512,
        intermediate_size=1376,
        num_hidden_layers=12,
        num_attention_heads=8,
        max_position_embeddings=256,
    )
    return LlamaForCausalLM(config).eval()


@torch.inference_mode()
def step_s(model: Any, rows: int, rounds: int) -> dict[int, float]:
    """Return the processor seconds of a step by how many tokens are proposed; 0 is a plain one. Sizes take turns."""
    cache = StaticCache(config=model.config, max_cache_len=PAST + 8)
    vocabulary = model.config.vocab_size
    model(input_ids=torch.randint(vocabulary, (rows, PAST)), past_key_values=cache, use_cache=True)
    least: dict[int, float] = {}
    for _ in range(rounds):
        for proposed in (0, *PROPOSED):
            ids = torch.randint(vocabulary, (rows, 1 + proposed))
            for layer in cache.layers:
                layer.cumulative_length.fill_(PAST)  # type: ignore[attr-defined]  # forget the last step
            began = time.process_time()
            model(input_ids=ids, past_key_values=cache, use_cache=True)
            least[proposed] = min(least.get(proposed, float("inf")), time.process_time() - began)
    return least


def bound(tokens: list[float], cost: dict[int, float], draft: dict[int, float] | None) -> tuple[float, int]:
    """Return the largest speed beside plain steps, and with how many proposals; all but the models goes for nothing.

    draft: the draft model's times, whose plain steps make the proposals; None: these go for nothing, too.
    """
    speeds = {
        proposed: made * cost[0] / (cost[proposed] + (proposed * draft[0] if draft else 0))
        for proposed, made in zip(PROPOSED, tokens, strict=True)
    }
    best = max(speeds, key=lambda proposed: speeds[proposed])
    return speeds[best], best


def page(record: dict[str, Any]) -> str:
    """Return both tables."""
    cost = {(name, rows): times for name, rows, times in record["cost"]}
    header = ["model", "rows", "plain step, ms", *(f"with {proposed} proposed" for proposed in PROPOSED)]
    costs = [
        [name, str(rows), f"{1000 * times[0]:.2f}", *(f"{times[proposed] / times[0]:.2f}" for proposed in PROPOSED)]
        for (name, rows), times in cost.items()
    ]
    cases = [case for case in cost if case[0] != "draft"]
    limits = []
    for temperature, found in record["acceptance"]:
        for name, tokens in found.items():
            best = [
                bound(tokens, cost[case], cost["draft", case[1]] if name == "draft model" else None) for case in cases
            ]
            limits.append(
                [f"{name}, temperature {temperature:g}", *(f"{made:.2f}" for made in tokens)]
                + [f"{speed:.2f} ({proposed})" for speed, proposed in best]
            )
    kept = ["tokens a step", *(f"{proposed} proposed" for proposed in PROPOSED)]
    kept += [f"bound, {name}, {rows} row{'s' * (rows > 1)}" for name, rows in cases]
    return (
        f"{markdown_table(header, costs)}\n\n{markdown_table(kept, limits)}\n\n"
        f"`{record['command']}`: least processor time of {record['rounds']} rounds, 1 torch thread; torch "
        f"{torch.__version__}, transformers {transformers.__version__}. {describe(record['machine'])} "
        f"Cores busy with other work before: {record['busy_cores_before'] or 0:.2f}."
    )


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--run", type=Path, default=Path("runs/docstrings/sft"), help="the model's run folder")
    parser.add_argument("--draft", type=Path, default=Path("runs/docstrings/draft"), help="the draft model's")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--out", type=Path, default=DOCS, help="folder of benchmarks.md and .json (default: docs)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    record: dict[str, Any] = {
        "command": " ".join(["python benchmarks/speculation.py", *sys.argv[1:]]),
        "rounds": options.rounds,
    }
    record |= {"machine": machine(), "busy_cores_before": busy_cores(), "cost": []}
    policy, draft = load_text_policy(options.run), load_text_policy(options.draft)
    record["acceptance"] = [(temperature, acceptance(policy, draft, temperature)) for temperature in (1.0, 0.0)]
    large = large_model(policy.model.config.vocab_size)
    for name, model in (("2 x 128", policy.model), ("12 x 512", large), ("draft", draft.model)):
        for rows in ROWS:
            if model is not large or rows <= LARGE_ROWS:
                record["cost"].append((name, rows, step_s(model, rows, options.rounds)))
                print(*record["cost"][-1], flush=True)
    publish(options.out, "speculation", record, page(record))
    print(page(record))


if __name__ == "__main__":
    main()
