"""A row holds all of an observation, and the network gets it back; of whatever space."""

import pickle

import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.vector.utils import batch_space, concatenate, create_empty_array

from rlx.errors import EnvError
from rlx.nets.observation import MISFIT, ObservationLayout

SEEDS = range(200)


def encoded(layout, *observations):
    rows = np.full((len(observations), *layout.shape), 7, layout.dtype)  # whatever was there before
    for observation, row in zip(observations, rows, strict=True):
        layout.encode(observation, row)
    return rows


def assert_holds(seen, space, observation):
    """`seen` is what the network sees of one observation of a space."""
    match space:
        case spaces.Dict():
            assert seen.keys() == observation.keys()
            for key, part in space.spaces.items():
                assert_holds(seen[key], part, observation[key])
        case spaces.Tuple():
            for one_seen, part, value in zip(seen, space.spaces, observation, strict=True):
                assert_holds(one_seen, part, value)
        case spaces.Box():
            np.testing.assert_array_equal(seen, observation.astype(np.float32))
            assert seen.dtype in (torch.float32, torch.uint8) and seen.shape == (space.shape or (1,))
        case spaces.MultiBinary():
            np.testing.assert_array_equal(seen, observation.ravel())
        case spaces.Discrete():
            assert seen.sum() == 1 and seen[observation - space.start] == 1
        case spaces.MultiDiscrete():
            groups = seen.split(space.nvec.ravel().tolist())
            chosen = (observation - space.start).ravel()
            assert all(g.sum() == 1 and g[c] == 1 for g, c in zip(groups, chosen, strict=True))
        case spaces.Text():
            letters = sorted(space.character_set)
            table = seen.reshape(space.max_length, len(letters))
            assert table.sum() == len(observation)
            assert all(table[i, letters.index(letter)] == 1 for i, letter in enumerate(observation))
        case spaces.OneOf():
            number, value = observation
            assert seen[: len(space.spaces)].argmax() == number
            parts = seen[len(space.spaces) :].split([spaces.flatdim(part) for part in space.spaces])
            for index, (part, own) in enumerate(zip(parts, space.spaces, strict=True)):
                expected = spaces.flatten(own, value) if index == number else np.zeros(len(part))
                np.testing.assert_array_equal(part, np.float32(expected))


def first(tree):
    if isinstance(tree, dict):
        return {key: first(part) for key, part in tree.items()}
    return tuple(map(first, tree)) if isinstance(tree, tuple) else tree[0]


@pytest.mark.parametrize("seed", SEEDS)
def test_what_is_encoded_comes_back(seed, random_observation_space):
    space = random_observation_space(seed)
    layout = ObservationLayout(space)
    for _ in range(3):
        observation = space.sample()
        rows = torch.from_numpy(encoded(layout, observation))
        assert_holds(first(layout.tree(rows)), space, observation)
        numbers = [
            part for part in (layout.split(rows).vector, *layout.split(rows).images.values()) if part is not None
        ]
        assert sum(part[0].numel() for part in numbers) == sum(leaf_sizes(layout.tree(rows)))


def leaf_sizes(tree):
    parts = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, tuple) else None
    return [tree[0].numel()] if parts is None else [size for part in parts for size in leaf_sizes(part)]


@pytest.mark.parametrize("seed", SEEDS)
def test_a_batch_as_gymnasium_makes_it_is_its_observations(seed, random_observation_space):
    space = random_observation_space(seed)
    layout = ObservationLayout(space)
    observations = [space.sample() for _ in range(3)]
    batch = concatenate(space, observations, create_empty_array(space, 3))
    assert batch_space(space, 3).contains(batch)
    rows = layout.encode_batch(batch, np.full((3, *layout.shape), 7, layout.dtype))
    np.testing.assert_array_equal(rows, encoded(layout, *observations))
    assert layout.num_observations(batch) == 3 and layout.num_observations(observations[0]) is None


@pytest.mark.parametrize("seed", range(50))
def test_a_layout_is_the_same_elsewhere_and_its_views_take_no_copy(seed, random_observation_space):
    layout = ObservationLayout(random_observation_space(seed))
    again = pickle.loads(pickle.dumps(layout))
    rows = torch.from_numpy(encoded(layout, *(layout.space.sample() for _ in range(4))))
    for own, other in zip(layout.split(rows), again.split(rows), strict=True):
        for part, twin in zip(*(one.values() if isinstance(one, dict) else [one] for one in (own, other)), strict=True):
            if part is not None:
                assert torch.equal(part, twin)
                assert part.untyped_storage().data_ptr() == rows.untyped_storage().data_ptr()


