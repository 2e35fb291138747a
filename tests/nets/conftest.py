"""Random gymnasium spaces, nested up to two levels deep, from a seed."""

import numpy as np
import pytest
from gymnasium import spaces

LETTERS = "abcdef"


def random_space(rng: np.random.Generator, kinds: list[str], depth: int = 2) -> spaces.Space:
    """Return a space whose basic parts are of `kinds`, with a generator of its own."""
    composite = ["dict", "tuple"] if depth else []
    kind = rng.choice([*kinds, *composite])
    seed = int(rng.integers(1 << 31))

    def sizes(low: int, high: int, count: int | None = None) -> list[int]:
        return rng.integers(low, high, count or rng.integers(1, 4)).tolist()

    def parts() -> list[spaces.Space]:
        return [random_space(rng, kinds, depth - 1) for _ in range(rng.integers(1, 4))]

    match kind:
        case "dict":
            named = [(f"k{9 - number}", part) for number, part in enumerate(parts())]
            return spaces.Dict(named if rng.random() < 0.5 else dict(named), seed=seed)
        case "tuple":
            return spaces.Tuple(parts(), seed=seed)
        case "one_of":
            return spaces.OneOf([random_space(rng, ["discrete", "box"], 0) for _ in range(2)], seed=seed)
        case "discrete":
            return spaces.Discrete(*sizes(1, 6, 1), start=int(rng.integers(-3, 4)), seed=seed)
        case "multi_discrete":
            shape = sizes(1, 4)
            low = rng.integers(-3, 4, shape)
            return spaces.MultiDiscrete(rng.integers(1, 6, shape), start=low, seed=seed)
        case "multi_binary":
            shape = sizes(1, 4)
            return spaces.MultiBinary(shape if len(shape) > 1 else shape[0], seed=seed)
        case "text":
            return spaces.Text(4, min_length=0, charset=frozenset(LETTERS), seed=seed)
        case "image":
            shape = [(9, 8), (9, 10, 3), (2, 9, 10), (2, 9, 10, 3), (2, 2, 2)][rng.integers(5)]
            return spaces.Box(0, 255, shape, np.uint8, seed=seed)
        case "float_image":
            return spaces.Box(-1, 1, (9, 9, 1), np.float32, seed=seed)
        case "integer_box":
            low = rng.integers(-5, 5, sizes(1, 4))
            return spaces.Box(low, low + rng.integers(0, 9, low.shape), dtype=np.int16, seed=seed)
        case "box":
            shape = tuple(sizes(1, 4, int(rng.integers(1, 5))))
            shape = () if rng.random() < 0.2 else shape if len(shape) != 3 else (*shape, 1)
            low = rng.uniform(-3, 1, shape)
            dtype = rng.choice([np.float32, np.float64])
            return spaces.Box(
                low.astype(dtype), (low + rng.uniform(0.5, 3, shape)).astype(dtype), dtype=dtype, seed=seed
            )
    raise AssertionError(kind)


OBSERVATIONS = [
    *("discrete", "multi_discrete", "multi_binary", "text", "one_of"),
    *("image", "float_image", "integer_box", "box"),
]
ACTIONS = ["discrete", "multi_discrete", "multi_binary", "integer_box", "box"]


@pytest.fixture
def random_observation_space():
    """A function that returns the observation space of a seed."""
    return lambda seed: random_space(np.random.default_rng(seed), OBSERVATIONS)


@pytest.fixture
def random_action_space():
    """A function that returns the action space of a seed."""
    return lambda seed: random_space(np.random.default_rng(seed), ACTIONS)
