"""One buffer under all parameters, and views of it that stay tied."""

import numpy as np
import pytest
import torch
from torch import nn

from rlx.nets.flat import FlatParameters


def small_net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1))


def test_the_buffer_holds_every_parameter_in_the_module_s_order():
    net = small_net()
    expected = nn.utils.parameters_to_vector(net.parameters()).detach().clone()
    assert torch.equal(FlatParameters(net).data, expected)


def test_parameters_follow_the_buffer_and_the_buffer_follows_parameters():
    net = small_net()
    flat = FlatParameters(net)
    flat.data.copy_(torch.arange(13.0))
    held = [parameter.tolist() for parameter in net.parameters()]
    assert held == [[[0, 1], [2, 3], [4, 5]], [6, 7, 8], [[9, 10, 11]], [12]]
    with torch.no_grad():
        [*net.parameters()][-1].add_(1)
    assert flat.numpy()[-1] == 13


def test_loading_weights_copies_them_and_numpy_is_a_view():
    net = small_net()
    flat = FlatParameters(net)
    view, weights = flat.numpy(), np.arange(13, dtype=np.float32)
    flat.load(weights)
    weights[:] = -1
    assert view.tolist() == list(range(13)) and [*net.parameters()][-1].item() == 12


def test_read_only_weights_load_without_a_warning():
    """Weights that arrive from another process are read-only views of its memory."""
    flat, weights = FlatParameters(small_net()), np.arange(13, dtype=np.float32)
    weights.setflags(write=False)
    flat.load(weights)
    assert flat.numpy().tolist() == list(range(13))


def test_a_shared_parameter_is_held_once():
    net = small_net()
    net[0].bias = net[2].bias = nn.Parameter(torch.zeros(1))
    assert len(FlatParameters(net).data) == 6 + 1 + 3


def test_gradients_reach_the_parameters_that_were_moved():
    net = small_net()
    FlatParameters(net)
    net(torch.ones(1, 2)).sum().backward()
    assert all(parameter.grad is not None for parameter in net.parameters())


@pytest.mark.filterwarnings("error")
def test_weights_that_are_read_only_are_loaded():
    flat, weights = FlatParameters(small_net()), np.arange(13, dtype=np.float32)
    weights.flags.writeable = False
    flat.load(weights)
    assert np.array_equal(flat.numpy(), weights)
