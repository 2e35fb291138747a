"""Networks that a user brings: an encoder, or a whole policy.

`model.custom` is a class or an import path pkg.module:Class, called as Class(observation_space, action_space,
**model.custom_kwargs). It makes a torch module whose `forward(obs)` takes what the space says: a tensor [N, ...] for a
Box (float32, or uint8 for images), one-hot float32 [N, n] for Discrete and the like, a dict or tuple of these for Dict
and Tuple; an "action_mask" is left out, since rlx applies it.

    an encoder        has the attribute features_size; forward returns features float32 [N, features_size]
    a whole policy    has none; forward returns (head [N, head_size], value [N]), where head_size is that of
                      distribution_for(ActionLayout(action_space)): for Discrete(n) n logits, for a Box of n numbers n
                      means, for several choices all their logits, then the means
"""

from __future__ import annotations

import inspect
import pkgutil
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rlx.errors import ConfigError
from rlx.nets.observation import ObservationLayout, Space

Custom = str | Callable[..., nn.Module]


class TreeEncoder(nn.Module):
    """A user's network behind rows: it gets the observation's structure."""

    def __init__(self, layout: ObservationLayout, network: nn.Module) -> None:
        super().__init__()
        self.layout = layout
        self.network = network

    def forward(self, rows: Tensor) -> Any:
        """Return what the network makes of rows [N, *layout.shape]."""
        return self.network(self.layout.tree(rows))


def build_custom(
    custom: Custom, kwargs: Mapping[str, Any], layout: ObservationLayout, action_space: Space, head_size: int
) -> tuple[TreeEncoder, int | None]:
    """Return a user's network and the number of its features, None for a whole policy.

    ConfigError where it does not return what it should, for two observations of zeros.
    """
    name = custom if isinstance(custom, str) else f"{custom.__module__}:{custom.__qualname__}"
    make = _found(custom, name)
    try:
        inspect.signature(make).bind(layout.space, action_space, **kwargs)
    except TypeError as error:
        raise ConfigError(
            f"model.custom {name} cannot be called with (observation_space, action_space) and model.custom_kwargs "
            f"{dict(kwargs)}: {error}."
        ) from error
    network = make(layout.space, action_space, **kwargs)
    if not isinstance(network, nn.Module):
        raise ConfigError(f"model.custom {name} made a {type(network).__name__}; it must make a torch.nn.Module.")
    parameters = dict(network.named_parameters())
    if buffers := sorted(network.state_dict().keys() - parameters.keys()):
        raise ConfigError(
            f"model.custom {name} has buffers ({', '.join(buffers)}), and only parameters are published and saved; use "
            "layers without running statistics, and register constants with persistent=False."
        )
    size = getattr(network, "features_size", None)
    encoder = TreeEncoder(layout, network)
    with torch.no_grad():
        made = encoder(torch.from_numpy(np.zeros((2, *layout.shape), layout.dtype)))
    if size is None:
        expected, cure = [(2, head_size), (2,)], "return (head, value), or set features_size for an encoder"
        shapes = [_shape(part) for part in made] if isinstance(made, tuple) else _shape(made)
    else:
        expected, cure, shapes = (2, size), "return features [N, features_size]", _shape(made)
    if shapes != expected:
        raise ConfigError(f"model.custom {name} returned {shapes} for 2 observations, not {expected}; {cure}.")
    return encoder, size


def _found(custom: Custom, name: str) -> Callable[..., Any]:
    if not isinstance(custom, str):
        return custom
    try:
        return pkgutil.resolve_name(name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"model.custom {name} cannot be found ({error}); give pkg.module:Class.") from error


def _shape(value: Any) -> Any:
    return tuple(value.shape) if isinstance(value, Tensor) else f"a {type(value).__name__}"
