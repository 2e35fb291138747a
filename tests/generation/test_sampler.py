"""The law that is sampled, against an oracle in numpy, and the draws against its cumulative sum in fp64."""

import numpy as np
import pytest
import torch

from rlx.errors import ConfigError
from rlx.generation.request import Sampling
from rlx.generation.sampler import ONE_LEVEL_UP_TO, draw, log_law, most_probable
from rlx.generation.uniform import sample_keys, uniform

LAWS = [
    Sampling(),
    Sampling(temperature=0.7),
    Sampling(temperature=1.3),
    Sampling(top_k=5),
    Sampling(top_k=1),
    Sampling(top_k=500),
    Sampling(top_p=0.6),
    Sampling(top_p=1e-6),
    Sampling(min_p=0.2),
    Sampling(temperature=0.7, top_k=9, top_p=0.8, min_p=0.05),
    Sampling(temperature=1.3, top_p=0.9, min_p=0.1),
]


def law_of(logits: np.ndarray, sampling: Sampling) -> np.ndarray:
    """Return the probabilities [V] of the law for logits [V]: sets of tokens, by loops, in fp64."""
    p = np.exp((logits.astype(np.float64) - logits.max()) / sampling.temperature)
    p /= p.sum()
    if sampling.top_k:
        best = sorted(range(len(p)), key=lambda token: -p[token])[: sampling.top_k]
        p = np.array([p[token] if token in best else 0 for token in range(len(p))])
        p /= p.sum()
    nucleus, mass = set(), 0.0
    for token in sorted(range(len(p)), key=lambda token: -p[token]):
        if mass >= sampling.top_p:
            break
        nucleus.add(token)
        mass += p[token]
    p = np.array([p[token] if token in nucleus else 0 for token in range(len(p))])
    p /= p.sum()
    p = np.where(p >= sampling.min_p * p.max(), p, 0)
    return p / p.sum()


def logits_of(rows: int, vocabulary: int, seed: int = 0, scale: float = 2.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(rows, vocabulary, generator=generator)


@pytest.mark.parametrize("sampling", LAWS)
def test_the_law_is_cut_and_renormalised_as_it_says(sampling):
    logits = logits_of(50, 16)
    found = log_law(logits, sampling).exp().numpy()
    expected = np.stack([law_of(row, sampling) for row in logits.numpy()])
    np.testing.assert_array_equal(found > 0, expected > 0)
    np.testing.assert_allclose(found, expected, rtol=2e-6, atol=1e-12)


def test_by_hand():
    """p = 1/2, 1/4, 1/8, 1/8: min_p 1/3 leaves the first two at 2/3 and 1/3; top_p 0.75 as well, 0.76 a third one."""
    logits = torch.tensor([[8.0, 4.0, 2.0, 2.0]]).log()
    for sampling, expected in [
        (Sampling(min_p=1 / 3), [2 / 3, 1 / 3, 0, 0]),
        (Sampling(top_p=0.75), [2 / 3, 1 / 3, 0, 0]),
        (Sampling(top_p=0.76), [4 / 7, 2 / 7, 1 / 7, 0]),
        (Sampling(top_k=3), [1 / 2, 1 / 4, 1 / 8, 1 / 8]),  # the fourth is as probable as the third
        (Sampling(temperature=0.5), [64 / 88, 16 / 88, 4 / 88, 4 / 88]),
    ]:
        np.testing.assert_allclose(log_law(logits, sampling).exp()[0].numpy(), expected, rtol=1e-6)


def test_a_law_of_low_precision_logits_is_made_in_float32():
    logits = logits_of(4, 40).bfloat16()
    assert torch.equal(log_law(logits, Sampling(top_k=3)), log_law(logits.float(), Sampling(top_k=3)))


@pytest.mark.parametrize("vocabulary", [1, 2, 16, ONE_LEVEL_UP_TO, ONE_LEVEL_UP_TO + 1, 2048, 32_000])
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(top_k=40, top_p=0.9)])
def test_draws_are_those_of_the_cumulative_sum_in_fp64(vocabulary, sampling):
    """One level and two levels alike: the same token for 256 draws, and its logp to the bit."""
    law = log_law(logits_of(64, vocabulary), sampling)
    row = torch.arange(256) % 64
    u = torch.from_numpy(uniform(sample_keys(3, 0, 256), np.zeros(256, np.int64)))
    token, logp = draw(law, row, u)
    cumulative = law.exp().double().cumsum(-1).numpy()
    expected = [
        np.searchsorted(cumulative[r], x * cumulative[r, -1], side="right")
        for r, x in zip(row.numpy(), u.numpy(), strict=True)
    ]
    np.testing.assert_array_equal(token.numpy(), expected)
    assert torch.equal(logp, law[row, token])


