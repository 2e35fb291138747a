"""The losses of samples against numbers worked out by hand."""

import math

import pytest
import torch

from rlx.functional.aggregation import sequence_mean
from rlx.functional.losses import cispo, clipped_squared_error, clipped_surrogate, sequence_ratio, squared_error
from rlx.functional.masking import weighted_sum


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


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "slope"),
    [
        (1.5, 1.0, -1.28, 0.0),  # above 1 + 0.28
        (1.25, 1.0, -1.25, -1.0),  # above 1 + 0.2, which is the lower half's range only
        (0.7, -1.0, 0.8, 0.0),  # below 1 - 0.2
        (1.5, -1.0, 1.5, 1.0),
        (0.7, 1.0, -0.7, -1.0),
        (5.0, 0.0, 0.0, 0.0),
    ],
)
def test_the_two_halves_of_the_clip_range_may_differ(ratio, advantage, loss, slope):
    r = torch.tensor(ratio, requires_grad=True)
    result = clipped_surrogate(r, torch.tensor(advantage), 0.2, 0.28)
    result.backward()
    assert result.item() == pytest.approx(loss)
    assert r.grad is not None and r.grad.item() == pytest.approx(slope)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "slope"),
    [
        (5.0, -1.0, 3.0, 0.0),  # would be 5: bounded, without gradient
        (2.5, -1.0, 2.5, 1.0),
        (0.5, -1.0, 0.8, 0.0),  # the clip of the lower side stays
        (5.0, 1.0, -1.2, 0.0),  # a good action's ratio is bounded by the range alone
        (5.0, -2.0, 6.0, 0.0),
    ],
)
def test_the_dual_clip_bounds_the_loss_of_a_bad_action_that_ran_away(ratio, advantage, loss, slope):
    r = torch.tensor(ratio, requires_grad=True)
    result = clipped_surrogate(r, torch.tensor(advantage), 0.2, dual_clip=3.0)
    result.backward()
    assert result.item() == pytest.approx(loss)
    assert r.grad is not None and r.grad.item() == pytest.approx(slope)


@pytest.mark.parametrize(
    ("logp", "advantage", "loss", "slope"),
    [
        (math.log(0.25), 2.0, 4.0 * math.log(2), -4.0),  # ratio 2, below the bound
        (math.log(0.1), 2.0, 6.0 * math.log(2), -6.0),  # ratio 5, weighed as 3, its gradient kept
        (math.log(0.1), -2.0, -6.0 * math.log(2), 6.0),
        (0.0, 1.0, 0.5 * math.log(2), -0.5),  # no lower bound
    ],
)
def test_cispo_bounds_the_weight_and_keeps_the_gradient(logp, advantage, loss, slope):
    """The new probability is 1/2; the loss is -min(ratio, 3) A log(1/2), its slope by log(new) -min(ratio, 3) A."""
    new_logp = torch.tensor(math.log(0.5), dtype=torch.float64, requires_grad=True)
    result = cispo(new_logp, (new_logp - logp).exp(), torch.tensor(advantage), max_ratio=3.0)
    result.backward()
    assert result.item() == pytest.approx(loss)
    assert new_logp.grad is not None and new_logp.grad.item() == pytest.approx(slope)


MASK = torch.tensor([[False, True, True, False], [False, False, True, False], [False, False, False, False]])


def test_the_ratio_of_a_sequence_by_hand_with_its_gradient():
    """Ratios 2 and 8 have the geometric mean 4; ratio 3 alone is 3; a row without a token has ratio 1."""
    nan = math.nan
    logp = torch.tensor([[nan, 0.0, 0.0, nan], [nan, nan, 0.0, nan], [nan] * 4], dtype=torch.float64)
    new_logp = torch.tensor(
        [[0.0, math.log(2), math.log(8), 0.0], [0.0, 0.0, math.log(3), 0.0], [0.0] * 4],
        dtype=torch.float64,
        requires_grad=True,
    )
    ratio = sequence_ratio(new_logp, logp, MASK)
    torch.testing.assert_close(ratio, torch.tensor([[4.0] * 4, [3.0] * 4, [1.0] * 4], dtype=torch.float64))

    # One loss a sequence, ratio x advantage 5, 7, 9: its slope by each token is advantage x ratio / length.
    (ratio[:, 0] * torch.tensor([5.0, 7.0, 9.0])).sum().backward()
    expected = [[0, 5 * 4 / 2, 5 * 4 / 2, 0], [0, 0, 7 * 3, 0], [0, 0, 0, 0]]
    torch.testing.assert_close(new_logp.grad, torch.tensor(expected, dtype=torch.float64))


def test_gspo_clips_a_sequence_as_a_whole():
    """Token ratios 1.5 and 1 / 1.5 cancel: nothing is clipped, though each is beyond the range of 0.2."""
    mask = torch.ones(1, 2, dtype=torch.bool)
    new_logp = torch.tensor([[math.log(1.5), -math.log(1.5)]], dtype=torch.float64, requires_grad=True)
    ratio = sequence_ratio(new_logp, torch.zeros(1, 2), mask)
    loss = clipped_surrogate(ratio, torch.ones(1, 2), 0.2)
    weighted_sum(loss, sequence_mean(mask).double()).backward()
    assert loss.tolist() == [pytest.approx([-1.0, -1.0])]
    assert new_logp.grad is not None and new_logp.grad.tolist() == [pytest.approx([-0.5, -0.5])]