def test_vectors_and_single_images_are_rows_as_they_are():
    vector, image = spaces.Box(-1, 1, (3,), np.float64), spaces.Box(0, 255, (8, 8, 3), np.uint8)
    for space, dtype in ((vector, np.float32), (image, np.uint8), (spaces.Box(0, 1, (4, 5, 1)), np.float32)):
        layout = ObservationLayout(space)
        assert (layout.shape, layout.dtype, layout.is_verbatim) == (space.shape, dtype, True)
    assert not ObservationLayout(vector).images and list(ObservationLayout(image).images) == [""]


MIXED = spaces.Dict(
    {
        "camera": spaces.Box(0, 255, (3, 3, 1), np.uint8),
        "goal": spaces.Discrete(3),
        "speed": spaces.Box(-9, 9, (2,), np.float32),
        "action_mask": spaces.MultiBinary(2),
    }
)


def test_a_row_of_several_parts_worked_out_by_hand():
    """Floats: speed, goal one-hot, mask: 7 x 4 bytes. Then 9 pixels, and 3 bytes up to the next multiple of 4."""
    layout = ObservationLayout(MIXED)
    camera = np.arange(9, dtype=np.uint8).reshape(3, 3, 1)
    observation = {"camera": camera, "goal": 1, "speed": np.float32([4, 5]), "action_mask": np.int8([0, 1])}
    (row,) = encoded(layout, observation)
    assert row.dtype == np.uint8 and row.shape == layout.shape == (40,)
    np.testing.assert_array_equal(row[:28].view(np.float32), [4, 5, 0, 1, 0, 0, 1])
    np.testing.assert_array_equal(row[28:], [*range(9), 0, 0, 0])
    vector, images, mask = layout.split(torch.from_numpy(row))
    assert vector.tolist() == [4, 5, 0, 1, 0] and mask.tolist() == [0, 1]
    np.testing.assert_array_equal(images["camera"], camera)
    np.testing.assert_array_equal(layout.scalable(row), [4, 5])
    assert layout.tree(torch.from_numpy(row)).keys() == {"camera", "goal", "speed"}
    assert repr(layout) == "uint8 [40]: 5 numbers, image camera (3, 3, 1) uint8, mask of 2 choices"


def test_a_mask_beside_vectors_is_cut_off_what_the_network_reads():
    layout = ObservationLayout(
        spaces.Dict({"action_mask": spaces.Box(0, 1, (3,), np.int8), "x": spaces.Box(-1, 1, (2,))})
    )
    row = encoded(layout, {"action_mask": np.int8([1, 0, 1]), "x": np.float32([0.5, -0.5])})
    np.testing.assert_array_equal(row, [[0.5, -0.5, 1, 0, 1]])
    np.testing.assert_array_equal(layout.inputs(row), [[0.5, -0.5]])
    np.testing.assert_array_equal(layout.mask(row), [[1, 0, 1]])


def test_only_a_key_at_the_top_is_a_mask():
    inner = spaces.Dict({"in": spaces.Dict({"action_mask": spaces.MultiBinary(2)})})
    assert (ObservationLayout(inner).mask_size, ObservationLayout(inner).vector_size) == (0, 2)


@pytest.mark.parametrize(
    ("space", "value"),
    [
        (spaces.Box(-1, 1, (2, 2)), np.zeros(4)),
        (spaces.Box(-1, 1, (2, 2)), "abcd"),
        (spaces.Discrete(3), 3),
        (spaces.Discrete(3), -1),
        (spaces.Discrete(3), 1.5),
        (spaces.Discrete(3, start=1), 0),
        (spaces.MultiDiscrete([2, 3]), [0, 3]),
        (spaces.MultiBinary(2), [0, 1, 1]),
        (spaces.Text(2, charset="ab"), "abc"),
        (spaces.Text(2, charset="ab"), "c"),
        (spaces.OneOf([spaces.Discrete(2), spaces.Discrete(2)]), (2, 0)),
        (spaces.Dict({"a": spaces.Discrete(2)}), {"b": 0}),
        (spaces.Dict({"a": spaces.Discrete(2)}), 1),
        (spaces.Tuple([spaces.Discrete(2)]), ()),
        (spaces.Dict({"a": spaces.Discrete(2)}), None),
    ],
)
def test_what_is_not_of_the_space_is_refused(space, value):
    layout = ObservationLayout(space)
    with pytest.raises(MISFIT):
        layout.encode(value, np.zeros(layout.shape, layout.dtype))


def test_a_batch_of_another_number_is_refused():
    layout = ObservationLayout(spaces.Dict({"a": spaces.Discrete(2)}))
    with pytest.raises(ValueError, match="2 observations in place of 3"):
        layout.encode_batch({"a": np.array([0, 1])}, np.zeros((3, 2), np.float32))


def test_a_space_without_a_number_is_refused():
    with pytest.raises(EnvError, match="holds no number that a policy could look at"):
        ObservationLayout(spaces.Dict({"action_mask": spaces.MultiBinary(3)}))
