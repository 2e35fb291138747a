"""A network in words: its parts, their layers and how many parameters they have."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from rlx.nets.policy import Policy

NO_BREAK = "\N{NO-BREAK SPACE}"


def summarize(policy: Policy) -> list[tuple[str, str, int]]:
    """Return (name, layers, number of parameters) of every part of a policy, the distribution at the end.

    Within a layer stand NO_BREAK spaces.
    """
    parts = dict(policy.named_children())
    parts["distribution"] = parts.pop("distribution")
    return [
        (
            name,
            ", ".join(layer.replace(" ", NO_BREAK) for layer in _layers(part)),
            sum(parameter.numel() for parameter in part.parameters()),
        )
        for name, part in parts.items()
    ]


def _layers(module: nn.Module) -> Iterator[str]:
    """Yield the layers below a module in the order in which they were made, those that do nothing left out."""
    children = list(module.children())
    for child in children:
        yield from _layers(child)
    if children or isinstance(module, nn.Flatten | nn.Sequential):
        return
    match module:
        case nn.Linear():
            yield f"Linear {module.in_features} -> {module.out_features}"
        case nn.Conv2d():
            size = "x".join(map(str, module.kernel_size))
            yield f"Conv {module.in_channels} -> {module.out_channels} ({size} / {module.stride[0]})"
        case nn.RNNBase():
            yield f"{type(module).__name__} {module.input_size} -> {module.hidden_size}"
        case _ if type(module).__name__ != "Planes":
            yield type(module).__name__
