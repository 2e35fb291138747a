"""Completions as rows, against rows written by hand."""

import numpy as np

from rlx.rollout.token_rows import token_batch, token_trajectory
from rlx.rollout.token_runner import Completions

F, T = False, True

# A prompt of three tokens, answered and ended; of one, cut; of two, ended at once. 9 is EOS.
PROMPTS = [(1, 2, 3), (4,), (5, 6)]
COMPLETIONS = Completions(
    tokens=np.array([7, 8, 9, 7, 9, 7, 9]),
    logp=np.array([-1.0, -2.0, -3.0, -4.0, -5.0, -6.0, -7.0], np.float32),
    length=np.array([3, 3, 1]),
    stopped=np.array([T, F, T]),
    version=np.array([2, 2, 4, 3, 3, 3, 5]),
)


def test_rows_by_hand():
    trajectory = token_trajectory(PROMPTS, COMPLETIONS, np.array([0.5, 0.25, -1.0], np.float32))
    rows = token_batch(trajectory, np.array([5, 3, 2]))
    expected = {
        "obs": [[1, 2, 3, 7, 8], [4, 7, 9, 0, 0], [5, 6, 0, 0, 0]],
        "action": [[2, 3, 7, 8, 9], [7, 9, 7, 0, 0], [6, 9, 0, 0, 0]],
        "mask": [[F, F, T, T, T], [T, T, T, F, F], [F, T, F, F, F]],
        "logp": [[0, 0, -1, -2, -3], [-4, -5, -6, 0, 0], [0, -7, 0, 0, 0]],
        "reward": [[0, 0, 0, 0, 0.5], [0, 0, 0.25, 0, 0], [0, -1, 0, 0, 0]],
        "terminated": [[F, F, F, F, T], [F, F, F, F, F], [F, T, F, F, F]],
        "truncated": [[F, F, F, F, F], [F, F, T, F, F], [F, F, F, F, F]],
        "weights_version": [[0, 0, 2, 2, 4], [3, 3, 3, 0, 0], [0, 5, 0, 0, 0]],
        "length": [5, 3, 2],
    }
    assert rows.tensors.keys() == expected.keys()
    for name, values in expected.items():
        assert rows.tensors[name].tolist() == values, name
    assert trajectory.obs.shape == (5, 3)  # time first
    np.testing.assert_array_equal(trajectory.first, [[T] * 3] + [[F] * 3] * 4)


def test_tokens_are_never_taken_for_what_they_look_like():
    """An EOS in the midst of a cut completion, a prompt of EOS and zeros: lengths and `stopped` say what is what."""
    completions = Completions(
        tokens=np.array([9, 0, 9]),
        logp=np.array([-1.0, -2.0, -3.0], np.float32),
        length=np.array([3]),
        stopped=np.array([F]),
        version=np.zeros(3, np.int64),
    )
    rows = token_batch(token_trajectory([(9, 0)], completions, np.ones(1, np.float32)), np.array([4]))
    assert rows.obs.tolist() == [[9, 0, 9, 0]]
    assert rows.action.tolist() == [[0, 9, 0, 9]]
    assert rows.mask.tolist() == [[F, T, T, T]]
    assert rows.truncated.tolist() == [[F, F, F, T]] and not rows.terminated.any()


def test_one_token_for_one_token():
    completions = Completions(np.array([9]), np.array([-0.5], np.float32), np.array([1]), np.array([T]), np.array([0]))
    rows = token_batch(token_trajectory([(9,)], completions, np.ones(1, np.float32)), np.array([1]))
    assert (rows.obs.tolist(), rows.action.tolist(), rows.mask.tolist()) == ([[9]], [[9]], [[True]])
    assert (rows.reward.tolist(), rows.terminated.tolist()) == ([[1.0]], [[True]])
