"""PPO's losses and the KL estimators against numbers worked out by hand."""

import pytest
import torch

from rlx.functional.kl import k1, k3
from rlx.functional.losses import clipped_squared_error, clipped_surrogate, squared_error


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "slope"),
    [
        (1.5, 2.0, -2.4, 0.0),  # already likelier than 1.2 times: no reward for more
        (0.5, 2.0, -1.0, -2.0),  # a good action got less likely: full gradient
        (1.5, -2.0, 3.0, 2.0),  # a bad action got likelier: full gradient
        (0.5, -2.0, 1.6, 0.0),  # already less likely than 0.8 times: no reward for less
        (1.1, 2.0, -2.2, -2.0),
        (0.9, -2.0, 1.8, 2.0),
    ],
)
def test_the_clipped_surrogate_by_hand_on_both_sides_and_signs(ratio, advantage, loss, slope):
    r = torch.tensor(ratio, requires_grad=True)
    result = clipped_surrogate(r, torch.tensor(advantage), 0.2)
    result.backward()
    assert result.item() == pytest.approx(loss)
    assert r.grad is not None and r.grad.item() == pytest.approx(slope)


def test_the_clip_range_may_be_a_tensor():
    ratio, advantage = torch.tensor([1.5, 0.5]), torch.tensor([2.0, -2.0])
    as_tensor = clipped_surrogate(ratio, advantage, torch.tensor(0.2))
    assert torch.equal(as_tensor, clipped_surrogate(ratio, advantage, 0.2))


def test_the_squared_error_has_no_factor_one_half():
    assert squared_error(torch.tensor([3.0, -1.0]), torch.tensor([1.0, 1.0])).tolist() == [4.0, 4.0]


@pytest.mark.parametrize(
    ("value", "return_", "loss", "slope"),
    [
        (1.1, 2.0, 0.81, -1.8),  # within 0.2 of the old value 1: the plain error
        (1.5, 2.0, 0.64, 0.0),  # moved 0.5 towards the return: judged at 1.2, no gradient for going on
        (0.5, 2.0, 2.25, -3.0),  # moved away: the plain error is the larger one
        (1.5, 0.0, 2.25, 3.0),  # overshot away from the return: the plain error again
    ],
)
def test_the_clipped_value_error_by_hand(value, return_, loss, slope):
    v = torch.tensor(value, requires_grad=True)
    result = clipped_squared_error(v, torch.tensor(return_), torch.tensor(1.0), 0.2)
    result.backward()
    assert result.item() == pytest.approx(loss)
    assert v.grad is not None and v.grad.item() == pytest.approx(slope)


def test_both_kl_estimators_are_unbiased_for_kl_of_old_from_new():
    """The expectation under the old policy is enumerated; the exact KL is the textbook sum."""
    old = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    new = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
    exact = 0.5 * torch.tensor(2.5).log().item() + 0.2 * torch.tensor(0.4).log().item()
    assert (old * k1(old.log(), new.log())).sum().item() == pytest.approx(exact, abs=1e-7)
    assert (old * k3(old.log(), new.log())).sum().item() == pytest.approx(exact, abs=1e-7)


def test_k3_is_never_negative_and_zero_for_the_same_policy():
    logp = torch.linspace(-5, 0, 50, dtype=torch.float64)
    assert k3(logp, logp.flip(0)).min().item() >= 0
    assert k1(logp, logp.flip(0)).min().item() < 0
    assert k3(logp, logp).abs().max().item() == 0
