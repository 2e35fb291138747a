"""What a running `fit()` shows: a live panel on a terminal, lines elsewhere, one changing text in a notebook.

A display only keeps numbers in `update`; it draws at its own pace, so that fast iterations stay fast.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rlx.metrics import Clock, Metrics, significant, supervised_figures
from rlx.settings import Settings

if TYPE_CHECKING:
    from rich.text import Text

PLAIN_INTERVAL_S = 2.0
NOTEBOOK_INTERVAL_S = 0.5
PANEL_REFRESHES_PER_S = 4
PANEL_WIDTH = 84
Cell = tuple[str, str, str]
"""A number of the panel: its name, itself, its style."""
SPARKS = "▁▂▃▄▅▆▇█"
PART_COLORS = ("green", "cyan", "magenta", "yellow", "red", "bright_black")


def progress_display(settings: Settings, parts: Sequence[str] = Clock.PARTS, is_supervised: bool = False) -> Progress:
    """Return the display that `reporting.progress` asks for: a context manager with `update(metrics)`.

    parts: what the seconds of an iteration are shared out to, time/<part> in the metrics. is_supervised: whether what
    counts is a loss and no return.
    """
    kind = settings.reporting.progress
    if kind == "auto":
        kind = "rich" if sys.stderr.isatty() and os.environ.get("TERM") != "dumb" else "plain"
        kind = "rich" if _in_notebook() else kind
    rich = NotebookProgress if _in_notebook() else RichProgress
    made = {"rich": rich, "plain": PlainProgress}.get(kind, Progress)
    return made(settings, parts, is_supervised)


class Progress:
    """Keeps the numbers and shows nothing; the other displays draw them."""

    def __init__(self, settings: Settings, parts: Sequence[str] = Clock.PARTS, is_supervised: bool = False) -> None:
        self._parts = (*parts, "other_s")
        self.stop = settings.stop
        self.title = f"{settings.algorithm.rpartition('/')[2] or 'training'} · {settings.subject or 'no environment'}"
        self.is_supervised = is_supervised
        runners = getattr(settings, "env_runners", None)
        self.runners_vary = runners is not None and runners.num_env_runners == "auto"
        self.metrics: Metrics = {}
        self.curve = Sparkline()
        """Of the return, or in supervised training of the loss."""
        self.first_return: float | None = None
        self._before: dict[str, float] = {}
        self._recent_s = dict.fromkeys((*self._parts, "iteration_s"), 0.0)
        self._recent_env_steps = 0.0
        self._started = time.perf_counter()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exc_info: object) -> None:
        pass

    def update(self, metrics: Metrics) -> None:
        """Take in one iteration's metrics; an evaluation's stay until the next one."""
        iteration_s = metrics.get("time/iteration_s") or 0.0
        env_steps = (metrics.get("env_steps_per_s") or 0.0) * iteration_s
        if not self.metrics:
            self._before = {
                "iterations": (metrics["iteration"] or 1) - 1,
                "env_steps": (metrics["env_steps"] or 0) - env_steps,
                "time_s": (metrics.get("time/total_s") or 0.0) - iteration_s,
            }
        # Replaced and never changed: the panel's thread may be reading it.
        self.metrics = {**self.metrics, **metrics}
        for part, seconds in self._recent_s.items():
            self._recent_s[part] = 0.9 * seconds + (metrics.get(f"time/{part}") or 0.0)
        self._recent_env_steps = 0.9 * self._recent_env_steps + env_steps
        mean, loss = metrics.get("episode_return_mean"), metrics.get("learner/loss")
        if mean is not None:
            self.first_return = mean if self.first_return is None else self.first_return
        if (value := loss if self.is_supervised else mean) is not None:
            self.curve.add(value)

    def elapsed_s(self) -> float:
        """Return the seconds since the display was made."""
        return time.perf_counter() - self._started

    def env_steps_per_s(self) -> float | None:
        """Return the speed of the latest iterations."""
        iteration_s = self._recent_s["iteration_s"]
        return self._recent_env_steps / iteration_s if iteration_s else None

    def time_shares(self) -> dict[str, float]:
        """Return where the time of the latest iterations went: parts of 1 by name."""
        total = sum(seconds for part, seconds in self._recent_s.items() if part != "iteration_s")
        return {part.removesuffix("_s"): self._recent_s[part] / (total or 1) for part in self._parts}

    def nearest_limit(self) -> tuple[str, float, float | None]:
        """Return the limit of `stop` that comes first: its name, the part done, and the seconds to go if known."""
        done = {
            "iterations": self.metrics.get("iteration"),
            "env_steps": self.metrics.get("env_steps"),
            "time_s": self.metrics.get("time/total_s"),
        }
        estimates, elapsed_s = [], self.elapsed_s()
        for name, value in done.items():
            limit = getattr(self.stop, name)
            if limit and value is not None:
                speed = (value - self._before[name]) / elapsed_s
                eta_s = max(0.0, limit - value) / speed if speed > 0 else float("inf")
                estimates.append((eta_s, name, min(1.0, value / limit)))
        if estimates:
            eta_s, name, part = min(estimates)
            return name, part, eta_s if eta_s < float("inf") else None
        goal, mean, first = self.stop.episode_return_mean, self.metrics.get("episode_return_mean"), self.first_return
        if goal is None:
            return "no limit", 0.0, None
        if mean is None or first is None or mean == first:
            return "episode_return_mean", 1.0 if mean is not None and mean >= goal else 0.0, None
        part = 1.0 if mean >= goal else max(0.0, (mean - first) / (goal - first))
        return "episode_return_mean", part, None


class PlainProgress(Progress):
    """Prints a line to stderr every two seconds at most, and the last one."""

    def __init__(self, settings: Settings, parts: Sequence[str] = Clock.PARTS, is_supervised: bool = False) -> None:
        super().__init__(settings, parts, is_supervised)
        self._next_s = 0.0
        self._is_shown = True

    def update(self, metrics: Metrics) -> None:
        """Take in the metrics; print them if the last line is old enough."""
        super().update(metrics)
        self._is_shown = False
        if self.elapsed_s() >= self._next_s:
            self._next_s = self.elapsed_s() + PLAIN_INTERVAL_S
            self._show()

    def __exit__(self, *exc_info: object) -> None:
        if not self._is_shown:
            self._show()

    def _show(self) -> None:
        self._is_shown = True
        with contextlib.suppress(OSError):  # the reader of a pipe is gone, or the disk is full: the run goes on
            print(plain_line(self), file=sys.stderr, flush=True)


class NotebookProgress(Progress):
    """Keeps one text under the cell up to date."""

    def __init__(self, settings: Settings, parts: Sequence[str] = Clock.PARTS, is_supervised: bool = False) -> None:
        super().__init__(settings, parts, is_supervised)
        self._next_s = 0.0
        self._handle: Any = None

    def update(self, metrics: Metrics) -> None:
        """Take in the metrics; redraw the text if it is old enough."""
        super().update(metrics)
        if self.elapsed_s() >= self._next_s:
            self._next_s = self.elapsed_s() + NOTEBOOK_INTERVAL_S
            self._show()

    def __exit__(self, *exc_info: object) -> None:
        if self.metrics:
            self._show()

    def _show(self) -> None:
        from IPython.display import display

        name, part, eta_s = self.nearest_limit()
        bar = "█" * round(30 * part) + "░" * (30 - round(30 * part))
        head = f"{self.title}   {bar} {part:4.0%} of {name}   eta {duration(eta_s)}   {self.curve}"
        bundle = {"text/plain": f"{head}\n{plain_line(self)}"}
        if self._handle is None:
            self._handle = display(bundle, raw=True, display_id=True)
        else:
            self._handle.update(bundle, raw=True)


class RichProgress(Progress):
    """A live panel on stderr; log lines and prints scroll above it."""

    def __enter__(self) -> RichProgress:
        from rich.console import Console
        from rich.live import Live

        self._console = Console(stderr=True, force_terminal=True, force_jupyter=False, highlight=False)
        self._live = Live(get_renderable=self.panel, console=self._console, refresh_per_second=PANEL_REFRESHES_PER_S)
        self._live.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._live.stop()

    def panel(self) -> Any:
        """Return the panel as it stands now."""
        from rich.panel import Panel
        from rich.text import Text

        return Panel(
            Text("\n", no_wrap=True, overflow="crop").join(panel_lines(self)),
            title=Text(self.title, style="bold"),
            title_align="left",
            subtitle=Text(duration(self.elapsed_s()), style="dim"),
            subtitle_align="right",
            border_style="blue",
            width=min(PANEL_WIDTH, self._console.width),
            padding=(0, 1),
        )


class Sparkline:
    """A whole history in few characters: as it grows, neighbours are averaged into one bar."""

    def __init__(self, width: int = 24) -> None:
        self.width = width
        self.bars: list[float] = []
        self._values_per_bar = 1
        self._pending: list[float] = []

    def add(self, value: float) -> None:
        """Append a value."""
        self._pending.append(value)
        if len(self._pending) < self._values_per_bar:
            return
        bars = [*self.bars, sum(self._pending) / len(self._pending)]
        self._pending = []
        if len(bars) == self.width:
            bars = [(a + b) / 2 for a, b in zip(bars[::2], bars[1::2], strict=True)]
            self._values_per_bar *= 2
        self.bars = bars

    def __str__(self) -> str:
        if not (bars := self.bars):
            return ""
        low, high = min(bars), max(bars)
        scale = (len(SPARKS) - 1) / (high - low) if high > low else 0.0
        return "".join(SPARKS[round((value - low) * scale)] for value in bars)


def plain_line(progress: Progress) -> str:
    """Return the state as one line whose columns stay where they are."""
    metrics = progress.metrics
    _, part, eta_s = progress.nearest_limit()
    if progress.is_supervised:
        figures = [f"{word} {number:>8}" for word, number in supervised_figures(metrics).items()]
    else:
        figures = [
            f"return {_significant(metrics, 'episode_return_mean'):>8}",
            f"length {_significant(metrics, 'episode_length_mean'):>7}",
            f"kl {_number(metrics, 'learner/kl', '.4f'):>6}",
            f"entropy {_number(metrics, 'learner/entropy', '.2f'):>5}",
        ]
        if metrics.get("evaluation/episode_return_mean") is not None:
            figures.insert(1, f"eval {_significant(metrics, 'evaluation/episode_return_mean'):>8}")
        if progress.runners_vary:
            figures.append(f"runners {_number(metrics, 'num_env_runners', 'd'):>4}")
    columns = [
        f"{part:4.0%}",
        f"iter {metrics['iteration']:>5}",
        f"env_steps {metrics['env_steps']:>11,}",
        *figures,
        f"{progress.env_steps_per_s() or 0:>9,.0f} steps/s",
        f"eta {duration(eta_s)}",
    ]
    return "  ".join(columns)


def panel_lines(progress: Progress) -> list[Text]:
    """Return the lines of the panel: the bar, the numbers, and where the time goes."""
    from rich.text import Text

    m = progress.metrics
    if not m:
        return [Text("the first iteration is running", style="dim")]
    rows = (_supervised_rows if progress.is_supervised else _episode_rows)(progress)
    lines = [_bar_line(progress)]
    for (left_name, left, left_style), (right_name, right, right_style) in rows:
        line = Text(f"{left_name:<11}", style="dim").append(f"{left:<20}", style=f"not dim {left_style}")
        if right_name:
            line.append(f"{right_name:<16}")
        lines.append(line.append(right, style=f"not dim {right_style}"))
    if m.get("evaluation/episode_return_mean") is not None:
        mean, std = (_significant(m, f"evaluation/episode_return_{name}") for name in ("mean", "std"))
        lines.append(Text("evaluation ", style="dim").append(f"{mean} ± {std}", style="not dim bold"))
    return [*lines, *_time_lines(progress.time_shares())]


def _episode_rows(progress: Progress) -> list[tuple[Cell, Cell]]:
    """Return what the panel shows of a run with episodes."""
    m, goal, speed = progress.metrics, progress.stop.episode_return_mean, progress.env_steps_per_s()
    target = f" → {goal:g}" if goal is not None else ""
    span = f"{_significant(m, 'episode_return_min')} … {_significant(m, 'episode_return_max')}"
    runners: Cell = ("env runners", _number(m, "num_env_runners", "d"), "")
    return [
        (("return", _significant(m, "episode_return_mean"), "bold green"), ("", f"{progress.curve}{target}", "green")),
        (("min … max", span, ""), ("episode length", _significant(m, "episode_length_mean"), "")),
        (("iteration", _number(m, "iteration", ","), ""), ("env_steps", _number(m, "env_steps", ","), "")),
        (
            ("steps/s", "-" if speed is None else f"{speed:,.0f}", "bold"),
            ("entropy", _number(m, "learner/entropy", ".3f"), ""),
        ),
        (
            ("KL", _number(m, "learner/kl", ".4f"), ""),
            ("explained var.", _number(m, "learner/explained_variance", ".3f"), ""),
        ),
        *([(runners, ("", "", ""))] if progress.runners_vary else []),
    ]


def _supervised_rows(progress: Progress) -> list[tuple[Cell, Cell]]:
    """Return what the panel shows of a run that learns from rows."""
    m, speed = progress.metrics, progress.env_steps_per_s()
    figures = supervised_figures(m)
    loss = figures.pop("loss", "-")
    figures.pop("eval return", None)  # has a line of its own
    cells = [(word, number, "") for word, number in figures.items()]
    return [
        (("loss", loss, "bold green"), ("", str(progress.curve), "green")),
        *zip(cells[::2], [*cells[1::2], ("", "", "")], strict=False),
        (("iteration", _number(m, "iteration", ","), ""), ("env_steps", _number(m, "env_steps", ","), "")),
        (
            ("steps/s", "-" if speed is None else f"{speed:,.0f}", "bold"),
            ("gradient norm", _significant(m, "learner/grad_norm"), ""),
        ),
    ]


def duration(seconds: float | None) -> str:
    """Return seconds as h:mm:ss, or - where they are unknown."""
    if seconds is None:
        return "-"
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}"


def _bar_line(progress: Progress, width: int = 34) -> Text:
    from rich.text import Text

    name, part, eta_s = progress.nearest_limit()
    filled = round(width * part)
    limit = getattr(progress.stop, name, None)
    goal = f"{limit:,.10g}" if limit is not None else ""
    line = Text("━" * filled, style="bold blue").append("━" * (width - filled), style="bright_black")
    return line.append(f" {part:4.0%} ", style="bold").append(
        f"of {goal} {name}  eta {duration(eta_s)}", style="not bold dim"
    )


def _time_lines(shares: Mapping[str, float], width: int = 76) -> list[Text]:
    """Return a stacked bar of where the time goes, and its legend in the same colours."""
    from rich.text import Text

    bar, legend, end = Text(), Text(), 0.0
    for (name, share), color in zip(shares.items(), PART_COLORS, strict=False):
        start, end = end, end + share
        bar.append("▄" * (round(width * end) - round(width * start)), style=color)
        legend.append("■ ", style=color).append(f"{name} {share:.0%}  ", style="dim" if share < 0.005 else "")
    return [bar, legend]


def _significant(metrics: Metrics, name: str) -> str:
    value = metrics.get(name)
    return "-" if value is None else significant(value)


def _number(metrics: Metrics, name: str, spec: str) -> str:
    value = metrics.get(name)
    return "-" if value is None else format(value, spec)


def _in_notebook() -> bool:
    """Return whether this is a Jupyter kernel; IPython on a terminal is a terminal."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    return type(shell).__name__ == "ZMQInteractiveShell"
