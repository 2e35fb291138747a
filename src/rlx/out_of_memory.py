"""Running out of memory, told in one sentence: what was planned, and what makes it less."""

from __future__ import annotations

import contextlib
import textwrap
from collections.abc import Iterator, Sequence

import torch

from rlx.errors import RlxError

OF_THE_CPU = "DefaultCPUAllocator: can't allocate memory"


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether torch found no memory for a tensor, on a GPU or in this machine."""
    return isinstance(error, torch.OutOfMemoryError) or (isinstance(error, RuntimeError) and OF_THE_CPU in str(error))


@contextlib.contextmanager
def out_of_memory_told(doing: str, planned: str, cures: Sequence[str]) -> Iterator[None]:
    """Raise RlxError, from what torch raised here or in another process, where memory runs out in `doing`."""
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise RlxError(
            f"memory ran out in {doing} ({textwrap.shorten(str(error), 200)}), and planned was "
            f"{planned.replace(chr(10), ', ')}: {'; or '.join(cures)}."
        ) from error
