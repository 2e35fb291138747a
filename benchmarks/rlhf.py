"""The whole of RLHF with a known truth, in one command and one folder; docs/rlhf.md says what it shows.

    python benchmarks/rlhf.py                   # into runs/docstrings; run again, it goes on where it was interrupted

A character model learns the docstrings of Python's standard library (configs/sft_docstrings.yaml). The gold score of
rlx.envs.docstrings says which of its completions are preferred; a reward model learns that from pairs
(configs/reward_model.yaml). PPO maximises the reward model with an adaptive KL penalty
(configs/rlhf_ppo_docstrings.yaml), and once more without any, and DPO learns from the same pairs (configs/dpo.yaml). In
the end every model completes held-out prompts: what does the reward model say of them, and what the gold score?
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from learning import write_section
from report import describe, machine, markdown_table

from rlx import cli
from rlx.envs import docstring_preferences, docstrings
from rlx.metrics import read_metrics
from rlx.reward_models import load_reward_model
from rlx.text_inference import TextPolicy, load_text_policy

MODELS = {
    "sft": "pre-trained",
    "ppo": "PPO, adaptive KL",
    "ppo_without_kl": "PPO without KL",
    "dpo": "DPO",
}
WITHOUT_KL = ("training.kl_target=null", "training.kl_coef=1e-9")
"""A coefficient of nothing: with 0 there would be no reference, and so no KL to show."""
CURVES = {
    "score_mean": "reward model's score",
    "custom/gold": "gold score",
    "ref_kl_sequence": "KL of a completion (nats)",
}
HEADER = ["model", "reward model's score", "gold score", "words", "variety", "form", "KL (nats)"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is not finished yet, then write table and plot."""
    options = _parse(arguments)
    folder: Path = options.folder
    facts = machine()
    runs = {name: folder / name for name in (*MODELS, "reward_model")}
    train("sft_docstrings", runs["sft"], options.set_sft + options.set)
    counts = {"train": options.prompts, "eval": options.held_out_prompts}
    preferences = make_preferences(runs["sft"], folder, counts, options.smallest_gap)
    from_sft = [f"model.path={runs['sft']}", *options.set]
    train("reward_model", runs["reward_model"], preferences + from_sft)
    ppo = [f"reward.model={runs['reward_model']}", *from_sft, *options.set_ppo]
    train("rlhf_ppo_docstrings", runs["ppo"], ppo)
    train("rlhf_ppo_docstrings", runs["ppo_without_kl"], ppo + list(WITHOUT_KL))
    train("dpo", runs["dpo"], preferences + from_sft)
    prompts = options.held_out_prompts
    rows = [[label, *judge(runs[name], runs, prompts)] for name, label in MODELS.items()]
    picture = options.out.with_name("rlhf.png") if options.out else folder / "rlhf.png"
    plot(runs["ppo"], runs["ppo_without_kl"], picture)
    text = report(rows, runs, facts)
    write_section(text, options.out or folder / "table.md", "rlhf")
    print(f"{text}\n\n{picture}")


def report(rows: Sequence[Sequence[Any]], runs: Mapping[str, Path], facts: dict[str, Any]) -> str:
    """Return the table, what the reward model is worth, how long each stage took, and on what machine."""
    cells = [[row[0], *(f"{value:.3f}" for value in row[1:])] for row in rows]
    accuracy = last(runs["reward_model"], "evaluation/accuracy")
    times = [f"{name} {last(run, 'time/total_s'):.0f} s" for name, run in runs.items()]
    picture = "![The reward model's score, gold score and KL over iterations, with and without a KL penalty](rlhf.png)"
    return (
        f"{picture}\n\n{markdown_table(HEADER, cells)}\n\n"
        f"The reward model is right in {accuracy:.1%} of the held-out pairs. "
        f"Iterations took: {', '.join(times)}.\n{describe(facts)}"
    )


def train(config: str, run: Path, settings: Sequence[str]) -> None:
    """Have `rlx train` make a run, or finish one that was interrupted; a finished one stays as it is."""
    finished = run / "finished"
    if finished.exists():
        return
    if any(run.glob("checkpoints/*")):
        command = ["train", "--resume", str(run)]
    else:
        command = ["train", config, "--run-dir", str(run)]
        for setting in settings:
            command += ["--set", setting]
    print(f"\nrlx {shlex.join(command)}", flush=True)
    if code := cli.main(command):
        sys.exit(code)
    finished.touch()


