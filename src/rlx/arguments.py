"""What the modules of the command line have in common: how a command is added, and kinds of values."""

from __future__ import annotations

import argparse
from typing import Any


def add_command(
    group: Any, name: str, command: Any, description: str, example: str, **more: Any
) -> argparse.ArgumentParser:
    """Add a command that calls `command(options)`, with the example that its help ends with."""
    parser = group.add_parser(
        name,
        help=description[0].lower() + description.partition(".")[0][1:],
        description=description,
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(command=command, **more)
    return parser


def natural(text: str) -> int:
    """Return a whole number of 0 or more."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 0 or more")
    return int(text)


def positive(text: str) -> int:
    """Return a whole number above 0."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)
