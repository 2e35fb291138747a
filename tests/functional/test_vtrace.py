"""V-trace against published numbers, the O(T^2) sum of the paper, and the two estimators that it contains."""

import numpy as np
import pytest
import torch
from torch import Tensor

from rlx.functional.advantages import gae, next_values, vtrace

# Of rlax' vtrace_test.py: two traces of four steps, two actions.
BEHAVIOUR = [[[8.9, 0.7], [5, 1], [0.6, 0.1], [-0.9, -0.1]], [[0.3, -5], [1, -8], [0.3, 1.7], [4.7, 3.3]]]
TARGET = [[[0.4, 0.5], [9.2, 8.8], [0.7, 4.4], [7.9, 1.4]], [[1, 0.9], [1, -1], [-4.3, 8.7], [0.8, 0.3]]]
ACTION = [[0, 1, 0, 0], [1, 0, 0, 1]]
REWARD = [[-1.3, -1.3, 2.3, 42], [1.3, 5.3, -3.3, -5]]
DISCOUNT = [[0, 0.89, 0.85, 0.99], [0.88, 1, 0.83, 0.95]]
VALUE = [[2.1, 1.1, -3.1, 0], [3.1, 0.1, -1.1, 7.4]]
BOOTSTRAP = [8.4, -1.2]
ERROR = [[-1.61551, -3.49732, 1.86705, 50.316], [1.46624, 3.61164, -8.334e-5, -13.54]]
ADVANTAGE_CLIP_5 = [[-1.61551, -17.48661, 1.86705, 162.05268], [7.33122, 3.61164, -8.3e-5, -25.84168]]


def time_major(values: list) -> Tensor:
    return torch.tensor(values, dtype=torch.float64).transpose(0, 1)


def golden(pg_rho_clip: float) -> tuple[Tensor, Tensor]:
    action = time_major(ACTION).long().unsqueeze(-1)
    logp, new_logp = (
        time_major(logits).log_softmax(-1).gather(-1, action).squeeze(-1) for logits in (BEHAVIOUR, TARGET)
    )
    value = time_major(VALUE)
    next_value = torch.cat([value[1:], torch.tensor([BOOTSTRAP], dtype=torch.float64)])
    never = torch.zeros(4, 2, dtype=torch.bool)
    discount = time_major(DISCOUNT)
    vs, advantage = vtrace(
        logp, new_logp, time_major(REWARD), value, next_value, never, never, discount, pg_rho_clip=pg_rho_clip
    )
    return vs - value, advantage


def test_published_numbers():
    error, advantage = golden(pg_rho_clip=1.0)
    torch.testing.assert_close(error, time_major(ERROR), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(advantage, time_major(ERROR), rtol=1e-4, atol=1e-5)
    error, advantage = golden(pg_rho_clip=5.0)
    torch.testing.assert_close(error, time_major(ERROR), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(advantage, time_major(ADVANTAGE_CLIP_5), rtol=1e-4, atol=1e-5)


def fragment(steps: int, envs: int, seed: int, *, on_policy: bool = False, done_rate: float = 0.2) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def normal() -> Tensor:
        return torch.randn(steps, envs, generator=generator, dtype=torch.float64)

    kind = torch.rand(steps, envs, generator=generator)
    terminated, truncated = kind < done_rate / 2, (kind >= done_rate / 2) & (kind < done_rate)
    logp, value, stored = normal() - 1, normal(), normal() * ~terminated
    return {
        "logp_T_B": logp,
        "new_logp_T_B": logp if on_policy else logp + 0.7 * normal(),
        "reward_T_B": normal(),
        "value_T_B": value,
        "next_value_T_B": next_values(value, stored, terminated | truncated),
        "terminated_T_B": terminated,
        "truncated_T_B": truncated,
    }


@pytest.mark.parametrize("clips", [(1.0, 1.0, 1.0), (2.5, 0.8, 4.0)])
def test_equals_the_sum_of_the_paper(clips):
    """vs_s = V(s_s) + sum over t >= s, in the same episode, of gamma^(t - s) (prod of c_i, s <= i < t) delta_t."""
    f, gamma, lambda_ = fragment(9, 4, seed=1), 0.9, 0.8
    vs, _ = vtrace(**f, gamma=gamma, lambda_=lambda_, rho_clip=clips[0], c_clip=clips[1], pg_rho_clip=clips[2])
    a = {name: tensor.numpy() for name, tensor in f.items()}
    ratio = np.exp(a["new_logp_T_B"] - a["logp_T_B"])
    done = a["terminated_T_B"] | a["truncated_T_B"]
    for start in range(9):
        for env in range(4):
            total, weight = 0.0, 1.0
            for t in range(start, 9):
                bootstrap = 0.0 if a["terminated_T_B"][t, env] else a["next_value_T_B"][t, env]
                delta = a["reward_T_B"][t, env] + gamma * bootstrap - a["value_T_B"][t, env]
                total += weight * min(clips[0], ratio[t, env]) * delta
                if done[t, env]:
                    break
                weight *= gamma * lambda_ * min(clips[1], ratio[t, env])
            assert vs[start, env].item() == pytest.approx(a["value_T_B"][start, env] + total, rel=1e-6)


@pytest.mark.parametrize("lambda_", [1.0, 0.6])
def test_on_policy_it_is_gae(lambda_):
    """With pi = mu the targets are GAE's; with lambda 1 that is the n-step return, and so is the advantage."""
    f = fragment(12, 5, seed=2, on_policy=True)
    vs, advantage = vtrace(**f, gamma=0.95, lambda_=lambda_)
    gae_fields = {name: tensor for name, tensor in f.items() if "logp" not in name}
    gae_advantage, return_ = gae(**gae_fields, gamma=0.95, lambda_=lambda_)
    torch.testing.assert_close(vs, return_)
    if lambda_ == 1.0:
        torch.testing.assert_close(advantage, gae_advantage)


@pytest.mark.parametrize("kind", ["terminated", "truncated"])
def test_two_episodes_in_one_trace_are_two_calls(kind):
    f = fragment(10, 3, seed=3, done_rate=0.0)
    f[f"{kind}_T_B"][5] = True
    f["next_value_T_B"][5] = 0.0 if kind == "terminated" else torch.tensor([0.3, -2.0, 5.0], dtype=torch.float64)
    both = vtrace(**f, gamma=0.9)
    first = vtrace(**{name: tensor[:6] for name, tensor in f.items()}, gamma=0.9)
    second = vtrace(**{name: tensor[6:] for name, tensor in f.items()}, gamma=0.9)
    for whole, *parts in zip(both, first, second, strict=True):
        torch.testing.assert_close(whole, torch.cat(parts), rtol=0, atol=0)


def test_no_gradient_flows_through_targets_and_advantages():
    f = fragment(6, 2, seed=4)
    for name in ("new_logp_T_B", "value_T_B", "next_value_T_B"):
        f[name].requires_grad_()
    assert not any(tensor.requires_grad for tensor in vtrace(**f, gamma=0.9))


def test_values_one_step_on_and_stored_ones_at_the_ends():
    value, stored = torch.tensor([[1.0], [2], [3], [4]]), torch.tensor([[10.0], [20], [30], [40]])
    done = torch.tensor([[False], [True], [False], [False]])
    assert next_values(value, stored, done).flatten().tolist() == [2, 20, 4, 40]
