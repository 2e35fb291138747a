"""Weights that make one loss of the losses of tokens: by hand, and however a minibatch is split."""

import itertools
from functools import partial

import pytest
import torch
from torch import Tensor

from rlx.functional.aggregation import pair_weight, sequence_mean, sequence_sum, token_mean
from rlx.functional.losses import clipped_surrogate, sequence_ratio
from rlx.functional.masking import weighted_sum

MASK = torch.tensor([[False, True, True, True], [False, True, False, False], [False, False, False, False]])
LOSS = torch.tensor([[100.0, 1.0, 2.0, 3.0], [100.0, 6.0, 100.0, 100.0], [100.0] * 4])
MODES = [token_mean, sequence_mean, sequence_sum, partial(sequence_sum, length=10)]


@pytest.mark.parametrize(
    ("weigh", "aggregate"),
    [
        (token_mean, 12 / 4),
        (sequence_mean, (6 / 3 + 6) / 2),
        (sequence_sum, (6 + 6) / 2),
        (partial(sequence_sum, length=10), (6 + 6) / 2 / 10),
    ],
)
def test_each_mode_by_hand(weigh, aggregate):
    """Two sequences with 3 and 1 counted tokens; the third has none, and counts nowhere."""
    weight = weigh(MASK)
    assert weight.dtype == torch.float32 and weight.shape == MASK.shape
    assert weighted_sum(LOSS, weight).item() == pytest.approx(aggregate)


@pytest.mark.parametrize("weigh", MODES)
def test_nothing_counted_weighs_nothing(weigh):
    assert weigh(torch.zeros(2, 3, dtype=torch.bool)).abs().sum().item() == 0


def ragged_minibatch(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    first = torch.randint(0, 4, (12, 1), generator=generator)
    length = torch.randint(0, 9, (12, 1), generator=generator)
    position = torch.arange(12)
    logp = -torch.rand(12, 12, generator=generator, dtype=torch.float64)
    return {
        "mask": (position >= first) & (position < first + length),
        "logp": logp,
        "new_logp": logp + 0.3 * torch.randn(12, 12, generator=generator, dtype=torch.float64),
        "advantage": torch.randn(12, 1, generator=generator, dtype=torch.float64).expand(12, 12),
    }


def loss_and_gradient(parts: list[list[int]], minibatch: dict[str, Tensor], weight: Tensor, level: str):
    """Return the loss and its gradient, gathered over parts that are each computed alone and trimmed."""
    new_logp = minibatch["new_logp"].clone().requires_grad_()
    total = 0.0
    for rows in parts:
        ends = minibatch["mask"][rows].nonzero()
        columns = int(ends[:, 1].max()) + 1 if len(ends) else 1
        mask, logp, advantage = (minibatch[n][rows][:, :columns] for n in ("mask", "logp", "advantage"))
        mine = new_logp[rows][:, :columns]
        ratio = sequence_ratio(mine, logp, mask) if level == "sequence" else (mine - logp).exp()
        loss = weighted_sum(clipped_surrogate(ratio, advantage, 0.2), weight[rows][:, :columns])
        loss.backward()
        total += loss.item()
    return total, new_logp.grad


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("weigh", MODES)
def test_any_microbatches_on_any_learners_make_one_loss_and_gradient(weigh, level):
    minibatch = ragged_minibatch(0)
    weight = weigh(minibatch["mask"]).double()
    whole_loss, whole_gradient = loss_and_gradient([list(range(12))], minibatch, weight, level)
    assert abs(whole_loss) > 1e-3 and whole_gradient.abs().max() > 1e-3
    by_length = minibatch["mask"].sum(1).argsort()
    for learners, microbatches in itertools.product((1, 2, 3, 5), (1, 2, 3, 4)):
        shares = [share.tolist() for share in torch.arange(12).tensor_split(learners)]
        shares += [share.tolist() for share in by_length.tensor_split(learners)]
        for order in (shares[:learners], shares[learners:]):
            parts = [p.tolist() for share in order for p in torch.tensor(share).tensor_split(microbatches) if len(p)]
            loss, gradient = loss_and_gradient(parts, minibatch, weight, level)
            assert loss == pytest.approx(whole_loss, rel=1e-12, abs=1e-14)
            torch.testing.assert_close(gradient, whole_gradient, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("weigh", [token_mean, sequence_mean])
def test_weights_made_after_the_split_would_be_wrong(weigh):
    """What the test above is there to catch: a mean of the microbatches' means is another number."""
    minibatch = ragged_minibatch(0)
    mask, loss = minibatch["mask"], minibatch["logp"]
    whole = weighted_sum(loss, weigh(mask).double()).item()
    halves = [weighted_sum(loss[rows], weigh(mask[rows]).double()).item() for rows in (slice(0, 5), slice(5, 12))]
    assert abs(sum(halves) / 2 - whole) > 1e-3


def test_pairs_of_which_both_sequences_have_a_token_count_alike():
    mask = torch.tensor([[[True, True], [True, False]], [[True, True], [False, False]], [[True, False], [True, True]]])
    assert pair_weight(mask).tolist() == [0.5, 0, 0.5]
    assert pair_weight(mask[1:2]).tolist() == [0]
