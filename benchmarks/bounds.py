"""What a device can do at best, measured: bytes moved and multiplications, each in a second.

What a program reaches is told as a part of these, measured in the same minute: a data sheet says nothing of the clock
at which a device runs now, nor of who else uses it.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

REPEATS = 20
"""Each figure is of the fastest of so many: a bound is what is possible, and whatever disturbs only takes time."""
COPIED_BYTES = {"cuda": 2**31, "cpu": 2**27}
"""Far more than the caches hold."""
MATRIX_SIZE = {"cuda": 8192, "cpu": 1024}


def bandwidth(device: torch.device | str, dtype: torch.dtype) -> float:
    """Return the bytes/s at which a large tensor is copied on the device, reading and writing both counted."""
    kind = torch.device(device).type
    source = torch.ones(COPIED_BYTES[kind] // dtype.itemsize, dtype=dtype, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _least_s(lambda: target.copy_(source), device)


def matrix_rate(device: torch.device | str, dtype: torch.dtype) -> float:
    """Return the FLOP/s, a multiplication and an addition being two, of a product of large square matrices.

    In float32 it is what the process allows: TF32 where torch.set_float32_matmul_precision says so.
    """
    size = MATRIX_SIZE[torch.device(device).type]
    # Random numbers: products of zeros take less power, and so let a GPU run at a clock that it cannot keep.
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    product = torch.empty_like(left)
    return 2 * size**3 / _least_s(lambda: torch.mm(left, right, out=product), device)


def synchronize(device: torch.device | str) -> None:
    """Wait until the device has done all that it was given; a CPU has when the call returns."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def _least_s(work: Callable[[], Tensor], device: torch.device | str) -> float:
    """Return the seconds of the fastest of REPEATS runs, after one that does not count."""
    times = []
    for _ in range(1 + REPEATS):
        synchronize(device)
        began = time.perf_counter()
        work()
        synchronize(device)
        times.append(time.perf_counter() - began)
    return min(times[1:])
