"""Encoders: what turns the row of an observation into features, chosen by what the row holds."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from rlx.errors import ConfigError
from rlx.nets.convolutions import FlatImage, ImageEncoder, Planes, orthogonal
from rlx.nets.observation import ObservationLayout

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "tanh": nn.Tanh,
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "elu": nn.ELU,
}


def build_encoder(
    layout: ObservationLayout,
    kind: str,
    hidden: Sequence[int],
    activation: str,
    generator: torch.Generator,
    precision: str = "float32",
) -> tuple[nn.Module, int]:
    """Return an encoder of rows and the number of its features.

    kind: "mlp", "cnn", "impala_cnn" or "auto": "cnn" for every image that is large enough for it. One image is encoded
    by convolutions alone, images beside anything else by a multilayer perceptron on top of all features. precision: of
    the convolutions, "float32" or "bfloat16".
    """
    if not layout.images:
        if kind not in ("auto", "mlp"):
            raise ConfigError(f"model.encoder={kind} needs images of 3 axes, not {layout.shape}; set model.encoder=mlp")
        return mlp(layout.vector_size, hidden, activation, generator), hidden[-1] if hidden else layout.vector_size
    encoders = [_image_encoder(image.shape, kind, generator, precision) for image in layout.images.values()]
    if layout.is_one_image and isinstance(encoders[0], ImageEncoder):
        return encoders[0], encoders[0].features
    sizes = [
        encoder.features if isinstance(encoder, ImageEncoder) else image.size
        for encoder, image in zip(encoders, layout.images.values(), strict=True)
    ]
    size = layout.vector_size + sum(sizes)
    joint = mlp(size, hidden, activation, generator)
    encoder = nn.Sequential(encoders[0], joint) if layout.is_one_image else PartsEncoder(layout, encoders, joint)
    return encoder, hidden[-1] if hidden else size


def mlp(inputs: int, hidden: Sequence[int], activation: str, generator: torch.Generator) -> nn.Sequential:
    """Return linear layers of the `hidden` widths, each followed by the activation."""
    layers: list[nn.Module] = []
    for outputs in hidden:
        layers += [orthogonal_linear(inputs, outputs, math.sqrt(2), generator), ACTIVATIONS[activation]()]
        inputs = outputs
    return nn.Sequential(*layers)


def orthogonal_linear(inputs: int, outputs: int, gain: float, generator: torch.Generator) -> nn.Linear:
    """Return a linear layer with orthogonal weights of the given gain and zero bias."""
    return orthogonal(nn.Linear(inputs, outputs), gain, generator)


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


def _image_encoder(
    shape: tuple[int, ...], kind: str, generator: torch.Generator, precision: str
) -> FlatImage | ImageEncoder:
    if kind == "mlp" or (kind == "auto" and not Planes(shape).are_large):
        return FlatImage()
    return ImageEncoder(shape, generator, "cnn" if kind == "auto" else kind, precision)
