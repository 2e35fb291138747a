"""What a policy chooses arrives in the environment as an action of its space."""

import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.vector.utils import batch_space, iterate

from rlx.nets.actions import ActionLayout


def random_rows(layout: ActionLayout, count: int, rng: np.random.Generator) -> np.ndarray:
    """Rows as a policy samples them: any choice, and floats far outside of any bounds."""
    columns = [rng.integers(0, size, count) for size in layout.sizes]
    columns += [rng.normal(0, 20, count) for _ in range(layout.num_floats)]
    return np.stack(columns, -1).astype(layout.dtype).reshape(count, *layout.shape)


@pytest.mark.parametrize("seed", range(200))
def test_every_row_becomes_an_action_of_the_space_alone_and_in_a_batch(seed, random_action_space):
    space = random_action_space(seed)
    layout = ActionLayout(space)
    rows = random_rows(layout, 5, np.random.default_rng(seed))
    kept = rows.copy()
    actions = list(layout.each(rows))
    batch = layout.to_env(rows)
    assert len(actions) == 5 and all(space.contains(action) for action in actions)
    batched = batch_space(space, 5)
    for action, from_batch in zip(actions, iterate(batched, batch), strict=True):
        assert_equal(space, action, from_batch)
    np.testing.assert_array_equal(rows, kept)


@pytest.mark.parametrize("seed", range(100))
def test_different_choices_are_different_actions(seed, random_action_space):
    """Every action of a space of choices is reached, and by one row only."""
    space = random_action_space(seed)
    layout = ActionLayout(space)
    if layout.num_floats or np.prod(layout.sizes, dtype=float) > 500:
        return
    rows = np.array(list(np.ndindex(*layout.sizes))).reshape(-1, *layout.shape)
    assert len({repr(action) for action in layout.each(rows)}) == np.prod(layout.sizes)


def assert_equal(space, action, other):
    if isinstance(space, spaces.Dict):
        for key, part in space.spaces.items():
            assert_equal(part, action[key], other[key])
    elif isinstance(space, spaces.Tuple):
        for part, one, twin in zip(space.spaces, action, other, strict=True):
            assert_equal(part, one, twin)
    else:
        np.testing.assert_array_equal(action, other)


def test_a_mixed_action_worked_out_by_hand():
    """The integers of all parts stand before the floats of all parts, each in the space's order."""
    space = spaces.Dict(
        [
            ("arm", spaces.Box(np.float32([-1, -3]), np.float32([1, 0.5]))),
            ("gear", spaces.Discrete(3, start=-1)),
            ("rest", spaces.Tuple([spaces.MultiBinary(2), spaces.Box(3, 5, (1,), np.int8), spaces.Box(-1, 1, (1,))])),
        ]
    )
    layout = ActionLayout(space)
    assert (layout.sizes, layout.num_floats, layout.shape, layout.dtype) == ([3, 2, 2, 3], 3, (7,), np.float32)
    (action,) = layout.each(np.float32([[2, 0, 1, 1, 9, -2, 0.25]]))
    assert space.contains(action)
    np.testing.assert_array_equal(action["arm"], [1, -2])
    assert action["gear"] == 1
    for part, expected in zip(action["rest"], ([0, 1], [4], [0.25]), strict=True):
        np.testing.assert_array_equal(part, expected)
    assert repr(layout) == "float32 [7]: 4 choices, 1 of [3, 2, 2, 3] each and 3 numbers"


def test_a_mask_must_leave_every_choice_something():
    layout = ActionLayout(spaces.MultiDiscrete([2, 3]))
    masks = np.array([[1, 0, 0, 0, 1], [1, 1, 0, 0, 0], [0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    assert layout.is_stuck(masks).tolist() == [False, True, True, False]


def test_floats_hold_every_choice_beside_them_exactly():
    layout = ActionLayout(spaces.Tuple([spaces.Discrete(1 << 24), spaces.Box(-1, 1, (1,))]))
    last = (1 << 24) - 1
    assert layout.each(np.array([[last, 0]], np.float32))[0][0] == last
