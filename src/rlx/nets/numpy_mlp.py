"""A policy made of small multilayer perceptrons, evaluated and differentiated in numpy.

On nets this small, torch spends more on bookkeeping than on arithmetic: acting on 16 observations costs a fifth
here, a training step half. This file serves every `Policy` of plain linear layers with one of the activations
below, acting and learning alike; `NumpyPolicy.of` declines any other. All arrays are views of the policy's
torch parameters (and of the gradient), so both worlds always see the same numbers. Tests hold it equal to torch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor, nn

from rlx.nets.distributions import HALF_LOG_2PI, ILLEGAL, Categorical, DiagonalGaussian, MultiCategorical
from rlx.nets.policy import Policy

# Beyond this many weights a layer's arithmetic outweighs torch's cost a call.
MAX_LAYER_WEIGHTS = 256 * 256


Gradients = Mapping[Tensor, np.ndarray]
"""Of each parameter, the array in its shape that holds its gradient."""


class Activation(NamedTuple):
    """An element-wise function whose derivative is known from its output alone."""

    apply: Callable[[np.ndarray], object]
    """Overwrites its argument."""
    times_derivative: Callable[[np.ndarray, np.ndarray, np.ndarray], object]
    """(gradient, output, scratch): multiplies gradient, in place, by the derivative at that output."""


def _times_tanh_derivative(gradient: np.ndarray, output: np.ndarray, scratch: np.ndarray) -> None:
    np.multiply(output, output, out=scratch)
    np.subtract(np.float32(1), scratch, out=scratch)
    gradient *= scratch


def _times_relu_derivative(gradient: np.ndarray, output: np.ndarray, scratch: np.ndarray) -> None:
    gradient *= output > 0


ACTIVATIONS: dict[type[nn.Module], Activation] = {
    nn.Tanh: Activation(lambda x: np.tanh(x, out=x), _times_tanh_derivative),
    nn.ReLU: Activation(lambda x: np.maximum(x, 0, out=x), _times_relu_derivative),
}


class NumpyPolicy:
    """pi and V of a small MLP policy in numpy; made by `NumpyPolicy.of`."""

    def __init__(
        self,
        policy: Policy,
        encoder: Chain,
        action_head: Chain,
        value_encoder: Chain,
        value_head: Chain,
        gradients: Gradients | None,
    ) -> None:
        self.distribution = policy.distribution
        self.is_discrete = not isinstance(policy.distribution, DiagonalGaussian)
        self._masked = policy.masked
        self._parts = Parts.of(policy.distribution) if isinstance(policy.distribution, MultiCategorical) else None
        self._encoder, self._action_head = encoder, action_head
        self._value_encoder, self._value_head = value_encoder, value_head
        if isinstance(policy.distribution, DiagonalGaussian):
            self._log_std = policy.distribution.log_std.detach().numpy()
            self._log_std_gradient = None if gradients is None else gradients[policy.distribution.log_std]

    @classmethod
    def of(cls, policy: nn.Module, gradients: Gradients | None = None) -> NumpyPolicy | None:
        """Return the numpy twin of `policy`, or None where torch must serve.

        `gradients` holds the array, in each parameter's shape, that `backward` writes to; acting needs none.
        """
        if type(policy) is not Policy or any(p.device.type != "cpu" for p in policy.parameters()):
            return None
        if not isinstance(policy.distribution, Categorical | MultiCategorical | DiagonalGaussian):
            return None
        encoder = Chain.of(policy.encoder, gradients)
        value_encoder = encoder if policy.value_encoder is None else Chain.of(policy.value_encoder, gradients)
        heads = [Chain.of(nn.Sequential(head), gradients) for head in (policy.action_head, policy.value_head)]
        if encoder is None or value_encoder is None or heads[0] is None or heads[1] is None:
            return None
        return cls(policy, encoder, heads[0], value_encoder, heads[1], gradients)

    def head(self, obs_N: np.ndarray) -> np.ndarray:
        """Return the distribution's head, float32 [N, head_size]; ILLEGAL where a choice is."""
        head = self._action_head.forward(self._encoder.forward(self._inputs(obs_N)))
        if self._masked is not None:
            head[self._masked.mask(obs_N) == 0] = ILLEGAL
        return head

    def value(self, obs_N: np.ndarray) -> np.ndarray:
        """Return V(obs), float32 [N]."""
        return self._value_head.forward(self._value_encoder.forward(self._inputs(obs_N)))[:, 0]

    def choose(self, head: np.ndarray) -> np.ndarray:
        """Return the actions [N, ...] with the largest logits in `head` [N, head_size]; of a Gaussian, its means."""
        if not self.is_discrete:
            return head
        return head.argmax(-1) if self._parts is None else self._parts.argmax(head)

    def std(self) -> np.ndarray:
        """Return the standard deviations [A] of a Gaussian policy."""
        return np.exp(self._log_std)

    def logp(self, head: np.ndarray, action: np.ndarray) -> np.ndarray:
        """Return log-probabilities [...] of `action` [...] or [..., A] under `head` [..., head_size]."""
        if self.is_discrete:
            logp_all = _log_softmax(np.moveaxis(head, -1, 0), self._parts)
            return self._of_chosen(np.take_along_axis(logp_all, self._rows(action), 0))
        return self._gaussian_logp((action - head) * np.exp(-self._log_std))

    def evaluate(self, minibatch: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return logp, entropy and value of a minibatch of arrays; `backward` differentiates the latest call.

        All three are [N], or [S, L] where the rows of the minibatch are sequences.
        """
        obs, action = minibatch.obs, minibatch.action
        if obs.ndim == 2:
            return self._evaluate(obs, action)
        logp, entropy, value = self._evaluate(obs.reshape(-1, obs.shape[-1]), action.reshape(-1, *action.shape[2:]))
        return logp.reshape(obs.shape[:2]), entropy.reshape(obs.shape[:2]), value.reshape(obs.shape[:2])

    def _evaluate(self, obs_N: np.ndarray, action: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        head = self.head(obs_N)
        value_features = self._value_encoder.forward(self._inputs(obs_N), again=self._value_encoder is self._encoder)
        value = self._value_head.forward(value_features)[:, 0]
        if self.is_discrete:
            # [size, N]: numpy reduces over a short last axis several times slower than over the first.
            self._logp_all, self._chosen = _log_softmax(head.T, self._parts), (self._rows(action), _range(len(action)))
            self._p = np.exp(self._logp_all)
            negative = self._p * self._logp_all
            if self._parts is None:
                self._entropy = entropy = -negative.sum(0)
            else:
                of_parts = -self._parts.add(negative)
                self._entropy, entropy = self._parts.spread(of_parts), of_parts.sum(0)
            return self._of_chosen(self._logp_all[self._chosen]), entropy, value
        self._inverse_std = np.exp(-self._log_std)
        self._scaled = (action - head) * self._inverse_std
        entropy = self._log_std.sum() + np.float32(len(self._log_std) * (0.5 + HALF_LOG_2PI))
        return self._gaussian_logp(self._scaled), np.full(len(action), entropy, np.float32), value

    def backward(self, d_logp: np.ndarray, d_entropy: np.ndarray, d_value: np.ndarray) -> None:
        """Write the parameters' gradient, given the loss's derivatives by what `evaluate` returned."""
        d_logp_N, d_entropy_N, d_value_N = d_logp.ravel(), d_entropy.ravel(), d_value.ravel()
        if self.is_discrete:
            # d logp / d head = onehot - p; d entropy / d head = -p (log p + entropy of the part); 0 where ILLEGAL
            d_head = self._logp_all + self._entropy
            d_head *= -d_entropy_N
            d_head -= d_logp_N
            d_head *= self._p
            d_head[self._chosen] += d_logp_N
            d_head = np.ascontiguousarray(d_head.T)
        else:
            d_head = self._scaled * d_logp_N[:, None]
            by_log_std = np.einsum("na,na->a", d_head, self._scaled)  # d logp / d log_std = scaled^2 - 1
            np.add(by_log_std, d_entropy_N.sum() - d_logp_N.sum(), out=self._log_std_gradient)
            d_head *= self._inverse_std
        d_features = self._action_head.backward(d_head)
        d_value_features = self._value_head.backward(d_value_N[:, None])
        if self._value_encoder is self._encoder:
            d_features += d_value_features
        else:
            self._value_encoder.backward(d_value_features, needs_input_gradient=False)
        self._encoder.backward(d_features, needs_input_gradient=False)

    def _inputs(self, obs_N: np.ndarray) -> np.ndarray:
        return obs_N if self._masked is None else self._masked.inputs(obs_N)

    def _rows(self, action: np.ndarray) -> np.ndarray:
        """Return which logits, along the first axis, were chosen: [1, ...], or [K, ...] of several parts."""
        return action[None] if self._parts is None else self._parts.rows(action)

    def _of_chosen(self, logp: np.ndarray) -> np.ndarray:
        """Return the log-probabilities of actions, given those of their parts [K, ...]."""
        return logp[0] if self._parts is None else logp.sum(0)

    def _gaussian_logp(self, scaled: np.ndarray) -> np.ndarray:
        constant = self._log_std.sum() + np.float32(len(self._log_std) * HALF_LOG_2PI)
        return np.float32(-0.5) * np.square(scaled).sum(-1) - constant


class Parts:
    """The parts of a MultiCategorical along the first axis of arrays [sum of sizes, ...]."""

    def __init__(self, sizes: Sequence[int], index: np.ndarray) -> None:
        self.sizes = sizes
        self.firsts = np.cumsum([0, *sizes[:-1]])
        self.index = index

    @classmethod
    def of(cls, distribution: MultiCategorical) -> Parts:
        """Return the parts of a distribution."""
        return cls(distribution.sizes, distribution.index.numpy())

    def add(self, values: np.ndarray) -> np.ndarray:
        """Return the sums over each part, [K, ...]."""
        return np.add.reduceat(values, self.firsts, 0)

    def max(self, values: np.ndarray) -> np.ndarray:
        """Return the largest value of each part, [K, ...]."""
        return np.maximum.reduceat(values, self.firsts, 0)

    def spread(self, of_parts: np.ndarray) -> np.ndarray:
        """Return values [K, ...] repeated for every choice of a part, [sum of sizes, ...]."""
        return np.repeat(of_parts, self.sizes, 0)

    def rows(self, action: np.ndarray) -> np.ndarray:
        """Return which row each integer of actions [..., K] chose, [K, ...]."""
        return np.moveaxis(action + self.firsts, -1, 0)

    def argmax(self, head: np.ndarray) -> np.ndarray:
        """Return the choice with the largest logit in each part of `head` [N, sum of sizes]: [N, K]."""
        padded = np.pad(head, ((0, 0), (0, 1)), constant_values=ILLEGAL)[:, self.index]
        return padded.reshape(len(head), len(self.sizes), -1).argmax(-1)


class Layer(NamedTuple):
    """One linear layer and the activation that follows; arrays are views."""

    weight: np.ndarray
    bias: np.ndarray
    activation: Activation | None
    weight_gradient: np.ndarray | None
    bias_gradient: np.ndarray | None


class Chain:
    """Linear layers, each with an optional activation; keeps the outputs of the latest forward pass."""

    def __init__(self, layers: list[Layer]) -> None:
        self.layers = layers
        self._outputs: list[np.ndarray] = []

    @classmethod
    def of(cls, module: nn.Module, gradients: Gradients | None) -> Chain | None:
        """Return the chain of an nn.Sequential; None if a part of it is of another kind."""
        if not isinstance(module, nn.Sequential):
            return None
        layers: list[Layer] = []
        for part in module:
            if type(part) is nn.Linear and part.bias is not None and part.weight.numel() <= MAX_LAYER_WEIGHTS:
                into = (None, None) if gradients is None else (gradients[part.weight], gradients[part.bias])
                layers.append(Layer(part.weight.detach().numpy(), part.bias.detach().numpy(), None, *into))
            elif type(part) in ACTIVATIONS and layers and layers[-1].activation is None:
                layers[-1] = layers[-1]._replace(activation=ACTIVATIONS[type(part)])
            else:
                return None
        return cls(layers)

    def forward(self, x_N: np.ndarray, *, again: bool = False) -> np.ndarray:
        """Return the output [N, outputs]; `again`: the input is that of the latest call, so is the output."""
        if again:
            return self._outputs[-1]
        outputs = [x_N]
        for weight, bias, activation, _, _ in self.layers:
            x_N = x_N @ weight.T
            x_N += bias
            if activation is not None:
                activation.apply(x_N)
            outputs.append(x_N)
        self._outputs = outputs
        return x_N

    def backward(self, gradient_N: np.ndarray, *, needs_input_gradient: bool = True) -> np.ndarray:
        """Write the gradients of the layers' parameters; return that of the input (meaningless if not needed)."""
        for position in range(len(self.layers) - 1, -1, -1):
            weight, _, activation, weight_gradient, bias_gradient = self.layers[position]
            if activation is not None:
                output = self._outputs[position + 1]
                activation.times_derivative(gradient_N, output, output)  # the output is not needed again
            np.matmul(gradient_N.T, self._outputs[position], out=weight_gradient)
            np.matmul(_ones(len(gradient_N)), gradient_N, out=bias_gradient)  # a sum over N, five times faster
            if position or needs_input_gradient:
                # numpy's matmul has no fast case for an outer product.
                gradient_N = gradient_N * weight if len(weight) == 1 else gradient_N @ weight
        return gradient_N


@functools.lru_cache(maxsize=8)
def _ones(size: int) -> np.ndarray:
    return np.ones(size, np.float32)


@functools.lru_cache(maxsize=8)
def _range(size: int) -> np.ndarray:
    return np.arange(size)


def _log_softmax(head: np.ndarray, parts: Parts | None) -> np.ndarray:
    """Return log-probabilities over the first axis, or over each part of it."""
    if parts is None:
        shifted = head - head.max(0)
        shifted -= np.log(np.exp(shifted).sum(0))
        return shifted
    shifted = head - parts.spread(parts.max(head))
    shifted -= parts.spread(np.log(parts.add(np.exp(shifted))))
    return shifted
