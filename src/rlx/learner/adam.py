"""Adam on one flat parameter buffer."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor


class FlatAdam:
    """Adam (Kingma & Ba 2015, arXiv:1412.6980) in torch's formulation, on one float32 buffer.

    torch.optim.Adam spends more time on bookkeeping than on a small net's arithmetic; on one flat tensor the
    update is six in-place operations.
    """

    def __init__(self, data: Tensor, epsilon: float, beta1: float = 0.9, beta2: float = 0.999) -> None:
        self.data = data
        self.epsilon, self.beta1, self.beta2 = epsilon, beta1, beta2
        self.mean = torch.zeros_like(data)
        self.square = torch.zeros_like(data)
        self.steps = 0

    @torch.no_grad()
    def step(self, gradient: Tensor, lr: float) -> None:
        """Move the parameters against `gradient` [n]."""
        self.steps += 1
        correction1 = 1 - self.beta1**self.steps
        correction2 = math.sqrt(1 - self.beta2**self.steps)
        self.mean.lerp_(gradient, 1 - self.beta1)
        self.square.mul_(self.beta2).addcmul_(gradient, gradient, value=1 - self.beta2)
        denominator = self.square.sqrt().div_(correction2).add_(self.epsilon)
        self.data.addcdiv_(self.mean, denominator, value=-lr / correction1)

    def get_state(self) -> dict[str, Any]:
        """Return the moments and the step count."""
        return {"mean": self.mean.cpu().numpy().copy(), "square": self.square.cpu().numpy().copy(), "steps": self.steps}

    def set_state(self, state: dict[str, Any]) -> None:
        """Continue from `get_state`."""
        self.mean.copy_(torch.from_numpy(np.asarray(state["mean"])))
        self.square.copy_(torch.from_numpy(np.asarray(state["square"])))
        self.steps = int(state["steps"])
