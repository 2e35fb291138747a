"""Uniform numbers that belong to a sample and a step, whoever else draws."""

import numpy as np

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MASK = 2**64 - 1


def sample_keys(seed: int, first: int, count: int) -> np.ndarray:
    """Return the keys of samples first, first + 1, ... of a request with this seed, uint64 [count]."""
    start = _mix(np.array([seed & _MASK], np.uint64) + _GOLDEN)
    return _mix(start + np.arange(first, first + count, dtype=np.uint64) * _GOLDEN)


def uniform(key_A: np.ndarray, step_A: np.ndarray) -> np.ndarray:
    """Return what each sample draws at its step, float64 [A] in [0, 1): element `step` of SplitMix64 from its key.

    52 bits, so that u * x is below x for every positive x, rounding included.
    """
    return (_mix(key_A + (step_A.astype(np.uint64) + np.uint64(1)) * _GOLDEN) >> np.uint64(12)) * 2.0**-52


def _mix(state: np.ndarray) -> np.ndarray:
    """Return SplitMix64's output for these states (Steele, Lea and Flood, 2014)."""
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))
