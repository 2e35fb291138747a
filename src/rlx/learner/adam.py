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
    update is a few operations, on the CPU in numpy, which shares the memory and costs less a call. A large buffer on
    the CPU is torch's own to step, on these same moments.
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
        self.steps = 0
        self._arrays = [_fastest(tensor) for tensor in (data, self.mean, self.square)]
        self._fused: torch.optim.Adam | None = None
        if data.numel() >= LARGE and data.device.type == "cpu":
            groups = [{"params": [data[part]]} for part in self._parts()]
            self._fused = torch.optim.Adam(groups, eps=epsilon, betas=(beta1, beta2), fused=True)

    @torch.no_grad()
    def step(self, gradient: Tensor, lr: float, lr_from_split: float | None = None) -> None:
        """Move the parameters against `gradient` [n]; those from `split` on by `lr_from_split`, where it is given."""
        self.steps += 1
        lrs = (lr, lr if lr_from_split is None else lr_from_split)
        if self.weight_decay:
            for view in self.decayed:
                view.mul_(1 - lrs[view.storage_offset() >= self.split] * self.weight_decay)
        if self._fused is not None:
            self._step_fused(self._fused, gradient, lrs)
            return
        correction1 = 1 - self.beta1**self.steps
        correction2 = math.sqrt(1 - self.beta2**self.steps)
        g = _fastest(gradient)
        data, mean, square = self._arrays
        mean *= self.beta1
        mean += (1 - self.beta1) * g
        square *= self.beta2
        square += (1 - self.beta2) * (g * g)
        denominator = square**0.5
        denominator /= correction2
        denominator += self.epsilon
        parts = [slice(None)] if lr_from_split is None else self._parts()
        for part, lr_of_part in zip(parts, lrs, strict=False):
            data[part] -= (lr_of_part / correction1) * mean[part] / denominator[part]

    def _parts(self) -> list[slice]:
        return [slice(0, self.split)] + ([slice(self.split, None)] if self.split < len(self.data) else [])

    def _step_fused(self, fused: torch.optim.Adam, gradient: Tensor, lrs: tuple[float, float]) -> None:
        for part, group, lr in zip(self._parts(), fused.param_groups, lrs, strict=False):
            (view,) = group["params"]
            before = torch.tensor(float(self.steps - 1))
            fused.state[view] = {"step": before, "exp_avg": self.mean[part], "exp_avg_sq": self.square[part]}
            group["lr"], view.grad = lr, gradient[part]
        fused.step()
        for group in fused.param_groups:
            group["params"][0].grad = None

    def get_state(self) -> dict[str, Any]:
        """Return the moments and the step count."""
        return {"mean": self.mean.cpu().numpy().copy(), "square": self.square.cpu().numpy().copy(), "steps": self.steps}

    def set_state(self, state: dict[str, Any]) -> None:
        """Continue from `get_state`."""
        self.mean.copy_(torch.from_numpy(np.array(state["mean"])))
        self.square.copy_(torch.from_numpy(np.array(state["square"])))
        self.steps = int(state["steps"])


def _fastest(tensor: Tensor) -> Any:
    """Return the tensor, or on the CPU numpy's view of it: the operators above mean the same on both."""
    return tensor.numpy() if tensor.device.type == "cpu" else tensor
