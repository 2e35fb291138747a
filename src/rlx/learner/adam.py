"""Adam on one flat parameter buffer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

LARGE = 200_000
"""Numbers from which on torch's fused step is worth its bookkeeping: it passes over the memory once, not ten times."""


class FlatAdam:
    """Adam (Kingma & Ba 2015, arXiv:1412.6980) in torch's formulation, on one float32 buffer.

    torch.optim.Adam spends more time on bookkeeping than on a small net's arithmetic; on one flat buffer the
    update is a few operations, on the CPU in numpy, which shares the memory and costs less a call. A large buffer is
    torch's own to step in one pass, on these same moments. The step is made where the buffer is: a gradient that is
    elsewhere, as of parameters on a GPU whose buffer is in host memory, is brought there.
    """

    def __init__(
        self,
        data: Tensor,
        epsilon: float,
        beta1: float = 0.9,
        beta2: float = 0.999,
        weight_decay: float = 0.0,
        decayed: Sequence[Tensor] = (),
        split: int | None = None,
    ) -> None:
        """`weight_decay` shrinks the views `decayed` of the buffer by lr * weight_decay a step (AdamW, Loshchilov &
        Hutter 2019, arXiv:1711.05101). From number `split` on the buffer has a step size of its own."""
        self.data = data
        self.split = len(data) if split is None else split
        self.weight_decay, self.decayed = weight_decay, decayed
        self.epsilon, self.beta1, self.beta2 = epsilon, beta1, beta2
        self.mean = torch.zeros_like(data)
        self.square = torch.zeros_like(data)
        self.steps = self.still = 0
        """Steps so far, and those of them in which the numbers before `split` stood still."""
        self._arrays = [_fastest(tensor) for tensor in (data, self.mean, self.square)]
        self._fused: torch.optim.Adam | None = None
        self._brought: Tensor | None = None
        if data.numel() >= LARGE and data.device.type in ("cpu", "cuda"):
            groups = [{"params": [data[part]]} for part in self._parts()]
            self._fused = torch.optim.Adam(groups, eps=epsilon, betas=(beta1, beta2), fused=True)

    @torch.no_grad()
    def step(self, gradient: Tensor, lr: float, lr_from_split: float | None = None) -> None:
        """Move the parameters against `gradient` [n]; those from `split` on by `lr_from_split`, where it is given.

        Where that is given and `lr` is 0, the first part stands still, moments and their bias correction included:
        zeros that are averaged in would make its first steps several times too large.
        """
        if gradient.device != self.data.device:
            gradient = self._bring(gradient)
        self.steps += 1
        lrs = (lr, lr if lr_from_split is None else lr_from_split)
        stands_still = lr_from_split is not None and lr == 0.0
        self.still += stands_still
        if self.weight_decay:
            for view in self.decayed:
                view.mul_(1 - lrs[view.storage_offset() >= self.split] * self.weight_decay)
        if self._fused is None and lr_from_split is None and not self.still:  # one step size and count: no parts
            self._step_part(slice(None), gradient, lr, self.steps)
            return
        parts = list(zip(self._parts(), lrs, (self.steps - self.still, self.steps), strict=False))
        if self._fused is not None:
            self._step_fused(self._fused, gradient, parts, stands_still)
            return
        for part, lr_of_part, steps in parts[stands_still:]:
            self._step_part(part, gradient, lr_of_part, steps)

    def _bring(self, gradient: Tensor) -> Tensor:
        """Return the gradient where the buffer is, by way of memory that a GPU writes to by itself."""
        if self._brought is None:
            pinned = gradient.device.type == "cuda" and self.data.device.type == "cpu"
            self._brought = torch.empty(
                gradient.shape, dtype=gradient.dtype, device=self.data.device, pin_memory=pinned
            )
        return self._brought.copy_(gradient)

    def _step_part(self, part: slice, gradient: Tensor, lr: float, steps: int) -> None:
        g = _fastest(gradient)[part]
        data, mean, square = (array[part] for array in self._arrays)
        mean *= self.beta1
        mean += (1 - self.beta1) * g
        square *= self.beta2
        square += (1 - self.beta2) * (g * g)
        denominator = square**0.5
        denominator /= math.sqrt(1 - self.beta2**steps)
        denominator += self.epsilon
        data -= (lr / (1 - self.beta1**steps)) * mean / denominator

    def _parts(self) -> list[slice]:
        return [slice(0, self.split)] + ([slice(self.split, None)] if self.split < len(self.data) else [])

    def _step_fused(
        self, fused: torch.optim.Adam, gradient: Tensor, parts: list[tuple[slice, float, int]], first: int
    ) -> None:
        """Step the parts from number `first` on; torch leaves out what has no gradient."""
        for (part, lr, steps), group in list(zip(parts, fused.param_groups, strict=True))[first:]:
            (view,) = group["params"]
            before = torch.tensor(float(steps - 1), device=view.device)
            fused.state[view] = {"step": before, "exp_avg": self.mean[part], "exp_avg_sq": self.square[part]}
            group["lr"], view.grad = lr, gradient[part]
        fused.step()
        for group in fused.param_groups:
            group["params"][0].grad = None

    def get_state(self) -> dict[str, Any]:
        """Return the moments and the step counts."""
        moments = {"mean": self.mean.cpu().numpy().copy(), "square": self.square.cpu().numpy().copy()}
        return moments | {"steps": self.steps, "still": self.still}

    def set_state(self, state: dict[str, Any]) -> None:
        """Continue from `get_state`."""
        self.mean.copy_(torch.from_numpy(np.array(state["mean"])))
        self.square.copy_(torch.from_numpy(np.array(state["square"])))
        self.steps, self.still = int(state["steps"]), int(state.get("still", 0))


def _fastest(tensor: Tensor) -> Any:
    """Return the tensor, or on the CPU numpy's view of it: the operators above mean the same on both."""
    return tensor.numpy() if tensor.device.type == "cpu" else tensor
