"""Rows of tokens in microbatches of like length: their gradients added up, or what a policy makes of them."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from rlx.learner.gradient import Gradient, Loss, Stats
from rlx.nets.flat import FlatParameters
from rlx.nets.ragged import positions_within
from rlx.trajectory import Batch

Parts = Iterable[tuple[Tensor, Batch]]
"""Row numbers and the microbatch of these rows."""


def accumulated_gradient(policy: Any, flat: FlatParameters, loss: Loss, max_tokens: int) -> Gradient:
    """Return the gradient function that goes through a minibatch in microbatches of at most `max_tokens` tokens.

    The weights of a minibatch were made before it is cut, so the parts of the loss, of its gradient and of its stats
    add up to the whole. They do so in float32: the sum of many microbatches outgrows each, and 8 bits would lose it.
    """
    flat_gradient = flat.new_gradient()
    in_place = []
    for parameter, view in zip(flat.parameters, flat.views(flat_gradient), strict=True):
        if parameter.dtype == view.dtype:
            in_place.append((parameter, view))
        else:
            parameter.register_post_accumulate_grad_hook(functools.partial(_add_to, view))

    def gradient(minibatch: Batch, coefficients: Mapping[str, float]) -> tuple[Tensor, Stats]:
        flat_gradient.zero_()
        for parameter, view in in_place:
            parameter.grad = view  # backward() adds to it in place
        parts = microbatches(policy, not_empty(minibatch), max_tokens)
        return flat_gradient, accumulate(policy, loss, parts, coefficients)

    return gradient


def _add_to(total: Tensor, parameter: Tensor) -> None:
    """Take the gradient of one microbatch from a parameter, which is done with it, and add it to the sum."""
    assert parameter.grad is not None
    total.add_(parameter.grad)
    parameter.grad = None


def accumulate(policy: Any, loss: Loss, parts: Parts, coefficients: Mapping[str, float]) -> Stats:
    """Add the gradients of all microbatches to those of the policy; return the sums of the stats."""
    sums: Stats = {}
    for _, microbatch in parts:
        total, stats = loss(policy, microbatch, coefficients)
        if total.requires_grad:
            total.backward()
        for name, stat in (stats | {"loss": total.detach()}).items():
            sums[name] = sums[name] + stat if name in sums else stat
    return sums


def evaluate_in_microbatches(policy: Any, batch: Batch, names: tuple[str, ...], parts: Parts) -> dict[str, Tensor]:
    """Return the columns `names` that `policy.columns` makes of all rows, which `parts` are the microbatches of."""
    found: dict[str, Tensor] = {}
    for rows, part in parts:
        for name, column in policy.columns(part, names).items():
            if name not in found:
                of_tokens = column.shape == part.mask.shape
                shape = batch.mask.shape if of_tokens else (len(batch), *column.shape[1:])
                found[name] = column.new_zeros(shape)
            place = found[name] if column.ndim < part.mask.ndim else found[name][..., : column.shape[-1]]
            place[rows] = column[: len(rows)]
    return found


def microbatches(policy: Any, batch: Batch, max_tokens: int | None) -> Iterator[tuple[Tensor, Batch]]:
    """Yield row numbers and microbatches of at most `max_tokens` tokens, trimmed to their longest row.

    The policy says which rows go together: those of like length, or those that share a beginning. A batch without a
    limit is one part, as it stands.
    """
    if max_tokens is None:
        yield torch.arange(len(batch), device=batch.mask.device), batch
        return
    for rows in policy.parts(batch, max_tokens):
        yield rows, _trimmed(batch, rows, max(1, int(batch.length[rows].max())))


def blank(batch: Batch) -> Batch:
    """Return rows of tokens with zeros wherever nothing counts, whatever stood there: NaN times 0 would be NaN.

    `obs` counts within `length`, every other column that is shaped like `mask` where the mask is true.
    """
    mask, length = batch.mask, batch.length
    within = positions_within(mask, length)
    mask = mask & within
    cleaned = {"mask": mask}
    for name, tensor in batch.tensors.items():
        if name != "mask" and tensor.shape[: mask.ndim] == mask.shape:
            counts = within if name == "obs" else mask
            cleaned[name] = torch.where(_unsqueezed(counts, tensor), tensor, tensor.new_zeros(()))
    return Batch(**(batch.tensors | cleaned))


def _unsqueezed(mask: Tensor, like: Tensor) -> Tensor:
    return mask.view(*mask.shape, *(1 for _ in range(like.ndim - mask.ndim)))


def _trimmed(batch: Batch, rows: Tensor, length: int) -> Batch:
    shape = batch.mask.shape

    def part(tensor: Tensor) -> Tensor:
        taken = tensor.index_select(0, rows)
        return taken.narrow(len(shape) - 1, 0, length) if tensor.shape[: len(shape)] == shape else taken

    return batch.map(part)


def not_empty(minibatch: Batch) -> Batch:
    """Return the minibatch, or in place of none a row that counts for nothing: losses and networks expect one."""
    if len(minibatch):
        return minibatch
    return minibatch.map(lambda tensor: tensor.new_zeros(1, *tensor.shape[1:]))


def nothing(batch: Batch) -> tuple[Tensor, Batch]:
    """Return no row numbers, and as short a microbatch as there is, of one row that counts for nothing."""
    none = torch.arange(0, device=batch.mask.device)
    blank_row = not_empty(batch.take(none))
    return none, _trimmed(blank_row, none.new_zeros(1), 1)
