"""Conversations of real token runners with environments in processes, while nobody waits for anybody."""

import os
import signal
from dataclasses import replace
from functools import partial

import numpy as np
import pytest

from rlx import actors
from rlx.actors import Restart
from rlx.generation.request import Sampling
from rlx.rollout import text_envs
from rlx.rollout.conversations import Terms, converse, transcripts
from rlx.rollout.text_envs import TextEnvs
from rlx.rollout.token_rows import token_trajectory
from rlx.rollout.token_runners import TokenRunners
from tests.rollout.scripted_env import Talkative
from tests.rollout.tiny_model import build_model, weights

SAMPLES = 2
LIMITS = {"max_age": 1, "when_old": "wait"}
STOPPED = pytest.param(signal.SIGSTOP, marks=pytest.mark.slow)
TERMS = Terms(max_turns=4, max_new_tokens=6, context=64, vocabulary=13, stops=frozenset([0, 5, 9]))


def seed_of(key, turn):
    return int(np.random.SeedSequence([*key, turn]).generate_state(1)[0])


def options(number, whats=None, gate=""):
    """Return the options of a prompt whose conversations have 1 to 5 turns; 5 are more than they may have."""
    what = (whats or {}).get(number, "")
    return {"prompt": [1, number % 13], "record": {"turns": 3 if what else 1 + number % 5, "what": what, "gate": gate}}


class Hall:
    """Runners, environments and what keeps them at work."""

    def __init__(self, runtime, options_of=options, samples=SAMPLES, terms=TERMS, timeout_s=20.0, **changes):
        limits = {"per_batch": 4} | {name: changes.pop(name, value) for name, value in LIMITS.items()}
        in_processes = {"runtime": lambda: runtime, "restart": Restart(max=3, per_s=60.0)}
        how = {"exact": True} | changes
        self.runners = TokenRunners(
            *(build_model,), num_runners=2, torch_threads=1, singly=True, max_tokens=None, max_new_tokens=6,
            **in_processes, **how,
        )  # fmt: skip
        self.envs = TextEnvs(Talkative, timeout_s=timeout_s, num_actors=2, **in_processes)
        self.arrivals = self.runners.arrive_in_turns(
            Sampling(),
            limits,
            **{"envs": self.envs, "terms": terms, "samples": samples, "options_of": options_of, "seed_of": seed_of},
        )
        self.runners.publish(0, weights)

    def take(self, batches, first=0):
        """Return the groups of so many batches, with the version that each was taken with."""
        taken = []
        for version in range(first, first + batches):
            taken += [(group, version) for group in self.arrivals.take()]
            self.runners.publish(version + 1, partial(weights, 1 + 0.01 * version))
        return taken

    def close(self):
        self.arrivals.pause()
        self.envs.close()
        self.runners.close()


@pytest.fixture(scope="module")
def runtime():
    with actors.runtime("local", preload=("numpy", "torch", "rlx.rollout.token_runners", "transformers")) as runtime:
        yield runtime


@pytest.fixture
def hall(runtime):
    """Make a Hall."""
    made = []

    def make(*arguments, **changes):
        made.append(Hall(runtime, *arguments, **changes))
        return made[-1], runtime

    yield make
    for one in made:
        one.close()


def in_rounds(numbers, samples=SAMPLES, options_of=options):
    """Return the conversations as they are held in rounds, in this process."""
    runners, envs = TokenRunners(build_model, exact=True), TextEnvs(Talkative, timeout_s=None)
    begun = {number: options_of(number) for number in numbers}
    return converse(
        lambda requests: runners.generate(requests, Sampling()), envs, begun, TERMS, samples=samples, seed_of=seed_of
    )


def said(conversation):
    return {**vars(conversation), "version": None}


def test_conversations_are_those_that_would_have_been_held_in_rounds(hall):
    """Who draws, when, and beside whom makes no difference while the weights stay: not to a bit."""
    made, _ = hall(max_age=2)
    groups = [group for _ in range(5) for group in made.arrivals.take()]
    assert sum(one.turns > 1 for group in groups for one in group.conversations) > 10
    expected = in_rounds([group.number for group in groups])
    assert [said(one) for group in groups for one in group.conversations] == [said(one) for one in expected]
    for group in groups:
        np.testing.assert_array_equal(group.completions.tokens, transcripts(group.conversations).tokens)