@pytest.mark.parametrize("vocabulary", [16, 3000])
def test_the_ends_of_the_range_draw_tokens_that_can_be_drawn(vocabulary):
    """The law has one token in the middle, or two; nothing else may come out, whatever u is."""
    law = torch.full((2, vocabulary), -torch.inf)
    law[0, vocabulary // 2] = 0.0
    law[1, [1, vocabulary - 2]] = torch.tensor(0.5).log()
    u = torch.tensor([0.0, 1 - 2.0**-52], dtype=torch.float64)
    for row, expected in [(0, [vocabulary // 2] * 2), (1, [1, vocabulary - 2])]:
        token, logp = draw(law, torch.tensor([row, row]), u)
        assert token.tolist() == expected
        assert torch.isfinite(logp).all()


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=0.7, top_p=0.9), Sampling(top_k=3, min_p=0.1)])
def test_frequencies_follow_the_law(sampling):
    """40,000 draws: chi-square below its 0.999 quantile (of up to 7 degrees of freedom: 24.3)."""
    logits, count = logits_of(1, 8, scale=1.0), 40_000
    u = uniform(sample_keys(11, 0, count), np.zeros(count, np.int64))
    token, _ = draw(log_law(logits, sampling), torch.zeros(count, dtype=torch.int64), torch.from_numpy(u))
    expected = count * law_of(logits[0].numpy(), sampling)
    drawn = np.bincount(token.numpy(), minlength=8)
    assert not drawn[expected == 0].any()
    possible = expected > 0
    assert ((drawn - expected)[possible] ** 2 / expected[possible]).sum() < 24.3


def test_a_greedy_draw_is_certain():
    token, logp = most_probable(torch.tensor([[0.0, 2.0, 1.0], [5.0, 2.0, 1.0]]))
    assert token.tolist() == [1, 0] and logp.tolist() == [0.0, 0.0]


def test_splitmix64_gives_the_published_numbers():
    """The first outputs of SplitMix64 from state 1234567, as its reference implementation prints them."""
    reference = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    u = uniform(np.full(4, 1234567, np.uint64), np.arange(4))
    np.testing.assert_array_equal(u, [(number >> 12) * 2.0**-52 for number in reference])


def test_draws_belong_to_seed_sample_and_step():
    keys = sample_keys(5, 0, 8)
    np.testing.assert_array_equal(sample_keys(5, 3, 2), keys[3:5])
    many = np.concatenate([sample_keys(seed, 0, 50) for seed in (0, 1, 2, -1, 2**70 + 3)])
    assert len(np.unique(many)) == 250
    draws = np.stack([uniform(many, np.full(250, step)) for step in range(200)])
    assert len(np.unique(draws)) == draws.size
    assert abs(draws.mean() - 0.5) < 5 * 12**-0.5 * draws.size**-0.5
    samples, steps = np.corrcoef(draws.T), np.corrcoef(draws)
    for correlation, length in ((samples, 200), (steps, 250)):
        assert np.abs(correlation[np.triu_indices(len(correlation), 1)]).max() < 6 * length**-0.5


@pytest.mark.parametrize(
    ("setting", "allowed"),
    [
        ({"temperature": -0.1}, "a number of at least 0"),
        ({"temperature": float("nan")}, "a number of at least 0"),
        ({"temperature": float("inf")}, "a number of at least 0"),
        ({"top_k": -1}, "a whole number of at least 0"),
        ({"top_k": 1.5}, "a whole number of at least 0"),
        ({"top_p": 0.0}, "above 0 and at most 1"),
        ({"top_p": 1.1}, "above 0 and at most 1"),
        ({"min_p": -0.1}, "from 0 to 1"),
    ],
)
def test_a_law_that_makes_no_sense_is_refused(setting, allowed):
    (name,) = setting
    with pytest.raises(ConfigError, match=f"{name} is .*; it must be {allowed}"):
        Sampling(**setting)
