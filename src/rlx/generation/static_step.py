"""One step of decoding on buffers that stay where they are, so that it can be captured once and repeated."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rlx.generation.request import Sampling
from rlx.generation.sampler import sample

FEWEST_ROWS = 8
SHORTEST_EXTENT = 64
"""The smallest shapes that a step is made for. Larger ones double, as each is captured, and rows and positions that
nobody uses cost little beside the weights, which every step reads."""

Work = Callable[[], None]
Capture = Callable[[Work], Work]
"""Makes of some work what repeats it, on the same memory; a device without graphs repeats the work itself."""
NewCapture = Callable[[], Capture]
"""Makes such a capture, with a memory for all that it captures."""


@dataclass(frozen=True)
class Shape:
    """What is fixed in a captured step."""

    rows: int
    extent: int
    sampling: Sampling


class StaticStep:
    """Decodes one token for all rows and draws for all samples, in shapes of which there are few.

    Rows beyond the live ones put the token 0 at position 0 of slots in which nobody lives: who moves in, by prefill or
    by a copy, begins with position 0, and nobody reads positions that were not written since.
    """

    def __init__(
        self,
        decode: Callable[[Tensor, Tensor, int], Tensor],
        *,
        slots: int,
        extents: Sequence[int],
        device: torch.device,
        new_capture: NewCapture,
        watched: Sequence[Tensor],
    ) -> None:
        """decode: from tokens and positions [rows] and an extent to logits [rows, V].

        extents: to choose from, the last one the slots' length. watched: tensors that `decode` reads where they are;
        what was captured ends with their moving, not with their changing.
        """
        self._decode, self._watched = decode, list(watched)
        self._new_capture, self._capture = new_capture, new_capture()
        self._rows, self._extents = doubled(FEWEST_ROWS, slots), list(extents)
        self._captured: dict[Shape, Work] = {}
        self._places = self._places_now()
        # Of each row its token and its position, of each sample its row and the bits of its uniform number.
        self._given = torch.zeros(4, slots, dtype=torch.int64, pin_memory=device.type == "cuda")
        self._inputs = torch.zeros(4, slots, dtype=torch.int64, device=device)
        self._drawn = torch.zeros(2, slots, dtype=torch.float64, device=device)

    def __call__(
        self, token_R: np.ndarray, position_R: np.ndarray, row_A: np.ndarray, u_A: np.ndarray, sampling: Sampling
    ) -> Tensor:
        """Return what `sample` returns, [2, A]; it stands where the next call writes."""
        rows, samples = len(token_R), len(row_A)
        given = self._given.numpy()
        given[:] = 0
        given[:2, :rows] = token_R, position_R
        given[2:, :samples] = row_A, u_A.view(np.int64)
        self._inputs.copy_(self._given, non_blocking=True)
        extent = at_least(self._extents, int(position_R.max()) + 1)
        self._work(Shape(at_least(self._rows, rows), extent, sampling))()
        return self._drawn[:, :samples]

    def _work(self, shape: Shape) -> Work:
        places = self._places_now()
        if places != self._places:
            self._captured, self._places, self._capture = {}, places, self._new_capture()
        if shape not in self._captured:
            self._captured[shape] = self._capture(lambda: self._run(shape))
        return self._captured[shape]

    def _run(self, shape: Shape) -> None:
        """Do the step, from the inputs to what is drawn; nothing in here may look at a value."""
        token, position, row, bits = self._inputs
        logits = self._decode(token[: shape.rows], position[: shape.rows], shape.extent)
        self._drawn.copy_(sample(logits, shape.sampling, row, bits.view(torch.float64)))

    def _places_now(self) -> list[int]:
        return [tensor.data_ptr() for tensor in self._watched]


def doubled(least: int, most: int) -> list[int]:
    """Return least, twice as much, and so on below most, and most itself."""
    sizes = []
    while least < most:
        sizes.append(least)
        least *= 2
    return [*sizes, most]


def at_least(sizes: Sequence[int], wanted: int) -> int:
    """Return the first of ascending sizes that is large enough."""
    return sizes[bisect_left(sizes, wanted)]
