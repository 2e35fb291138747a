"""Arrivals with real runners: who is slow holds up nobody, what is ahead is bounded, nothing is lost unseen."""

import contextlib
import os
import signal
import time
from pathlib import Path

import gymnasium
import numpy as np
import psutil
import pytest

from rlx.actors import Restart
from rlx.errors import ActorDied
from rlx.nets.flat import FlatParameters
from rlx.nets.policy import build_policy
from rlx.rollout.env_runner import EnvRunner
from rlx.rollout.runner_group import RunnerGroup
from tests.polling import until

STEPS, ENVS = 5, 2
DEADLINE_S = 30.0


class Counts(gymnasium.Env):
    """Observations are (number of this runner's process, steps so far); the runner in the folder's list holds."""

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (2,), np.float64)
    action_space = gymnasium.spaces.Discrete(2)

    def __init__(self, folder, fail_at=None):
        self.folder, self.fail_at = Path(folder), fail_at
        self.count = 0

    def reset(self, seed=None, options=None):
        return self.observe(), {}

    def observe(self):
        return np.array([os.getpid(), self.count], np.float64)

    def step(self, action):
        self.count += 1
        if self.fail_at is not None and self.count >= self.fail_at:
            raise FloatingPointError(f"step {self.count}")
        while (self.folder / f"hold-{os.getpid()}").exists():
            (self.folder / f"held-{os.getpid()}").touch()
            time.sleep(0.001)
        return self.observe(), 0.0, False, False, {}


@pytest.fixture
def make_group(local, tmp_path):
    groups = []

    def make(num_runners, fail_at=None, **options):
        group = RunnerGroup(
            *(Counts, build_policy),
            num_runners=num_runners,
            num_envs=ENVS,
            runtime=lambda: local,
            kwargs={"folder": str(tmp_path), "fail_at": fail_at},
            **options,
        )
        groups.append(group)
        group.publish(0, weights())
        return group

    yield make
    for hold in tmp_path.glob("hold-*"):
        hold.unlink()
    for group in groups:
        group.close()


def weights():
    return FlatParameters(build_policy(Counts.observation_space, Counts.action_space)).numpy().copy()


def arrive(group, per_batch=1, max_ahead=4, **options):
    return group.arrive(STEPS, per_batch=per_batch, max_ahead=max_ahead, **options)


def origins(sample):
    """Return for every env of a batch the pid of its runner, and its first step."""
    return [(int(pid), int(count)) for pid, count in sample.trajectory.obs[0]]


def runner_pids(runtime):
    """Return those of the runners that are there; groups of other tests may have had more."""
    return [info.pid for _, info in sorted(runtime.state().items()) if info.status == "alive"]


def test_each_runners_fragments_follow_each_other_and_none_is_lost(make_group):
    group = make_group(2)
    seen = {}

    def take():
        sample = arrive(group, per_batch=2)
        assert sample.trajectory.obs.shape == (STEPS, 2 * ENVS, 2)
        assert sample.env_steps == STEPS * 2 * ENVS
        for pid, count in origins(sample)[::ENVS]:
            assert count == seen.get(pid, 0)
            seen[pid] = count + STEPS
        group.used()
        return len(seen)

    until(lambda: take() == 2)
    for _ in range(12):
        take()
    assert len(seen) == 2


def test_who_is_slow_is_waited_for_by_nobody(make_group, local, tmp_path):
    group = make_group(3)
    slow, *fast = runner_pids(local)
    hold = tmp_path / f"hold-{slow}"
    hold.touch()
    pids = set()
    for _ in range(20):
        pids |= {pid for pid, _ in origins(arrive(group, per_batch=2))}
        group.used()
    assert pids == set(fast)
    hold.unlink()
    until(lambda: slow in {pid for pid, _ in origins(arrive(group))} or group.used())


def test_runners_are_at_most_so_far_ahead(make_group):
    group = make_group(2)
    arrive(group, max_ahead=3, queue_size=9)
    until(lambda: len(group._arrivals._queue) == 2)  # all that may be ahead of the one being learned from
    assert group._actors.calls == [2, 1] and not group._arrivals._calls
    group.used()
    until(lambda: sum(group._actors.calls) == 4)
    until(lambda: len(group._arrivals._queue) == 3)


def test_a_full_queue_pushes_back(make_group):
    group = make_group(1)
    arrive(group, max_ahead=50, queue_size=2)
    until(lambda: len(group._arrivals._queue) == 2 and len(group._arrivals._calls) == 1)
    until(lambda: group._arrivals._calls[0].future.done())
    assert group._actors.calls == [5]  # one taken, two in the queue, one that waits for room, one to go on with