@pytest.mark.parametrize(
    ("when_old", "on_new_weights"),
    [
        ("wait", "finish"),
        pytest.param("wait", "refresh_cache", marks=pytest.mark.slow),
        pytest.param("pace", "finish", marks=pytest.mark.slow),
        ("drop", "keep_cache"),
    ],
)
def test_no_prompt_is_lost_or_taken_twice_and_no_token_is_too_old(hall, when_old, on_new_weights):
    made, _ = hall(when_old=when_old, on_new_weights=on_new_weights, exact=False)
    taken = made.take(12)
    numbers = [group.number for group, _ in taken]
    assert len(numbers) == len(set(numbers)) == 48
    for group, version in taken:
        versions = group.completions.version[group.completions.drawn]
        assert version - 1 <= group.version <= versions.min() and versions.max() <= version
        assert len(group.conversations) == SAMPLES and not any(one.failure for one in group.conversations)
        ends = 1 + group.number % 5
        for one in group.conversations:
            assert one.turns <= min(ends, 4) and one.terminated == (one.turns == ends)
    state, dropped = made.arrivals.get_state(), made.arrivals.take_dropped()
    missing = set(range(state["next"])) - set(numbers) - set(state["open"])
    assert bool(missing) == bool(dropped)
    assert when_old != "wait" or not dropped


def test_what_an_environment_said_is_read_and_does_not_count(hall):
    made, _ = hall()
    groups = made.arrivals.take()
    for group in groups:
        for one in group.conversations:
            tokens, drawn, rest = np.array(one.tokens), np.array(one.drawn), 0
            while rest < len(tokens):  # a turn, and what is made of it
                turn = rest + int(np.argmin(drawn[rest:])) if not drawn[rest:].all() else len(tokens)
                total = int(tokens[rest:turn].sum())
                assert one.reward[turn - 1] == total / 100
                answer = np.full(1 + total % 3, total % 10) if turn < len(tokens) else []
                assert tokens[turn : turn + len(answer)].tolist() == list(answer)
                assert not drawn[turn : turn + len(answer)].any()
                rest = turn + len(answer)
        score = np.array([sum(one.reward) for one in group.conversations], np.float32)
        rows = token_trajectory([one.start for one in group.conversations], group.completions, score)
        assert rows.mask.sum() == group.completions.drawn.sum()
        np.testing.assert_allclose(rows.reward.sum(0), score, rtol=1e-6)


def test_nobody_waits_for_an_environment_of_another_process_and_a_conversation_goes_on_with_new_weights(hall, gate):
    """The one of prompt 0 stands at the gate in its second turn; those of odd numbers live in the other process."""
    path, _ = gate
    short = replace(TERMS, stops=frozenset(range(13)))  # turns of one token
    options_of = partial(options, whats={0: "waits"}, gate=path)
    made, _ = hall(options_of, samples=1, when_old="pace", max_age=3, terms=short)
    arrivals = made.arrivals
    arrivals._may_ask = lambda: arrivals._next < 8
    with arrivals._changed:
        arrivals._start()
        assert arrivals._changed.wait_for(lambda: len(arrivals._arrived) == 4, timeout=60)
    assert sorted(group.number for group in arrivals.take()) == [1, 3, 5, 7]
    with open(path, "w"):  # it has come to the gate
        made.runners.publish(1, partial(weights, 1.1))
    (group,) = [group for group in arrivals.take() if group.number == 0]
    (one,) = group.conversations
    assert one.turns == 3 and group.version == 0
    assert np.array(one.version)[one.drawn].tolist() == [0, 0, 1]


