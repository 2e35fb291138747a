"""The gradient of a loss with respect to one flat parameter buffer: eager, compiled, or in numpy for small MLPs.

All three give the same numbers up to rounding.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rlx.errors import RlxError
from rlx.nets.flat import FlatParameters
from rlx.nets.numpy_mlp import NumpyPolicy
from rlx.nets.policy import RecurrentPolicy
from rlx.trajectory import Batch

log = logging.getLogger("rlx")

Stats = dict[str, Any]
"""Scalars by name: 0-dimensional tensors, or floats."""

Loss = Callable[[Any, Batch, Mapping[str, Any]], tuple[Tensor, Stats]]
"""loss(policy, minibatch, coefficients) -> (scalar, stats). Both are sums weighted by `minibatch.weight`,
so that the parts of several learners add up to the whole. Coefficients are numbers that change during a run."""

Derivatives = Callable[..., tuple[tuple[np.ndarray, np.ndarray, np.ndarray], Stats]]
"""derivatives(new_logp, entropy, value, minibatch, coefficients) -> ((by new_logp, by entropy, by value), stats):
a loss differentiated by hand, on numpy arrays [N], or [S, L] of sequences; the stats are the loss's own, and the total
as "loss"."""

Gradient = Callable[[Batch, Mapping[str, float]], tuple[Tensor, Stats]]
"""gradient(minibatch, coefficients) -> (flat gradient [n], stats with the total as "loss")."""


def with_derivatives(derivatives: Derivatives) -> Callable[[Callable], Callable]:
    """Decorate a loss with its derivatives by hand, which small MLPs on the CPU use in its place.

    They belong to this very function: a subclass that writes another loss does not inherit them. The first minibatch
    of every learner is differentiated both ways, so that a loss whose derivatives were forgotten does not go unseen.
    """

    def decorate(loss: Callable) -> Callable:
        loss.derivatives = derivatives  # type: ignore[attr-defined]
        return loss

    return decorate


def gradient_function(policy: nn.Module, flat: FlatParameters, loss: Loss, *, compile: bool) -> Gradient:
    """Return the fastest gradient function that serves this policy and this loss."""
    in_numpy = numpy_gradient(policy, flat, loss)
    if in_numpy is not None:
        if compile:
            log.info("learners.compile has nothing to do: gradients of this small network are made in numpy")
        return in_numpy
    if compile and isinstance(policy, RecurrentPolicy):
        log.info("learners.compile has nothing to do: where sequences are cut for a memory depends on their episodes")
        compile = False
    return (compiled_gradient if compile else eager_gradient)(policy, flat, loss)


def eager_gradient(policy: nn.Module, flat: FlatParameters, loss: Loss) -> Gradient:
    """Return the gradient function that runs autograd on every call; it serves any module and any loss."""

    def gradient(minibatch: Batch, coefficients: Mapping[str, float]) -> tuple[Tensor, Stats]:
        total, stats = loss(policy, minibatch, coefficients)
        parts = torch.autograd.grad(total, flat.parameters, materialize_grads=True)
        flattened = [part.reshape(-1).to(flat.data.dtype) for part in parts]
        return torch.cat(flattened), stats | {"loss": total.detach()}

    return gradient


def compiled_gradient(policy: nn.Module, flat: FlatParameters, loss: Loss) -> Gradient:
    """Return the gradient function with forward and backward pass fused by torch.compile.

    Differentiating with respect to the flat buffer inside the compiled region makes one graph with one output:
    no autograd bookkeeping a parameter is left. Costs tens of seconds once for every minibatch shape.
    """
    module = _LossModule(policy, loss)
    names = [name for name, _ in module.named_parameters()]

    def total(data: Tensor, fields: dict[str, Tensor], coefficients: dict[str, Tensor]) -> tuple[Tensor, Stats]:
        parameters = dict(zip(names, flat.views(data), strict=True))
        return torch.func.functional_call(module, parameters, (fields, coefficients))

    compiled = torch.compile(torch.func.grad_and_value(total, has_aux=True), dynamic=False, fullgraph=True)

    def gradient(minibatch: Batch, coefficients: Mapping[str, float]) -> tuple[Tensor, Stats]:
        # As tensors, coefficients may change without a new compilation.
        as_tensors = {name: torch.tensor(value) for name, value in coefficients.items()}
        grad, (value, stats) = compiled(flat.data, minibatch.tensors, as_tensors)
        return grad, stats | {"loss": value}

    return gradient


def numpy_gradient(policy: nn.Module, flat: FlatParameters, loss: Loss) -> Gradient | None:
    """Return the gradient function that differentiates in numpy, or None where torch must serve.

    It needs a small MLP on the CPU and a loss that brings its derivatives. On such nets torch's cost of a call,
    some 80 of them a step, exceeds the arithmetic.
    """
    bound = loss if isinstance(loss, functools.partial) else functools.partial(loss)
    derivatives = getattr(bound.func, "derivatives", None)
    if derivatives is None or flat.device.type != "cpu":
        return None
    flat_gradient = torch.zeros_like(flat.data)
    views = [view.numpy() for view in flat.views(flat_gradient)]
    numpy_policy = NumpyPolicy.of(policy, dict(zip(flat.parameters, views, strict=True)))
    if numpy_policy is None:
        return None

    checked = False

    def gradient(minibatch: Batch, coefficients: Mapping[str, float]) -> tuple[Tensor, Stats]:
        nonlocal checked
        arrays: Any = minibatch.map(Tensor.numpy)
        outputs = numpy_policy.evaluate(arrays)
        if not checked:
            _check_derivatives(bound, outputs, _off_the_kinks(minibatch), coefficients)
            checked = True
        by_outputs, stats = derivatives(*outputs, arrays, coefficients, *bound.args, **bound.keywords)
        numpy_policy.backward(*by_outputs)
        return flat_gradient, stats

    return gradient


def _check_derivatives(
    loss: functools.partial, outputs: tuple[np.ndarray, ...], minibatch: Batch, coefficients: Mapping[str, float]
) -> None:
    """Raise RlxError where a loss was changed but its derivatives were not: it would train on the old loss, unseen."""
    arrays = minibatch.map(Tensor.numpy)
    by_hand, _ = loss.func.derivatives(*outputs, arrays, coefficients, *loss.args, **loss.keywords)
    leaves = [torch.from_numpy(np.array(output)).requires_grad_() for output in outputs]
    total, _ = loss(_Evaluated(leaves), minibatch, coefficients)
    by_autograd = torch.autograd.grad(total, leaves, materialize_grads=True)
    for name, hand, autograd in zip(("new_logp", "entropy", "value"), by_hand, by_autograd, strict=True):
        difference = float(np.linalg.norm(hand - autograd.numpy()))
        if difference > 1e-4 * autograd.norm().item() + 1e-8:
            raise RlxError(
                f"the derivative by {name} that belongs to this loss is not its derivative: on the first minibatch it "
                f"differs by {difference:.3g}. Change it with the loss, or delete the loss's @with_derivatives line."
            )


class _Evaluated:
    """Stands for a policy whose `evaluate` is done, so that a loss can be differentiated by what it returned."""

    def __init__(self, outputs: list[Tensor]) -> None:
        self._outputs = outputs

    def evaluate(self, minibatch: Batch) -> list[Tensor]:
        return self._outputs

    def __getattr__(self, name: str) -> Any:
        raise RlxError(
            f"this loss reads policy.{name}, which derivatives by new_logp, entropy and value cannot cover: "
            "delete the loss's @with_derivatives line."
        )


def _off_the_kinks(minibatch: Batch) -> Batch:
    """Return the minibatch with its numbers moved at random, to both sides of every clip and never onto its edge.

    What `evaluate` reads, and the weights, stay as they are. The noise is always the same.
    """
    generator = torch.Generator().manual_seed(0)
    moved = dict(minibatch.tensors)
    for name, tensor in minibatch.tensors.items():
        if tensor.is_floating_point() and name not in ("obs", "action", "state", "weight"):
            moved[name] = tensor + 0.5 * torch.randn(tensor.shape, generator=generator)
    return Batch(**moved)


class _LossModule(nn.Module):
    """The loss as a module's forward pass, which is what functional_call can run with other parameters."""

    def __init__(self, policy: nn.Module, loss: Loss) -> None:
        super().__init__()
        self.policy = policy
        self.loss = loss

    def forward(self, fields: dict[str, Tensor], coefficients: dict[str, Tensor]) -> tuple[Tensor, Stats]:
        total, stats = self.loss(self.policy, Batch(**fields), coefficients)
        return total, stats
