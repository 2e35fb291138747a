"""A twin of a model: modules, config and mode of its own around the very same parameters."""

from __future__ import annotations

import copy
import operator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from rlx.generation import attention


class Twin:
    """The model as the generator runs it: in eval mode, while the original may train.

    The twin shares the Parameter objects, so weights that were changed in place are there at once, and persistent
    buffers. Its other buffers are its own: some rotary embeddings write into theirs in the forward pass. Attention is
    eager where it is so in the original, else attention.py's: flash attention would take no mask of four dimensions.
    """

    def __init__(self, original: nn.Module) -> None:
        self._original = original
        self._parameters: list[nn.Parameter] = []
        self._kind: Any = None
        self._model: Any = None

    def model(self) -> Any:
        """Return the twin, made anew where the original has other Parameter objects, another dtype or device."""
        parameters = list(self._original.parameters())
        kind, known = (parameters[0].dtype, parameters[0].device), self._parameters
        same = len(known) == len(parameters) and all(map(operator.is_, known, parameters))
        if not same or kind != self._kind:
            self._model, self._parameters, self._kind = _twin_of(self._original), parameters, kind
        return self._model


def _twin_of(original: nn.Module) -> Any:
    private = {id(buffer) for buffer in _buffers_not_saved(original)}
    shared = [*original.parameters(), *(buffer for buffer in original.buffers() if id(buffer) not in private)]
    twin: Any = copy.deepcopy(original, {id(tensor): tensor for tensor in shared})
    for module in twin.modules():
        if isinstance(module, PreTrainedModel) and module.config._attn_implementation != "eager":
            module.config._attn_implementation = attention.NAME if module._supports_sdpa else "eager"
    return twin.eval()


def _buffers_not_saved(model: nn.Module) -> list[torch.Tensor]:
    return [
        buffer
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None and name in module._non_persistent_buffers_set
    ]
