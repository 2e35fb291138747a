"""What the commands of `rlx` do: each calls the library with its parsed options, and prints what came of it.

Nothing heavy is imported at the top; each command imports what it needs.
"""

from __future__ import annotations

import argparse
import logging
import os
import shlex
import sys
import textwrap
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlx.errors import CALLBACK_NOTE, CheckpointError, ConfigError, DataError, MissingExtra, NotSupported, RlxError

if TYPE_CHECKING:
    from rlx.config import AlgorithmConfig
    from rlx.metrics import Metrics
    from rlx.video import AddFrame

log = logging.getLogger("rlx")

BAD_INPUT = (ConfigError, DataError, CheckpointError, MissingExtra, NotSupported)
INTERRUPTED = 130


def train(options: argparse.Namespace) -> int:
    """Train a config, or go on with a run."""
    from rlx.config import load_config

    if options.resume is None and options.config is None:
        raise ConfigError("rlx train needs a CONFIG (see `rlx list`), or --resume RUN to go on with a run.")
    if options.resume is not None:
        config = _config_of_resumed(options.resume, options.config, options.set)
    else:
        config = load_config(options.config, options.set)
    config.settings.stop.require_limit(config.settings.evaluation.interval)
    config.validate()
    if options.dry_run:
        _page(config.to_yaml())
        return 0
    if options.resume is not None:
        _check_goes_on(options.resume)
        return _fit(config, options.resume, resume=True)
    return _fit(config, _new_run_folder(options.run_dir, config), resume=False)


def evaluate(options: argparse.Namespace) -> None:
    """Play evaluation episodes with a trained policy, or complete the evaluation's prompts with a language model."""
    if not any((options.run / name).exists() for name in ("checkpoints", "state.json")):
        fault = "is neither a run folder nor a checkpoint" if options.run.exists() else "does not exist"
        raise CheckpointError(f"{options.run} {fault}; give the folder that `rlx train` printed after `run`.")
    metrics = _evaluate_on_text(options) if _is_on_text(options.run) else _play(options)
    for name, value in metrics.items():
        shown = "-" if value is None else f"{value:.5g}"
        print(f"{name.removeprefix('evaluation/'):<20} {shown:>10}")
    if options.video is not None:
        print(f"{'video':<20} {options.video}")


def _play(options: argparse.Namespace) -> Metrics:
    """Return the metrics of evaluation episodes."""
    if options.video is not None:
        from rlx import video

        video.check_ending(options.video)
        video.render_without_display()
    from rlx.inference import load_policy

    policy = load_policy(options.run)
    with _recording(options.video, policy.settings.environment.id) as add_frame:
        return policy.evaluate(options.episodes, seed=options.seed, on_frame=add_frame)


def _is_on_text(run: Path) -> bool:
    from rlx.checkpoint import load_state

    return "rollouts" in load_state(run)


def _evaluate_on_text(options: argparse.Namespace) -> Metrics:
    """Return the metrics of a language model on the evaluation's rows of its run."""
    from rlx.checkpoint import load_state
    from rlx.config import AlgorithmConfig
    from rlx.config_lookup import config_class

    if options.video is not None:
        raise ConfigError(f"{options.run} is a run on text, so there is no video of it; leave --video out.")
    saved = load_state(options.run)["config"]
    found = config_class(saved["algorithm"], options.run, AlgorithmConfig, f'algorithm is "{saved["algorithm"]}"')
    config = found.from_dict(saved)
    if config.settings.evaluation.source is None:
        raise ConfigError(
            f"{options.run} has no rows to be evaluated on: evaluation.source is not set; train with it, or look at "
            "completions with `rlx generate`."
        )
    with config.build(restore=options.run) as algorithm:
        return algorithm.evaluate(options.episodes, seed=options.seed or 0)


def list_all(options: argparse.Namespace) -> None:
    """Print what rlx ships."""
    from rlx.config import list_algorithms, list_configs

    parts = []
    for title, entries in (("algorithms", list_algorithms()), ("configs (rlx train NAME)", list_configs())):
        width = max((len(name) for name, _ in entries), default=0)
        parts += [title, *(f"  {name:<{width}}  {meaning}" for name, meaning in entries)]
    _page("\n".join(parts))


def config_show(options: argparse.Namespace) -> None:
    """Print every setting of a config and, as comments, the network that it builds."""
    from rlx.config import load_config

    config = load_config(_config_path(options.config), options.set)
    try:
        network = config.network()
    except RlxError as error:
        network = f"network: none, because {error}"
    _page(config.to_yaml(comments=options.comments) + textwrap.indent(network, "# "))


def config_diff(options: argparse.Namespace) -> None:
    """Print the settings in which two configs or runs differ."""
    from rlx.config import load_config

    first, second = (load_config(_config_path(one)) for one in (options.first, options.second))
    changes = first.diff(second)
    width = max(map(len, changes), default=0)
    lines = [f"{key:<{width}}  {_yaml(old)} -> {_yaml(new)}" for key, (old, new) in changes.items()]
    _page("\n".join(lines) or f"{options.first} and {options.second} set everything alike.")


