"""How the losses of tokens become one number: weights, from the mask of one whole minibatch.

`weighted_sum(loss, weight)` is the aggregate. Weights are made before a minibatch is split, so their denominator is
that of all of it, and the sums of any microbatches on any number of learners add up to the same loss and gradient.
Axes: S sequences of L tokens, P pairs of sequences. A sequence without a counted token counts nowhere.
"""

import torch
from torch import Tensor

from rlx.functional.masking import sample_weight


def token_mean(mask: Tensor) -> Tensor:
    """Return weights, float32 and shaped like `mask`, of the mean over all counted tokens: each token counts alike.

    DAPO's (Yu et al. 2025, arXiv:2503.14476, eq. 12); a long sequence counts more than a short one.
    """
    return sample_weight(mask)


def sequence_mean(mask: Tensor) -> Tensor:
    """Return weights [S, L] of the mean over each sequence's tokens, then over sequences: each sequence counts alike.

    GRPO's and GSPO's (Shao et al. 2024, arXiv:2402.03300, eq. 3); a token of a long sequence counts less.
    """
    counted = mask.to(torch.float32)
    length = counted.sum(-1, keepdim=True)
    return counted / length.clamp(min=1) / _sequences(mask)


def sequence_sum(mask: Tensor, length: float = 1) -> Tensor:
    """Return weights [S, L] of the sum over each sequence's tokens divided by `length`, then the mean over sequences.

    With a constant `length`, as a rule the longest that a completion may have, it is Dr. GRPO's (Liu et al. 2025,
    arXiv:2503.20783, section 3.2 and its listing): no bias for or against long sequences. With 1 it is the sum of
    log-probabilities that REINFORCE and RLOO are written with.
    """
    return mask.to(torch.float32) / length / _sequences(mask)


def pair_weight(mask_P_2_L: Tensor) -> Tensor:
    """Return weights [P], float32, of the mean over pairs: those of which both sequences have a counted token."""
    return sample_weight(mask_P_2_L.any(-1).all(-1))


def _sequences(mask: Tensor) -> Tensor:
    """Return the number of sequences with a counted token, at least 1."""
    return mask.any(-1).sum().clamp(min=1)
