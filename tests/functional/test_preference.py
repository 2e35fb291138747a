"""Losses of preference pairs against numbers worked out by hand."""

import math

import pytest
import torch

from rlx.functional.preference import dpo, ipo, log_ratio_margin, pairwise_loss, sequence_logp


def pair(*values: float) -> list[torch.Tensor]:
    return [torch.tensor([value], dtype=torch.float64) for value in values]


def test_dpo_by_hand():
    """Margin 1 and beta 0.1: -log sigmoid(0.1)."""
    assert dpo(*pair(-10.0, -12.0, -10.5, -11.5), beta=0.1).tolist() == pytest.approx([0.644397], abs=5e-7)
    assert dpo(*pair(-12.0, -10.0, -11.5, -10.5), beta=0.1).tolist() == pytest.approx([0.744397], abs=5e-7)


def test_a_policy_that_is_the_reference_has_loss_ln_2_and_no_margin():
    same = pair(-10.0, -12.0, -10.0, -12.0)
    assert log_ratio_margin(*same).tolist() == [0]
    assert dpo(*same, beta=0.1).tolist() == pytest.approx([math.log(2)], rel=1e-15)
    assert ipo(*same, beta=0.1).tolist() == pytest.approx([25.0])


def test_dpos_gradient_pushes_the_two_apart_alike():
    """d loss / d chosen = -beta sigmoid(-beta margin): at margin 0 it is -beta / 2."""
    chosen, rejected, ref_chosen, ref_rejected = pair(-10.0, -12.0, -10.0, -12.0)
    chosen.requires_grad_(), rejected.requires_grad_()
    dpo(chosen, rejected, ref_chosen, ref_rejected, beta=0.1).sum().backward()
    assert chosen.grad is not None and chosen.grad.tolist() == pytest.approx([-0.05])
    assert rejected.grad is not None and rejected.grad.tolist() == pytest.approx([0.05])


def test_smoothed_labels_mix_the_two_ways_round():
    """(1 - 0.1) x 0.644397 + 0.1 x 0.744397; with one half there is nothing to learn, whatever the margin."""
    margin_1 = pair(-10.0, -12.0, -10.5, -11.5)
    assert dpo(*margin_1, beta=0.1, label_smoothing=0.1).tolist() == pytest.approx([0.654397], abs=5e-7)
    chosen = margin_1[0].requires_grad_()
    dpo(chosen, *pair(-10.0, -10.0, -10.0), beta=0.1, label_smoothing=0.5).sum().backward()
    assert chosen.grad is not None and chosen.grad.item() == pytest.approx(0.1 * (0.5 - 1 / 2), abs=1e-12)


def test_ipo_by_hand():
    """Margin 1, and beta 0.25 asks for 1 / (2 beta) = 2; at the target there is neither loss nor gradient."""
    assert ipo(*pair(-10.0, -12.0, -10.5, -11.5), beta=0.25).tolist() == pytest.approx([1.0])
    assert ipo(*pair(-10.0, -12.0, -10.5, -11.5), beta=0.5).tolist() == pytest.approx([0.0])


def test_the_reward_models_loss_by_hand():
    """-log sigmoid(x) = log(1 + exp(-x)): ln 2 for a tie, and a margin is asked for on top."""
    chosen, rejected = torch.tensor([1.0, 3.0, 0.0]), torch.tensor([1.0, 1.0, 2.0])
    by_hand = [math.log(1 + math.exp(-x)) for x in (0, 2, -2)]
    assert pairwise_loss(chosen, rejected).tolist() == pytest.approx(by_hand)
    with_margin = pairwise_loss(chosen, rejected, torch.tensor([0.0, 2.0, 1.0])).tolist()
    assert with_margin == pytest.approx([math.log(1 + math.exp(-x)) for x in (0, 0, -3)])
    assert pairwise_loss(chosen, rejected, 2.0)[1].item() == pytest.approx(math.log(2))


def test_only_differences_of_scores_matter():
    chosen, rejected = torch.randn(2, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(pairwise_loss(chosen + 5, rejected + 5), pairwise_loss(chosen, rejected))


def test_large_margins_neither_overflow_nor_lose_their_gradient():
    chosen = torch.tensor([-500.0], requires_grad=True)
    loss = pairwise_loss(chosen, torch.tensor([500.0]))
    loss.backward()
    assert loss.item() == 1000 and chosen.grad is not None and chosen.grad.item() == -1


def test_a_sequence_is_the_sum_of_its_counted_tokens_whatever_stands_elsewhere():
    logp = torch.tensor([[[math.nan, -1.0, -2.0], [-3.0, math.inf, math.nan]]], requires_grad=True)
    mask = torch.tensor([[[False, True, True], [True, False, False]]])
    assert sequence_logp(logp, mask).tolist() == [[-3.0, -3.0]]
    assert sequence_logp(logp, mask, mean=True).tolist() == [[-1.5, -3.0]]
    sequence_logp(logp, mask).sum().backward()
    assert logp.grad is not None and logp.grad.tolist() == [[[0, 1, 1], [1, 0, 0]]]
    assert sequence_logp(logp, torch.zeros_like(mask), mean=True).tolist() == [[0, 0]]
