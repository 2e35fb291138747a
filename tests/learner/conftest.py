"""A small PPO problem: a policy, its loss written out, and a batch with masked rows."""

from collections.abc import Mapping, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces

from rlx.actors import ActorHandle
from rlx.actors.machine import Node
from rlx.learner.meeting import Meeting
from rlx.nets.policy import build_policy
from rlx.trajectory import Batch

OBS = spaces.Box(-1, 1, (4,), np.float32)
build_discrete = partial(build_policy, OBS, spaces.Discrete(3), hidden=(8, 8), seed=1)
build_continuous = partial(build_policy, OBS, spaces.Box(-1, 1, (2,), np.float32), hidden=(8, 8), seed=1)
UPDATE = {"epochs": 3, "minibatch_size": 8, "lr": 3e-3, "coefficients": {"clip_range": 0.2}, "target_kl": None}


def have_meet(learners: Sequence[ActorHandle]) -> None:
    """Have learners on actors of this machine meet, in the order given."""
    meeting = Meeting.of([actor.name for actor in learners], [Node("here", "127.0.0.1")] * len(learners))
    meeting = meeting._replace(port=learners[0].open_store.call(meeting.hosts[0]).result(60.0))
    joins = [actor.join.call(rank, meeting, 60.0) for rank, actor in enumerate(learners)]
    for join in joins:
        join.result(60.0)


def ppo_loss(policy: Any, minibatch: Batch, coefficients: Mapping[str, Any]) -> tuple[torch.Tensor, dict]:
    """Return the clipped surrogate plus value error minus entropy, written without rlx.functional."""
    new_logp, entropy, value = policy.evaluate(minibatch)
    assert new_logp.shape == entropy.shape == value.shape == minibatch.weight.shape
    ratio, clip_range = (new_logp - minibatch.logp).exp(), coefficients["clip_range"]
    clipped = torch.clamp(ratio, 1 - clip_range, 1 + clip_range)
    surrogate = torch.minimum(ratio * minibatch.advantage, clipped * minibatch.advantage)
    value_error = (value - minibatch.return_) ** 2
    weight = minibatch.weight
    total = ((-surrogate + 0.5 * value_error - 0.01 * entropy) * weight).sum()
    kl = ((minibatch.logp - new_logp) * weight).sum()
    return total, {"kl": kl.detach(), "value_loss": (value_error * weight).sum().detach()}


def make_batch(count: int = 21, seed: int = 0, continuous: bool = False) -> Batch:
    """Return `count` samples, about a quarter of them masked."""
    generator = torch.Generator().manual_seed(seed)
    action = torch.randint(0, 3, (count,), generator=generator)
    return Batch(
        obs=torch.randn(count, 4, generator=generator),
        action=torch.randn(count, 2, generator=generator) if continuous else action,
        logp=-1 + 0.2 * torch.randn(count, generator=generator),
        advantage=torch.randn(count, generator=generator),
        return_=torch.randn(count, generator=generator),
        mask=torch.rand(count, generator=generator) > 0.25,
    )


def make_sequences(count: int = 7, length: int = 3, **options: Any) -> Batch:
    """Return the samples of `make_batch` as the rows of `count` sequences, the last ones padded."""
    batch = make_batch(count * length, **options).map(lambda tensor: tensor.unflatten(0, (count, length)))
    batch.mask[-2:, -1] = False
    return batch


@pytest.fixture
def problem() -> SimpleNamespace:
    """`build`, `build_continuous`, `loss`, `batch(...)`, `sequences(...)` and `update`, for Learner.update."""
    return SimpleNamespace(
        build=build_discrete,
        build_continuous=build_continuous,
        loss=ppo_loss,
        batch=make_batch,
        sequences=make_sequences,
        update=UPDATE,
    )
