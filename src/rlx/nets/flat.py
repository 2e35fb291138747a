"""One contiguous buffer under all parameters of a module."""

from __future__ import annotations

import functools
from itertools import groupby
from typing import NamedTuple

import numpy as np
import torch
from torch import nn


class _Copy(NamedTuple):
    """What a run of parameters is computed with, where that is not the buffer itself."""

    values: torch.Tensor
    master: torch.Tensor
    """The part of the buffer that they are a copy of."""
    staged: torch.Tensor | None
    """Where they are rounded, in host memory that a GPU reads by itself, so that half as many bytes cross the bus."""

    def refresh(self) -> None:
        source = self.master if self.staged is None else self.staged.copy_(self.master)
        self.values.copy_(source)


class FlatParameters:
    """Moves a module's learned parameters into one float32 buffer and leaves views of it in their place.

    Learned are those that require a gradient: of a model with an adapter, the adapter. The others stay where they are.
    A module that is float64 throughout stays float64.

    Parameters in bfloat16 are computed with as they are: they become views of a second buffer, the first one rounded,
    which `refresh` makes anew. A step is often smaller than bfloat16 can tell from nothing, so it is made in float32.

    One buffer means one tensor to publish, one optimizer update and one norm, whatever the module looks like;
    and numpy code that holds views of it sees every update without a copy.
    """

    def __init__(
        self, module: nn.Module, device: torch.device | str = "cpu", *, learns: bool = True, on_host: bool = False
    ) -> None:
        """`learns`: whether steps are made here; else weights only arrive, and bfloat16 throughout stays that.

        on_host: the buffer is in host memory, and the device has a copy of it in the parameters' own dtypes.
        """
        named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
        self.names, self.parameters = [name for name, _ in named], [p for _, p in named]
        self.device = torch.device(device)
        kept = {torch.float64} if learns else {torch.float64, torch.bfloat16}
        dtypes = {p.dtype for p in self.parameters}
        dtype = dtypes.pop() if len(dtypes) == 1 and dtypes <= kept else torch.float32
        count = sum(p.numel() for p in self.parameters)
        pinned = on_host and self.device.type == "cuda"
        self.data = torch.empty(count, dtype=dtype, device="cpu" if on_host else device, pin_memory=pinned)
        views = self.views(self.data)
        for parameter, view in zip(self.parameters, views, strict=True):
            view.copy_(parameter.detach())
        self._copies: list[_Copy] = []
        kinds = [torch.bfloat16 if p.dtype == torch.bfloat16 else dtype for p in self.parameters]
        begin = 0
        for kind, run in groupby(zip(kinds, self.parameters, views, strict=True), key=lambda one: one[0]):
            members = [(parameter, view) for _, parameter, view in run]
            end = begin + sum(p.numel() for p, _ in members)
            if kind == dtype and not on_host:
                for parameter, view in members:
                    parameter.data = view
            else:
                self._copies.append(self._copied(self.data[begin:end], kind, [p for p, _ in members], pinned))
            begin = end

    def _copied(self, master: torch.Tensor, dtype: torch.dtype, parameters: list[nn.Parameter], pinned: bool) -> _Copy:
        """Return a copy of a part of the buffer on the device, and make these parameters views of it."""
        staged = torch.empty(len(master), dtype=dtype, pin_memory=True) if pinned and dtype != master.dtype else None
        made = _Copy(torch.empty(len(master), dtype=dtype, device=self.device), master, staged)
        made.refresh()
        pieces = made.values.split([p.numel() for p in parameters])
        for parameter, piece in zip(parameters, pieces, strict=True):
            parameter.data = piece.view(parameter.shape)
        return made

    def refresh(self) -> None:
        """Bring what is computed with up to the buffer, which has changed."""
        for copy in self._copies:
            copy.refresh()

    def first_of(self, prefix: str) -> int | None:
        """Return where the parameters begin whose names begin with `prefix`; None where they are not the last ones."""
        own = [name.startswith(prefix) for name in self.names]
        others = own.count(False)
        return None if any(own[:others]) else sum(p.numel() for p in self.parameters[:others])

    def views(self, flat: torch.Tensor) -> list[torch.Tensor]:
        """Return one view of `flat` per parameter, in its shape."""
        pieces = flat.split([p.numel() for p in self.parameters])
        return [piece.view(p.shape) for piece, p in zip(pieces, self.parameters, strict=True)]

    def new_gradient(self) -> torch.Tensor:
        """Return zeros [n] in the dtype of the buffer, where the parameters are."""
        return torch.zeros(len(self.data), dtype=self.data.dtype, device=self.device)

    def numpy(self) -> np.ndarray:
        """Return the buffer as float32 [n]: a view on the CPU, from elsewhere a copy that the next call overwrites."""
        return self.data.numpy() if self.data.device.type == "cpu" else self._staging.copy_(self.data).numpy()

    def arrays(self) -> dict[str, np.ndarray]:
        """Return every parameter by its name, as the buffer has it (copies)."""
        views = zip(self.names, self.views(self.data), strict=True)
        return {name: view.cpu().numpy().copy() for name, view in views}

    def load(self, weights: np.ndarray) -> None:
        """Copy `weights` float32 [n] into the buffer; ValueError where they are of another size."""
        if weights.shape != self.data.shape:
            raise ValueError(
                f"weights of size {weights.size} are not those of this network, whose size is {len(self.data)}."
            )
        if self.data.device.type == "cpu" and self.data.dtype != torch.bfloat16:
            np.copyto(self.data.numpy(), weights)  # torch would warn of arrays that are read-only
        else:
            np.copyto(self._staging.numpy(), weights)
            self.data.copy_(self._staging)
        self.refresh()

    @functools.cached_property
    def _staging(self) -> torch.Tensor:
        """Memory of the host, in numpy's dtypes, that a GPU copies to and from by itself, at the speed of the bus."""
        dtype = torch.float32 if self.data.dtype == torch.bfloat16 else self.data.dtype
        return torch.empty(self.data.shape, dtype=dtype, pin_memory=self.data.device.type == "cuda")