@pytest.mark.parametrize("number", [signal.SIGKILL, STOPPED])
def test_what_a_lost_runner_had_under_way_goes_on_with_its_successor(hall, number):
    made, runtime = hall(max_age=2, generate_timeout_s=2.0)
    groups = [group for _ in range(2) for group in made.arrivals.take()]
    under_way = made.arrivals.get_state()["open"]
    os.kill(runtime.state()["token_runner/0"].pid, number)
    restarts = 0
    while not (restarts and set(under_way) <= {group.number for group in groups}):
        groups += made.arrivals.take()
        restarts += made.runners.take_restarts()
    numbers = [group.number for group in groups]
    assert len(numbers) == len(set(numbers))
    assert restarts == 1
    expected = in_rounds(numbers)
    assert [said(one) for group in groups for one in group.conversations] == [said(one) for one in expected]


@pytest.mark.parametrize("number", [signal.SIGKILL, STOPPED])
def test_a_process_of_environments_that_is_lost_costs_the_conversations_in_it_once(hall, number, monkeypatch):
    monkeypatch.setattr(text_envs, "MARGIN_S", 1.0)
    made, runtime = hall(max_age=2, timeout_s=0.2)
    groups = [group for _ in range(2) for group in made.arrivals.take()]
    under_way = made.arrivals.get_state()["open"]
    os.kill(runtime.state()["text_env/0"].pid, number)
    restarts = 0
    while not (restarts and set(under_way) <= {group.number for group in groups}):
        groups += made.arrivals.take()
        restarts += made.envs.take_restarts()
    assert restarts == 1
    numbers = [group.number for group in groups]
    assert len(numbers) == len(set(numbers))
    conversations = dict(zip(numbers, [group.conversations for group in groups], strict=True))
    for one_number, alike in zip(numbers, np.array(in_rounds(numbers)).reshape(-1, SAMPLES).tolist(), strict=True):
        for sample, (one, expected) in enumerate(zip(conversations[one_number], alike, strict=True)):
            if one.failure:
                assert one.failure == "the environment was lost with its process"
                assert (one_number + sample) % 2 == 0 and one_number in under_way
            else:
                assert said(one) == said(expected)


def test_an_environment_that_hangs_costs_its_own_conversation(hall):
    whats = {2: "hangs"}
    made, _ = hall(lambda number: options(number, whats), timeout_s=0.5)
    groups = [group for _ in range(2) for group in made.arrivals.take()]
    failed = [group.number for group in groups for one in group.conversations if one.failure]
    reached = [group.number for group in groups for one in group.conversations if one.turns == 2 or one.failure]
    assert set(failed) == {2} <= set(reached)
    assert "interrupted" in next(one.failure for group in groups for one in group.conversations if one.failure)
    assert sorted(group.number for group in groups) == sorted({group.number for group in groups})


def test_a_state_is_gone_on_from(hall):
    made, _ = hall()
    before = [group.number for group, _ in made.take(3)]
    state = made.arrivals.get_state()
    assert sorted(before + state["open"]) == list(range(state["next"]))
    lost = [group.number for group, _ in made.take(2, first=3)]
    made.arrivals.set_state(state)
    groups = [group for group, _ in made.take(4, first=3)]
    after = [group.number for group in groups]
    assert not set(after) & set(before)
    assert set(state["open"]) | set(lost) <= set(after)
    state = made.arrivals.get_state()
    assert sorted(before + after + state["open"]) == list(range(state["next"]))
    assert not any(one.failure for group in groups for one in group.conversations)


def test_conversations_of_an_evaluation_leave_those_under_way_alone(hall):
    made, _ = hall()
    groups = made.arrivals.take()
    under_way = made.arrivals.get_state()["open"]
    assert under_way
    made.arrivals.pause()
    begun = {number: options(number) for number in under_way}
    evaluated = converse(
        lambda requests: made.runners.generate(requests, Sampling()),
        *(made.envs, begun, TERMS), samples=SAMPLES, seed_of=seed_of, stream=1,
    )  # fmt: skip
    assert not any(one.failure for one in evaluated)
    while not set(under_way) <= {group.number for group in groups}:
        groups += made.arrivals.take()
    expected = in_rounds([group.number for group in groups])
    assert [said(one) for group in groups for one in group.conversations] == [said(one) for one in expected]
