"""Log-probabilities and entropy of tokens, from hidden states, without a [tokens, vocabulary] tensor of them all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

CHUNK_NUMBERS = 2**22
"""Logits that are worked on at a time: 16 MB in float32, of which two or three such buffers exist at once."""
KEPT_NUMBERS = 2**25
"""Up to so many logits (128 MB) are kept for the backward pass; beyond, it computes them again."""


@dataclass(frozen=True)
class LogitTransform:
    """What a language model does with the product of hidden state and head: z = softcap * tanh(scale * z / softcap).

    softcap: Gemma 2 (arXiv:2408.00118), section 2; None leaves it out. scale: of Cohere and Granite models.
    """

    scale: float = 1.0
    softcap: float | None = None


def logp_and_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    transform: LogitTransform = LogitTransform(),
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Return the log-probability of `target` [M] and the entropy in nats [M], of softmax(logits / temperature).

    hidden [M, H], weight [V, H], bias [V]: logits = transform(hidden @ weight.T + bias). Differentiable once, by
    hidden, weight and bias. What follows the product is float32 at least, whatever the dtype of the model.
    Memory beyond inputs and gradients: `CHUNK_NUMBERS` and `KEPT_NUMBERS`, however many the tokens.
    """
    # Inside of the function gradients are always off, so what is needed of it is asked here.
    keep = torch.is_grad_enabled() and len(hidden) * len(weight) <= KEPT_NUMBERS
    return _ChunkedHead.apply(hidden, weight, bias, target, transform, temperature, keep)  # type: ignore[return-value]


class _ChunkedHead(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
        transform: LogitTransform,
        temperature: float,
        keep: bool,
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        accurate = torch.promote_types(hidden.dtype, torch.float32)
        logp, entropy, total = (hidden.new_empty(len(hidden), dtype=accurate) for _ in range(3))
        kept: list[Tensor] = []
        # Two buffers, used again by every chunk: fresh ones of this size would cost more than the arithmetic on them.
        buffers = [_buffer(hidden, weight, accurate) for _ in range(2)]
        for part in _chunks(hidden, weight):
            z = _logits(hidden[part], weight, bias, transform, temperature, None if keep else buffers[0])
            largest = z.amax(-1, keepdim=True)
            z -= largest
            exp = torch.exp(z, out=_rows_of(buffers[1], z))
            mass = exp.sum(-1, keepdim=True)
            z -= mass.log()  # the log of every token's probability
            total[part] = (largest + mass.log()).squeeze(1)
            logp[part] = z.gather(1, target[part, None]).squeeze(1)
            entropy[part] = exp.mul_(z).sum(-1) / mass.squeeze(1)
            if keep:
                kept.append(z)
        entropy.neg_()
        ctx.save_for_backward(hidden, weight, bias, target, total, entropy, *kept)
        ctx.transform, ctx.temperature = transform, temperature
        return logp, entropy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, by_logp: Tensor | None, by_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, target, total, entropy, *kept = ctx.saved_tensors
        needs_hidden, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        by_hidden = torch.empty_like(hidden) if needs_hidden else None
        by_weight = torch.zeros_like(weight, dtype=total.dtype) if needs_weight else None
        by_bias = torch.zeros_like(bias, dtype=total.dtype) if needs_bias else None
        buffers = [_buffer(hidden, weight, total.dtype) for _ in range(2)]
        for number, part in enumerate(_chunks(hidden, weight)):
            if kept:
                log_p = kept[number]
            else:
                log_p = _logits(hidden[part], weight, bias, ctx.transform, ctx.temperature, buffers[0])
                log_p -= total[part, None]
            slope = _slope(log_p, total[part], ctx.transform, ctx.temperature)
            by_z = torch.exp(log_p, out=_rows_of(buffers[1], log_p))
            scratch = _rows_of(buffers[0], log_p)  # log_p itself, where that is not kept
            _by_logits(by_z, log_p, scratch, target[part], entropy[part], _part(by_logp, part), _part(by_entropy, part))
            if slope is not None:
                by_z *= slope
            in_dtype = by_z.to(hidden.dtype)
            if by_hidden is not None:
                torch.mm(in_dtype, weight, out=by_hidden[part])
            if by_weight is not None:
                _add_product(by_weight, in_dtype.T, hidden[part])
            if by_bias is not None:
                by_bias += by_z.sum(0)
        return (
            by_hidden,
            None if by_weight is None else by_weight.to(weight.dtype),
            None if by_bias is None else by_bias.to(bias.dtype),
            None,
            None,
            None,
            None,
        )


def _chunk_rows(weight: Tensor) -> int:
    return max(1, CHUNK_NUMBERS // len(weight))


def _chunks(hidden: Tensor, weight: Tensor) -> list[slice]:
    size = _chunk_rows(weight)
    return [slice(start, min(start + size, len(hidden))) for start in range(0, len(hidden), size)]


def _buffer(hidden: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    rows = min(len(hidden), _chunk_rows(weight))
    return torch.empty(rows, len(weight), dtype=dtype, device=hidden.device)


def _rows_of(buffer: Tensor, like: Tensor) -> Tensor:
    return buffer[: len(like)]


def _logits(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    transform: LogitTransform,
    temperature: float,
    buffer: Tensor | None,
) -> Tensor:
    """Return logits over temperature [m, V], float32 at least, in `buffer` where that is given."""
    out = None if buffer is None or buffer.dtype != hidden.dtype else _rows_of(buffer, hidden)
    z = torch.mm(hidden, weight.T, out=out)
    z = z.to(torch.promote_types(z.dtype, torch.float32))
    if bias is not None:
        z += bias
    if transform.scale != 1.0:
        z *= transform.scale
    if transform.softcap is not None:
        z.div_(transform.softcap).tanh_().mul_(transform.softcap)
    if temperature != 1.0:
        z /= temperature
    return z


def _by_logits(
    p: Tensor,
    log_p: Tensor,
    scratch: Tensor,
    target: Tensor,
    entropy: Tensor,
    by_logp: Tensor | None,
    by_entropy: Tensor | None,
) -> None:
    """Turn probabilities [m, V] into the derivative by z, logits over temperature, in place.

    d logp / dz_j = [j is target] - p_j;   d entropy / dz_j = -p_j (log p_j + entropy).
    """
    if by_entropy is not None:
        factor = torch.add(log_p, entropy[:, None], out=scratch)
        factor *= -by_entropy[:, None]
        if by_logp is not None:
            factor -= by_logp[:, None]
        p *= factor
    elif by_logp is not None:
        p *= -by_logp[:, None]
    else:
        p.zero_()
    if by_logp is not None:
        p.scatter_add_(1, target[:, None], by_logp[:, None])


def _slope(log_p: Tensor, total: Tensor, transform: LogitTransform, temperature: float) -> Tensor | float | None:
    """Return the derivative of z by the product of hidden state and head; None where it is 1."""
    factor = transform.scale / temperature
    if transform.softcap is None:
        return None if factor == 1.0 else factor
    # tanh' = 1 - tanh^2, and z = softcap * tanh(...) / temperature = log_p + total
    tanh = (log_p + total[:, None]).mul_(temperature / transform.softcap)
    return tanh.square_().neg_().add_(1.0).mul_(factor)


def _add_product(into: Tensor, left: Tensor, right: Tensor) -> None:
    if left.dtype == into.dtype:
        into.addmm_(left, right)
    else:
        into += left @ right


def _part(tensor: Tensor | None, part: slice) -> Tensor | None:
    return None if tensor is None else tensor[part]