def make_preferences(sft: Path, folder: Path, counts: Mapping[str, int], smallest_gap: float) -> list[str]:
    """Return the settings that name the files of preference pairs, which are made where they are missing."""
    settings = ["data.kwargs={}", "evaluation.kwargs={}"]
    for key, split in (("data", "train"), ("evaluation", "eval")):
        file, count = folder / f"pairs_{split}.jsonl", counts[split]
        if not file.exists():
            made = docstring_preferences.rows(str(sft), split, count, smallest_gap=smallest_gap)
            lines = [json.dumps(row) for row in made]
            print(f"{file}: {len(lines)} pairs of {count} prompts", flush=True)
            part = file.with_suffix(".part")
            part.write_text("\n".join(lines) + "\n")
            part.rename(file)
        settings.append(f"{key}.source={file}")
    return settings


def judge(run: Path, runs: dict[str, Path], prompts: int) -> list[float]:
    """Return mean score, mean gold score, its three parts, and KL to the pre-trained model, on held-out prompts."""
    policy, reference = load_text_policy(run), load_text_policy(runs["sft"])
    reward_model, _ = load_reward_model(runs["reward_model"])
    asked = [row["prompt"] for row in docstrings.rows("eval", 128, 24, limit=prompts)]
    limit = policy.defaults.max_new_tokens
    texts = [made[0] for made in policy.generate(asked, seed=1_000_000)]
    before = [policy.tokenizer.encode(prompt, add_special_tokens=False) for prompt in asked]
    after = [policy.tokenizer.encode(text, add_special_tokens=False) for text in texts]
    end = policy.tokenizer.eos_token_id
    drawn = [tokens if len(tokens) == limit else [*tokens, end] for tokens in after]
    kl = [_logp(policy, *pair) - _logp(reference, *pair) for pair in zip(before, drawn, strict=True)]
    length = torch.tensor([len(first) + len(rest) for first, rest in zip(before, drawn, strict=True)])
    tokens = torch.zeros(len(asked), int(length.max()), dtype=torch.int64)
    for row, first, rest in zip(tokens, before, drawn, strict=True):
        row[: len(first) + len(rest)] = torch.tensor([*first, *rest])
    score = reward_model.score(tokens, length).mean().item()
    parts = [docstrings.features(text) for text in texts]
    gold = float(np.mean(docstrings.gold(asked, texts)))
    return [score, gold, *(float(np.mean([part[name] for part in parts])) for name in parts[0]), float(np.mean(kl))]


def last(run: Path, metric: str) -> float:
    """Return the newest value of a run's metric."""
    return [row[metric] for row in read_metrics(run / "metrics.jsonl") if row.get(metric) is not None][-1]


def plot(with_kl: Path, without_kl: Path, file: Path) -> None:
    """Draw score, gold score and KL of both runs over iterations."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.4), dpi=100, layout="constrained")
    for axes, (metric, title) in zip(figure.subplots(1, len(CURVES)), CURVES.items(), strict=True):
        for run, label, color in ((with_kl, "adaptive KL", "C0"), (without_kl, "without KL", "C3")):
            found = [(row["iteration"], row[metric]) for row in read_metrics(run / "metrics.jsonl") if metric in row]
            axes.plot(*zip(*found, strict=True), color=color, label=label, linewidth=1.6)
        axes.set_title(title, loc="left", fontsize=10)
        axes.set_xlabel("iteration")
        axes.grid(color="0.9", linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(x=0.01)
        axes.legend(frameon=False, fontsize=9)
    figure.savefig(file)


def _logp(policy: TextPolicy, prompt: Sequence[int], completion: Sequence[int]) -> float:
    """Return the log-probability of a completion."""
    tokens = torch.tensor([[*prompt, *completion]])
    with torch.inference_mode():
        logits = policy.model(tokens[:, :-1]).logits[0, len(prompt) - 1 :]
    return logits.log_softmax(-1).gather(1, tokens[0, len(prompt) :, None]).sum().item()


def _parse(arguments: Sequence[str] | None) -> Any:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--folder", type=Path, default=Path("runs/docstrings"), help="where everything lies (default: %(default)s)")
    add("--out", type=Path, metavar="PAGE", help="a page for table and plot, as docs/rlhf.md (default: the folder)")
    add("--prompts", type=int, default=2000, help="prompts that pairs are made of (default: %(default)s)")
    add("--smallest-gap", type=float, default=0.2, help="in gold score, of a pair (default: %(default)s)")
    add("--held-out-prompts", type=int, default=400, help="prompts that models are judged by (default: %(default)s)")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of every run")
    add("--set-sft", action="append", default=[], metavar="KEY=VALUE", help="a setting of the pre-training")
    add("--set-ppo", action="append", default=[], metavar="KEY=VALUE", help="a setting of both PPO runs")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
