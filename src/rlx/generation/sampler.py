"""Draws tokens by inverse CDF, and says what probability each one had under the law that it was drawn from."""

from __future__ import annotations

import torch
from torch import Tensor

from rlx.generation.request import Sampling

ONE_LEVEL_UP_TO = 1024
"""Vocabularies up to this size have one cumulative sum over all tokens; larger ones have one over blocks."""
BLOCK = 256


def sample(logits: Tensor, sampling: Sampling, row_A: Tensor, u_A: Tensor) -> Tensor:
    """Return each sample's token and its log-probability, float64 [2, A]; a row of the result is for the host to read.

    logits: [R, V]. row_A: int64 [A], the row that each sample draws from. u_A: float64 [A], uniform in [0, 1). Where a
    row's logits are no finite numbers, neither are the log-probabilities. Nothing in here waits for the device.
    """
    if sampling.temperature == 0:
        token_R, logp_R = most_probable(logits)
        token_A, logp_A = token_R[row_A], logp_R[row_A]
    else:
        token_A, logp_A = draw(log_law(logits, sampling), row_A, u_A)
    return torch.stack([token_A.double(), logp_A.double()])


def log_law(logits: Tensor, sampling: Sampling) -> Tensor:
    """Return the log-probabilities of the law that `sampling` makes of logits [R, V]: float32 [R, V], -inf if cut.

    Temperature, then top-k, top-p and min-p, each on what the one before has left, as in transformers. Tokens as
    probable as the k-th one stay; among equals at the edge of top-p the lower ids do. Not for temperature 0.
    """
    logits = logits.float()
    if sampling.temperature != 1:
        logits = logits / sampling.temperature
    if 0 < sampling.top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(sampling.top_k).values[:, -1:], -torch.inf)
    if sampling.top_p < 1:
        logits = _keep_top_p(logits, sampling.top_p)
    if sampling.min_p > 0:
        probability = logits.softmax(-1)
        least = sampling.min_p * probability.amax(-1, keepdim=True)
        logits = logits.masked_fill(probability < least, -torch.inf)
    return logits.log_softmax(-1)


def draw(log_law_R: Tensor, row_A: Tensor, u_A: Tensor) -> tuple[Tensor, Tensor]:
    """Return tokens int64 [A] and their log-probabilities float32 [A].

    log_law_R: [R, V]. row_A: int64 [A], the row that each sample draws from.
    u_A: float64 [A], uniform in [0, 1). A token is the first whose cumulative probability is above u.
    """
    vocabulary = log_law_R.shape[-1]
    probability = log_law_R.exp()
    if vocabulary <= ONE_LEVEL_UP_TO:
        cumulative = probability.cumsum(-1, dtype=torch.float64)[row_A]
        token_A = _first_above(cumulative, u_A * cumulative[:, -1])
    else:
        token_A = _two_level(probability, row_A, u_A)
    return token_A, log_law_R[row_A, token_A]


def most_probable(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return the greedy tokens [R] of logits [R, V], and their logp: 0, as this law allows nothing else.

    Where logits are not finite there is no law, and logp is NaN.
    """
    return logits.argmax(-1), torch.where(torch.isfinite(logits).all(-1), 0.0, torch.nan)


def _keep_top_p(logits: Tensor, top_p: float) -> Tensor:
    descending, order = torch.sort(logits, dim=-1, descending=True, stable=True)
    probability = descending.softmax(-1, dtype=torch.float64)
    before = probability.cumsum(-1) - probability
    before[:, 0] = 0.0  # the most probable token stays whatever the rounding
    return logits.masked_fill((before >= top_p).scatter(-1, order, before >= top_p), -torch.inf)


def _two_level(probability: Tensor, row_A: Tensor, u_A: Tensor) -> Tensor:
    """Draw a block by the blocks' sums, then a token of the block: two short cumulative sums in place of a long one."""
    rows, vocabulary = probability.shape
    blocks = -(-vocabulary // BLOCK)
    if blocks * BLOCK != vocabulary:
        probability = torch.nn.functional.pad(probability, (0, blocks * BLOCK - vocabulary))
    probability = probability.view(rows, blocks, BLOCK)
    cumulative = probability.sum(-1, dtype=torch.float64).cumsum(-1)[row_A]
    point = u_A * cumulative[:, -1]
    block_A = _first_above(cumulative, point)
    before = torch.nn.functional.pad(cumulative, (1, 0)).gather(1, block_A[:, None])[:, 0]
    inside = probability[row_A, block_A].cumsum(-1, dtype=torch.float64)
    return block_A * BLOCK + _first_above(inside, point - before)


def _first_above(cumulative: Tensor, point: Tensor) -> Tensor:
    """Return the first index whose cumulative sum is above the point [A], never one that adds nothing to the sum."""
    index = torch.searchsorted(cumulative, point[:, None], right=True)[:, 0]
    last = (cumulative < cumulative[:, -1:]).sum(-1)
    return torch.minimum(index, last)
