"""Adam on one flat parameter buffer."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor


class FlatAdam:
    """Adam (Kingma & Ba 2015, arXiv:1412.6980) in torch's formulation, on one float32 buffer.

    torch.optim.Adam spends more time on bookkeeping than on a small net's arithmetic; on one flat buffer the
    update is a few operations, on the CPU in numpy, which shares the memory and costs less a call.
    """

    def __init__(self, data: Tensor, epsilon: float, beta1: float = 0.9, beta2: float = 0.999) -> None:
        self.data = data
        self.epsilon, self.beta1, self.beta2 = epsilon, beta1, beta2
        self.mean = torch.zeros_like(data)
        self.square = torch.zeros_like(data)
        self.steps = 0
        self._arrays = [_fastest(tensor) for tensor in (data, self.mean, self.square)]

    @torch.no_grad()
    def step(self, gradient: Tensor, lr: float) -> None:
        """Move the parameters against `gradient` [n]."""
        self.steps += 1
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
        data -= (lr / correction1) * mean / denominator

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
