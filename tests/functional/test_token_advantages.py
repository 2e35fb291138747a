"""Advantages of tokens: rows of different lengths, whatever stands before, between and after what counts."""

import math

import pytest
import torch

from rlx.functional.advantages import gae, next_values, token_gae

GOLDEN = {  # rewards, values, advantages for gamma 1, lambda 0.95
    3: ([0.0, 0.0, 1.0], [0.5, 0.4, 0.3], [0.43675, 0.565, 0.7]),
    2: ([0.0, 1.0], [0.4, 0.3], [0.565, 0.7]),
    1: ([1.0], [0.3], [0.7]),
}


def rows(before: int, garbage: float, columns: int = 6) -> dict[str, torch.Tensor]:
    """Return the golden rows, each after a prompt of `before` tokens, with garbage wherever nothing counts."""
    reward = torch.full((3, columns), garbage, dtype=torch.float64)
    value, expected = reward.clone(), torch.zeros_like(reward)
    mask = torch.zeros(3, columns, dtype=torch.bool)
    for row, (length, (rewards, values, advantages)) in enumerate(GOLDEN.items()):
        counted = slice(before, before + length)
        mask[row, counted] = True
        for tensor, numbers in ((reward, rewards), (value, values), (expected, advantages)):
            tensor[row, counted] = torch.tensor(numbers, dtype=torch.float64)
    return {"reward": reward, "value": value, "mask": mask, "expected": expected}


@pytest.mark.parametrize("garbage", [0.0, 1e9, math.nan, math.inf])
@pytest.mark.parametrize("before", [0, 2])
def test_the_golden_numbers_in_rows_of_any_length(before, garbage):
    t = rows(before, garbage)
    advantage, return_ = token_gae(t["reward"], t["value"], t["mask"], 1.0, 0.95)
    torch.testing.assert_close(advantage, t["expected"], rtol=0, atol=1e-12)
    assert return_[0, before : before + 3].tolist() == pytest.approx([0.93675, 0.965, 1.0])
    assert return_[~t["mask"]].abs().max().item() == 0


@pytest.mark.parametrize("garbage", [0.0, 1e9])
def test_the_classic_estimator_on_transposed_rows_agrees(garbage):
    """The last token of a row is its end; nothing after it, however large, crosses that."""
    t = rows(0, garbage)
    last = t["mask"] & ~torch.cat([t["mask"][:, 1:], torch.zeros(3, 1, dtype=torch.bool)], 1)
    done, value, never = last.T, t["value"].T, torch.zeros_like(last.T)
    next_value = next_values(value, torch.zeros_like(value), done)
    for terminated, truncated in ((done, never), (never, done)):  # cut off with a stored next value of 0 is the same
        advantage, return_ = gae(t["reward"].T, value, next_value, terminated, truncated, 1.0, 0.95)
        torch.testing.assert_close(advantage.T[t["mask"]], t["expected"][t["mask"]], rtol=0, atol=1e-12)
        assert return_[:3, 0].tolist() == pytest.approx([0.93675, 0.965, 1.0])


def test_a_random_row_agrees_with_the_classic_estimator():
    generator = torch.Generator().manual_seed(0)
    reward, value = torch.randn(2, 5, 20, generator=generator, dtype=torch.float64)
    mask = torch.arange(20) < torch.tensor([[20], [13], [1], [7], [19]])
    done = (torch.arange(20) == mask.sum(1, keepdim=True) - 1).T
    next_value = next_values(value.T, torch.zeros(20, 5, dtype=torch.float64), done)
    classic = gae(reward.T, value.T, next_value, done, torch.zeros_like(done), 0.97, 0.9)
    for mine, theirs in zip(token_gae(reward, value, mask, 0.97, 0.9), classic, strict=True):
        torch.testing.assert_close(mine, theirs.T.masked_fill(~mask, 0), rtol=0, atol=1e-12)


def test_tokens_that_do_not_count_inside_a_row_are_passed_over():
    """The three golden tokens with the answer of a tool between them: no step of time, no discount."""
    mask = torch.tensor([[True, False, False, True, False, True, False]])
    spread = torch.full((1, 7), math.nan, dtype=torch.float64)
    reward, value = spread.clone(), spread.clone()
    reward[mask], value[mask] = torch.tensor(GOLDEN[3][:2], dtype=torch.float64)
    advantage, _ = token_gae(reward, value, mask, 1.0, 0.95)
    assert advantage[mask].tolist() == pytest.approx(GOLDEN[3][2])


def test_without_values_they_are_rewards_to_come():
    """REINFORCE with gamma 0.5: 3, 1 + 3 / 2, 1 + (1 + 3 / 2) / 2."""
    reward, mask = torch.tensor([[1.0, 1.0, 3.0]]), torch.ones(1, 3, dtype=torch.bool)
    advantage, return_ = token_gae(reward, torch.zeros(1, 3), mask, 0.5, 1.0)
    assert advantage.tolist() == [[2.25, 2.5, 3.0]] and torch.equal(advantage, return_)


def test_a_value_that_follows_a_cut_is_added_to_the_last_reward():
    """Bootstrapping a row that was cut: r + gamma V(after)."""
    value, mask = torch.tensor([[0.5, 0.4]]), torch.ones(1, 2, dtype=torch.bool)
    advantage, _ = token_gae(torch.tensor([[0.0, 1.0 + 0.9 * 2.0]]), value, mask, 0.9, 0.95)
    last = 1 + 0.9 * 2.0 - 0.4
    assert advantage[0].tolist() == pytest.approx([0.9 * 0.4 - 0.5 + 0.9 * 0.95 * last, last])