def test_a_full_queue_drops_the_oldest_and_counts_them(make_group):
    group = make_group(1)
    ((_, begun), _) = origins(arrive(group, when_full="drop_oldest"))  # not always the runner's first
    until(lambda: group._arrivals._dropped_steps >= 5 * STEPS * ENVS)
    sample = arrive(group, when_full="drop_oldest")
    ((_, count), _) = origins(sample)
    # What the runner has done between the first batch and this one was dropped, and nothing else.
    assert sample.dropped_steps == (count - begun - STEPS) * ENVS
    group.used()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_runner_that_dies_or_stops_is_started_again_while_the_others_go_on(make_group, local, number):
    group = make_group(2, restart=Restart(max=3, per_s=60), sample_timeout_s=1.0)
    arrive(group)
    group.used()
    victim, other = runner_pids(local)
    os.kill(victim, number)
    others = restarts = 0
    new = set()
    while not new or not others:
        sample = arrive(group)
        restarts += sample.runner_restarts
        pids = {pid for pid, _ in origins(sample)}
        others += pids == {other}
        new |= pids - {victim, other}
        group.used()
    assert restarts == 1
    until(lambda: not psutil.pid_exists(victim))


def test_no_restart_left_ends_it_with_advice(make_group, local):
    group = make_group(2)
    arrive(group)
    os.kill(runner_pids(local)[1], signal.SIGKILL)
    with pytest.raises(ActorDied, match=r"SIGKILL(.|\n)*fault_tolerance.max_restarts"):
        for _ in range(100):
            group.used()
            arrive(group)


def test_what_an_environment_raises_travels_and_the_next_call_goes_on(make_group):
    group = make_group(1, fail_at=3 * STEPS + 2)
    for _ in range(3):
        arrive(group)
        group.used()
    with pytest.raises(FloatingPointError, match="step 17"):
        arrive(group)
    with pytest.raises(FloatingPointError, match=r"step \d+"):  # it still fails, and still answers
        arrive(group)


def test_it_goes_on_after_its_state_was_taken_and_begins_anew_where_it_is_set(make_group):
    group = make_group(1)
    arrive(group)
    group.used()
    state = group.get_state()
    ((_, count),) = {*origins(arrive(group))[:1]}
    group.used()
    assert count == STEPS  # what had arrived before is still there
    group.set_state(state)
    group.publish(1, weights())
    sample = arrive(group)
    assert (sample.trajectory.weights_version == 1).all()
    ((_, count),) = {*origins(sample)[:1]}
    assert count % STEPS == 0


def test_the_state_is_taken_without_a_runner_that_is_far_behind(make_group, local, tmp_path):
    """What it was at arrives later, and a group that goes on from the state has it go on as it is."""
    group = make_group(2)
    slow, fast = runner_pids(local)
    hold = tmp_path / f"hold-{slow}"
    hold.touch()  # before its first fragment, so that none of it waits
    arrive(group)
    group.used()
    until((tmp_path / f"held-{slow}").exists)
    state = group.get_state()
    assert [one is None for one in state["runners"]] == [True, False]
    for _ in range(10):  # the other goes on
        assert {pid for pid, _ in origins(arrive(group))} == {fast}
        group.used()
    hold.unlink()
    until(lambda: slow in {pid for pid, _ in origins(arrive(group))} or group.used())
    group.set_state(state)
    group.publish(1, weights())
    seen = set()

    def has_seen_both():
        seen.update(pid for pid, _ in origins(arrive(group)))
        group.used()
        return len(seen) == 2

    until(has_seen_both)


def test_closing_ends_the_thread_in_the_middle_of_everything(make_group, local, tmp_path):
    group = make_group(2)
    arrive(group)
    for pid in runner_pids(local):
        (tmp_path / f"hold-{pid}").touch()
    thread = group._arrivals._thread
    assert thread is not None and thread.is_alive()
    started = time.monotonic()
    group.close()
    assert not thread.is_alive() and time.monotonic() - started < 5


def test_fragments_of_one_runner_are_what_it_collects_alone(make_group, local):
    """Nothing of the values depends on the road that they took: rewards, logp and values as from a plain runner."""
    options = {"seed": 3, "normalize_obs": False}
    made = RunnerGroup("CartPole-v1", build_policy, num_runners=1, num_envs=2, runtime=lambda: local, **options)
    alone = EnvRunner("CartPole-v1", 2, build_policy, **options)
    with contextlib.closing(made) as group:
        policy = build_policy(*group.spaces(), seed=1)
        flat = FlatParameters(policy).numpy().copy()
        group.publish(0, flat)
        alone.set_weights(0, flat)
        for _ in range(5):
            sample, expected = group.arrive(20, per_batch=1, max_ahead=3), alone.sample(20)
            for name, array in expected.trajectory.arrays().items():
                np.testing.assert_array_equal(getattr(sample.trajectory, name), array, err_msg=name)
            assert sample.episodes == expected.episodes
            group.used()
