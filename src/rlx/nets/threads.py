"""How many CPU threads the arithmetic of this process uses."""

import contextlib
import functools
from collections.abc import Iterator

import torch
from threadpoolctl import ThreadpoolController


def limit_threads(count: int) -> None:
    """Let torch and numpy's BLAS use `count` threads in this process.

    On small nets a second thread gains nothing, and beside env runners its busy waiting costs up to ten times.
    """
    torch.set_num_threads(count)
    _blas().limit(limits=count, user_api="blas")


@contextlib.contextmanager
def one_torch_thread() -> Iterator[None]:
    """Have torch use one thread: how many there are decides how its matrix factorisations round."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@functools.cache
def _blas() -> ThreadpoolController:
    return ThreadpoolController()  # looks through every loaded library, once
