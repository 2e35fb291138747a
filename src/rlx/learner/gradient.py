"""The gradient of a loss with respect to one flat parameter buffer: by numpy for small MLPs, else by autograd.

Both serve the same losses and agree to rounding; either can have its torch part compiled.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rlx.nets.flat import FlatParameters
from rlx.nets.numpy_mlp import NumpyPolicy
from rlx.trajectory import Batch

log = logging.getLogger("rlx")

Stats = dict[str, Tensor]
Loss = Callable[[Any, Batch, Mapping[str, Any]], tuple[Tensor, Stats]]
"""loss(policy, minibatch, coefficients) -> (scalar, stats). Both are sums weighted by `minibatch.weight`,
so that the parts of several learners add up to the whole. Coefficients are numbers that change during a run."""

Gradient = Callable[[Batch, Mapping[str, float]], tuple[Tensor, Stats]]
"""gradient(minibatch, coefficients) -> (flat gradient [n], stats with the loss under "loss")."""


def gradient_function(policy: nn.Module, flat: FlatParameters, loss: Loss, *, compile: bool) -> Gradient:
    """Return the fastest gradient function that serves `policy`."""
    return numpy_gradient(policy, flat, loss, compile=compile) or torch_gradient(policy, flat, loss, compile=compile)


def torch_gradient(policy: nn.Module, flat: FlatParameters, loss: Loss, *, compile: bool) -> Gradient:
    """Return the gradient function that serves any module and any loss."""
    return (compiled_gradient if compile else eager_gradient)(policy, flat, loss)


def eager_gradient(policy: nn.Module, flat: FlatParameters, loss: Loss) -> Gradient:
    """Return the gradient function that runs autograd on every call."""

    def gradient(minibatch: Batch, coefficients: Mapping[str, float]) -> tuple[Tensor, Stats]:
        total, stats = loss(policy, minibatch, coefficients)
        parts = torch.autograd.grad(total, flat.parameters, materialize_grads=True)
        return torch.cat([part.reshape(-1) for part in parts]), {"loss": total.detach()} | stats

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

    compiled = _compile(torch.func.grad_and_value(total, has_aux=True))

    def gradient(minibatch: Batch, coefficients: Mapping[str, float]) -> tuple[Tensor, Stats]:
        grad, (value, stats) = compiled(flat.data, minibatch.tensors, _as_tensors(coefficients))
        return grad, {"loss": value} | stats

    return gradient


def numpy_gradient(policy: nn.Module, flat: FlatParameters, loss: Loss, *, compile: bool = False) -> Gradient | None:
    """Return the gradient function that differentiates small nets in numpy, or None where torch must serve.

    The loss stays any torch function of what `policy.evaluate` returns: torch differentiates it by those three
    vectors, and numpy goes on from there to the parameters. A loss that asks the policy for anything else is
    found out at its first minibatch, and `torch_gradient` takes over.
    """
    flat_gradient = torch.zeros_like(flat.data)
    views = [view.numpy() for view in flat.views(flat_gradient)] if flat.data.device.type == "cpu" else []
    numpy_policy = NumpyPolicy.of(policy, dict(zip(flat.parameters, views, strict=False)))
    if numpy_policy is None:
        return None
    differentiate = (_compiled_derivatives if compile else _eager_derivatives)(loss)
    general: Gradient | None = None

    def gradient(minibatch: Batch, coefficients: Mapping[str, float]) -> tuple[Tensor, Stats]:
        nonlocal general
        if general is None:
            outputs = numpy_policy.evaluate(minibatch.obs.numpy(), minibatch.action.numpy())
            tensors = [torch.from_numpy(np.ascontiguousarray(output)) for output in outputs]
            try:
                derivatives, stats = differentiate(tensors, minibatch, coefficients)
            except _NeedsModule as need:
                log.info("the loss reads policy.%s: gradients come from autograd over the whole network", need)
                general = torch_gradient(policy, flat, loss, compile=compile)
            else:
                numpy_policy.backward(*(derivative.numpy() for derivative in derivatives))
                return flat_gradient, stats
        return general(minibatch, coefficients)

    return gradient


def _eager_derivatives(loss: Loss) -> Callable[..., tuple[tuple[Tensor, ...], Stats]]:
    """Return the function that differentiates the loss by logp, entropy and value with autograd."""

    def differentiate(outputs: list[Tensor], minibatch: Batch, coefficients: Mapping[str, float]):
        leaves = [output.requires_grad_() for output in outputs]
        total, stats = loss(_Evaluated(leaves, minibatch), minibatch, coefficients)
        return torch.autograd.grad(total, leaves, materialize_grads=True), {"loss": total.detach()} | stats

    return differentiate


def _compiled_derivatives(loss: Loss) -> Callable[..., tuple[tuple[Tensor, ...], Stats]]:
    """Return the same, with the loss and its derivatives fused into one kernel."""

    def total(outputs: list[Tensor], fields: dict[str, Tensor], coefficients: dict[str, Tensor]):
        minibatch = Batch(**fields)
        return loss(_Evaluated(outputs, minibatch), minibatch, coefficients)

    compiled = _compile(torch.func.grad_and_value(total, has_aux=True))
    eager = _eager_derivatives(loss)
    checked = False

    def differentiate(outputs: list[Tensor], minibatch: Batch, coefficients: Mapping[str, float]):
        nonlocal checked
        if not checked:  # an exception of ours must not have to find its way out of the compiler
            eager([output.clone() for output in outputs], minibatch, coefficients)
            checked = True
        derivatives, (value, stats) = compiled(outputs, minibatch.tensors, _as_tensors(coefficients))
        return derivatives, {"loss": value} | stats

    return differentiate


class _NeedsModule(Exception):
    """The loss wants more of the policy than one `evaluate` of its minibatch."""


class _Evaluated:
    """Stands for the policy in a loss: its `evaluate` returns what numpy has computed already, as leaves of a graph."""

    def __init__(self, outputs: list[Tensor], minibatch: Batch) -> None:
        self._outputs = outputs
        self._inputs = minibatch.obs, minibatch.action

    def evaluate(self, obs: Tensor, action: Tensor) -> list[Tensor]:
        if obs is not self._inputs[0] or action is not self._inputs[1]:
            raise _NeedsModule("evaluate of other observations")
        return self._outputs

    def __getattr__(self, name: str) -> Any:
        raise _NeedsModule(name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise _NeedsModule("forward")


class _LossModule(nn.Module):
    """The loss as a module's forward pass, which is what functional_call can run with other parameters."""

    def __init__(self, policy: nn.Module, loss: Loss) -> None:
        super().__init__()
        self.policy = policy
        self.loss = loss

    def forward(self, fields: dict[str, Tensor], coefficients: dict[str, Tensor]) -> tuple[Tensor, Stats]:
        total, stats = self.loss(self.policy, Batch(**fields), coefficients)
        return total, stats


def _compile(function: Callable) -> Callable:
    return torch.compile(function, dynamic=False, fullgraph=True)


def _as_tensors(coefficients: Mapping[str, float]) -> dict[str, Tensor]:
    """Return coefficients as tensors: these may change without a new compilation."""
    return {name: torch.tensor(value) for name, value in coefficients.items()}
