"""Memory: an LSTM or a GRU over sequences that hold parts of several episodes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

KINDS: dict[str, type[nn.LSTM] | type[nn.GRU]] = {"lstm": nn.LSTM, "gru": nn.GRU}


class Memory(nn.Module):
    """One recurrent layer. Its state is one vector a sequence, whatever the kind: an LSTM's h and c stand side by side.

    Orthogonal weights and zero biases, as in CleanRL's recurrent PPO; Stable-Baselines3 keeps torch's own start.
    """

    def __init__(self, kind: str, inputs: int, size: int, generator: torch.Generator) -> None:
        super().__init__()
        self.size = size
        self.state_size = 2 * size if kind == "lstm" else size
        self.layer = KINDS[kind](inputs, size, batch_first=True)
        for name, parameter in self.layer.named_parameters():
            if name.startswith("weight"):
                nn.init.orthogonal_(parameter, generator=generator)
            else:
                nn.init.zeros_(parameter)

    def forward(self, x: Tensor, state: Tensor, first: Tensor) -> Tensor:
        """Return the outputs [S, L, size] for x [S, L, F], where `state` [S, state_size] was before the first step.

        The memory is empty before every step where `first` [S, L] is true. Sequences are cut there, and the pieces,
        filled up to equal length, run side by side: one call of the layer. On a CPU that takes half the time of packed
        sequences, or of a loop over the steps.
        """
        count, length, _ = x.shape
        begins = first.clone()
        begins[:, 0] = True
        start = begins.flatten().nonzero().squeeze(1)  # [G]: where the pieces begin, and so where the last ones end
        is_carried = ~first[:, 0]
        state = state * is_carried.unsqueeze(1)
        if len(start) == count:
            return self._run(x, state) if count else x.new_zeros(0, length, self.size)
        pieces = start.diff(append=start.new_tensor([count * length]))
        offset = torch.arange(int(pieces.max()), device=x.device)
        is_step = offset < pieces.unsqueeze(1)
        index = (start.unsqueeze(1) + offset).clamp(max=count * length - 1)
        states = state.new_zeros(len(start), self.state_size)
        states[start % length == 0] = state
        return self._run(x.flatten(0, 1)[index], states)[is_step].view(count, length, self.size)

    def step(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Return the output [B, size] for x [B, F] and the state [B, state_size] after it."""
        weights = tuple(self.layer.parameters())  # a cell's call costs a third of the layer's
        if isinstance(self.layer, nn.GRU):
            after = torch.gru_cell(x, state, *weights)
            return after, after
        y, cell = torch.lstm_cell(x, state.split(self.size, -1), *weights)
        return y, torch.cat([y, cell], -1)

    def _run(self, x: Tensor, state: Tensor) -> Tensor:
        parts = [part.contiguous() for part in state.unsqueeze(0).split(self.size, -1)]
        return self.layer(x, parts[0] if len(parts) == 1 else tuple(parts))[0]
