"""torch's varlen_attn as its documentation says, for devices on which it has no kernel: with masks, in float64."""

import torch


class Varlen:
    """Is called as varlen_attn; counts its calls."""

    def __init__(self):
        self.calls = 0

    def __call__(
        self, query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale, window_size, enable_gqa, seqused_k=None
    ):
        self.calls += 1
        (tokens_q, heads, size), (tokens_k, key_heads, _) = query.shape, key.shape
        assert query.dtype == key.dtype == value.dtype and value.shape == key.shape
        assert query.stride(-1) == key.stride(-1) == value.stride(-1) == 1
        assert heads == key_heads or (enable_gqa and heads % key_heads == 0)
        assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32 and cu_seq_q.shape == cu_seq_k.shape
        lengths = cu_seq_k.diff() if seqused_k is None else seqused_k
        assert lengths.dtype == torch.int32 and lengths.shape == (len(cu_seq_q) - 1,)
        assert (cu_seq_q.diff() <= max_q).all() and (lengths <= max_k).all() and (lengths <= cu_seq_k.diff()).all()
        assert cu_seq_q[-1] == tokens_q and cu_seq_k[-1] <= tokens_k

        sequence_q, at_q = _places(cu_seq_q, tokens_q)
        sequence_k, at_k = _places(cu_seq_k, tokens_k)
        known = (sequence_k < len(lengths)) & (at_k < lengths[sequence_k.clamp(max=len(lengths) - 1)])
        # The last query of a sequence stands where its last key does.
        at_q = at_q + (lengths - cu_seq_q.diff())[sequence_q]
        left, right = window_size
        seen = known & (sequence_q[:, None] == sequence_k)
        if left >= 0:
            seen &= at_k >= at_q[:, None] - left
        if right >= 0:
            seen &= at_k <= at_q[:, None] + right
        keys, values = (one.double().repeat_interleave(heads // key_heads, 1) for one in (key, value))
        scores = torch.einsum("qhd,khd->hqk", query.double(), keys) * (size**-0.5 if scale is None else scale)
        law = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        return torch.einsum("hqk,khd->qhd", law, values).to(query.dtype)


def _places(bounds, tokens):
    """Return the sequence that each token belongs to, and where it is in it."""
    token = torch.arange(tokens)
    sequence = torch.searchsorted(bounds, token.int(), right=True) - 1
    return sequence, token - bounds[sequence]
