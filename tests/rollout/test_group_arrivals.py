"""Groups as they arrive from real token runners; and which are taken when, by hand."""

import contextlib
import os
import signal
import time
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest

from rlx import actors
from rlx.actors import Restart
from rlx.errors import ConfigError
from rlx.generation.generation import Generation
from rlx.generation.request import Request, Sampling
from rlx.rollout.group_arrivals import Group, GroupArrivals
from rlx.rollout.token_runner import Completions, TokenRunner
from rlx.rollout.token_runners import TokenRunners
from tests.rollout.tiny_model import build_model, weights


class FakeChannel:
    """Holds what was published last."""

    def __init__(self):
        self.newest = None

    def publish(self, version, values):
        self.newest = SimpleNamespace(version=version, value={"weights": values})

    def latest(self):
        return self.newest


SAMPLES = 2


def request(number):
    """One prompt takes twenty times as long as the others."""
    limit = 56 if number % 7 == 3 else 2 + number % 4
    return Request([1, 2, number % 13], n=SAMPLES, max_new_tokens=limit, seed=number)


@pytest.fixture(scope="module")
def runtime():
    with actors.runtime("local", preload=("numpy", "torch", "rlx.rollout.token_runners", "transformers")) as runtime:
        yield runtime


@pytest.fixture
def make_runners(runtime):
    with contextlib.ExitStack() as stack:

        def make(count=2, **options):
            runners = TokenRunners(
                build_model,
                num_runners=count,
                runtime=lambda: runtime,
                restart=Restart(max=3, per_s=60.0),
                torch_threads=1,
                max_tokens=64,
                max_new_tokens=56,
                **options,
            )
            return stack.enter_context(contextlib.closing(runners)), runtime

        yield make


def take(arrivals, runners, batches, first=0):
    """Return the groups of so many batches, with the version that each was taken with."""
    taken = []
    for version in range(first, first + batches):
        taken += [(group, version) for group in arrivals.take()]
        runners.publish(version + 1, partial(weights, 1 + 0.01 * version))
    return taken


@pytest.mark.parametrize(
    ("when_old", "on_new_weights"),
    [("wait", "finish"), ("wait", "refresh_cache"), ("pace", "finish"), ("drop", "keep_cache")],
)
def test_no_prompt_is_lost_or_taken_twice_and_no_token_is_too_old(make_runners, when_old, on_new_weights):
    runners, _ = make_runners(on_new_weights=on_new_weights)
    arrivals = runners.arrive(request, Sampling(), per_batch=4, max_age=1, when_old=when_old)
    runners.publish(0, weights)
    taken = take(arrivals, runners, 12)
    numbers = [group.number for group, _ in taken]
    assert len(numbers) == len(set(numbers)) == 48
    for group, version in taken:
        completions, limit = group.completions, request(group.number).max_new_tokens
        assert completions.length.tolist() == [limit] * SAMPLES
        assert version - 1 <= group.version <= completions.version.min() and completions.version.max() <= version
        if on_new_weights == "finish":
            assert len(set(completions.version)) == 1
    state, dropped = arrivals.get_state(), arrivals.take_dropped()
    missing = set(range(state["next"])) - set(numbers) - set(state["open"])
    assert sum(SAMPLES * request(number).max_new_tokens for number in missing) == dropped
    assert when_old != "wait" or not dropped


