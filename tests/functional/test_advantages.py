"""GAE against published numbers, a case worked out by hand, and a lambda-weighted sum of n-step returns."""

import pytest
import torch
from torch import Tensor

from rlx.functional.advantages import gae

# Reward and V(observation that followed) of three episodes of four steps; returns for gamma 0.99, lambda 0.95
# from Tianshou's test/base/test_returns.py.
REWARD = [101.0, 102, 103, 200, 104, 105, 106, 201, 107, 108, 109, 202]
NEXT_VALUE = [2.0, 3, 4, -1, 5, 6, 7, -2, 8, 9, 10, -3]
RETURNS_TERMINATED = [
    454.8344, 376.1143, 291.298, 200, 464.561, 383.1085, 295.387, 201, 474.2876, 390.1027, 299.476, 202,
]  # fmt: skip
RETURNS_TRUNCATED = [
    454.0109, 375.2386, 290.3669, 199.01, 462.9138, 381.3571, 293.5248, 199.02, 474.2876, 390.1027, 299.476, 202,
]  # fmt: skip


def column(values: list, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return `values` [T] as [T, 1]."""
    return torch.tensor(values, dtype=dtype).unsqueeze(1)


def flags(length: int, *true_at: int) -> Tensor:
    return column([t in true_at for t in range(length)], torch.bool)


def random_fragment(steps: int, envs: int, seed: int, done_rate: float = 0.15) -> dict[str, Tensor]:
    """Return a fragment whose next_value is the next row's value, except where an episode ended."""
    generator = torch.Generator().manual_seed(seed)

    def normal() -> Tensor:
        return torch.randn(steps, envs, generator=generator, dtype=torch.float64)

    kind = torch.rand(steps, envs, generator=generator)
    terminated, truncated = kind < done_rate, (kind >= done_rate) & (kind < 2 * done_rate)
    value, next_value = normal(), normal()
    inside = ~(terminated | truncated)[:-1]
    next_value[:-1][inside] = value[1:][inside]
    return {
        "reward_T_B": normal(),
        "value_T_B": value,
        "next_value_T_B": next_value,
        "terminated_T_B": terminated,
        "truncated_T_B": truncated,
    }


def lambda_return(fragment: dict[str, Tensor], t: int, b: int, gamma: float, lambda_: float) -> float:
    """Return (1 - lambda) sum lambda^(n-1) G_n over n-step returns G_n, the last one taking the remaining weight."""
    reward, next_value = fragment["reward_T_B"][:, b].tolist(), fragment["next_value_T_B"][:, b].tolist()
    terminated, truncated = fragment["terminated_T_B"][:, b].tolist(), fragment["truncated_T_B"][:, b].tolist()
    n_step_returns = []
    for end in range(t, len(reward)):
        bootstrap = 0.0 if terminated[end] else gamma ** (end - t + 1) * next_value[end]
        n_step_returns.append(sum(gamma ** (k - t) * reward[k] for k in range(t, end + 1)) + bootstrap)
        if terminated[end] or truncated[end]:
            break
    *earlier, last = n_step_returns
    mixed = sum((1 - lambda_) * lambda_**n * g for n, g in enumerate(earlier))
    return mixed + lambda_ ** len(earlier) * last


@pytest.mark.parametrize(
    ("terminated_at", "truncated_at", "expected"),
    [((3, 7, 11), (), RETURNS_TERMINATED), ((11,), (3, 7), RETURNS_TRUNCATED)],
)
def test_gae_gives_the_published_returns(terminated_at, truncated_at, expected):
    terminated, truncated = flags(12, *terminated_at), flags(12, *truncated_at)
    next_value = column(NEXT_VALUE)
    value = (next_value * ~terminated).roll(1, dims=0)
    advantage, returns = gae(column(REWARD), value, next_value, terminated, truncated, 0.99, 0.95)
    torch.testing.assert_close(returns, column(expected), rtol=0, atol=1e-4)
    torch.testing.assert_close(advantage, column(expected) - value, rtol=0, atol=1e-4)


def test_gae_by_hand_bootstraps_a_truncation_and_not_a_termination_and_crosses_neither():
    """gamma = lambda = 1/2, so the decay is 1/4; step 1 is truncated at V = 8, step 3 terminates.

    delta = 1 + 1/2 - 1 = 0.5;  2 + 8/2 - 1 = 5;  3 + 1/2 - 1 = 2.5;  4 - 1 = 3;  5 + 2/2 - 1 = 5
    A = 0.5 + 5/4 = 1.75;  5;  2.5 + 3/4 = 3.25;  3;  5
    """
    advantage, returns = gae(
        column([1, 2, 3, 4, 5]),
        column([1, 1, 1, 1, 1]),
        column([1, 8, 1, 100, 2]),
        flags(5, 3),
        flags(5, 1),
        gamma=0.5,
        lambda_=0.5,
    )
    assert advantage.flatten().tolist() == [1.75, 5, 3.25, 3, 5]
    assert returns.flatten().tolist() == [2.75, 6, 4.25, 4, 6]


@pytest.mark.parametrize("gamma", [0.0, 0.9, 1.0])
@pytest.mark.parametrize("lambda_", [0.0, 0.7, 1.0])
def test_gae_equals_the_mixture_of_n_step_returns(gamma, lambda_):
    fragment = random_fragment(steps=14, envs=4, seed=1)
    assert fragment["terminated_T_B"].any() and fragment["truncated_T_B"].any()
    _, returns = gae(**fragment, gamma=gamma, lambda_=lambda_)
    expected = [[lambda_return(fragment, t, b, gamma, lambda_) for b in range(4)] for t in range(14)]
    torch.testing.assert_close(returns, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-12)


def test_gae_with_lambda_zero_is_the_one_step_error():
    f = random_fragment(steps=9, envs=3, seed=2)
    advantage, _ = gae(**f, gamma=0.9, lambda_=0.0)
    one_step = f["reward_T_B"] + 0.9 * f["next_value_T_B"].where(~f["terminated_T_B"], 0) - f["value_T_B"]
    torch.testing.assert_close(advantage, one_step, rtol=0, atol=1e-12)


def test_gae_treats_the_environments_of_a_fragment_independently():
    fragment = random_fragment(steps=9, envs=5, seed=3)
    together, _ = gae(**fragment, gamma=0.99, lambda_=0.95)
    for b in range(5):
        alone, _ = gae(**{name: t[:, b : b + 1] for name, t in fragment.items()}, gamma=0.99, lambda_=0.95)
        assert torch.equal(alone, together[:, b : b + 1])


def test_gae_of_two_episodes_in_a_row_is_gae_of_each():
    first, second = random_fragment(5, 2, seed=4, done_rate=0), random_fragment(6, 2, seed=5, done_rate=0)
    first["truncated_T_B"][-1] = True
    joined = {name: torch.cat([first[name], second[name]]) for name in first}
    expected = torch.cat([gae(**part, gamma=0.99, lambda_=0.95)[0] for part in (first, second)])
    assert torch.equal(gae(**joined, gamma=0.99, lambda_=0.95)[0], expected)


@pytest.mark.parametrize("ending", ["terminated_T_B", "truncated_T_B"])
def test_the_garbage_of_a_reset_row_reaches_no_other_row(ending):
    """A NEXT_STEP vector environment puts a row that is no transition after every done row."""
    fragment = random_fragment(steps=8, envs=2, seed=6, done_rate=0)
    fragment[ending][3, 0] = True
    clean, _ = gae(**fragment, gamma=0.99, lambda_=0.95)
    for name in ("reward_T_B", "value_T_B", "next_value_T_B"):
        fragment[name][4, 0] = 1e30
    dirty, _ = gae(**fragment, gamma=0.99, lambda_=0.95)
    others = torch.ones(8, 2, dtype=torch.bool)
    others[4, 0] = False
    assert torch.equal(clean[others], dirty[others])


def test_gae_does_not_write_to_its_inputs_and_keeps_float32():
    fragment = {n: t.float() if t.is_floating_point() else t for n, t in random_fragment(6, 2, seed=7).items()}
    before = {name: t.clone() for name, t in fragment.items()}
    advantage, returns = gae(**fragment, gamma=0.99, lambda_=0.95)
    assert all(torch.equal(before[name], fragment[name]) for name in fragment)
    assert advantage.dtype == returns.dtype == torch.float32
