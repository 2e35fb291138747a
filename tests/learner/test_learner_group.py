"""Several learners are one learner: the same steps, weights and stats, up to rounding."""

import os
import signal
import time
from functools import partial

import numpy as np
import pytest
import torch

from rlx import actors
from rlx.learner.learner import Learner
from rlx.learner.learner_group import GPU_WORTH_PARAMETERS, LearnerGroup, LearnersLost, choose_device
from tests.learner.conftest import have_meet


@pytest.fixture(scope="module")
def runtime():
    with actors.runtime("local", preload=("numpy", "torch", "rlx.learner.learner_group")) as rt:
        yield rt


def assert_same_stats(stats, expected) -> None:
    for name in stats.keys() - {"busy_s"}:
        assert stats[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-6), name


@pytest.mark.parametrize(("world_size", "rows"), [(2, "batch"), (3, "batch"), (2, "sequences")])
def test_learners_in_processes_of_their_own_equal_one(problem, runtime, world_size, rows):
    """21 samples in minibatches of 8, 8, 5, or as 7 sequences of 3 in minibatches of 2, 2, 2, 1.

    Shares differ in size, and one is empty; some rows are masked; the KL is watched.
    """
    make = getattr(problem, rows)
    update = problem.update | {"target_kl": 50.0}
    ranks = [  # each starts from weights of its own: joining must give it rank 0's
        runtime.spawn(Learner, partial(problem.build, seed=1 + rank), problem.loss) for rank in range(world_size)
    ]
    have_meet(ranks)
    one, group = Learner(problem.build, problem.loss), runtime.group(ranks)
    for seed in (1, 2):
        expected = one.update(make(seed=seed), **update, seed=seed)
        for stats in group.update.call(make(seed=seed), **update, seed=seed).values(60.0):
            assert_same_stats(stats, expected)
    for weights in group.weights.call().values(10.0):
        np.testing.assert_allclose(weights, one.weights(), rtol=0, atol=1e-6)
    for actor in ranks:
        runtime.kill(actor)


def test_a_group_in_the_driver_is_a_learner_and_counts(problem):
    group, learner = LearnerGroup(problem.build, problem.loss, device="cpu"), Learner(problem.build, problem.loss)
    assert (group.version, group.gradient_steps) == (0, 0)
    for seed in (1, 2):
        group.update(problem.batch(seed=seed), **problem.update, seed=seed)
        learner.update(problem.batch(seed=seed), **problem.update, seed=seed)
    assert np.array_equal(group.weights(), learner.weights())
    assert (group.version, group.gradient_steps) == (2, 18)
    group.close()


def test_a_group_of_two_actors_equals_one_learner_and_passes_its_state_on(problem, runtime):
    """The state of two learners goes on in one, and the other way round."""
    alone = LearnerGroup(problem.build, problem.loss, device="cpu")
    two = LearnerGroup(problem.build, problem.loss, device="cpu", num_learners=2, runtime=lambda: runtime)
    for group in (alone, two):
        stats = [group.update(problem.batch(seed=seed), **problem.update, seed=seed) for seed in (1, 2)]
    np.testing.assert_allclose(two.weights(), alone.weights(), rtol=0, atol=1e-6)
    assert (two.version, two.gradient_steps) == (alone.version, alone.gradient_steps) == (2, 18)
    assert stats[-1]["gradient_steps"] == 9

    state = two.get_state()
    from_two = LearnerGroup(lambda: problem.build(seed=99), problem.loss, device="cpu")
    from_two.set_state(state)
    two.update(problem.batch(seed=3), **problem.update, seed=3)
    two.set_state(state)
    for group in (two, from_two):
        group.update(problem.batch(seed=4), **problem.update, seed=4)
    np.testing.assert_allclose(two.weights(), from_two.weights(), rtol=0, atol=1e-6)
    assert two.version == from_two.version == 3
    two.close()


def test_an_error_in_the_loss_of_an_actor_arrives_as_itself(problem, runtime):
    def loss(policy, minibatch, coefficients):
        raise ZeroDivisionError("in the loss")

    group = LearnerGroup(problem.build, loss, device="cpu", num_learners=1, runtime=lambda: runtime)
    with pytest.raises(ZeroDivisionError, match="in the loss"):
        group.update(problem.batch(), **problem.update, seed=0)
    group.close()


