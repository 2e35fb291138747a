"""RewardModel: a language model's trunk and a scalar head, which scores whole sequences."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from rlx.nets.ragged import parts_by_length, positions_within
from rlx.nets.transformer import check_trunk, freeze_head, gradient_modes, resolved_layout
from rlx.nets.trunk import Layout, Trunk
from rlx.trajectory import Batch


class RewardModel(nn.Module):
    """Scores a sequence by the last hidden state of its last token, which lengths tell and no token id does.

    `mean` and `std`, which `normalize` sets, make scores of mean 0 and standard deviation 1 of reference samples.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        model: nn.Module,
        *,
        layout: Layout | Literal["auto"] = "auto",
        dropout: bool = False,
        activation_checkpointing: bool = False,
        compile: bool = False,
    ) -> None:
        """`model`: a causal language model, or a peft model around one; its head is not used. Else as the policy."""
        super().__init__()
        self.model, self.layout = model, layout
        self.dropout, self.activation_checkpointing, self.compile_layers = dropout, activation_checkpointing, compile
        self.trunk = Trunk(model)
        check_trunk(self.trunk)
        freeze_head(model)
        size = self.trunk.hidden_size
        self.score_head = nn.Linear(size, 1, device=next(model.parameters()).device)
        # Stiennon et al. 2020 (arXiv:2009.01325), appendix B.1: small, so that no sequence begins as a favourite.
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            self.score_head.weight.copy_(torch.randn(1, size, generator=generator, device="cpu") / (size + 1) ** 0.5)
            self.score_head.bias.zero_()
        self.register_buffer("mean", torch.zeros(()))
        self.register_buffer("std", torch.ones(()))
        self.eval()

    def normalize(self, mean: float, std: float) -> None:
        """From now on `score` subtracts `mean` and divides by `std`."""
        if not std > 0:
            raise ValueError(f"the standard deviation of scores must be positive, not {std}: all samples score alike.")
        self.mean.fill_(mean)
        self.std.fill_(std)

    @torch.no_grad()
    def score(self, tokens: Tensor, length: Tensor, *, max_tokens: int = 4096) -> Tensor:
        """Return normalised scores [S] of tokens [S, L], of which the first length [S] count, in their parts."""
        scores = torch.empty(len(tokens), device=tokens.device)
        for rows in parts_by_length(length, max_tokens, self._layout(tokens) == "packed"):
            longest = max(1, int(length[rows[-1]]))
            scores[rows] = self._raw(tokens[rows, :longest], length[rows]).float()
        return (scores - self.mean) / self.std

    def evaluate(self, minibatch: Batch) -> Tensor:
        """Return the scores, not normalised, of rows of a batch: [S], or [P, 2] of pairs. Differentiable.

        A row is its obs and the last action, which no position of `obs` holds.
        """
        width = minibatch.obs.shape[-1]
        length = minibatch.length.reshape(-1)
        obs, action = (tensor.reshape(-1, width) for tensor in (minibatch.obs, minibatch.action))
        tokens = torch.cat([obs, obs.new_zeros(len(obs), 1)], 1)
        tokens.scatter_(1, length[:, None], action.gather(1, (length - 1).clamp(min=0)[:, None]))
        return self._raw(tokens, length + 1).view(minibatch.length.shape)

    def columns(self, minibatch: Batch, names: tuple[str, ...]) -> dict[str, Tensor]:
        """Return {"score": the normalised scores}, [S] or [P, 2]."""
        return {name: (self.evaluate(minibatch) - self.mean) / self.std for name in names if name == "score"}

    def parts(self, batch: Batch, max_tokens: int) -> list[Tensor]:
        """Return row numbers in parts of at most `max_tokens` tokens, as this model runs them best."""
        return parts_by_length(batch.length, max_tokens, self._layout(batch.obs) == "packed")

    def _layout(self, tokens: Tensor) -> Layout:
        layout = resolved_layout(self.layout, tokens.device)
        return "padded" if layout == "shared" else layout  # sequences are scored whole

    def _raw(self, tokens: Tensor, length: Tensor) -> Tensor:
        tokens = torch.where(positions_within(tokens, length), tokens, 0)
        last = torch.arange(len(tokens), device=tokens.device) * tokens.shape[1] + (length - 1).clamp(min=0)
        with gradient_modes([self.trunk], self.dropout, self.activation_checkpointing, self.compile_layers):
            hidden = self.trunk.hidden(tokens, length, last, self._layout(tokens), None)
        return self.score_head(hidden.to(self.score_head.weight.dtype)).squeeze(1)
