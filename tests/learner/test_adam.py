"""Adam on one buffer is torch's Adam."""

import numpy as np
import pytest
import torch

from rlx.learner.adam import LARGE, FlatAdam


@pytest.mark.parametrize("epsilon", [1e-8, 1e-5])
def test_fifty_steps_equal_torch_s_adam_while_the_learning_rate_changes(epsilon):
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(100, generator=generator)
    parameter = torch.nn.Parameter(start.clone())
    oracle = torch.optim.Adam([parameter], lr=1.0, eps=epsilon, betas=(0.8, 0.95))
    adam = FlatAdam(start.clone(), epsilon, beta1=0.8, beta2=0.95)
    for step in range(50):
        lr = 0.01 / (1 + step)
        gradient = torch.randn(100, generator=generator) * 10 ** (-step % 4)
        oracle.param_groups[0]["lr"], parameter.grad = lr, gradient.clone()
        oracle.step()
        adam.step(gradient, lr)
    moved = parameter.detach() - start
    assert moved.abs().min() > 0
    torch.testing.assert_close(adam.data, parameter.detach(), rtol=1e-6, atol=1e-7)


def test_the_first_step_by_hand_is_the_learning_rate_against_the_gradient_s_sign():
    """m / (1 - beta1) = g and sqrt(v / (1 - beta2)) = |g|, so the step is lr g / (|g| + eps)."""
    adam = FlatAdam(torch.tensor([1.0, 1.0, 1.0]), epsilon=1e-5)
    adam.step(torch.tensor([4.0, -0.001, 0.0]), lr=0.1)
    assert adam.data.tolist() == pytest.approx([1 - 0.1, 1 + 0.1 * 0.001 / (0.001 + 1e-5), 1.0])


def test_adam_continues_bit_for_bit_from_its_state():
    generator = torch.Generator().manual_seed(0)
    gradients = torch.randn(6, 20, generator=generator)
    straight, first = (FlatAdam(torch.zeros(20), 1e-5) for _ in range(2))
    for gradient in gradients:
        straight.step(gradient, 0.01)
    for gradient in gradients[:3]:
        first.step(gradient, 0.01)
    resumed = FlatAdam(first.data.clone(), 1e-5)
    state = first.get_state()
    first.step(gradients[0], 0.01)  # the state is a copy
    resumed.set_state(state)
    for gradient in gradients[3:]:
        resumed.step(gradient, 0.01)
    assert torch.equal(resumed.data, straight.data)


@pytest.mark.parametrize("size", [100, LARGE])
def test_steps_are_those_of_the_formula_and_go_on_from_a_state(size):
    """Kingma & Ba, algorithm 1, in float64; the third step is made by another optimizer that got the state."""
    generator = torch.Generator().manual_seed(0)
    gradients = [torch.randn(size, generator=generator) for _ in range(3)]
    data = torch.randn(size, generator=generator)
    expected, mean, square = data.double().numpy().copy(), np.zeros(size), np.zeros(size)
    adam = FlatAdam(data, epsilon=1e-5)
    for step, (gradient, lr) in enumerate(zip(gradients, (0.1, 0.2, 0.05), strict=True), 1):
        if step == 3:
            state, adam = adam.get_state(), FlatAdam(data, epsilon=1e-5)
            adam.set_state(state)
        adam.step(gradient.clone(), lr)
        g = gradient.double().numpy()
        mean, square = 0.9 * mean + 0.1 * g, 0.999 * square + 0.001 * g * g
        expected -= lr * (mean / (1 - 0.9**step)) / (np.sqrt(square / (1 - 0.999**step)) + 1e-5)
    np.testing.assert_allclose(data.numpy(), expected, rtol=0, atol=2e-6)
    assert adam.get_state()["steps"] == 3


@pytest.mark.parametrize("size", [100, LARGE])
def test_a_part_that_stood_still_begins_as_a_fresh_optimizer_does(size):
    generator = torch.Generator().manual_seed(0)
    start, split = torch.randn(size, generator=generator), 30
    first, second = (torch.nn.Parameter(part.clone()) for part in (start[:split], start[split:]))
    oracles = [torch.optim.AdamW([part], lr=lr, weight_decay=0.1) for part, lr in ((first, 0.01), (second, 0.3))]
    data = start.clone()
    options = {"weight_decay": 0.1, "decayed": (data[:split], data[split:]), "split": split}
    adam = FlatAdam(data, 1e-8, **options)
    for number, gradient in enumerate(torch.randn(40, size, generator=generator)):
        still = number < 30
        first.grad, second.grad = gradient[:split].clone(), gradient[split:].clone()
        for oracle in oracles[still:]:
            oracle.step()
        if number == 33:  # and goes on so from a state
            state, adam = adam.get_state(), FlatAdam(data, 1e-8, **options)
            adam.set_state(state)
        adam.step(gradient.clone(), 0.0 if still else 0.01, 0.3)
    torch.testing.assert_close(data, torch.cat([first.detach(), second.detach()]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("size", [100, LARGE])
def test_from_its_split_on_the_buffer_steps_by_a_rate_of_its_own(size):
    """As two optimizers of torch would, decay included; without a second rate there is no split."""
    generator = torch.Generator().manual_seed(0)
    start, split = torch.randn(size, generator=generator), 30
    parts = [torch.nn.Parameter(part.clone()) for part in (start[:split], start[split:])]
    oracles = [torch.optim.AdamW([part], lr=lr, weight_decay=0.1) for part, lr in zip(parts, (0.01, 0.3), strict=True)]
    data, undivided = start.clone(), start.clone()
    adam = FlatAdam(data, 1e-8, weight_decay=0.1, decayed=(data[:split], data[split:]), split=split)
    plain = FlatAdam(undivided, 1e-8, weight_decay=0.1, decayed=(undivided,), split=split)
    for gradient in torch.randn(4, size, generator=generator):
        for part, oracle, g in zip(parts, oracles, (gradient[:split], gradient[split:]), strict=True):
            part.grad = g.clone()
            oracle.step()
        adam.step(gradient.clone(), 0.01, 0.3)
        plain.step(gradient.clone(), 0.01)
    torch.testing.assert_close(data, torch.cat([part.detach() for part in parts]), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(undivided[:split], data[:split], rtol=0, atol=0)
    assert (undivided[split:] - data[split:]).abs().median() > 0.1
