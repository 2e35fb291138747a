"""Log-probabilities and entropy of tokens, from hidden states, without a [tokens, vocabulary] tensor of them all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

CHUNK_NUMBERS = 2**23
"""Logits that are worked on at a time: 32 MB in float32, of which two or three such buffers exist at once."""
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
    return _ChunkedHead.apply(hidden, weight, bias, target, transform, temperature)  # type: ignore[return-value]


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
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        accurate = torch.promote_types(hidden.dtype, torch.float32)
        logp, entropy, total = (hidden.new_empty(len(hidden), dtype=accurate) for _ in range(3))
        keep = any(ctx.needs_input_grad) and len(hidden) * len(weight) <= KEPT_NUMBERS
        kept: list[Tensor] = []
        for part in _chunks(hidden, weight):
            z = _logits(hidden[part], weight, bias, transform, temperature)
            torch.logsumexp(z, -1, out=total[part])
            z -= total[part, None]  # the log of every token's probability
            logp[part] = z.gather(1, target[part, None]).squeeze(1)
            torch.bmm(z.exp().unsqueeze(1), z.unsqueeze(2), out=entropy[part].view(-1, 1, 1))
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
        for number, part in enumerate(_chunks(hidden, weight)):
            if kept:
                log_p = kept[number]
            else:
                log_p = _logits(hidden[part], weight, bias, ctx.transform, ctx.temperature)
                log_p -= total[part, None]
            by_z = _by_logits(log_p, target[part], entropy[part], _part(by_logp, part), _part(by_entropy, part))
            _undo(by_z, log_p, total[part], ctx.transform, ctx.temperature)
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
        )


def _chunks(hidden: Tensor, weight: Tensor) -> list[slice]:
    size = max(1, CHUNK_NUMBERS // len(weight))
    return [slice(start, min(start + size, len(hidden))) for start in range(0, len(hidden), size)]


def _logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, transform: LogitTransform, temperature: float
) -> Tensor:
    z = torch.mm(hidden, weight.T) if bias is None else torch.addmm(bias, hidden, weight.T)
    z = z.to(torch.promote_types(z.dtype, torch.float32))
    if transform.scale != 1.0:
        z *= transform.scale
    if transform.softcap is not None:
        z.div_(transform.softcap).tanh_().mul_(transform.softcap)
    if temperature != 1.0:
        z /= temperature
    return z


def _by_logits(
    log_p: Tensor, target: Tensor, entropy: Tensor, by_logp: Tensor | None, by_entropy: Tensor | None
) -> Tensor:
    """Return the derivative by z, logits over temperature [m, V].

    d logp / dz_j = [j is target] - p_j;   d entropy / dz_j = -p_j (log p_j + entropy).
    """
    by_z = log_p.exp()
    if by_entropy is not None:
        factor = log_p + entropy[:, None]
        factor *= -by_entropy[:, None]
        if by_logp is not None:
            factor -= by_logp[:, None]
        by_z *= factor
    elif by_logp is not None:
        by_z *= -by_logp[:, None]
    else:
        by_z.zero_()
    if by_logp is not None:
        by_z.scatter_add_(1, target[:, None], by_logp[:, None])
    return by_z


def _undo(by_z: Tensor, log_p: Tensor, total: Tensor, transform: LogitTransform, temperature: float) -> None:
    """Turn the derivative by z into that by the product of hidden state and head, in place."""
    if transform.softcap is not None:  # tanh' = 1 - tanh^2, and z = softcap * tanh(...) / temperature = log_p + total
        tanh = (log_p + total[:, None]).mul_(temperature / transform.softcap)
        by_z *= tanh.square_().neg_().add_(1.0)
    factor = transform.scale / temperature
    if factor != 1.0:
        by_z *= factor


def _add_product(into: Tensor, left: Tensor, right: Tensor) -> None:
    if left.dtype == into.dtype:
        into.addmm_(left, right)
    else:
        into += left @ right


def _part(tensor: Tensor | None, part: slice) -> Tensor | None:
    return None if tensor is None else tensor[part]