def config_schema(options: argparse.Namespace) -> None:
    """Print the JSON schema of an algorithm's YAML files."""
    import json

    from rlx.config import AlgorithmConfig
    from rlx.config_lookup import config_class

    found = config_class(options.algorithm, Path(), AlgorithmConfig, f'there is no algorithm "{options.algorithm}"')
    _page(json.dumps(found.json_schema(), indent=2))


def plot(options: argparse.Namespace) -> None:
    """Draw learning curves."""
    from rlx.plotting import plot_runs

    print(plot_runs(options.runs, options.output or options.runs[0] / "curve.png", options.metric))


def generate(options: argparse.Namespace) -> None:
    """Complete prompts with a trained language model."""
    from rlx.text_inference import load_text_policy

    policy = load_text_policy(options.run)
    prompts = options.prompt or [line.rstrip("\n") for line in sys.stdin]
    completions = policy.generate(
        prompts,
        options.n,
        options.seed,
        temperature=options.temperature,
        max_new_tokens=options.max_new_tokens,
    )
    _page("\n".join(f"{prompt}{text}" for prompt, texts in zip(prompts, completions, strict=True) for text in texts))


def chat(options: argparse.Namespace) -> None:
    """Talk to a trained language model until the input ends; a line that it cannot answer is left out of the talk."""
    from rlx.text_inference import load_text_policy

    policy = load_text_policy(options.run)
    has_template = bool(policy.tokenizer.chat_template)
    messages: list[dict[str, str]] = []
    limits = {"temperature": options.temperature, "max_new_tokens": options.max_new_tokens}
    while (line := _ask("> ")) is not None:
        if not line:
            continue
        seed, asked = options.seed + len(messages), [*messages, {"role": "user", "content": line}]
        try:
            answer = (
                policy.chat(asked, seed, **limits) if has_template else policy.generate(line, 1, seed, **limits)[0][0]
            )
        except RlxError as error:
            report(error)
            continue
        messages = [*asked, {"role": "assistant", "content": answer}]
        print(answer, flush=True)


def samples(options: argparse.Namespace) -> None:
    """Show the completions that a run has kept, or write them to a file."""
    import json

    from rlx.samples import read_samples, sample_lines, token_lines, write_parquet

    if options.output is not None:
        rows = read_samples(options.run)
        if options.output.suffix == ".parquet":
            write_parquet(rows, options.output)
        elif options.output.suffix == ".jsonl":
            options.output.write_text("".join(json.dumps(row) + "\n" for row in rows))
        else:
            raise ConfigError(f"{options.output} ends in neither .jsonl nor .parquet; rename it.")
        print(options.output)
        return
    rows = read_samples(options.run, options.iteration)
    if options.json:
        _page("\n".join(json.dumps(row) for row in rows))
        return
    tokenizer = _tokenizer_of(options.run) if options.tokens else None
    lines = []
    for row in rows:
        lines += [*sample_lines([row]), *(token_lines(tokenizer, row) if options.tokens else [])]
    _page("\n".join(lines))


def export(options: argparse.Namespace) -> None:
    """Write a run's language model as transformers reads it."""
    from rlx.text_inference import load_text_policy
    from rlx.text_models import EXPORT, check_export_folder

    if options.output is not None:
        check_export_folder(options.output)  # before the model is loaded, which may take minutes
    policy = load_text_policy(options.run)
    if options.output is None and not (options.run / "checkpoints").is_dir():
        raise ConfigError(
            f"{options.run} is no run folder, where a model has its place: say with -o where this one goes."
        )
    print(policy.export(options.output or options.run / EXPORT, replace=options.output is None))


def _ask(sign: str) -> str | None:
    is_person = sys.stdin.isatty()
    try:
        return input(sign if is_person else "")
    except EOFError:
        if is_person:
            print()  # the shell's prompt shall not stand behind the sign
        return None


def _tokenizer_of(run: Path) -> Any:
    from rlx.config import load_config
    from rlx.text_models import build_tokenizer
    from rlx.text_origin import with_origin

    settings: Any = load_config(run / "config.yaml").settings
    return build_tokenizer(with_origin(settings.model, run))


def report(error: RlxError) -> int:
    """Print an error without its traceback; return the exit code."""
    blame = [note for note in getattr(error, "__notes__", ()) if note.startswith(CALLBACK_NOTE)]
    print("\n".join([f"rlx: error: {error}", *blame]), file=sys.stderr)
    return 2 if isinstance(error, BAD_INPUT) else 1


def _recording(file: Path | None, env: Any) -> AbstractContextManager[AddFrame | None]:
    if file is None:
        return nullcontext()
    from rlx.video import frames_per_second, recording

    return recording(file, frames_per_second(env))


