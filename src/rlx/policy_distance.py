"""What lies between who drew the tokens, the policy before an update, and the reference."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rlx.functional.kl import k1, k3
from rlx.functional.masking import sample_weight, weighted_sum
from rlx.metrics import Metrics
from rlx.trajectory import Batch


def old_policy(new_logp: Tensor, minibatch: Batch, training: Any) -> tuple[Tensor, Tensor]:
    """Return the log-probabilities that ratios are taken to, and the weight of each token's loss.

    Where generating and learning take turns and rlx generates, the policy that drew the tokens is the one before the
    update. Otherwise ratios are taken to the one before the update, and what lies between it and the one that drew them
    is made up for by a truncated importance weight (Hilton et al. 2021, arXiv:2110.00641; Espeholt et al. 2018,
    arXiv:1802.01561; Yao et al. 2025, "Your Efficient RL Framework Secretly Brings You Off-Policy RL Training").
    """
    old_logp = minibatch.tensors.get("old_logp")
    if old_logp is None:
        if not training.max_age:
            return minibatch.logp, torch.ones_like(new_logp)
        old_logp = new_logp.detach()  # an update of one step is made by the old policy
    if training.importance_cap is None:
        return old_logp, torch.ones_like(new_logp)
    return old_logp, (old_logp - minibatch.logp).exp().clamp(max=training.importance_cap)


def mismatch_kl(batch: Batch, version: int) -> float | None:
    """Return the mean over tokens of k3 from who drew them to the policy before the update, `old_logp`; None: no token.

    Both had the same weights: only tokens that were drawn with this version count.
    """
    mask = batch.mask & (batch.weights_version == version)
    if not mask.any():
        return None
    drawn, found = (batch.tensors[name].masked_fill(~mask, 0) for name in ("logp", "old_logp"))
    return weighted_sum(k3(drawn, found), sample_weight(mask)).item()


def reference_kl(batch: Batch) -> Metrics:
    """Return the KL from who drew the tokens to the reference, by two estimators and summed over a completion."""
    weight = sample_weight(batch.mask)
    logp, ref_logp = (batch.tensors[name].masked_fill(~batch.mask, 0) for name in ("logp", "ref_logp"))
    k1_mean = weighted_sum(k1(logp, ref_logp), weight).item()
    sequences = int(batch.mask.any(-1).sum())
    return {
        "ref_kl_k1": k1_mean,
        "ref_kl_k3": weighted_sum(k3(logp, ref_logp), weight).item(),
        "ref_kl_sequence": k1_mean * int(batch.mask.sum()) / max(1, sequences),
    }
