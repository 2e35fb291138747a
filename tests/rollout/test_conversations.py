"""Conversations with environments: what is read and drawn, by hand; and environments that fail, in both homes."""

import contextlib
from dataclasses import replace

import numpy as np
import pytest

from rlx import actors
from rlx.actors import Restart
from rlx.rollout.conversations import Terms, converse, transcripts
from rlx.rollout.text_envs import TextEnvs
from rlx.rollout.token_rows import token_batch, token_trajectory
from rlx.rollout.token_runner import Completions
from tests.rollout.scripted_env import Scripted

STOP = 9
TERMS = Terms(max_turns=5, max_new_tokens=4, context=50, vocabulary=30, stops=frozenset([STOP]))
F, T = False, True


def drawn(asked):
    """Return what a model would draw for these requests: its own number of the call, and the stop token."""
    drawn.calls.append(asked)
    count = sum(request.n for request in asked)
    number = len(drawn.calls)
    return Completions(
        tokens=np.array([number, STOP] * count),
        logp=np.array([-number, -0.5] * count, np.float32),
        length=np.full(count, 2),
        stopped=np.ones(count, bool),
        version=np.full(2 * count, 10 + number),
    )


IN_BOTH_HOMES = pytest.mark.parametrize("make_envs", ["driver", "processes"], indirect=True)


@pytest.fixture
def make_envs(request):
    """Make environments in the driver, or where a test asks for it in processes."""
    home = getattr(request, "param", "driver")
    drawn.calls = []
    with contextlib.ExitStack() as stack:
        elsewhere = {}
        if home == "processes":
            runtime = stack.enter_context(actors.runtime("local", preload=("numpy", "rlx.rollout.text_env_host")))
            elsewhere = {"num_actors": 2, "runtime": lambda: runtime, "restart": Restart(max=3, per_s=60.0)}

        def make(timeout_s=5.0):
            return stack.enter_context(contextlib.closing(TextEnvs(Scripted, timeout_s=timeout_s, **elsewhere)))

        yield make


def talk(envs, whats=(None,), generate=drawn, **changes):
    begun = {number: {"prompt": [1, 2], "record": {"what": what}} for number, what in enumerate(whats)}
    samples = changes.pop("samples", 1)
    return converse(generate, envs, begun, replace(TERMS, **changes), samples=samples, seed_of=seed_of)


def seed_of(key, turn):
    return hash((*key, turn)) & 0xFFFF


@IN_BOTH_HOMES
def test_a_conversation_by_hand(make_envs):
    (one,) = talk(make_envs())
    assert one.start == [1, 2, 7] and one.terminated and not one.failure
    assert one.tokens == [1, 9, 21, 21, 2, 9, 22, 22, 3, 9]
    assert one.drawn == [T, T, F, F, T, T, F, F, T, T]
    assert one.logp == [-1, -0.5, 0, 0, -2, -0.5, 0, 0, -3, -0.5]
    assert one.version == [11, 11, 0, 0, 12, 12, 0, 0, 13, 13]
    assert one.reward == [0, 0.5, 0, 0, 0, 0.5, 0, 0, 0, 0.5]


def test_the_model_reads_on_behind_the_very_tokens_that_it_drew(make_envs):
    talk(make_envs(), [None, None], samples=2)
    first, second, third = drawn.calls
    assert [(list(request.prompt), request.n) for request in first] == [([1, 2, 7], 2)] * 2  # samples share a prefill
    assert [(list(request.prompt), request.n) for request in second] == [([1, 2, 7, 1, 9, 21, 21], 1)] * 4
    assert [list(request.prompt) for request in third] == [[1, 2, 7, 1, 9, 21, 21, 2, 9, 22, 22]] * 4
    assert len({request.seed for call in drawn.calls for request in call}) == 2 + 4 + 4


def test_rows_of_a_conversation_by_hand(make_envs):
    """A score of 2 is 0.5 for each turn, where the turn ends, and 0.5 beside."""
    conversations = talk(make_envs(), max_turns=3)
    made = transcripts(conversations)
    assert (made.length.tolist(), made.drawn_length.tolist()) == ([10], [6])
    rows = token_batch(token_trajectory([conversations[0].start], made, np.array([2.0], np.float32)), np.array([12]))
    expected = {
        "obs": [1, 2, 7, 1, 9, 21, 21, 2, 9, 22, 22, 3],
        "action": [2, 7, 1, 9, 21, 21, 2, 9, 22, 22, 3, 9],
        "mask": [F, F, T, T, F, F, T, T, F, F, T, T],
        "logp": [0, 0, -1, -0.5, 0, 0, -2, -0.5, 0, 0, -3, -0.5],
        "reward": [0, 0, 0, 0.5, 0, 0, 0, 0.5, 0, 0, 0, 1.0],
        "terminated": [F] * 11 + [T],
        "truncated": [F] * 12,
        "weights_version": [0, 0, 11, 11, 0, 0, 12, 12, 0, 0, 13, 13],
    }
    for name, values in expected.items():
        assert rows.tensors[name].tolist() == [values], name


