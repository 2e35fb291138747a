"""What the benchmarks that need a GPU share: a model of Qwen3-0.6B's shape, their command line and where they write."""

import argparse
from pathlib import Path
from typing import Any

import torch
from report import DOCS, publish

QWEN3 = {
    "model_type": "qwen3",
    "vocab_size": 151_936,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
}
FEW_LAYERS = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "head_dim": 8}


def parser(title: str, rounds: int) -> argparse.ArgumentParser:
    """Return a command line with --tiny, --rounds and --out."""
    made = argparse.ArgumentParser(description=title.partition("\n")[0])
    made.add_argument("--tiny", action="store_true", help="a small model on the CPU, into no page but that of --out")
    made.add_argument("--rounds", type=int, default=rounds)
    made.add_argument("--out", type=Path, help="folder of benchmarks.md and .json (default: docs)")
    return made


def runs_here(tiny: bool) -> bool:
    """Return whether this machine has what the benchmark needs; say so where it does not."""
    if not tiny and not torch.cuda.is_available():
        print("This benchmark needs a GPU, and torch finds no CUDA device here; --tiny runs it small on the CPU.")
    return tiny or torch.cuda.is_available()


def finish(options: argparse.Namespace, section: str, record: dict[str, Any], table: str) -> None:
    """Print the table, and write it where it belongs."""
    out = options.out or (None if options.tiny else DOCS)
    if out is not None:
        publish(out, section, record, table)
    print(table)
