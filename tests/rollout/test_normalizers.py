import json

import numpy as np

from rlx.rollout.normalizers import DiscountedReturn, Normalizer, ObsNormalizer, RewardScaler, RunningMoments


def moments_of(sample_N):
    moments = RunningMoments()
    moments.update(sample_N)
    return moments


def test_merging_runners_equals_one_pass_over_all_samples():
    rng = np.random.default_rng(0)
    parts = [rng.normal(1e4, 3.0, (n, 2)) for n in (1, 50, 0, 7)]
    merged = RunningMoments()
    for part in parts:
        merged.merge(moments_of(part))
    everything = np.concatenate(parts)
    assert merged.count == 58
    np.testing.assert_allclose(merged.mean, everything.mean(0), rtol=1e-12)
    np.testing.assert_allclose(merged.variance, everything.var(0), rtol=1e-12)


def test_float32_samples_lose_no_digits():
    """float32 sums of 1e4-sized numbers would be wrong in the third digit of a variance of 1e-4."""
    sample_N = (1e4 + np.arange(1000) % 2 * 0.02).astype(np.float32)[:, None]
    np.testing.assert_allclose(moments_of(sample_N).variance, sample_N.astype(np.float64).var(0), rtol=1e-12)


def test_moments_survive_json():
    moments = moments_of(np.array([1.0, 2.0, 4.0]))
    restored = RunningMoments.from_state(json.loads(json.dumps(moments.get_state())))
    assert (restored.count, restored.mean, restored.variance) == (3, moments.mean, moments.variance)


def test_normalised_observations_are_standardised_and_clipped():
    """Samples 0 and 4 have mean 2 and standard deviation 2; 100 is 49 deviations off and is cut to 10."""
    normalize = ObsNormalizer(moments_of(np.array([[0.0], [4.0]])), clip=10.0)
    obs = np.array([[2], [4], [100]], np.float32)
    result = normalize(obs)
    np.testing.assert_allclose(result, [[0], [1], [10]], rtol=1e-6)
    assert result.dtype == np.float32 and obs[2] == 100


def test_without_moments_observations_pass_and_with_empty_ones_they_are_clipped():
    obs = np.array([[3.0], [30.0]], np.float32)
    np.testing.assert_array_equal(ObsNormalizer(None, clip=10.0)(obs), obs)
    np.testing.assert_array_equal(ObsNormalizer(RunningMoments(), clip=10.0)(obs), [[3], [10]])


def test_the_discounted_return_restarts_after_an_episode_and_skips_masked_rows():
    """gamma .5, rewards 1: 1, 1.5 | end | (reset row) | 1, 1.5, and the next fragment goes on with 1.75."""
    discounted = DiscountedReturn(1, gamma=0.5)
    done = np.array([[False], [True], [False], [False], [False]])
    mask = np.array([[True], [True], [False], [True], [True]])
    moments = discounted.moments(np.array([[1.0], [1.0], [0.0], [1.0], [1.0]]), done, mask)
    assert (moments.count, moments.mean, moments.m2) == (4, 1.25, 0.25)
    one = np.ones((1, 1), bool)
    assert discounted.moments(np.ones((1, 1)), ~one, one).mean == 1.75


def test_the_discounted_return_restarts_where_no_row_is_masked():
    """gamma .5, rewards 1: 1, 1.5 | end | 1."""
    done, mask = np.array([[False], [True], [False]]), np.ones((3, 1), bool)
    moments = DiscountedReturn(1, gamma=0.5).moments(np.ones((3, 1)), done, mask)
    np.testing.assert_allclose((moments.mean, moments.m2), (3.5 / 3, 1 / 6), rtol=1e-12)


def test_rewards_are_divided_by_the_deviation_of_the_return_and_keep_their_mean():
    """Returns 0 and 4 deviate by 2: reward 3 becomes 1.5, and 100 is cut to 10."""
    scale = RewardScaler(moments_of(np.array([0.0, 4.0])), clip=10.0)
    np.testing.assert_allclose(scale(np.array([3.0, 100.0, -1.0])), [1.5, 10, -0.5], rtol=1e-6)


def test_the_normalizers_state_is_empty_until_something_is_merged():
    normalizer = Normalizer()
    assert normalizer.get_state() == {"obs": None, "returns": None}
    normalizer.merge(moments_of(np.ones((2, 3))), None)
    restored = Normalizer.from_state(normalizer.get_state())
    assert restored.obs is not None and restored.obs.count == 2 and restored.returns is None
