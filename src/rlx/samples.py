"""Samples: completions that a run has kept to be read, in RUN/samples.jsonl."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rlx.config_document import Document
from rlx.errors import CheckpointError, MissingExtra
from rlx.metrics import read_metrics
from rlx.run import SAMPLES, holds_run

if TYPE_CHECKING:
    from torch import Tensor

    from rlx.text_rollouts import Rollout


def sample_records(iteration: int, rollout: Rollout, count: int, ref_logp: Tensor | None) -> list[dict[str, Any]]:
    """Return up to `count` completions as rows of samples.jsonl; ref_logp: of the rollout's rows [S, L], if known."""
    logps = rollout.completions.split(rollout.completions.logp)
    chosen = np.unique(np.linspace(0, len(logps) - 1, min(count, len(logps))).astype(int)).tolist()
    return [_record(iteration, rollout, index, logps, ref_logp) for index in chosen]


def _record(
    iteration: int, rollout: Rollout, index: int, logps: Sequence[np.ndarray], ref_logp: Tensor | None
) -> dict[str, Any]:
    completions = rollout.completions
    tokens, version = (completions.split(column)[index] for column in (completions.tokens, completions.version))
    drawn = np.ones(len(tokens), bool) if completions.drawn is None else completions.split(completions.drawn)[index]
    logp = logps[index]
    row: dict[str, Any] = {
        "iteration": iteration,
        "prompt": rollout.prompts[index].text,
        "completion": rollout.texts[index],
        "score": float(rollout.score[index]) if rollout.counts[index] else None,
        "truncated": not bool(rollout.completions.stopped[index]),
        "weights_version": int(version[0]) if len(version) else None,
        "tokens": tokens.tolist(),
        "logp": [round(float(value), 5) for value in logp[drawn]],
    }
    if not drawn.all():
        row["drawn"] = drawn.tolist()  # the others are an environment's
    if ref_logp is not None and rollout.counts[index]:
        ref = ref_logp[index][rollout.batch.mask[index]].numpy()
        row["kl"] = float((logp[drawn] - ref).sum())
        row["ref_logp"] = [round(float(value), 5) for value in ref]
    return row


def read_samples(run: Path, iteration: int | None = None) -> list[dict[str, Any]]:
    """Return the rows of a run's samples.jsonl, of one iteration (negative: counted from the last) or all."""
    file = run / SAMPLES
    rows = read_metrics(file) if file.is_file() else []
    if not rows:
        raise CheckpointError(_why_none(run))
    if iteration is None:
        return rows
    kept = sorted({row["iteration"] for row in rows})
    wanted = kept[iteration] if iteration < 0 and -iteration <= len(kept) else iteration
    found = [row for row in rows if row["iteration"] == wanted]
    if not found:
        raise CheckpointError(f"{run} has no samples of iteration {iteration}, but of {kept[0]} to {kept[-1]}.")
    return found


def _why_none(run: Path) -> str:
    """Return why a folder has no samples, and what would have some."""
    if not holds_run(run):
        fault = "is no run folder" if run.exists() else "does not exist"
        return f"{run} {fault}; give the folder that `rlx train` printed after `run`."
    text = (run / "config.yaml").read_text()
    algorithm = Document.parse(text, str(run / "config.yaml")).values.get("algorithm")
    return (
        f"{run} is a run of {algorithm} and has kept no samples: runs that draw completions to learn from do, after "
        "their first iteration, where reporting.samples_per_iteration is not 0; see `rlx generate` for others on text."
    )


def sample_lines(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yield the lines that show samples on a terminal: score, KL, mean logp, then what was asked and what came."""
    for row in rows:
        score = "masked" if row["score"] is None else f"{row['score']:.4g}"
        kl = f"  kl {row['kl']:.3f}" if "kl" in row else ""
        logp = f"{sum(row['logp']) / max(1, len(row['logp'])):.3f}"
        end = "  truncated" if row["truncated"] else ""
        yield f"iteration {row['iteration']}  score {score}{kl}  logp/token {logp}  {len(row['tokens'])} tokens{end}"
        yield f"  prompt      {row['prompt']!r}"
        yield f"  completion  {row['completion']!r}"


def token_lines(tokenizer: Any, row: Mapping[str, Any]) -> Iterator[str]:
    """Yield a line for each token of a sample: its text, logp, and logp under the reference."""
    refs = row.get("ref_logp") or [None] * len(row["logp"])
    of_drawn = zip(row["logp"], refs, strict=True)
    for token, drawn in zip(row["tokens"], row.get("drawn") or [True] * len(row["tokens"]), strict=True):
        text = tokenizer.decode([token])
        if not drawn:
            yield f"    {text!r:<16} of the environment"
            continue
        logp, ref = next(of_drawn)
        yield f"    {text!r:<16} {logp:>9.4f}" + ("" if ref is None else f"  reference {ref:>9.4f}")


def write_parquet(rows: Sequence[Mapping[str, Any]], file: Path) -> None:
    """Write samples as a Parquet file."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise MissingExtra("Parquet needs pyarrow: pip install 'rlx[parquet]'.") from error
    names = list(dict.fromkeys(name for row in rows for name in row))
    table = pyarrow.table({name: [row.get(name) for row in rows] for name in names})
    pyarrow.parquet.write_table(table, file)
