"""One learner: its steps are those of a plain torch loop, and every sample counts as it should."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from rlx.algorithms.ppo import PPO, PPOTraining
from rlx.checkpoint import load_checkpoint, save_checkpoint
from rlx.errors import RlxError
from rlx.learner.gradient import compiled_gradient, eager_gradient, numpy_gradient, with_derivatives
from rlx.learner.learner import Learner
from rlx.nets.flat import FlatParameters
from rlx.trajectory import Batch


def plain_torch_update(policy, loss, batch, optimizer, *, epochs, minibatch_size, coefficients, seed, max_grad_norm):
    """Return the gradient norms of the update that Learner.update should make, written the usual way."""
    generator = torch.Generator().manual_seed(seed)
    norms = []
    for _ in range(epochs):
        for rows in torch.randperm(len(batch), generator=generator).split(minibatch_size):
            minibatch = batch.take(rows)
            weight = minibatch.mask / minibatch.mask.sum()
            total, _ = loss(policy, Batch(**minibatch.tensors, weight=weight), coefficients)
            optimizer.zero_grad()
            total.backward()
            norms.append(nn.utils.clip_grad_norm_(policy.parameters(), max_grad_norm or math.inf).item())
            optimizer.step()
    return norms


@pytest.mark.parametrize("continuous", [False, True])
@pytest.mark.parametrize(("activation", "max_grad_norm"), [("tanh", 0.05), ("tanh", None), ("gelu", 0.05)])
def test_an_update_makes_the_steps_of_a_plain_torch_loop(problem, continuous, activation, max_grad_norm):
    """Nets with tanh are differentiated in numpy, those with gelu by autograd."""
    build = partial(problem.build_continuous if continuous else problem.build, activation=activation)
    learner, reference = Learner(build, problem.loss, max_grad_norm=max_grad_norm), build()
    optimizer = torch.optim.Adam(reference.parameters(), lr=3e-3, eps=1e-5)
    for seed in (5, 6):
        batch = problem.batch(seed=seed, continuous=continuous)
        stats = learner.update(batch, **problem.update, seed=seed)
        norms = plain_torch_update(
            reference, problem.loss, batch, optimizer, epochs=3, minibatch_size=8,
            coefficients={"clip_range": 0.2}, seed=seed, max_grad_norm=max_grad_norm,
        )  # fmt: skip
        assert stats["gradient_steps"] == len(norms) == 9
        assert stats["grad_norm"] == pytest.approx(np.mean(norms), rel=1e-4)
    assert max_grad_norm is None or min(norms) > max_grad_norm, "clipping took place"
    expected = nn.utils.parameters_to_vector(reference.parameters()).detach().numpy()
    np.testing.assert_allclose(learner.weights(), expected, rtol=0, atol=2e-6)


def test_every_sample_is_used_once_an_epoch_and_the_last_smaller_minibatch_too(problem):
    """10 samples in minibatches of 4: 4, 4, 2 in each of 3 epochs, in another order every time."""
    seen = []

    def loss(policy, minibatch, coefficients):
        seen.append(minibatch.number.tolist())
        return problem.loss(policy, minibatch, coefficients)

    batch = Batch(**problem.batch(10).tensors, number=torch.arange(10))
    Learner(problem.build, loss).update(batch, **problem.update | {"minibatch_size": 4}, seed=0)
    assert [len(numbers) for numbers in seen] == [4, 4, 2] * 3
    epochs = [seen[start] + seen[start + 1] + seen[start + 2] for start in (0, 3, 6)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != list(range(10))


def test_masked_rows_have_no_influence_on_weights_or_stats(problem):
    clean, dirty = problem.batch(), problem.batch()
    for name in ("obs", "logp", "advantage", "return_"):
        dirty.tensors[name][~dirty.mask] = 7.0
    assert 0 < clean.mask.sum() < len(clean)
    learners = [Learner(problem.build, problem.loss) for _ in range(2)]
    stats = [
        learner.update(batch, **problem.update, seed=0) for learner, batch in zip(learners, (clean, dirty), strict=True)
    ]
    assert np.array_equal(learners[0].weights(), learners[1].weights())
    for measured in stats:
        measured.pop("busy_s")
    assert stats[0] == stats[1]


def test_a_minibatch_without_a_counted_sample_gives_no_nan(problem):
    batch = problem.batch(9)
    batch.mask[:] = False
    learner = Learner(problem.build, problem.loss)
    before = learner.weights()
    stats = learner.update(batch, **problem.update, seed=0)
    assert np.array_equal(learner.weights(), before) and stats["loss"] == stats["grad_norm"] == 0


def test_stats_are_means_over_the_gradient_steps(problem):
    recorded = []

    def loss(policy, minibatch, coefficients):
        total, stats = problem.loss(policy, minibatch, coefficients)
        recorded.append((total.item(), stats["value_loss"].item()))
        return total, stats

    stats = Learner(problem.build, loss).update(problem.batch(), **problem.update, seed=0)
    assert stats["loss"] == pytest.approx(np.mean([total for total, _ in recorded]), rel=1e-5)
    assert stats["value_loss"] == pytest.approx(np.mean([value for _, value in recorded]), rel=1e-5)
    assert stats["stopped_early"] == 0 and stats["busy_s"] > 0


@pytest.mark.parametrize(("kl", "target_kl", "steps"), [(0.5, 0.4, 2), (0.5, 0.6, 9), (0.5, None, 9)])
def test_the_kl_limit_ends_the_update_before_the_step_that_passed_it(problem, kl, target_kl, steps):
    """The third minibatch reports `kl`."""
    calls, at_third = 0, np.empty(0)

    def loss(policy, minibatch, coefficients):
        nonlocal calls, at_third
        calls += 1
        total, stats = problem.loss(policy, minibatch, coefficients)
        if calls == 3:
            at_third = learner.weights()
        return total, stats | {"kl": torch.tensor(kl if calls == 3 else 0.0)}

    learner = Learner(problem.build, loss)
    stats = learner.update(problem.batch(), **problem.update | {"target_kl": target_kl}, seed=0)
    assert stats["gradient_steps"] == steps and stats["stopped_early"] == (steps == 2)
    assert np.array_equal(learner.weights(), at_third) is (steps == 2)
    assert calls == (3 if steps == 2 else 9)


def test_the_kl_of_an_update_counts_each_minibatch_once(problem):
    """With a limit or without, the mean is the same."""
    with_limit, without = (
        Learner(problem.build, problem.loss).update(problem.batch(), **problem.update | {"target_kl": limit}, seed=0)
        for limit in (100.0, None)
    )
    assert with_limit["kl"] == without["kl"] != 0


def test_an_update_that_stops_before_its_first_step_changes_nothing(problem):
    learner = Learner(problem.build, problem.loss)
    before = learner.weights()
    stats = learner.update(problem.batch(), **problem.update | {"target_kl": -100.0}, seed=0)
    assert stats["gradient_steps"] == 0 and stats["stopped_early"] == 1
    assert np.array_equal(learner.weights(), before) and learner.adam.steps == 0


def test_the_seed_fixes_an_update_whatever_torch_drew_before(problem):
    weights = []
    for seed in (1, 1, 2):
        learner = Learner(problem.build, problem.loss)
        torch.rand(len(weights))
        learner.update(problem.batch(), **problem.update, seed=seed)
        weights.append(learner.weights())
    assert np.array_equal(weights[0], weights[1]) and not np.array_equal(weights[0], weights[2])


def test_a_learner_continues_bit_for_bit_from_a_checkpoint(problem, tmp_path):
    straight, first = (Learner(problem.build, problem.loss) for _ in range(2))
    for learner, seeds in ((straight, (1, 2, 3)), (first, (1,))):
        for seed in seeds:
            learner.update(problem.batch(seed=seed), **problem.update, seed=seed)
    state = load_checkpoint(save_checkpoint(tmp_path / "learner", first.get_state()))
    first.update(problem.batch(), **problem.update, seed=9)  # the saved state is a copy

    resumed = Learner(lambda: problem.build(seed=77), problem.loss)
    resumed.set_state(state)
    for seed in (2, 3):
        resumed.update(problem.batch(seed=seed), **problem.update, seed=seed)
    assert np.array_equal(resumed.weights(), straight.weights())


def test_the_caller_s_batch_and_the_weights_returned_are_left_alone(problem):
    learner, batch = Learner(problem.build, problem.loss), problem.batch()
    before = {name: tensor.clone() for name, tensor in batch.tensors.items()}
    weights = learner.weights()
    start = weights.copy()
    learner.update(batch, **problem.update, seed=0)
    assert list(batch.tensors) == list(before)
    assert all(torch.equal(batch.tensors[name], before[name]) for name in before)
    assert np.array_equal(weights, start)


def with_weight(batch: Batch) -> Batch:
    return Batch(**batch.tensors, weight=batch.mask / batch.mask.sum())


def ppo_loss_of(**training):
    return partial(PPO.loss, training=PPOTraining(entropy_coef=0.03, value_coef=0.7, **training))


@pytest.mark.parametrize("continuous", [False, True])
@pytest.mark.parametrize("activation", ["tanh", "relu"])
@pytest.mark.parametrize("options", [{}, {"share_encoder": True}, {"hidden": ()}, {"hidden": (8,)}])
@pytest.mark.parametrize("value_clip", [None, 0.3])
def test_the_numpy_gradient_of_ppo_s_loss_is_autograd_s(problem, continuous, activation, options, value_clip):
    build = problem.build_continuous if continuous else problem.build
    policy, loss = build(activation=activation, **options), ppo_loss_of(value_clip=value_clip)
    flat = FlatParameters(policy)
    flat.data += 0.3 * torch.randn(len(flat.data), generator=torch.Generator().manual_seed(3))
    in_numpy = numpy_gradient(policy, flat, loss)
    assert in_numpy is not None
    for seed in (0, 1):  # the second call must not see the first one's
        batch = problem.batch(seed=seed, continuous=continuous)
        value = torch.randn(len(batch), generator=torch.Generator().manual_seed(seed))
        minibatch = Batch(**with_weight(batch).tensors, value=value)
        expected, expected_stats = eager_gradient(policy, flat, loss)(minibatch, {"clip_range": 0.2})
        gradient, stats = in_numpy(minibatch, {"clip_range": 0.2})
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)
        assert stats.keys() == expected_stats.keys()
        for name, stat in stats.items():
            assert stat == pytest.approx(expected_stats[name].item(), rel=1e-4, abs=1e-6), name


@pytest.mark.parametrize("continuous", [False, True])
@pytest.mark.parametrize("make", [numpy_gradient, eager_gradient])
def test_a_gradient_of_sequences_is_that_of_their_samples(problem, continuous, make):
    policy = (problem.build_continuous if continuous else problem.build)()
    flat = FlatParameters(policy)
    sequences = with_weight(problem.sequences(continuous=continuous))
    sequences.tensors["value"] = sequences.return_ - 0.5
    gradients, stats = zip(
        *(
            make(policy, flat, ppo_loss_of(value_clip=0.3))(batch, {"clip_range": 0.2})
            for batch in (sequences, sequences.map(lambda tensor: tensor.flatten(0, 1)))
        ),
        strict=True,
    )
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-7)
    for name, stat in stats[0].items():
        assert float(stat) == pytest.approx(float(stats[1][name]), rel=1e-5), name


def test_a_minibatch_of_sequences_counts_their_samples(problem):
    """7 sequences of 3 steps: minibatches of 8 samples are 2 sequences; of 2 samples, one."""
    shapes = []

    def loss(policy, minibatch, coefficients):
        shapes.append(tuple(minibatch.weight.shape))
        assert minibatch.weight.sum().item() == pytest.approx(1) and not minibatch.weight[~minibatch.mask].any()
        return problem.loss(policy, minibatch, coefficients)

    for minibatch_size, expected in ((8, [(2, 3)] * 3 + [(1, 3)]), (2, [(1, 3)] * 7)):
        shapes.clear()
        options = problem.update | {"epochs": 1, "minibatch_size": minibatch_size}
        Learner(problem.build, loss).update(problem.sequences(), **options, seed=0)
        assert shapes == expected


def test_derivatives_by_hand_belong_to_their_loss_alone(problem):
    class Other(PPO):
        @staticmethod
        def loss(policy, minibatch, coefficients, training):
            return PPO.loss(policy, minibatch, coefficients, training)

    policy = problem.build()
    flat = FlatParameters(policy)
    assert numpy_gradient(policy, flat, ppo_loss_of()) is not None
    assert numpy_gradient(policy, flat, partial(Other.loss, training=PPOTraining())) is None
    assert numpy_gradient(policy, flat, problem.loss) is None


def test_a_loss_that_was_changed_without_its_derivatives_is_refused(problem):
    @with_derivatives(PPO.loss.derivatives)
    def changed(policy, minibatch, coefficients, training):
        total, stats = PPO.loss(policy, minibatch, coefficients, training)
        return 1.01 * total, stats

    @with_derivatives(PPO.loss.derivatives)
    def unclipped(policy, minibatch, coefficients, training):
        """The same wherever the ratio is within the clip range, which is all of a real first minibatch."""
        _, stats = PPO.loss(policy, minibatch, coefficients, training)
        new_logp, _, value = policy.evaluate(minibatch)
        surrogate = -(new_logp - minibatch.logp).exp() * minibatch.advantage
        return ((surrogate + 0.5 * (value - minibatch.return_) ** 2) * minibatch.weight).sum(), stats

    batch = problem.batch()
    minibatch = Batch(**{**with_weight(batch).tensors, "return_": 100 * batch.return_}, value=batch.return_)
    for loss, name in ((changed, "new_logp"), (unclipped, "new_logp")):
        policy = problem.build()
        in_numpy = numpy_gradient(policy, FlatParameters(policy), partial(loss, training=PPOTraining()))
        with pytest.raises(RlxError, match=f"the derivative by {name} that belongs to this loss is not its derivative"):
            in_numpy(minibatch, {"clip_range": 0.2})


def test_the_check_of_derivatives_does_not_stumble_over_a_clip_range_of_zero(problem):
    """At ratio 1 every sample is on the edge then, and rounding decides whether it has a gradient."""
    policy, batch = problem.build(), problem.batch()
    flat = FlatParameters(policy)
    logp = policy.evaluate(batch)[0].detach()
    minibatch = Batch(**{**with_weight(batch).tensors, "logp": logp}, value=batch.return_)
    numpy_gradient(policy, flat, ppo_loss_of())(minibatch, {"clip_range": 0.0})


def test_a_policy_with_a_memory_is_differentiated_by_autograd_also_where_compiling_is_asked_for(problem):
    """Sequences are cut where episodes begin, so the graph is another one for every minibatch."""
    batch = problem.sequences()
    batch.tensors |= {"first": torch.rand(7, 3) < 0.3, "state": torch.randn(7, 16)}
    build = partial(problem.build, memory="gru", memory_size=8)
    learners = [Learner(build, problem.loss, compile=compile) for compile in (False, True)]
    for learner in learners:
        learner.update(batch, **problem.update, seed=0)
    assert np.array_equal(learners[0].weights(), learners[1].weights())


def test_padded_steps_have_no_influence_on_a_memory(problem):
    """C28: what stands in the masked end of a sequence moves no weight."""
    weights = []
    for filler in (0.0, 7.0):
        batch = problem.sequences()
        batch.tensors |= {"first": torch.zeros(7, 3, dtype=torch.bool), "state": torch.ones(7, 16)}
        batch.mask[:, -1] = False
        for name in ("obs", "logp", "advantage", "return_"):
            batch.tensors[name][:, -1] = filler
        learner = Learner(partial(problem.build, memory="gru", memory_size=8), problem.loss)
        learner.update(batch, **problem.update, seed=0)
        weights.append(learner.weights())
    assert np.array_equal(*weights)


@pytest.mark.slow
@pytest.mark.parametrize("continuous", [False, True])
def test_the_compiled_gradient_is_the_eager_one_and_follows_the_coefficients(problem, continuous):
    policy = (problem.build_continuous if continuous else problem.build)()
    flat, minibatch = FlatParameters(policy), with_weight(problem.batch(continuous=continuous))
    eager, compiled = (make(policy, flat, problem.loss) for make in (eager_gradient, compiled_gradient))
    for clip_range in (0.2, 0.01):
        expected, expected_stats = eager(minibatch, {"clip_range": clip_range})
        gradient, stats = compiled(minibatch, {"clip_range": clip_range})
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(stats, expected_stats, rtol=1e-4, atol=1e-6)
        flat.data += 0.1 * gradient


@pytest.mark.slow
def test_a_compiled_learner_makes_the_steps_of_an_eager_one(problem):
    eager, compiled = (Learner(problem.build, problem.loss, compile=compile) for compile in (False, True))
    for learner in (eager, compiled):
        learner.update(problem.batch(), **problem.update, seed=0)
    np.testing.assert_allclose(compiled.weights(), eager.weights(), rtol=0, atol=1e-5)
