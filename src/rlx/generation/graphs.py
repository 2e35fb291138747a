"""Work on a GPU as CUDA graphs: launched as one, however many kernels it has."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from rlx.errors import RlxError
from rlx.out_of_memory import is_out_of_memory

log = logging.getLogger(__name__)

WARM_UPS = 2
"""Runs before a capture, in which libraries choose their kernels and take their memory."""


def capture_for(device: torch.device) -> Callable[[Callable[[], None]], Callable[[], None]]:
    """Return what captures work on this device; where there are no graphs, work stays what it is."""
    return Graphs(device) if device.type == "cuda" else lambda work: work


class Graphs:
    """Captures work as CUDA graphs. They share their memory: no two run at a time, and none reads another's results."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._pool = device, torch.cuda.graph_pool_handle()

    def __call__(self, work: Callable[[], None]) -> Callable[[], None]:
        """Return what repeats the work, the work itself where a graph could not; it has been done meanwhile."""
        with torch.cuda.device(self._device):
            read = self._warm_up(work)
            if read is not None:
                log.info("decoding without CUDA graphs: the model looks at what it computes, by %s", read)
                return work
            graph = torch.cuda.CUDAGraph()
            try:
                # thread_local: another thread may ask for memory meanwhile, as one that receives weights does.
                with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                    work()
            except RuntimeError as error:
                if is_out_of_memory(error):
                    raise
                raise RlxError(
                    f"decoding could not be captured as a CUDA graph ({error}); Generator(..., static_step=False) "
                    "decodes without graphs."
                ) from error
        return graph.replay

    def _warm_up(self, work: Callable[[], None]) -> str | None:
        """Do the work on a stream of its own, as capturing will; return what `host_read` does."""
        stream, current = torch.cuda.Stream(), torch.cuda.current_stream()
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            read = host_read(work)
            for _ in range(WARM_UPS if read is None else 0):
                work()
        current.wait_stream(stream)
        return read


INDEXING = torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default


class HostRead(Exception):
    """The work needs a value on the host."""


class _NoHostReads(TorchDispatchMode):
    """Refuses what a graph would repeat with the values of its capture, or could not capture."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with self:  # in inference mode, what is made of other operations comes here whole
            found = func.decompose(*args, **kwargs)
        if found is not NotImplemented:
            return found
        # Results that are numbers, or whose shape depends on values; indices do that where they are masks.
        by_value = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}.intersection(func.tags)
        if func in INDEXING:
            by_value = [i for i in args[1] if i is not None and i.dtype in (torch.bool, torch.uint8)]
        if by_value:
            raise HostRead(str(func))
        found = func(*args, **kwargs)
        devices = {one.device for one in (found, *args) if isinstance(one, Tensor) and one.ndim}
        if len(devices) > 1:
            raise HostRead(f"{func} between {' and '.join(map(str, devices))}")
        return found


def host_read(work: Callable[[], None]) -> str | None:
    """Do the work; return the operation by which it needs a value on the host, before which it stops; None if none."""
    try:
        with _NoHostReads():
            work()
    except HostRead as read:
        return str(read)
    return None
