"""Advantages within groups against numbers worked out by hand, and the statistics module as oracle."""

import math
import statistics

import pytest
import torch

from rlx.functional.groups import group_advantage, has_spread


@pytest.mark.parametrize(
    ("scores", "expected"),
    [([1, 0, 0, 1], [0.86588, -0.86588, -0.86588, 0.86588]), ([1, 0, 0, 0], [1.49970, -0.49990, -0.49990, -0.49990])],
)
def test_grpo_by_hand(scores, expected):
    """Mean and unbiased deviation: of 1, 0, 0, 1 they are 0.5 and 0.57735."""
    advantage = group_advantage(torch.tensor(scores, dtype=torch.float32), 4)
    assert advantage.tolist() == pytest.approx(expected, abs=5e-6)


def test_rloo_and_dr_grpo_by_hand():
    score = torch.tensor([1.0, 0.0, 0.0, 0.0])
    rloo = group_advantage(score, 4, baseline="leave_one_out", scale="none")
    assert rloo.tolist() == pytest.approx([1, -1 / 3, -1 / 3, -1 / 3])
    assert group_advantage(score, 4, scale="none").tolist() == [0.75, -0.25, -0.25, -0.25]


def test_reinforce_plus_plus_by_hand():
    """Over the whole batch the scores 1, 3, 5, 7 have mean 4 and deviation sqrt(20 / 3)."""
    score = torch.tensor([1.0, 3.0, 5.0, 7.0], dtype=torch.float64)
    advantage = group_advantage(score, 2, baseline="batch_mean", scale="batch_std", epsilon=0)
    assert advantage.tolist() == pytest.approx([x / math.sqrt(20 / 3) for x in (-3, -1, 1, 3)])
    no_baseline = group_advantage(score, 2, baseline="none", scale="none")
    assert no_baseline.tolist() == score.tolist()


@pytest.mark.parametrize("baseline", ["mean", "leave_one_out", "batch_mean"])
@pytest.mark.parametrize("scale", ["group_std", "batch_std", "none"])
@pytest.mark.parametrize("score", [0.1, 1e-30, -3.3, 1e8, 16777217.0])
def test_equal_scores_give_exactly_zero(score, baseline, scale):
    """0.1 three times has in float32 a mean that is not 0.1: what is left over must not be scaled up by 1 / epsilon."""
    scores = torch.full((6,), score)
    assert group_advantage(scores, 3, baseline=baseline, scale=scale).tolist() == [0] * 6
    assert has_spread(scores, 3).tolist() == [False] * 6


def test_a_group_is_judged_by_itself_and_by_nothing_else():
    one = torch.tensor([0.1, 0.1, 0.1, 5.0, 1.0, 2.0])
    assert group_advantage(one, 3)[:3].tolist() == [0, 0, 0]
    moved = one + torch.tensor([0.0, 0.0, 0.0, 100.0, 100.0, 100.0])
    torch.testing.assert_close(group_advantage(moved, 3), group_advantage(one, 3), rtol=0, atol=1e-5)
    assert has_spread(one, 3).tolist() == [False] * 3 + [True] * 3


@pytest.mark.parametrize("baseline", ["mean", "leave_one_out"])
@pytest.mark.parametrize("scale", ["group_std", "batch_std", "none"])
def test_groups_of_any_size_in_any_order_with_samples_that_do_not_count(baseline, scale):
    generator = torch.Generator().manual_seed(0)
    group = torch.tensor([7, 3, 7, 11, 3, 7, 7, 3, 5, 5, 7, 9])
    score = torch.randn(12, generator=generator, dtype=torch.float64)
    mask = torch.tensor([True] * 12)
    mask[[2, 8, 11]] = False
    poisoned = score.masked_fill(~mask, math.nan)
    advantage = group_advantage(poisoned, group, baseline=baseline, scale=scale, mask_S=mask)
    of_batch = statistics.stdev(score[mask].tolist())
    for i in range(12):
        fellows = [score[j].item() for j in range(12) if mask[j] and group[j] == group[i]]
        others = [score[j].item() for j in range(12) if mask[j] and group[j] == group[i] and j != i]
        if not mask[i] or len(fellows) == 1:
            assert advantage[i].item() == 0
            continue
        centre = statistics.mean(fellows if baseline == "mean" else others)
        divisor = {"group_std": statistics.stdev(fellows) + 1e-4, "batch_std": of_batch + 1e-4, "none": 1.0}[scale]
        assert advantage[i].item() == pytest.approx((score[i].item() - centre) / divisor, rel=1e-9)


def test_equal_numbers_and_a_size_say_the_same():
    score = torch.randn(12, generator=torch.Generator().manual_seed(1))
    numbers = torch.arange(12) // 4
    assert torch.equal(group_advantage(score, numbers), group_advantage(score, 4))
    order = torch.randperm(12, generator=torch.Generator().manual_seed(2))
    shuffled = group_advantage(score[order], numbers[order])
    torch.testing.assert_close(shuffled, group_advantage(score, 4)[order], rtol=0, atol=1e-6)


def test_spread_looks_at_counted_samples_only():
    score = torch.tensor([1.0, 1.0, math.nan, 2.0, 2.0, 3.0])
    mask = torch.tensor([True, True, False, True, True, True])
    assert has_spread(score, 3, mask).tolist() == [False, False, False, True, True, True]


def test_no_samples_and_none_that_count():
    assert group_advantage(torch.zeros(0), 4).tolist() == []
    assert group_advantage(torch.zeros(0), torch.zeros(0, dtype=torch.int64)).tolist() == []
    nothing = torch.zeros(4, dtype=torch.bool)
    assert group_advantage(torch.full((4,), math.nan), 2, mask_S=nothing).tolist() == [0, 0, 0, 0]


def test_a_size_that_does_not_fit_is_an_error():
    with pytest.raises(ValueError, match="7 samples cannot be split into groups of 4"):
        group_advantage(torch.zeros(7), 4)
    with pytest.raises(ValueError, match="groups of 0"):
        group_advantage(torch.zeros(7), 0)