def _fit(config: AlgorithmConfig, folder: Path, *, resume: bool) -> int:
    """Train until a limit, an error or Ctrl-C; say what came of it and what to do next."""
    algorithm = None
    try:
        with config.build(folder, restore=folder if resume else None) as algorithm:
            log.info("run folder: %s (Ctrl-C stops after the iteration, with a checkpoint)", folder)
            metrics = algorithm.fit()
    except RlxError as error:
        code = report(error)
        _print_how_to_go_on(folder, "the run can go on from its last checkpoint")
        return code
    except KeyboardInterrupt:
        print("rlx: interrupted", file=sys.stderr)
        _print_how_to_go_on(folder, "the run can go on from its last checkpoint")
        return INTERRUPTED
    except Exception:  # a bug, most often of the environment: its traceback is what helps
        _print_how_to_go_on(folder, "the run can go on from its last checkpoint")
        raise
    if algorithm.stop_reason == "interrupted":
        _print_how_to_go_on(folder, f"interrupted after iteration {algorithm.iteration}; to go on")
        return INTERRUPTED
    _print_outcome(config, folder, metrics, algorithm.stop_reason)
    return 0


def _print_outcome(config: AlgorithmConfig, folder: Path, metrics: Metrics, reason: str) -> None:
    from rlx.metrics import significant, supervised_figures

    print(f"stopped  {reason}" + ("" if metrics else " before this session began"))
    if config.is_supervised():
        if figures := supervised_figures(metrics):
            print(f"learned  {', '.join(f'{word} {number}' for word, number in figures.items())}")
    elif metrics.get("episode_return_mean") is not None:
        mean, low, high, length = (
            significant(metrics[f"episode_{name}"] or 0.0)
            for name in ("return_mean", "return_min", "return_max", "length_mean")
        )
        count = config.settings.reporting.window_episodes
        print(f"return   {mean}, mean of the last {count} episodes (min {low}, max {high}); length {length}")
    elif metrics:
        print("return   none: no episode has finished yet")
    if metrics:
        total_s = metrics["time/total_s"] or 0.0
        print(
            f"time     {total_s:,.1f} s for {metrics['env_steps']:,} env steps in {metrics['iteration']:,} iterations"
        )
    print(f"run      {folder}")
    further = [word for change in _further_limits(config, metrics, reason) for word in ("--set", change)]
    can_be_evaluated = getattr(config.settings.evaluation, "source", "episodes") is not None
    commands = [["rlx", "eval", str(folder)]] * can_be_evaluated + [["rlx", "plot", str(folder)]]
    for number, command in enumerate([*commands, ["rlx", "train", "--resume", str(folder), *further]]):
        print(f"{'' if number else 'next':<8} {shlex.join(command)}")


def _further_limits(config: AlgorithmConfig, metrics: Metrics, reason: str) -> list[str]:
    """Return the --set values that let a run go on for twice as long."""
    stop, name = config.settings.stop, reason.partition(" ")[0]
    if not getattr(stop, name, None):  # a callback's own reason
        return []
    if name != "episode_return_mean":
        return [f"stop.{name}={2 * getattr(stop, name)}"]
    others = stop.iterations or stop.env_steps or stop.time_s
    return ["stop.episode_return_mean=null"] + ([] if others else [f"stop.env_steps={2 * (metrics['env_steps'] or 0)}"])


def _print_how_to_go_on(folder: Path, sentence: str) -> None:
    from rlx.checkpoint import list_checkpoints

    if list_checkpoints(folder / "checkpoints"):
        print(f"rlx: {sentence}: {shlex.join(['rlx', 'train', '--resume', str(folder)])}", file=sys.stderr)


def _new_run_folder(wanted: Path | None, config: AlgorithmConfig) -> Path:
    from rlx.run import check_new_run, default_run_folder

    folder = wanted or default_run_folder(config.settings.algorithm, config.settings.subject or "env")
    check_new_run(folder)  # Run.create checks it too, but only once the processes have started
    return folder


def _config_of_resumed(folder: Path, config: str | None, changes: list[str]) -> AlgorithmConfig:
    """Return the config to go on with; refused where it would bend the run's training curve."""
    from rlx.config import load_config
    from rlx.run import check_resumable

    file = folder / "config.yaml"
    if not file.is_file():
        raise CheckpointError(f"{folder} is no run folder: it has no config.yaml; give what `rlx train` printed.")
    saved, wanted = load_config(file), load_config(config or file, changes)
    check_resumable(saved, wanted, str(folder))
    return wanted


def _check_goes_on(folder: Path) -> None:
    """Raise, before anything starts, where a run cannot go on: somebody holds it, or its files are damaged."""
    from rlx.checkpoint import load_newest
    from rlx.metrics import read_metrics
    from rlx.run import Run

    run = Run.open(folder)
    try:
        load_newest(run.checkpoints)
        if (folder / "metrics.jsonl").exists():
            read_metrics(folder / "metrics.jsonl")
    finally:
        run.close()


def _page(text: str) -> None:
    """Print, and end quietly where the reader has gone, as `head` does."""
    try:
        print(text.rstrip("\n"), flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _yaml(value: Any) -> str:
    from rlx.config_document import flow

    return flow(value)


def _config_path(config_or_run: str) -> str:
    """Return the YAML file of a run folder, or the argument itself."""
    file = Path(config_or_run) / "config.yaml"
    return str(file) if file.is_file() else config_or_run