def test_a_learner_whose_memory_ran_out_comes_before_those_that_waited_for_it(problem, runtime):
    def loss(policy, minibatch, coefficients):
        if torch.distributed.get_rank() == 1:
            torch.empty(1 << 50)
        raise RuntimeError("Connection closed by peer")

    group = LearnerGroup(problem.build, loss, device="cpu", num_learners=2, runtime=lambda: runtime)
    with pytest.raises(RuntimeError, match="DefaultCPUAllocator: can't allocate memory"):
        group.update(problem.batch(), **problem.update, seed=0)
    group.close()


def test_learners_started_again_do_nothing_until_they_are_given_a_state(problem, runtime):
    restart = actors.Restart(max=1, per_s=60.0, backoff_s=0.01)
    options = {"device": "cpu", "num_learners": 2, "runtime": lambda: runtime, "restart": restart}
    group = LearnerGroup(problem.build, problem.loss, **options)
    group.update(problem.batch(seed=1), **problem.update, seed=1)
    state = group.get_state()
    expected = group.update(problem.batch(seed=2), **problem.update, seed=2)
    weights = group.weights()
    os.kill(runtime.state()["learner/1"].pid, signal.SIGKILL)
    with pytest.raises(LearnersLost):
        group.update(problem.batch(seed=3), **problem.update, seed=3)
    for call in (group.weights, group.get_state, partial(group.update, problem.batch(), **problem.update, seed=3)):
        with pytest.raises(LearnersLost):
            call()
    group.set_state(state)
    assert (group.version, group.gradient_steps) == (1, 9)
    again = group.update(problem.batch(seed=2), **problem.update, seed=2)
    assert again | {"busy_s": 0} == expected | {"busy_s": 0}
    assert np.array_equal(group.weights(), weights)
    group.close()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_who_is_lost_is_named(number, problem, runtime):
    """Also where it was between two calls, and where the other one waits for the one that does not run."""
    restart = actors.Restart(max=2, per_s=60.0, backoff_s=0.01)
    options = {"device": "cpu", "num_learners": 2, "runtime": lambda: runtime, "restart": restart}
    group = LearnerGroup(problem.build, problem.loss, update_timeout_s=6.0, **options)
    state = group.get_state()
    os.kill(runtime.state()["learner/1"].pid, number)
    if number == signal.SIGKILL:
        while group._incarnations() == [0, 0] or group._are_starting():
            time.sleep(0.005)
        said = r"learner/1 \(pid \d+\) was killed by SIGKILL"
    else:
        said = r"^learner/1\.update\(\) has not answered within 6 s: it is stopped by a signal \(SIGSTOP\)\.$"
    with pytest.raises(LearnersLost, match=said):
        group.update(problem.batch(), **problem.update, seed=0)
    group.set_state(state)
    assert group.update(problem.batch(), **problem.update, seed=0)["gradient_steps"] == 9
    group.close()


def test_learners_that_are_being_started_again_are_asked_for_nothing(problem, runtime):
    """A call that waited for them would be answered by learners without a state, or be late."""
    restart = actors.Restart(max=2, per_s=60.0, backoff_s=60.0, max_backoff_s=60.0)
    options = {"device": "cpu", "num_learners": 1, "runtime": lambda: runtime, "restart": restart}
    group = LearnerGroup(problem.build, problem.loss, update_timeout_s=60.0, **options)
    os.kill(runtime.state()["learner/0"].pid, signal.SIGKILL)
    while not group._are_starting():
        time.sleep(0.001)
    started = time.monotonic()
    with pytest.raises(LearnersLost, match="was killed by SIGKILL"):
        group.weights()
    assert time.monotonic() < started + 30
    group.close()


def test_the_device_is_chosen_with_a_reason(problem, monkeypatch):
    assert choose_device("cuda:1", problem.build) == ("cuda:1", "as set by learners.device")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto", problem.build) == ("cpu", "no CUDA device")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose_device("auto", problem.build)[0] == "cpu"
    large = torch.nn.Linear(GPU_WORTH_PARAMETERS, 1)
    assert choose_device("auto", lambda: large)[0] == "cuda"
