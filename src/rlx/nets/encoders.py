"""Encoders: what turns the row of an observation into features, chosen by what the row holds."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from rlx.errors import ConfigError
from rlx.nets.observation import ObservationLayout

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
MIN_SIDE = 5
"""Of the images that these convolutions take."""


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
    """Convolutions over an image, then one linear layer of 512 features.

    uint8 pixels are scaled to [0, 1]. Images are [N, H, W, C] or [N, C, H, W]: the channels are the last axis if it
    is shorter than the first, else the first. [N, H, W] has one channel, a stack of S images [N, S, ...] S x C.
    """

    def __init__(self, shape: tuple[int, ...], generator: torch.Generator) -> None:
        super().__init__()
        self.planes = _Planes(shape)
        channels, height, width = self.planes.shape
        if min(height, width) < MIN_SIDE:
            raise ConfigError(
                f"an image of shape {shape} is too small for the convolutional encoder (at least {MIN_SIDE} x "
                f"{MIN_SIDE}); set model.encoder=mlp"
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
        return self.layers(self.planes(_scaled(obs)))


class FlatObs(nn.Module):
    """Flattens an image to float32 [N, size]."""

    def forward(self, obs: Tensor) -> Tensor:
        """Return obs as float32 [N, size]; uint8 is scaled to [0, 1]."""
        return _scaled(obs).flatten(1)


class PartsEncoder(nn.Module):
    """An encoder for each image, and a multilayer perceptron on their features beside the vector."""

    def __init__(self, layout: ObservationLayout, images: Sequence[nn.Module], joint: nn.Module) -> None:
        super().__init__()
        self.layout = layout
        self.images = nn.ModuleList(images)
        self.joint = joint

    def forward(self, rows: Tensor) -> Tensor:
        """Return features of rows [N, *layout.shape]."""
        vector, images, _ = self.layout.split(rows)
        features = [encoder(image) for encoder, image in zip(self.images, images.values(), strict=True)]
        return self.joint(torch.cat(features if vector is None else [*features, vector], -1))


def build_encoder(
    layout: ObservationLayout, kind: str, hidden: Sequence[int], activation: str, generator: torch.Generator
) -> tuple[nn.Module, int]:
    """Return an encoder of rows and the number of its features.

    kind: "mlp", "cnn" or "auto": convolutions for every image that is large enough for them.
    """
    if kind == "cnn" and not layout.images:
        raise ConfigError(f"model.encoder=cnn needs images of 3 axes, not {layout.shape}; set model.encoder=mlp")
    if not layout.images:
        return mlp(layout.vector_size, hidden, activation, generator), hidden[-1] if hidden else layout.vector_size
    encoders = [_image_encoder(image.shape, kind, generator) for image in layout.images.values()]
    if layout.is_one_image and isinstance(encoders[0][0], ImageEncoder):
        return encoders[0]
    size = layout.vector_size + sum(features for _, features in encoders)
    joint = mlp(size, hidden, activation, generator)
    features = hidden[-1] if hidden else size
    if layout.is_one_image:
        return nn.Sequential(encoders[0][0], joint), features
    return PartsEncoder(layout, [encoder for encoder, _ in encoders], joint), features


def _image_encoder(shape: tuple[int, ...], kind: str, generator: torch.Generator) -> tuple[nn.Module, int]:
    if kind == "mlp" or (kind == "auto" and min(_Planes(shape).shape[1:]) < MIN_SIDE):
        return FlatObs(), math.prod(shape)
    return ImageEncoder(shape, generator), CNN_FEATURES


class _Planes(nn.Module):
    """Arranges the axes of images as convolutions want them, [N, C, H, W]; `shape` is that of one, (C, H, W)."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        stack, image = (shape[0], shape[1:]) if len(shape) == 4 else (1, shape)
        self.is_stack, self.is_flat = len(shape) == 4, len(shape) == 2
        self.channels_last = not self.is_flat and image[2] < image[0]
        channels, height, width = (1, *image) if self.is_flat else image
        if self.channels_last:
            height, width, channels = image
        self.shape = (stack * channels, height, width)

    def forward(self, image: Tensor) -> Tensor:
        """Return the view [N, C, H, W]; of a stack of images with channels last, a copy."""
        if self.is_flat:
            return image.unsqueeze(1)
        if self.channels_last:
            image = image.movedim(-1, -3)
        return image.flatten(1, 2) if self.is_stack else image


def _scaled(image: Tensor) -> Tensor:
    return image.float() / 255 if image.dtype == torch.uint8 else image


def _orthogonal(layer, gain: float, generator: torch.Generator):
    nn.init.orthogonal_(layer.weight, gain, generator=generator)
    nn.init.zeros_(layer.bias)
    return layer
