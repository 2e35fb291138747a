"""Learning curves of finished or running runs, as a PNG: one line per config, a band over its seeds."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rlx.config_lookup import did_you_mean
from rlx.errors import CheckpointError, ConfigError
from rlx.metrics import METRICS, TEXT_METRICS, read_metrics
from rlx.settings import FREE_ON_RESUME

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DEFAULT_METRIC = "episode_return_mean"
SUPERVISED_METRICS = ("evaluation/episode_return_mean", "evaluation/accuracy", "evaluation/loss", "learner/loss")
"""What is drawn of runs that learn from rows and have no return: the first that all of them have a curve of."""
NOT_PART_OF_A_CURVE = ("runtime", *(name for name in FREE_ON_RESUME if name != "callbacks"))
"""Sections in which two runs may differ and still be repetitions of one config."""
MAX_POINTS = 1000


@dataclass(frozen=True)
class Curve:
    """One run's metric over env_steps, and the settings it came from."""

    run: Path
    settings: dict[str, Any]
    env_steps: np.ndarray
    values: np.ndarray

    def identity(self) -> dict[str, Any]:
        """Return the settings by dotted key that tell configs apart."""
        flat: dict[str, Any] = {}
        for section, values in self.settings.items():
            if section not in NOT_PART_OF_A_CURVE:
                entries = values.items() if isinstance(values, dict) else [("", values)]
                flat |= {f"{section}.{key}".rstrip("."): value for key, value in entries}
        return flat


def plot_runs(runs: Sequence[Path], file: Path, metric: str | None = None) -> Path:
    """Draw `metric` of all `runs` over env_steps into the picture `file`, in place of an older one; return it.

    metric: None takes the return, or of runs that learn from rows an evaluation, or else the loss.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    formats = sorted(FigureCanvasAgg(Figure()).get_supported_filetypes())
    if file.suffix.lstrip(".").lower() not in formats:
        raise ConfigError(f"{file} is no picture; end its name in one of {', '.join('.' + one for one in formats)}.")
    metric = metric or _default_metric(runs)
    curves = [load_curve(run, metric) for run in runs]
    figure = Figure(figsize=(8, 4.8), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    groups = group_by_config(curves)
    for number, (label, members) in enumerate(groups.items()):
        _draw_group(axes, label, members, f"C{number}")
    _describe(axes, curves, metric)
    axes.legend(frameon=False, fontsize=9)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(file)
    except OSError as error:
        raise ConfigError(f"{file} cannot be written: {error.strerror}; give another name with -o.") from error
    return file


def _default_metric(runs: Sequence[Path]) -> str:
    every = [_read(run) for run in runs]
    if not all((settings.get("data") or {}).get("source") for settings, _ in every):
        return DEFAULT_METRIC
    for metric in SUPERVISED_METRICS:
        if all(sum(row.get(metric) is not None for row in rows) > 1 for _, rows in every):
            return metric
    return SUPERVISED_METRICS[-1]


def load_curve(run: Path, metric: str) -> Curve:
    """Return one run's curve; a sentence where there is nothing to draw."""
    settings, rows = _read(run)
    points = [(row["env_steps"], row[metric]) for row in rows if row.get(metric) is not None]
    known = METRICS | TEXT_METRICS
    here = dict.fromkeys(name for row in rows for name, value in row.items() if value is not None)
    if not points and metric not in known:
        hint = did_you_mean(metric, known | here) or f" It has {', '.join(here)}."
        raise ConfigError(f"{metric} is no metric of {run}.{hint}")
    if not points:
        why = {
            "episode": "no episode has finished in it yet; train longer, or plot another --metric such as learner/loss",
            "evaluation": "it never evaluated; train with --set evaluation.interval=10",
        }.get(metric.replace("/", "_").split("_")[0], "its algorithm does not report that")
        raise CheckpointError(f"{run} has no {metric}: {why}.")
    env_steps, values = np.asarray(points, dtype=float).T
    return Curve(run, settings, env_steps, values)


