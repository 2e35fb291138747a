"""One contiguous buffer under all parameters of a module."""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import nn


class FlatParameters:
    """Moves a module's learned parameters into one float32 buffer and leaves views of it in their place.

    Learned are those that require a gradient: of a model with an adapter, the adapter. The others stay where they are.
    A module that is float64 throughout stays float64.

    One buffer means one tensor to publish, one optimizer update and one norm, whatever the module looks like;
    and numpy code that holds views of it sees every update without a copy.
    """

    def __init__(self, module: nn.Module, device: torch.device | str = "cpu") -> None:
        named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
        self.names, self.parameters = [name for name, _ in named], [p for _, p in named]
        dtype = torch.float64 if {p.dtype for p in self.parameters} == {torch.float64} else torch.float32
        none = torch.empty(0, dtype=dtype, device=device)  # for a policy that learns nothing
        self.data = torch.cat([none, *(p.detach().reshape(-1).to(device, dtype) for p in self.parameters)])
        for parameter, view in zip(self.parameters, self.views(self.data), strict=True):
            parameter.data = view

    def first_of(self, prefix: str) -> int | None:
        """Return where the parameters begin whose names begin with `prefix`; None where they are not the last ones."""
        own = [name.startswith(prefix) for name in self.names]
        others = own.count(False)
        return None if any(own[:others]) else sum(p.numel() for p in self.parameters[:others])

    def views(self, flat: torch.Tensor) -> list[torch.Tensor]:
        """Return one view of `flat` per parameter, in its shape."""
        pieces = flat.split([p.numel() for p in self.parameters])
        return [piece.view(p.shape) for piece, p in zip(pieces, self.parameters, strict=True)]

    def numpy(self) -> np.ndarray:
        """Return the buffer as float32 [n]: a view on the CPU, from elsewhere a copy that the next call overwrites."""
        return self.data.numpy() if self.data.device.type == "cpu" else self._staging.copy_(self.data).numpy()

    def arrays(self) -> dict[str, np.ndarray]:
        """Return every parameter by its name (copies)."""
        parameters = zip(self.names, self.parameters, strict=True)
        return {name: parameter.detach().cpu().numpy().copy() for name, parameter in parameters}

    def load(self, weights: np.ndarray) -> None:
        """Copy `weights` float32 [n] into the buffer."""
        if self.data.device.type == "cpu":
            np.copyto(self.data.numpy(), weights)  # torch would warn of arrays that are read-only
        else:
            np.copyto(self._staging.numpy(), weights)
            self.data.copy_(self._staging)

    @functools.cached_property
    def _staging(self) -> torch.Tensor:
        """Memory of the host that the device copies to and from by itself, at the full speed of the bus."""
        return torch.empty(self.data.shape, dtype=self.data.dtype, pin_memory=self.data.device.type == "cuda")
