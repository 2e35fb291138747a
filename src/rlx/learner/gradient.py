"""The gradient of a loss with respect to one flat parameter buffer, eager or compiled."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rlx.nets.flat import FlatParameters
from rlx.nets.numpy_mlp import NumpyPolicy
from rlx.trajectory import Batch

Stats = dict[str, Tensor]
Loss = Callable[[Any, Batch, Mapping[str, Any]], tuple[Tensor, Stats]]
"""loss(policy, minibatch, coefficients) -> (scalar, stats). Both are sums weighted by `minibatch.weight`,
so that the parts of several learners add up to the whole. Coefficients are numbers that change during a run."""

Gradient = Callable[[Batch, Mapping[str, float]], tuple[Tensor, Stats]]
"""gradient(minibatch, coefficients) -> (flat gradient [n], stats with the loss under "loss")."""


def gradient_function(policy: nn.Module, flat: FlatParameters, loss: Loss, *, compile: bool) -> Gradient:
    """Return the fastest gradient function that serves: compiled if asked for, numpy for small MLPs, else eager."""
    if compile:
        return compiled_gradient(policy, flat, loss)
    return numpy_gradient(policy, flat, loss) or eager_gradient(policy, flat, loss)


def eager_gradient(policy: nn.Module, flat: FlatParameters, loss: Loss) -> Gradient:
    """Return the gradient function that runs autograd on every call."""

    def gradient(minibatch: Batch, coefficients: Mapping[str, float]) -> tuple[Tensor, Stats]:
        total, stats = loss(policy, minibatch, coefficients)
        parts = torch.autograd.grad(total, flat.parameters, materialize_grads=True)
        return torch.cat([part.reshape(-1) for part in parts]), {"loss": total.detach()} | stats

    return gradient


def numpy_gradient(policy: nn.Module, flat: FlatParameters, loss: Loss) -> Gradient | None:
    """Return the gradient function that differentiates small nets in numpy, or None where torch must serve.

    The loss stays any torch function of what `policy.evaluate` returns: autograd differentiates it by those three
    vectors, and numpy goes on from there to the parameters. A loss that wants more of the policy than one
    `evaluate` (a second one, its parameters) is differentiated by autograd.
    """
    autograd_gradient = eager_gradient(policy, flat, loss)
    gradient_of_all = torch.zeros_like(flat.data)
    arrays = [view.numpy() for view in flat.views(gradient_of_all)]
    numpy_policy = NumpyPolicy.of(policy, dict(zip(flat.parameters, arrays, strict=True)))
    if numpy_policy is None:
        return None

    def gradient(minibatch: Batch, coefficients: Mapping[str, float]) -> tuple[Tensor, Stats]:
        evaluated = _Evaluated(numpy_policy)
        try:
            total, stats = loss(evaluated, minibatch, coefficients)
        except _NeedsAutogradError:
            return autograd_gradient(minibatch, coefficients)
        by_outputs = torch.autograd.grad(total, evaluated.outputs, materialize_grads=True)
        numpy_policy.backward(*(part.numpy() for part in by_outputs))
        return gradient_of_all, {"loss": total.detach()} | stats

    return gradient


class _Evaluated:
    """Stands for the policy in a loss: its `evaluate` runs in numpy and returns leaves of the autograd graph."""

    def __init__(self, policy: NumpyPolicy) -> None:
        self.policy = policy
        self.outputs: tuple[Tensor, ...] = ()

    def evaluate(self, obs: Tensor, action: Tensor) -> tuple[Tensor, ...]:
        if self.outputs:  # numpy's backward pass knows the latest call only
            raise _NeedsAutogradError
        arrays = self.policy.evaluate(obs.numpy(), action.numpy())
        self.outputs = tuple(torch.from_numpy(np.ascontiguousarray(a)).requires_grad_() for a in arrays)
        return self.outputs

    def __call__(self, obs: Tensor) -> Any:
        raise _NeedsAutogradError

    def __getattr__(self, name: str) -> Any:
        raise _NeedsAutogradError


class _NeedsAutogradError(Exception):
    """The loss uses the policy in a way that the numpy gradient does not cover."""


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
        return grad, {"loss": value} | stats

    return gradient


class _LossModule(nn.Module):
    """The loss as a module's forward pass, which is what functional_call can run with other parameters."""

    def __init__(self, policy: nn.Module, loss: Loss) -> None:
        super().__init__()
        self.policy = policy
        self.loss = loss

    def forward(self, fields: dict[str, Tensor], coefficients: dict[str, Tensor]) -> tuple[Tensor, Stats]:
        total, stats = self.loss(self.policy, Batch(**fields), coefficients)
        return total, stats