def _read(run: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return the settings and the rows of metrics of a run."""
    import yaml

    if not (run / "config.yaml").is_file():
        raise CheckpointError(f"{run} is no run folder: it has no config.yaml; give the folder that `rlx train` made.")
    file = run / "metrics.jsonl"
    rows = read_metrics(file) if file.is_file() else []
    if not rows:
        raise CheckpointError(f"{run} has no metrics yet; plot it once an iteration has finished.")
    return yaml.safe_load((run / "config.yaml").read_text()), rows


def group_by_config(curves: Sequence[Curve]) -> dict[str, list[Curve]]:
    """Return the curves of each config under a label that says in what it differs from the others."""
    groups: list[tuple[dict[str, Any], list[Curve]]] = []
    for curve in curves:
        identity = curve.identity()
        members = next((members for other, members in groups if other == identity), None)
        if members is None:
            groups.append((identity, [curve]))
        else:
            members.append(curve)
    identities = [identity for identity, _ in groups]
    keys = dict.fromkeys(key for identity in identities for key in identity)
    differing = [key for key in keys if any(one.get(key) != identities[0].get(key) for one in identities)]
    labels = {}
    for identity, members in groups:
        text = ", ".join(f"{key.rpartition('.')[2]}={identity[key]}" for key in differing if key in identity)
        labels[textwrap.shorten(text, 60, placeholder=" ...") or members[0].run.name] = members
    if len(labels) < len(groups):  # two texts were shortened to the same one
        labels = {members[0].run.name: members for _, members in groups}
    return labels


def mean_and_range(curves: Sequence[Curve]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return env_steps, mean, lowest and highest value over the stretch that every curve covers."""
    first = max(curve.env_steps[0] for curve in curves)
    last = min(curve.env_steps[-1] for curve in curves)
    grid = np.unique(np.concatenate([curve.env_steps for curve in curves]))
    grid = grid[(grid >= first) & (grid <= last)]
    if len(grid) > MAX_POINTS:
        grid = np.linspace(first, last, MAX_POINTS)
    values = np.stack([np.interp(grid, curve.env_steps, curve.values) for curve in curves])
    return grid, values.mean(0), values.min(0), values.max(0)


def _draw_group(axes: Axes, label: str, curves: Sequence[Curve], color: str) -> None:
    if len(curves) == 1:
        marker = "o" if len(curves[0].values) == 1 else ""  # a line of one point is not to be seen
        axes.plot(curves[0].env_steps, curves[0].values, color=color, label=label, linewidth=1.8, marker=marker)
        return
    for curve in curves:  # whole, so that a run that ended early hides nothing of the others
        axes.plot(curve.env_steps, curve.values, color=color, linewidth=0.6, alpha=0.35)
    grid, mean, low, high = mean_and_range(curves)
    axes.fill_between(grid, low, high, color=color, alpha=0.18, linewidth=0)
    name = f"{label}: mean" if label != curves[0].run.name else "mean"
    axes.plot(grid, mean, color=color, linewidth=2, label=f"{name} of {len(curves)} runs, band from min to max")


def _describe(axes: Axes, curves: Sequence[Curve], metric: str) -> None:
    """Title, labels with units, the goal, and a light grid."""
    titles = {f"{one.settings['algorithm'].rpartition('/')[2]} on {_subject(one.settings)}" for one in curves}
    axes.set_title(" / ".join(sorted(titles)), loc="left", fontweight="bold")
    steps = {"tokens" if _is_on_text(one.settings) else "environment steps" for one in curves}
    axes.set_xlabel(f"env_steps ({' or '.join(sorted(steps))})\n", labelpad=6)
    meaning = "\n".join(textwrap.wrap((METRICS | TEXT_METRICS).get(metric, "").partition(";")[0].rstrip("."), 110))
    axes.text(1, -0.155, meaning, transform=axes.transAxes, ha="right", va="top", fontsize=7, color="0.45")
    axes.set_ylabel(metric + _unit(metric))
    goals = {one.settings["stop"]["episode_return_mean"] for one in curves} - {None}
    if metric.endswith("episode_return_mean") and len(goals) == 1:
        axes.axhline(goal := goals.pop(), color="0.35", linestyle="--", linewidth=1, label=f"solved at {goal:g}")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.10g}")
    axes.grid(color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.01)


def _subject(settings: dict[str, Any]) -> str:
    """Return what a run trains on, an environment, or the language model that it trains."""
    if not _is_on_text(settings):
        return settings["environment"]["id"]
    model = settings["model"]
    return (model["path"] or model["config"]["model_type"]).rstrip("/").rpartition("/")[2]


def _is_on_text(settings: dict[str, Any]) -> bool:
    return "generation" in settings


def _unit(metric: str) -> str:
    units = {"_per_s": " (1/s)", "_s": " (s)", "_length_mean": " (steps)", "/kl": " (nats)", "/entropy": " (nats)"}
    return next((unit for ending, unit in units.items() if metric.endswith(ending)), "")
