"""The losses of IMPALA and APPO, differentiated by hand, are those that autograd differentiates."""

from functools import partial

import numpy as np
import pytest
import torch
from gymnasium import spaces

from rlx.algorithms.appo import APPO, APPOTraining
from rlx.algorithms.impala import IMPALA, IMPALATraining
from rlx.learner.gradient import eager_gradient, numpy_gradient
from rlx.nets.flat import FlatParameters
from rlx.nets.policy import build_policy
from rlx.trajectory import Batch

SEQUENCES, STEPS = 5, 7


def fields_of(generator, *shape):
    """Return what both losses read, of the given leading shape; probabilities differ by factors around 1."""
    normal = partial(torch.randn, generator=generator)
    mask = torch.rand(shape, generator=generator) < 0.9
    return {
        "obs": normal(*shape, 3),
        "action": torch.randint(4, shape, generator=generator),
        "mask": mask,
        "weight": mask / mask.sum(),
        "logp": -1.4 + 0.3 * normal(*shape),
    }


def impala_minibatch(generator):
    """Sequences with episodes that end, both ways, in their middle."""
    shape = (SEQUENCES, STEPS)
    ends = torch.rand(2, *shape, generator=generator) < 0.15
    return Batch(
        **fields_of(generator, *shape),
        reward=torch.randn(shape, generator=generator),
        next_value=torch.randn(shape, generator=generator),
        terminated=ends[0],
        truncated=ends[1] & ~ends[0],
    )


def appo_minibatch(generator):
    """Samples as `APPO.prepare` leaves them."""
    fields = fields_of(generator, SEQUENCES * STEPS)
    targets = {name: torch.randn(SEQUENCES * STEPS, generator=generator) for name in ("advantage", "return_")}
    return Batch(**fields, **targets, old_logp=fields["logp"])


@pytest.mark.parametrize(
    ("loss", "minibatch_of", "coefficients"),
    [
        (partial(IMPALA.loss, training=IMPALATraining(lambda_=0.9, entropy_coef=0.03)), impala_minibatch, {}),
        (partial(APPO.loss, training=APPOTraining(kl_coef=0.4)), appo_minibatch, {"clip_range": 0.2}),
    ],
    ids=["impala", "appo"],
)
@pytest.mark.parametrize("share_encoder", [False, True])
def test_the_numpy_gradient_and_stats_are_those_of_autograd(loss, minibatch_of, coefficients, share_encoder):
    space = spaces.Box(-1, 1, (3,), np.float32)
    policy = build_policy(space, spaces.Discrete(4), hidden=(16, 16), share_encoder=share_encoder)
    flat = FlatParameters(policy)
    in_numpy, eager = numpy_gradient(policy, flat, loss), eager_gradient(policy, flat, loss)
    for seed in range(3):
        minibatch = minibatch_of(torch.Generator().manual_seed(seed))
        (gradient, stats), (expected, expected_stats) = (make(minibatch, coefficients) for make in (in_numpy, eager))
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)
        assert stats.keys() == expected_stats.keys()
        for name, stat in expected_stats.items():
            assert float(stats[name]) == pytest.approx(float(stat), rel=1e-4, abs=1e-6), name