def test_completions_are_those_that_would_have_been_drawn_alone(make_runners):
    """Who generates, when, and beside whom makes no difference while the weights stay."""
    runners, _ = make_runners(exact=True)
    arrivals = runners.arrive(request, Sampling(), per_batch=3, max_age=2)
    runners.publish(0, weights)
    groups = [group for _ in range(6) for group in arrivals.take()]
    alone = TokenRunners(build_model, exact=True)
    expected = alone.generate([request(group.number) for group in groups], Sampling())
    found = Completions.concatenate([group.completions for group in groups])
    np.testing.assert_array_equal(found.tokens, expected.tokens)
    np.testing.assert_array_equal(found.logp, expected.logp)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_what_a_lost_runner_had_under_way_is_made_once_by_its_successor(make_runners, number):
    runners, runtime = make_runners(generate_timeout_s=2.0, exact=True)
    arrivals = runners.arrive(request, Sampling(), per_batch=4, max_age=2)
    runners.publish(0, weights)
    groups = [group for _ in range(2) for group in arrivals.take()]
    under_way = arrivals.get_state()["open"]
    os.kill(runtime.state()["token_runner/0"].pid, number)
    while not set(under_way) <= {group.number for group in groups}:
        groups += arrivals.take()
    numbers = [group.number for group in groups]
    assert len(numbers) == len(set(numbers))
    assert runners.take_restarts() == 1
    expected = TokenRunners(build_model, exact=True).generate([request(one) for one in numbers], Sampling())
    found = Completions.concatenate([group.completions for group in groups])
    np.testing.assert_array_equal(found.tokens, expected.tokens)


def test_a_state_is_gone_on_from(make_runners):
    runners, _ = make_runners()
    arrivals = runners.arrive(request, Sampling(), per_batch=4, max_age=1)
    runners.publish(0, weights)
    before = [group.number for group, _ in take(arrivals, runners, 3)]
    state = arrivals.get_state()
    assert sorted(before + state["open"]) == list(range(state["next"]))
    lost = [group.number for group, _ in take(arrivals, runners, 2, first=3)]
    arrivals.set_state(state)
    after = [group.number for group, _ in take(arrivals, runners, 4, first=3)]
    assert not set(after) & set(before)
    assert set(state["open"]) | set(lost) <= set(after)
    state = arrivals.get_state()
    assert sorted(before + after + state["open"]) == list(range(state["next"]))


def test_runners_are_no_further_ahead_than_they_have_to_be(make_runners):
    """A learner that finds every batch complete learns from the last version, whatever age is allowed."""
    runners, _ = make_runners(1)
    arrivals = runners.arrive(lambda number: request(2), Sampling(), per_batch=4, max_age=5)
    runners.publish(0, weights)
    arrivals.take()
    assert arrivals._lead == 2  # it had to wait
    ages = []
    for version in range(1, 9):
        runners.publish(version, weights)
        deadline = time.monotonic() + 60
        while arrivals._asked or len(arrivals._arrived) < 4:  # a slow learner
            assert time.monotonic() < deadline
            time.sleep(0.001)
        ages.append([version - group.version for group in arrivals.take()])
    assert arrivals._lead == 1 and max(map(max, ages[-4:])) <= 1


def test_generate_and_arrivals_take_turns(make_runners):
    """As in an evaluation."""
    runners, _ = make_runners()
    arrivals = runners.arrive(request, Sampling(), per_batch=4, max_age=1)
    runners.publish(0, weights)
    numbers = [group.number for group in arrivals.take()]
    made = runners.generate([request(100), request(102)], Sampling())
    assert made.length.tolist() == [2, 2, 4, 4]
    numbers += [group.number for group in arrivals.take()]
    assert len(set(numbers)) == 8


def test_a_runner_that_dies_in_an_evaluation_is_told_of_what_was_under_way(make_runners):
    runners, runtime = make_runners(1)
    arrivals = runners.arrive(request, Sampling(), per_batch=4, max_age=2)
    runners.publish(0, weights)
    numbers = [group.number for group in arrivals.take()]
    runners.generate([request(100)], Sampling())  # it pauses the arrivals
    os.kill(runtime.state()["token_runner/0"].pid, signal.SIGKILL)
    runners.generate([request(100)], Sampling())
    assert runners.take_restarts() == 1
    numbers += [group.number for _ in range(3) for group in arrivals.take()]
    assert len(set(numbers)) == len(numbers) == 16