@pytest.mark.parametrize(
    ("changes", "tokens"),
    [
        ({"max_turns": 1}, [1, 9]),
        ({"max_turns": 2}, [1, 9, 21, 21, 2, 9]),
        ({"context": 7}, [1, 9]),  # 3 + 2 + 2 leaves no room for a token of the model
        ({"context": 8}, [1, 9, 21, 21, 2, 9]),
    ],
)
def test_a_conversation_that_is_cut_ends_with_a_turn_of_the_model(make_envs, changes, tokens):
    (one,) = talk(make_envs(), **changes)
    assert one.tokens == tokens and not one.terminated
    assert transcripts([one]).stopped.tolist() == [F]


def test_a_turn_without_a_stop_token_is_the_last(make_envs):
    def cut(asked):
        made = drawn(asked)
        made.stopped[:] = len(drawn.calls) < 2
        return made

    (one,) = talk(make_envs(), generate=cut)
    assert one.tokens == [1, 9, 21, 21, 2, 9] and one.reward == [0, 0.5, 0, 0, 0, 0.5]


@pytest.mark.parametrize(
    ("what", "failure"),
    [
        ("raises in reset", "reset() raised FloatingPointError: no luck"),
        ("starts with nothing", "reset() returned 0 tokens; the model reads 1 to 49"),
        ("raises", "step() raised FloatingPointError: at [1, 9]"),
        ("hangs", "step() of an environment took longer than environment.timeout_s=0.5 and was interrupted; "),
        ("starts with a book", "reset() returned 62 tokens; the model reads 1 to 49"),
        ("is no number", "step() raised ValueError: the reward is nan; it must be a finite number of float32"),
        ("says another language", "the observation has token ids outside of 0 to 29"),
        ("says words", "step() raised TypeError: the observation is str of shape (); it must be token ids"),
    ],
)
def test_an_environment_that_fails_costs_its_own_conversation(make_envs, what, failure):
    conversations = talk(make_envs(timeout_s=0.5), [None, what, None])
    assert conversations[1].failure.startswith(failure)
    assert not conversations[1].failure.endswith(".")  # a sentence goes on behind it
    for one in (conversations[0], conversations[2]):
        assert not one.failure and len(one.tokens) == 10
    lengths = np.array([len(one.start) - 1 + len(one.tokens) for one in conversations])
    rows = token_trajectory([one.start for one in conversations], transcripts(conversations), np.ones(3, np.float32))
    assert token_batch(rows, lengths).obs.shape == (3, 12)


@pytest.mark.parametrize("make_envs", ["processes"], indirect=True)
def test_one_that_hangs_in_a_process_costs_its_own_conversation(make_envs):
    conversations = talk(make_envs(timeout_s=0.5), [None, "hangs", None, None])
    assert [bool(one.failure) for one in conversations] == [F, T, F, F]  # 3 is in its process


def test_after_four_that_hang_no_more_are_waited_for(make_envs):
    conversations = talk(make_envs(timeout_s=0.1), ["hangs"] * 5)
    assert [one.failure.startswith("step() of an environment took longer") for one in conversations] == [T] * 4 + [F]
    assert conversations[4].failure == "step() was not called, since 4 others before it were interrupted"


@pytest.mark.parametrize("make_envs", ["processes"], indirect=True)
def test_a_process_that_dies_costs_the_conversations_in_it(make_envs):
    envs = make_envs()
    conversations = talk(envs, [None, "dies", None, None])
    assert [bool(one.failure) for one in conversations] == [F, T, F, T]  # 1 and 3 share a process
    assert conversations[3].failure == "the environment was lost with its process"
    assert envs.take_restarts() == 1


@IN_BOTH_HOMES
def test_an_environment_is_used_again(make_envs):
    envs = make_envs()
    first, second = talk(envs), talk(envs)
    assert first[0].tokens == [1, 9, 21, 21, 2, 9, 22, 22, 3, 9]
    assert second[0].tokens == [4, 9, 21, 21, 5, 9, 22, 22, 6, 9]


def test_conversations_that_the_model_left_keep_no_environment(make_envs):
    """Of those that end with max_turns the environment does not know that they are over."""
    envs = make_envs()
    for _ in range(5):
        talk(envs, [None] * 3, max_turns=1)
    assert len(envs._hosts._envs) + len(envs._hosts._free) == 3
