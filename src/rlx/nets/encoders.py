"""Encoders: what turns an encoded observation into features, chosen by the shape of its space."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from rlx.errors import ConfigError

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "tanh": nn.Tanh,
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "elu": nn.ELU,
}

# Kernel, stride and channels of Mnih et al. 2015 ("Nature CNN"), and a small one for images under 36 pixels.
NATURE_CONVOLUTIONS = ((8, 4, 32), (4, 2, 64), (3, 1, 64))
SMALL_CONVOLUTIONS = ((3, 1, 16), (3, 2, 32))
CNN_FEATURES = 512


def orthogonal_linear(inputs: int, outputs: int, gain: float, generator: torch.Generator) -> nn.Linear:
    """Return a linear layer with orthogonal weights of the given gain and zero bias."""
    return _orthogonal(nn.Linear(inputs, outputs), gain, generator)


def mlp(inputs: int, hidden: Sequence[int], activation: str, generator: torch.Generator) -> nn.Sequential:
    """Return linear layers of the `hidden` widths, each followed by the activation."""
    layers: list[nn.Module] = []
    for outputs in hidden:
        layers += [orthogonal_linear(inputs, outputs, math.sqrt(2), generator), ACTIVATIONS[activation]()]
        inputs = outputs
    return nn.Sequential(*layers)


class ImageEncoder(nn.Module):
    """Convolutions over an image [N, H, W, C] or [N, C, H, W], then one linear layer of 512 features.

    uint8 pixels are scaled to [0, 1]. The channels are the last axis if it is shorter than the first, else the first.
    """

    def __init__(self, shape: tuple[int, int, int], generator: torch.Generator) -> None:
        super().__init__()
        self.channels_last = shape[2] < shape[0]
        channels, height, width = (shape[2], shape[0], shape[1]) if self.channels_last else shape
        if min(height, width) < 5:
            raise ConfigError(
                f"an image of shape {shape} is too small for the convolutional encoder (at least 5 x 5); "
                "set model.encoder=mlp"
            )
        layers: list[nn.Module] = []
        for kernel, stride, outputs in NATURE_CONVOLUTIONS if min(height, width) >= 36 else SMALL_CONVOLUTIONS:
            convolution = nn.Conv2d(channels, outputs, kernel, stride)
            layers += [_orthogonal(convolution, math.sqrt(2), generator), nn.ReLU()]
            channels, height, width = outputs, (height - kernel) // stride + 1, (width - kernel) // stride + 1
        head = orthogonal_linear(channels * height * width, CNN_FEATURES, math.sqrt(2), generator)
        self.layers = nn.Sequential(*layers, nn.Flatten(), head, nn.ReLU())

    def forward(self, obs: Tensor) -> Tensor:
        """Return features [N, 512]."""
        pixels = obs.float() / 255 if obs.dtype == torch.uint8 else obs
        return self.layers(pixels.permute(0, 3, 1, 2) if self.channels_last else pixels)


def build_encoder(
    obs_shape: tuple[int, ...], kind: str, hidden: Sequence[int], activation: str, generator: torch.Generator
) -> tuple[nn.Module, int]:
    """Return an encoder and the number of its features; `kind` is "mlp", "cnn" or "auto" (by the number of axes)."""
    if kind == "cnn" and len(obs_shape) != 3:
        raise ConfigError(f"model.encoder=cnn needs images of 3 axes, not {obs_shape}; set model.encoder=mlp")
    if kind == "cnn" or (kind == "auto" and len(obs_shape) == 3):
        return ImageEncoder((obs_shape[0], obs_shape[1], obs_shape[2]), generator), CNN_FEATURES
    size = math.prod(obs_shape)
    layers = mlp(size, hidden, activation, generator)
    return (layers if len(obs_shape) == 1 else nn.Sequential(FlatObs(), layers)), (hidden[-1] if hidden else size)


class FlatObs(nn.Module):
    """Flattens an observation of several axes to float32 [N, size]."""

    def forward(self, obs: Tensor) -> Tensor:
        """Return obs as float32 [N, size]; uint8 is scaled to [0, 1]."""
        return (obs.float() / 255 if obs.dtype == torch.uint8 else obs).flatten(1)


def _orthogonal(layer, gain: float, generator: torch.Generator):
    nn.init.orthogonal_(layer.weight, gain, generator=generator)
    nn.init.zeros_(layer.bias)
    return layer
