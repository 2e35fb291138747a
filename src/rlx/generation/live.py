"""The samples that are being generated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rlx.generation.request import Completion, Request
from rlx.generation.uniform import sample_keys

_COLUMNS = ("share_A", "sample_A", "place_A", "row_A", "step_A", "limit_A", "prompt_A", "key_A", "stop_A_K")


@dataclass(frozen=True)
class Share:
    """Samples first to first + count - 1 of a request, which begin together."""

    request: Request
    number: int
    """Of the request."""
    first: int
    count: int
    limit: int
    """Tokens of a completion at most, by the request and by the context."""

    @property
    def length(self) -> int:
        """Tokens of prompt and completion at most."""
        return len(self.request.prompt) + self.limit


class Live:
    """What is known of each live sample: arrays [A], in no order. Several may share a row, see rows.py."""

    def __init__(self, capacity: int, limit: int) -> None:
        self.capacity = capacity
        self.rows = 0
        self._tokens = np.zeros((capacity, limit), np.int64)
        self._logp = np.zeros((capacity, limit), np.float32)
        self._version = np.zeros((capacity, limit), np.int64)
        self._free = [*range(capacity)]
        self._shares: dict[int, Share] = {}
        self._unfinished: dict[int, int] = {}  # samples of each share
        self._shares_so_far = 0
        self.share_A = self.sample_A = self.place_A = self.row_A = np.zeros(0, np.int64)
        self.step_A = self.limit_A = self.prompt_A = self.last_A = np.zeros(0, np.int64)
        self.key_A = np.zeros(0, np.uint64)
        self.stop_A_K = np.zeros((0, 0), np.int64)

    @property
    def count(self) -> int:
        """Live samples, A."""
        return len(self.row_A)

    @property
    def length_A(self) -> np.ndarray:
        """Tokens of each sample that are in its row: all but the newest, int64 [A]."""
        return self.prompt_A + self.step_A - 1

    def add(self, shares: Sequence[Share]) -> None:
        """Add fresh samples; each share has one row, after the rows there are."""
        counts = [share.count for share in shares]
        total = sum(counts)
        stops = max(self.stop_A_K.shape[1], *(len(share.request.stop_ids) for share in shares))
        stop_S_K = np.full((len(shares), stops), -1, np.int64)
        for row, share in zip(stop_S_K, shares, strict=True):
            row[: len(share.request.stop_ids)] = sorted(share.request.stop_ids)
        numbers = np.repeat(np.arange(len(shares)), counts)
        fresh = {
            "share_A": numbers + self._shares_so_far,
            "sample_A": np.concatenate([np.arange(share.first, share.first + share.count) for share in shares]),
            "place_A": np.array(self._free[:total], np.int64),
            "row_A": numbers + self.rows,
            "step_A": np.zeros(total, np.int64),
            "limit_A": np.array([share.limit for share in shares])[numbers],
            "prompt_A": np.array([len(share.request.prompt) for share in shares])[numbers],
            "key_A": np.concatenate([sample_keys(share.request.seed, share.first, share.count) for share in shares]),
            "stop_A_K": stop_S_K[numbers],
        }
        missing = stops - self.stop_A_K.shape[1]
        self.stop_A_K = np.pad(self.stop_A_K, ((0, 0), (0, missing)), constant_values=-1)
        for name, column in fresh.items():
            setattr(self, name, np.concatenate([getattr(self, name), column]))
        del self._free[:total]
        for number, share in enumerate(shares, self._shares_so_far):
            self._shares[number], self._unfinished[number] = share, share.count
        self._shares_so_far += len(shares)
        self.rows += len(shares)

    def record(self, token_A: np.ndarray, logp_A: np.ndarray, version: int) -> list[tuple[int, int, Completion]]:
        """Append what was drawn; return (request, sample, completion) of those that end, which live no longer.

        version: of the weights that it was drawn with.
        """
        self._tokens[self.place_A, self.step_A] = token_A
        self._logp[self.place_A, self.step_A] = logp_A
        self._version[self.place_A, self.step_A] = version
        self.step_A = self.step_A + 1
        self.last_A = token_A
        stopped_A = (self.stop_A_K == token_A[:, None]).any(1)
        ended_A = stopped_A | (self.step_A >= self.limit_A)
        if not ended_A.any():
            return []
        ended = [self._end(int(index), bool(stopped_A[index])) for index in np.flatnonzero(ended_A)]
        for name in (*_COLUMNS, "last_A"):
            setattr(self, name, getattr(self, name)[~ended_A])
        return ended

    def sequences(self) -> list[list[int]]:
        """Return the tokens that stand in each row."""
        _, first_R = np.unique(self.row_A, return_index=True)  # samples that share a row have drawn alike
        drawn = [self._tokens[self.place_A[a], : self.step_A[a] - 1].tolist() for a in first_R]
        shares = [self._shares[int(self.share_A[a])] for a in first_R]
        return [[*share.request.prompt, *tokens] for share, tokens in zip(shares, drawn, strict=True)]

    def move(self, row_A: np.ndarray) -> None:
        """Take over the samples' new rows."""
        self.row_A = row_A
        self.rows = int(row_A.max()) + 1 if len(row_A) else 0
        self.token_R, self.position_R = np.zeros(self.rows, np.int64), np.zeros(self.rows, np.int64)
        self.token_R[row_A] = self.last_A
        self.position_R[row_A] = self.length_A

    def _end(self, index: int, stopped: bool) -> tuple[int, int, Completion]:
        place, steps, number = int(self.place_A[index]), int(self.step_A[index]), int(self.share_A[index])
        tokens, logp, version = (column[place, :steps].copy() for column in (self._tokens, self._logp, self._version))
        share = self._shares[number]
        self._free.append(place)
        self._unfinished[number] -= 1
        if not self._unfinished[number]:
            del self._shares[number], self._unfinished[number]
        return share.number, int(self.sample_A[index]), Completion(tokens, logp, version, stopped)
