"""fit: iterations with their evaluations and checkpoints, until a limit, a request or an interrupt."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Any

from rlx import video
from rlx.errors import ConfigError
from rlx.interrupts import deferred_interrupt
from rlx.learner.learner_group import LearnersLost
from rlx.metrics import Metrics
from rlx.progress import progress_display

if TYPE_CHECKING:
    from rlx.trainable import Trainable

log = logging.getLogger("rlx")

INTERRUPTED = "interrupted"


def fit(algo: Trainable) -> Metrics:
    """Do what `Trainable.fit` says."""
    algo.settings.stop.require_limit(algo.settings.evaluation.interval)
    algo.check_open()
    algo.stop_request = ""
    _check_films(algo)
    algo.saves.open()
    metrics: Metrics = {}
    while True:
        metrics = _train(algo) or metrics
        try:
            algo.saves.save()
            algo.finish()
        except LearnersLost as lost:
            algo.saves.go_back(lost)
            if algo.stop_reason == INTERRUPTED:  # it is not asked for twice
                algo.request_stop(INTERRUPTED)
        else:
            break
    algo.callbacks("on_stop", algo, algo.stop_reason)
    return metrics


def _train(algo: Trainable) -> Metrics:
    """Make iterations until there is a reason to stop; return the last one's metrics, none where none was made."""
    metrics: Metrics = {}
    display = progress_display(algo.settings, algo.clock_parts, algo.config.is_supervised())
    with deferred_interrupt() as interrupted, display as progress:
        while not (reason := INTERRUPTED if interrupted() else reason_to_stop(algo)):
            try:
                metrics = iterate(algo)
            except LearnersLost as lost:  # in an evaluation or a checkpoint
                algo.saves.go_back(lost)
                continue
            progress.update(metrics)
    algo.stop_reason = reason
    return metrics


def iterate(algo: Trainable) -> Metrics:
    """Train, evaluate and checkpoint as their intervals say."""
    metrics = algo.train()
    interval = algo.settings.evaluation.interval
    if interval and algo.iteration % interval == 0:
        started = time.perf_counter()
        metrics |= algo.evaluate()
        _film(algo)
        metrics["time/evaluation_s"] = time.perf_counter() - started
        _stop_at_goal(algo, metrics)
    algo.saves.write_metrics(metrics)
    _track_best(algo, metrics)
    interval = algo.settings.checkpointing.interval
    if interval and algo.iteration % interval == 0:
        algo.saves.save()
    return metrics


def reason_to_stop(algo: Trainable) -> str:
    """Return what was requested or which limit is reached, in words, or an empty string."""
    mean = algo.window.summary()["episode_return_mean"] if algo.window.is_full else None
    limits = {"iterations": algo.iteration, "env_steps": algo.env_steps, "time_s": algo.total_s}
    return algo.stop_request or algo.settings.stop.reached(mean, **limits)


def _stop_at_goal(algo: Trainable, metrics: Metrics) -> None:
    """Request a stop where this evaluation has reached stop.evaluation_return_mean."""
    goal = algo.settings.stop.evaluation_return_mean
    if goal is None:
        return
    mean = metrics.get("evaluation/episode_return_mean")
    if mean is None:
        raise ConfigError(
            f"stop.evaluation_return_mean={goal:g} needs evaluations with a return, and here they measure a loss; set "
            "reward.function, or the limit to null."
        )
    if mean >= goal:
        algo.request_stop(f"evaluation/episode_return_mean {mean:.3g} reached {goal:g}")


def _check_films(algo: Any) -> None:
    """Raise, before anything is made, where evaluations shall be recorded and cannot be."""
    if not getattr(algo.settings.evaluation, "video", 0):  # text has none
        return
    if algo.run_dir is None:
        log.warning("evaluation.video has no effect without a run folder: give one, as in config.build('runs/film').")
        return
    video.check_ending(algo.run_dir / "film.mp4")
    video.render_without_display()
    video.check_renders(lambda on_frame: algo.play(1, num_envs=1, on_frame=on_frame))


def _film(algo: Any) -> None:
    """Play the first episodes of an evaluation once more and record them: rendering would slow down all others."""
    e, run = algo.settings.evaluation, algo.saves.run
    if run is None or not getattr(e, "video", 0):
        return
    file = run.folder / "videos" / f"iteration-{algo.iteration:06d}.mp4"
    with video.recording(file, video.frames_per_second(algo.settings.environment.id)) as add_frame:
        algo.play(e.video, num_envs=1, on_frame=add_frame)


def _track_best(algo: Trainable, metrics: Metrics) -> None:
    """Remember the checkpointed iteration with the highest return: of its evaluation, else of the window."""
    c = algo.settings.checkpointing
    if not (c.keep_best and c.interval and algo.iteration % c.interval == 0):
        return
    score = metrics.get("evaluation/episode_return_mean", metrics["episode_return_mean"])
    if score is not None and (algo.best_return is None or score > algo.best_return):
        algo.best_return, algo.best_iteration = score, algo.iteration
