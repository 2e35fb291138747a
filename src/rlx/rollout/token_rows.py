"""Completions as rows: what was generated, in the one container of experience."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from rlx.rollout.token_runner import Completions
from rlx.trajectory import Batch, Trajectory


def token_trajectory(prompts: Sequence[Sequence[int]], completions: Completions, score_S: np.ndarray) -> Trajectory:
    """Return S completed sequences as a Trajectory, T = the longest sequence less one token.

    prompts: the tokens of each completion's prompt. score_S: float32, each sequence's reward, which stands at the last
    token of its completion; of it, what environments gave for turns stands at theirs. A step reads a token (`obs`) and
    acts with the one that follows (`action`); only steps that act with a token that was drawn count (`mask`). Values
    are not known yet and are 0.
    """
    columns = (completions.tokens, completions.logp, completions.version)
    tokens, logps, versions = (completions.split(column) for column in columns)
    drawns = None if completions.drawn is None else completions.split(completions.drawn)
    rewards = None if completions.reward is None else completions.split(completions.reward)
    first_S = np.array([len(prompt) - 1 for prompt in prompts], np.int64)  # the step that acts with its first token
    end_S = first_S + completions.length
    shape = len(prompts), int(end_S.max(initial=1))
    obs, action = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    logp, reward = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
    version = np.zeros(shape, np.int64)
    for row, (prompt, completion) in enumerate(zip(prompts, tokens, strict=True)):
        first, end = first_S[row], end_S[row]
        obs[row, : first + 1], obs[row, first + 1 : end] = prompt, completion[:-1]
        action[row, :first], action[row, first:end] = prompt[1:], completion
        logp[row, first:end], version[row, first:end] = logps[row], versions[row]
        if rewards is not None:
            reward[row, first:end] = rewards[row]
    step = np.arange(shape[1])
    mask = (step >= first_S[:, None]) & (step < end_S[:, None])
    last = mask & (step == end_S[:, None] - 1)
    if rewards is not None:
        score_S = score_S - np.array([of_one.sum() for of_one in rewards], np.float32)  # what comes beside them
    reward[last] += score_S[completions.length > 0]
    if drawns is not None:
        mask[mask] = np.concatenate(drawns)
    unknown = np.broadcast_to(np.float32(0), shape[::-1])
    return Trajectory(
        obs=obs.T,
        action=action.T,
        logp=logp.T,
        value=unknown,
        next_value=unknown,
        reward=reward.T,
        terminated=(last & completions.stopped[:, None]).T,
        truncated=(last & ~completions.stopped[:, None]).T,
        mask=mask.T,
        first=np.broadcast_to(step[:, None] == 0, shape[::-1]),
        weights_version=version.T,
    )


def token_batch(trajectory: Trajectory, length_S: np.ndarray) -> Batch:
    """Return the rows [S, T] that learners take, of a trajectory [T, S]; length_S: int64, steps of each sequence."""
    names = ("obs", "action", "mask", "logp", "reward", "terminated", "truncated", "weights_version")
    columns = {name: torch.from_numpy(np.require(getattr(trajectory, name).T, None, ["C", "W"])) for name in names}
    return Batch(**columns, length=torch.from_numpy(length_S))
