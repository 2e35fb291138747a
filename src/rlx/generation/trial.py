"""A trial of a model before it is trusted: two short rows through slots, beside the model's own forward pass."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlx.errors import ConfigError
from rlx.generation.architecture import Architecture
from rlx.generation.slots import Slots
from rlx.out_of_memory import is_out_of_memory

STEPS = 2
FULL_PRECISION, REDUCED_PRECISION = 1e-3, 0.1
"""How far logits may be apart, as a part of the largest one; errors in masks and positions are of its own size."""


@torch.inference_mode()
def try_out(slots: Slots, model: Any, architecture: Architecture) -> None:
    """Raise ConfigError if slots give other logits than the model does, which would be wrong in silence otherwise."""
    context = architecture.context or 8
    lengths = [min(3, max(1, context - STEPS - 2)), min(5, max(1, context - STEPS))]
    steps = min(STEPS, context - max(lengths))
    rows = [
        [(7 * row + 3 * t + 1) % architecture.vocabulary for t in range(length + steps)]
        for row, length in enumerate(lengths)
    ]
    kind = model.config.get_text_config(decoder=True).model_type
    try:
        expected = [
            model(input_ids=torch.tensor([row], device=slots.device), use_cache=False).logits[0] for row in rows
        ]
        slots.reserve(len(rows), max(map(len, rows)))
        found = _through_slots(slots, rows, lengths)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise ConfigError(
            f"a model of type {kind!r} cannot be generated with: with keys and values in slots its forward pass fails "
            f"with {type(error).__name__}: {error}"
        ) from error
    for row, length in enumerate(lengths):
        error, scale = _distance(found[row], expected[row][length - 1 :])
        allowed = FULL_PRECISION if model.dtype in (torch.float32, torch.float64) else REDUCED_PRECISION
        if error > allowed * scale:
            raise ConfigError(
                f"a model of type {kind!r} cannot be generated with: with keys and values in slots its logits are off "
                f"by {error:.2g} of {scale:.2g}, so its attention does not follow the masks and positions it is given."
            )


def _through_slots(slots: Slots, rows: list[list[int]], lengths: list[int]) -> Tensor:
    """Return the logits of the last prompt token and of each token after it, [rows, 1 + steps, V]."""
    logits = [slots.prefill([row[:length] for row, length in zip(rows, lengths, strict=True)], 0)]
    for step in range(len(rows[0]) - lengths[0]):
        position = np.array(lengths, np.int64) + step
        token = np.array([row[at] for row, at in zip(rows, position, strict=True)], np.int64)
        logits.append(slots.decode(token, position))
    return torch.stack(logits, 1)


def _distance(found: Tensor, expected: Tensor) -> tuple[float, float]:
    """Return the largest difference and the largest logit; no difference where the weights are not finite."""
    if not torch.isfinite(expected).all():
        return 0.0, 1.0
    return float((found - expected).abs().max()), float(expected.abs().max())