@pytest.mark.parametrize("on_new_weights", ["finish", "keep_cache", "refresh_cache"])
def test_new_weights_that_an_evaluation_takes_find_sequences_under_way(on_new_weights, monkeypatch):
    """As between two calls of advance: the long one of two requests has drawn some tokens, then new weights come."""
    channel = FakeChannel()
    runner = TokenRunner(
        build_model, policy_channel=channel, on_new_weights=on_new_weights, max_tokens=64, max_new_tokens=56
    )
    channel.publish(0, weights())
    long, short = Request([1, 2], max_new_tokens=20, seed=1), Request([3], max_new_tokens=3, seed=2)
    assert [number for number, _, _ in runner.advance({0: long, 1: short}, Sampling())] == [1]
    refreshed = []
    monkeypatch.setattr(Generation, "refresh", lambda self: refreshed.append(self))
    channel.publish(1, weights(1.1))
    assert runner.generate([short], Sampling()).version.tolist() == [1, 1, 1]
    ((number, _, made),) = runner.advance({}, Sampling())
    drawn_before = 20 if on_new_weights == "finish" else 3
    assert number == 0 and made.version.tolist() == [0] * drawn_before + [1] * (20 - drawn_before)
    assert len(refreshed) == (on_new_weights == "refresh_cache")


def test_what_a_runner_raises_is_raised_where_groups_are_taken(make_runners):
    runners, _ = make_runners(1)
    too_long = Request([1] * 70, n=1, max_new_tokens=4)
    arrivals = runners.arrive(
        lambda number: too_long if number == 5 else request(number), Sampling(), per_batch=4, max_age=1
    )
    runners.publish(0, weights)
    with pytest.raises(ConfigError, match="the prompt has 70 tokens"):
        for _ in range(3):
            arrivals.take()


# Which groups are taken -------------------------------------------------------------------------------------------


def picked(version, asked, arrived, per_batch=2, max_age=2, when_old="wait"):
    """Return the versions of the groups that are taken of those that `arrived`, beside those that were only `asked`."""
    nothing = Completions(
        np.zeros(0, int), np.zeros(0, np.float32), np.zeros(0, int), np.zeros(0, bool), np.zeros(0, int)
    )
    arrivals = GroupArrivals((), None, per_batch=per_batch, max_age=max_age, when_old=when_old)
    arrivals._version = version
    arrivals._asked = dict(enumerate(asked, 100))
    arrivals._arrived = [Group(number, of, nothing) for number, of in enumerate(arrived)]
    batch = arrivals._pick()
    return None if batch is None else [group.version for group in batch]


@pytest.mark.parametrize(
    ("version", "asked", "arrived", "taken"),
    [
        (5, [], [5], None),  # half a batch
        (5, [], [5, 4, 5, 3], [3, 4]),  # the oldest first
        (5, [3], [4, 5], None),  # 3 would be 3 updates old in the next one
        (5, [4, 4], [5, 5], [5, 5]),  # these two have one update more
        (5, [4, 4, 4], [5, 5], None),  # of three, one would not fit into it
        (5, [4], [3, 4, 5], [3, 4]),
        (5, [4, 5, 5], [4, 4, 5], [4, 4]),
        (5, [4, 4], [4, 5, 5], [4, 5]),
        (5, [], [4, 4, 4, 4], [4, 4]),
        (5, [5] * 4, [5, 5], [5, 5]),  # version 5 may be learned from by 5, 6 and 7
        (5, [5] * 5, [5, 5], None),
    ],
)
def test_a_slow_one_is_waited_for_where_it_would_be_too_old_otherwise(version, asked, arrived, taken):
    assert picked(version, asked, arrived) == taken


@pytest.mark.parametrize("when_old", ["pace", "drop"])
def test_elsewhere_it_is_dropped(when_old):
    assert picked(5, [3], [4, 5], when_old=when_old) == [4, 5]
    assert picked(5, [], [2, 4, 5], when_old=when_old) == [4, 5]
    assert picked(5, [], [2, 5], when_old=when_old) is None
