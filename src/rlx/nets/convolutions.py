"""Convolutions over images: the network of Mnih et al. 2015 and the deep one of IMPALA (Espeholt et al. 2018)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from rlx.errors import ConfigError

# Kernel, stride and channels of Mnih et al. 2015 ("Nature CNN"), and a small one for images under 36 pixels.
NATURE_CONVOLUTIONS = ((8, 4, 32), (4, 2, 64), (3, 1, 64))
SMALL_CONVOLUTIONS = ((3, 1, 16), (3, 2, 32))
CNN_FEATURES = 512
IMPALA_SECTIONS = (16, 32, 32)
IMPALA_FEATURES = 256
MIN_SIDE = 5
"""Of the images that these convolutions take."""


class ImageEncoder(nn.Module):
    """Convolutions over an image, then one linear layer; `kind` is "cnn" (512 features) or "impala_cnn" (256).

    precision "bfloat16" computes them in that type, the features are float32 again; parameters always are.
    uint8 pixels are scaled to [0, 1]. Images are [N, H, W, C] or [N, C, H, W]: the channels are the last axis if it
    is shorter than the first, else the first. [N, H, W] has one channel, a stack of S images [N, S, ...] S x C.
    """

    def __init__(
        self, shape: tuple[int, ...], generator: torch.Generator, kind: str = "cnn", precision: str = "float32"
    ) -> None:
        super().__init__()
        self.planes = Planes(shape)
        self.is_half = precision == "bfloat16"
        if not self.planes.are_large:
            raise ConfigError(
                f"an image of shape {shape} is too small for the convolutional encoder (at least {MIN_SIDE} x "
                f"{MIN_SIDE}); set model.encoder=mlp"
            )
        make, self.features = (_impala, IMPALA_FEATURES) if kind == "impala_cnn" else (_nature, CNN_FEATURES)
        layers, outputs = make(self.planes.shape, generator)
        head = orthogonal(nn.Linear(outputs, self.features), math.sqrt(2), generator)
        self.layers = nn.Sequential(*layers, nn.Flatten(), head, nn.ReLU())

    def forward(self, obs: Tensor) -> Tensor:
        """Return features [N, features]."""
        planes = self.planes(obs)
        if not self.is_half:
            return self.layers(planes)
        with torch.autocast(obs.device.type, torch.bfloat16):
            return self.layers(planes).float()


class PixelConvolution(nn.Conv2d):
    """The first convolution of a network: uint8 pixels are scaled to [0, 1] by its weights.

    So no pass over the batch is needed for it, and bfloat16, which holds all integers to 256, holds pixels exactly.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Return the output for planes [N, C, H, W], uint8 or float32."""
        device = input.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else torch.float32
        weight = self.weight / 255 if input.dtype == torch.uint8 else self.weight
        # Channels last, the layout for which CPUs and GPUs have the fast kernels: all layers after this one keep it.
        planes = input.to(dtype, memory_format=torch.channels_last)
        return functional.conv2d(planes, weight, self.bias, self.stride, self.padding)


class Planes(nn.Module):
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
        self.are_large = min(height, width) >= MIN_SIDE

    def forward(self, image: Tensor) -> Tensor:
        """Return the view [N, C, H, W]; of a stack of images with channels last, a copy."""
        if self.is_flat:
            return image.unsqueeze(1)
        if self.channels_last:
            image = image.movedim(-1, -3)
        return image.flatten(1, 2) if self.is_stack else image


class FlatImage(nn.Module):
    """Flattens an image to float32 [N, size]."""

    def forward(self, obs: Tensor) -> Tensor:
        """Return obs as float32 [N, size]; uint8 is scaled to [0, 1]."""
        return scaled(obs).flatten(1)


class ResidualBlock(nn.Module):
    """x + conv(relu(conv(relu(x))))."""

    def __init__(self, channels: int, generator: torch.Generator) -> None:
        super().__init__()
        # Gain 1: the branch adds to what passes beside it.
        first, second = (orthogonal(nn.Conv2d(channels, channels, 3, padding=1), 1.0, generator) for _ in range(2))
        self.layers = nn.Sequential(nn.ReLU(), first, nn.ReLU(), second)

    def forward(self, planes: Tensor) -> Tensor:
        """Return planes of the same shape."""
        return planes + self.layers(planes)


def orthogonal(layer, gain: float, generator: torch.Generator):
    """Return a layer with orthogonal weights of the given gain and zero bias."""
    nn.init.orthogonal_(layer.weight, gain, generator=generator)
    nn.init.zeros_(layer.bias)
    return layer


def scaled(image: Tensor) -> Tensor:
    """Return pixels from 0 to 1 where they are uint8, and the image itself where it is float."""
    return image.float() / 255 if image.dtype == torch.uint8 else image


def _nature(shape: tuple[int, int, int], generator: torch.Generator) -> tuple[list[nn.Module], int]:
    """Return the layers for planes [C, H, W], and how many numbers come out of them."""
    channels, height, width = shape
    layers: list[nn.Module] = []
    for kernel, stride, outputs in NATURE_CONVOLUTIONS if min(height, width) >= 36 else SMALL_CONVOLUTIONS:
        convolution = (nn.Conv2d if layers else PixelConvolution)(channels, outputs, kernel, stride)
        layers += [orthogonal(convolution, math.sqrt(2), generator), nn.ReLU()]
        channels, height, width = outputs, (height - kernel) // stride + 1, (width - kernel) // stride + 1
    return layers, channels * height * width


def _impala(shape: tuple[int, int, int], generator: torch.Generator) -> tuple[list[nn.Module], int]:
    """Return the layers for planes [C, H, W], and how many numbers come out of them."""
    channels, height, width = shape
    layers: list[nn.Module] = []
    for outputs in IMPALA_SECTIONS:
        convolution = (nn.Conv2d if layers else PixelConvolution)(channels, outputs, 3, padding=1)
        layers += [orthogonal(convolution, math.sqrt(2), generator), nn.MaxPool2d(3, stride=2, padding=1)]
        layers += [ResidualBlock(outputs, generator) for _ in range(2)]
        channels, height, width = outputs, (height + 1) // 2, (width + 1) // 2
    return [*layers, nn.ReLU()], channels * height * width
