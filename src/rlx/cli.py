"""The command line: what can be typed, with its help; rlx.commands does it.

Nothing heavy is imported here, so that `rlx --help` answers at once.
Exit codes: 0 done, 1 the run failed, 2 the input is wrong, 130 interrupted.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import errno
import gc
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import rlx
from rlx import cluster_arguments, cluster_inspection, commands, inspection
from rlx.arguments import add_command, natural, positive
from rlx.errors import ConfigError, RlxError

log = logging.getLogger("rlx")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return its exit code."""
    # Python's last collection walks all of torch for 0.3 s, and frees nothing that the end of the process does not.
    atexit.register(gc.freeze)
    options = _parser().parse_args(arguments)
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # so that environment.id=my_module:MyEnv finds the user's file, as python -m would
    try:
        with _console_log(options.log_level):
            code = _command(options)(options) or 0
            sys.stdout.flush()
            return code
    except RlxError as error:
        return commands.report(error)
    except BrokenPipeError:  # `rlx ps | head`: the reader has seen enough
        _drop_output()
        return 0
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        _drop_output()
        print(f"rlx: {error.filename or 'the output'} cannot be written: the disk is full; make room.", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("rlx: interrupted", file=sys.stderr)
        return commands.INTERRUPTED


def _command(options: argparse.Namespace) -> Any:
    """Return what does it: the command here, or that on a cluster's machines."""
    if "there" not in options:
        return options.command
    if options.address is None and options.token_file is not None:
        raise ConfigError("--token-file is the key of the cluster at --address: give both, or neither.")
    return options.command if options.address is None else options.there


def _drop_output() -> None:
    """Have the interpreter's flush at the end find somewhere to write."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class _ConsoleHandler(logging.Handler):
    """Writes to what sys.stderr is at that moment: the live panel puts itself there, to keep lines above it."""

    def emit(self, record: logging.LogRecord) -> None:
        prefix = "" if record.levelno < logging.WARNING else f"{record.levelname.lower()}: "
        with contextlib.suppress(OSError):  # the reader of a pipe is gone, or the disk is full: the run goes on
            print(prefix + self.format(record), file=sys.stderr, flush=True)


@contextmanager
def _console_log(level: int) -> Iterator[None]:
    handler, before = _ConsoleHandler(level), log.level
    log.addHandler(handler)
    log.setLevel(min(level, logging.INFO))
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(before)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rlx",
        description="Train, evaluate and compare reinforcement-learning policies.",
        epilog="example:\n  rlx train ppo --set stop.env_steps=50000      # CartPole, under a minute on a laptop",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"rlx {rlx.__version__}")
    parser.set_defaults(log_level=logging.WARNING)
    group = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_train(group)
    _add_eval(group)
    _add_plot(group)
    _add_text(group)
    add_command(group, "list", commands.list_all, "List the algorithms and configs that ship with rlx.", "rlx list")
    _add_config(group)
    _add_inspection(group)
    cluster_arguments.add(group)
    return parser


def _add_train(group: Any) -> None:
    parser = add_command(
        group,
        "train",
        commands.train,
        "Train the algorithm described in CONFIG, into a run folder. Ctrl-C stops after the current iteration and\n"
        "saves a checkpoint.",
        "rlx train ppo --set environment.id=CartPole-v1 --set stop.env_steps=50000\n"
        "  rlx train --resume runs/ppo-CartPole-v1-... --set stop.env_steps=100000",
        log_level=logging.INFO,
    )
    parser.add_argument(
        "config", metavar="CONFIG", nargs="?", help="a YAML file, or the name of a shipped config (see `rlx list`)"
    )
    _add_set(parser)
    folders = parser.add_mutually_exclusive_group()
    folders.add_argument(
        "--run-dir", metavar="DIR", type=Path, help="new run folder (default: runs/<algorithm>-<environment>-<time>)"
    )
    folders.add_argument(
        "--resume",
        metavar="RUN",
        type=Path,
        help="go on with a run from its newest checkpoint; needs no CONFIG; --set may change stop, reporting, "
        "checkpointing, fault_tolerance, evaluation and callbacks",
    )
    parser.add_argument("--dry-run", action="store_true", help="check everything, print the full config, and exit")


def _add_eval(group: Any) -> None:
    parser = add_command(
        group,
        "eval",
        commands.evaluate,
        "Evaluate the policy of RUN on fresh episodes, with its observation statistics frozen; a language model on\n"
        "the rows of evaluation.source.",
        "rlx eval runs/ppo-CartPole-v1-... --episodes 20 --video cartpole.gif",
    )
    parser.add_argument("run", metavar="RUN", type=Path, help="run folder (its newest checkpoint) or checkpoint folder")
    parser.add_argument(
        "--episodes",
        metavar="N",
        type=positive,
        help="episodes, or rows of text (default: the run's evaluation section)",
    )
    parser.add_argument(
        "--video", metavar="FILE", type=Path, help="record the first environment: .gif, or .mp4 with rlx[video]"
    )
    parser.add_argument(
        "--seed",
        metavar="S",
        type=int,
        help="seed of the first episode or prompt, the next ones count up (default: evaluation.seed; text: 0)",
    )


def _add_plot(group: Any) -> None:
    parser = add_command(
        group,
        "plot",
        commands.plot,
        "Plot a metric of one or more RUNs over env_steps: a line per config, a band over its seeds.",
        "rlx plot runs/ppo-* -o curves.png",
    )
    parser.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="run folder")
    parser.add_argument(
        *("-o", "--output"),
        metavar="FILE",
        type=Path,
        help="picture to write, in place of an older one (default: curve.png in the first run)",
    )
    parser.add_argument(
        "--metric",
        metavar="NAME",
        help="what to plot (default: episode_return_mean; of runs that learn from rows an evaluation, or the loss)",
    )


def _add_text(group: Any) -> None:
    """Commands for language models."""
    generate = add_command(
        group,
        "generate",
        commands.generate,
        "Complete prompts with the language model of RUN.",
        "rlx generate runs/grpo-addition --prompt '37+58='",
    )
    generate.add_argument("--prompt", metavar="TEXT", action="append", help="a prompt; repeatable (default: stdin)")
    generate.add_argument("-n", metavar="N", type=positive, default=1, help="completions of each (default: 1)")
    chat = add_command(
        group,
        "chat",
        commands.chat,
        "Talk to the language model of RUN, by its tokenizer's chat template; without one, lines are prompts.",
        "rlx chat runs/grpo-addition",
    )
    for parser in (generate, chat):
        parser.add_argument(
            "run", metavar="RUN", help="run folder, checkpoint folder, folder of transformers, or hub id"
        )
        parser.add_argument("--temperature", metavar="T", type=float, help="0: the likeliest (default: the run's)")
        parser.add_argument("--max-new-tokens", metavar="N", type=positive, help="longest answer (default: the run's)")
        parser.add_argument("--seed", metavar="S", type=natural, default=0, help="seed of what is drawn (default: 0)")
    samples = add_command(
        group,
        "samples",
        commands.samples,
        "Show completions that RUN has kept, with score, KL and log-probabilities.",
        "rlx samples runs/grpo-addition --iteration 40 --tokens",
    )
    samples.add_argument("run", metavar="RUN", type=Path, help="run folder")
    samples.add_argument("--iteration", metavar="I", type=int, default=-1, help="which; -1: the last (default)")
    samples.add_argument("--tokens", action="store_true", help="show every token with its log-probability")
    samples.add_argument("--json", action="store_true", help="print a JSON object a line")
    samples.add_argument("-o", "--output", metavar="FILE", type=Path, help="write all samples to a .jsonl or .parquet")
    export = add_command(
        group,
        "export",
        commands.export,
        "Write the language model of RUN as transformers reads it, adapter merged.",
        "rlx export runs/grpo-addition -o model",
    )
    export.add_argument("run", metavar="RUN", type=Path, help="run folder, or checkpoint folder")
    export.add_argument("-o", "--output", metavar="DIR", type=Path, help="new or empty folder (default: RUN/model)")


def _add_config(group: Any) -> None:
    parser = group.add_parser("config", help="show, compare and describe configs", description="Look at configs.")
    actions = parser.add_subparsers(required=True, metavar="ACTION")
    show = add_command(
        actions,
        "show",
        commands.config_show,
        "Show every setting of CONFIG.",
        "rlx config show ppo --set training.lr=1e-3",
    )
    show.add_argument("config", metavar="CONFIG", help="a YAML file, the name of a shipped config, or a run folder")
    _add_set(show)
    show.add_argument("--comments", action="store_true", help="write each setting's meaning above it")
    diff = add_command(
        actions,
        "diff",
        commands.config_diff,
        "Compare two configs or runs.",
        "rlx config diff ppo runs/ppo-CartPole-v1-...",
    )
    for name in ("first", "second"):
        diff.add_argument(name, metavar=name.upper(), help="a YAML file, the name of a shipped config, or a run folder")
    schema = add_command(
        actions,
        "schema",
        commands.config_schema,
        "Print the JSON schema of an algorithm's YAML files, for editors.",
        "rlx config schema ppo > ppo.schema.json",
    )
    schema.add_argument(
        "algorithm", metavar="ALGORITHM", nargs="?", default="ppo", help="name, module or file (default: ppo)"
    )


def _add_inspection(group: Any) -> None:
    """Commands that look at running actors from another terminal; all of them read files only."""
    ps = add_command(group, "ps", inspection.ps, "Show the running runtimes and what their actors do.", "rlx ps --json")
    top = add_command(group, "top", inspection.top, "Show what `rlx ps` shows, again every second.", "rlx top")
    top.add_argument("--once", action="store_true", help="show it once, as without a terminal or with --json")
    why = add_command(
        group,
        "why",
        inspection.why,
        "Say why ACTOR does not answer: what it runs, waits for, or died of.",
        "rlx why env/3",
    )
    stack = add_command(
        group,
        "stack",
        inspection.stack,
        "Show where ACTOR is in its Python code, all threads. Without ACTOR: all actors, equal stacks once.",
        "rlx stack env/3",
    )
    logs = add_command(
        group, "logs", inspection.logs, "Show the last lines that ACTOR has printed.", "rlx logs env/3 -n 100 --follow"
    )
    trace = add_command(
        group,
        "trace",
        inspection.trace,
        "Write the latest calls of all actors as a trace. Open it at https://ui.perfetto.dev or chrome://tracing.",
        "rlx trace -o trace.json",
    )
    debug = add_command(
        group,
        "debug",
        inspection.debug,
        "Debug ACTOR, which waits at a breakpoint(), with pdb: n, s, p x; c goes on, q ends the method.",
        "rlx debug env/3",
    )
    trace.add_argument(
        "-o", "--output", metavar="FILE", type=Path, default=Path("trace.json"), help="(default: trace.json)"
    )
    for parser in (why, logs, debug):
        parser.add_argument("actor", metavar="ACTOR", help="name of the actor (see `rlx ps`)")
    which = stack.add_mutually_exclusive_group()
    which.add_argument("actor", metavar="ACTOR", nargs="?", help="name of the actor (see `rlx ps`)")
    which.add_argument("--all", action="store_true", help="all actors, as without ACTOR")
    logs.add_argument("-n", "--lines", metavar="N", type=positive, default=20, help="how many lines (default: 20)")
    source = logs.add_mutually_exclusive_group()
    source.add_argument("--run", metavar="RUN", type=Path, help="folder of a finished run to take the log from")
    _add_runtime(source)
    form = logs.add_mutually_exclusive_group()
    form.add_argument("-f", "--follow", action="store_true", help="go on until the actor ends, or Ctrl-C")
    for parser in (ps, top, why, stack, trace, debug):
        _add_runtime(parser)
    for parser, name, there in (
        (ps, "ps", cluster_inspection.ps),
        (why, "why", cluster_inspection.of_actor),
        (stack, "stack", cluster_inspection.of_actor),
        (logs, "logs", cluster_inspection.of_actor),
        (trace, "trace", cluster_inspection.trace),
    ):
        cluster_arguments.add_cluster(parser, name, there)
    for parser in (ps, top, why, stack, trace, form):
        parser.add_argument("--json", action="store_true", help="print one JSON value instead of text")


def _add_runtime(parser: Any) -> None:
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)  # asked by a cluster's daemon
    parser.add_argument(
        "--runtime",
        metavar="RUNTIME",
        help="process id of a driver, or folder of a runtime (default: the one that runs)",
    )


def _add_set(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--set",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        help="change one setting, such as training.lr=1e-4; the value is YAML; repeatable",
    )


if __name__ == "__main__":
    sys.exit(main())
