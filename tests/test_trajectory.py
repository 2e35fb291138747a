"""The containers: shared memory, order along the axes, and what a slice holds."""

import pickle

import numpy as np
import pytest
import torch

from rlx.trajectory import Batch, Trajectory


def numbered(steps: int, envs: int, start: int = 0) -> Trajectory:
    """Return a trajectory whose fields tell time and environment: obs[t, b] = start + 10 t + b."""
    number = start + 10 * np.arange(steps)[:, None] + np.arange(envs)
    as_float, as_bool = number.astype(np.float32), number % 2 == 0
    return Trajectory(
        obs=np.stack([as_float, -as_float], axis=-1),
        action=number,
        logp=as_float,
        value=as_float,
        next_value=as_float,
        reward=as_float,
        terminated=as_bool,
        truncated=as_bool,
        mask=as_bool,
        first=~as_bool,
        weights_version=number,
    )


def test_tensors_share_the_trajectory_s_memory():
    trajectory = numbered(2, 3)
    batch = trajectory.tensors()
    trajectory.reward[1, 2] = 99
    assert batch.reward[1, 2].item() == 99
    assert batch.mask.dtype == torch.bool and batch.action.dtype == torch.int64


def test_concatenate_joins_environments_in_the_order_given():
    joined = Trajectory.concatenate([numbered(2, 2), numbered(2, 1, start=100)])
    assert joined.action.tolist() == [[0, 1, 100], [10, 11, 110]]
    assert joined.obs.shape == (2, 3, 2) and joined.obs[1, 2].tolist() == [110, -110]
    assert joined.mask.tolist() == [[True, False, True], [True, False, True]]


def test_concatenate_refuses_fragments_of_different_length():
    with pytest.raises(ValueError, match="dimension"):
        Trajectory.concatenate([numbered(2, 1), numbered(3, 1)])


def test_flatten_keeps_a_sample_s_fields_together():
    batch = numbered(3, 2).tensors().flatten("obs", "action", advantage=torch.arange(6).view(3, 2))
    assert sorted(batch.tensors) == ["action", "advantage", "obs"] and len(batch) == 6
    assert batch.action.tolist() == [0, 1, 10, 11, 20, 21]
    assert batch.obs[:, 0].tolist() == batch.action.tolist()
    assert batch.advantage.tolist() == [0, 1, 2, 3, 4, 5]


def test_sequences_are_cut_for_each_environment_and_end_in_zeros_that_do_not_count():
    """5 steps of 2 environments in rows of 2 steps: three rows each, of which the last has one step."""
    trajectory = numbered(5, 2, start=1)
    trajectory.mask = np.ones((5, 2), bool)
    batch = trajectory.tensors().sequences(2, "obs", "action", "mask", advantage=torch.arange(10).view(5, 2))
    assert batch.action.tolist() == [[1, 11], [2, 12], [21, 31], [22, 32], [41, 0], [42, 0]]
    assert batch.advantage.tolist() == [[0, 2], [1, 3], [4, 6], [5, 7], [8, 0], [9, 0]]
    assert batch.mask.tolist() == [[True, True]] * 4 + [[True, False]] * 2
    assert batch.obs.shape == (6, 2, 2) and batch.obs[..., 0].tolist() == batch.action.tolist()
    assert len(batch) == 6 and batch.take(torch.tensor([3])).action.tolist() == [[22, 32]]


def test_a_sequence_as_long_as_the_fragment_is_an_environment_s_row():
    batch = numbered(3, 2).tensors().sequences(3, "action", "obs")
    assert batch.action.tolist() == [[0, 10, 20], [1, 11, 21]]
    assert numbered(3, 2).tensors().sequences(4, "action").action.tolist() == [[0, 10, 20, 0], [1, 11, 21, 0]]


def test_a_sequence_begins_with_the_state_before_its_first_step():
    """States before the steps 0, 2 and 4 of two environments: [c, b] holds 10 c + b."""
    trajectory = numbered(5, 2)
    trajectory.state = (10.0 * np.arange(3)[:, None] + np.arange(2))[..., None].astype(np.float32)
    batch = trajectory.tensors()
    assert batch.sequences(2, "action", "state").state[:, 0].tolist() == [0, 1, 10, 11, 20, 21]
    assert batch.sequences(5, "action", "state").state[:, 0].tolist() == [0, 1]
    with pytest.raises(ValueError, match="known before 3 steps, and sequences of 3 need 2"):
        batch.sequences(3, "action", "state")


def test_a_trajectory_without_a_state_has_no_such_field():
    assert "state" not in numbered(2, 1).tensors().tensors
    assert Trajectory.concatenate([numbered(2, 1), numbered(2, 1)]).state is None


def test_take_copies_the_rows_in_the_order_of_the_index():
    batch = numbered(3, 2).tensors().flatten("obs", "action")
    taken = batch.take(torch.tensor([5, 0, 5]))
    batch.action.zero_()
    assert taken.action.tolist() == [21, 0, 21] and taken.obs[:, 1].tolist() == [-21, 0, -21]


def test_split_yields_views_and_keeps_the_shorter_last_slice():
    batch = numbered(5, 1).tensors().flatten("action")
    slices = list(batch.split(2))
    assert [s.action.tolist() for s in slices] == [[0, 10], [20, 30], [40]]
    slices[2].action.fill_(-1)
    assert batch.action[-1].item() == -1


def test_an_unknown_field_is_named_with_those_there_are():
    batch = Batch(obs=torch.zeros(1), action=torch.zeros(1))
    with pytest.raises(AttributeError, match=r"no field 'rewad'; it has \['action', 'obs'\]"):
        _ = batch.rewad


def test_a_batch_survives_pickling():
    batch = pickle.loads(pickle.dumps(Batch(obs=torch.arange(3))))
    assert batch.obs.tolist() == [0, 1, 2]


def test_tensors_share_writable_memory_and_copy_what_is_read_only():
    """What came from another process is mapped read-only; writing into a tensor of it would be a SIGSEGV."""
    trajectory = numbered(2, 2)
    trajectory.obs.flags.writeable = False
    tensors = trajectory.tensors()
    tensors.obs.zero_()
    tensors.reward.zero_()
    assert trajectory.obs.any() and not trajectory.reward.any()
