"""Environments that hang: what is interrupted, and above all what is not."""

import gc
import random
import signal
import sys
import threading
import time

import cloudpickle
import gymnasium
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.vector import AsyncVectorEnv, SyncVectorEnv

from rlx import actors
from rlx.nets.flat import FlatParameters
from rlx.nets.policy import build_policy
from rlx.rollout import deadline
from rlx.rollout.deadline import EnvTimeout, Watchdog
from rlx.rollout.runner_group import RunnerGroup

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # a process cannot import a test module by its name

pytestmark = pytest.mark.timeout(60)
WATCHED = {"on_env_error": "rebuild", "env_step_timeout_s": 0.2}
FOR_EVER = 3600.0


class Stuck(gymnasium.Env):
    """obs = number of steps in the episode; `hang` is called where (made as, method, its how many-th) says so."""

    observation_space = spaces.Box(-np.inf, np.inf, (1,), np.float32)
    action_space = spaces.Discrete(2)

    def __init__(self, number, where, hang):
        self.number, self.where, self.hang = number, where, hang
        self.calls = dict.fromkeys(("step", "reset", "close"), 0)

    def call(self, method):
        self.calls[method] += 1
        if (self.number, method, self.calls[method]) in self.where:
            self.hang()

    def reset(self, *, seed=None, options=None):
        self.call("reset")
        self.steps = 0
        return np.zeros(1, np.float32), {}

    def step(self, action):
        self.call("step")
        self.steps += 1
        return np.full(1, self.steps, np.float32), 1.0, False, self.steps == 4, {}

    def close(self):
        self.call("close")


def stuck(*where, hang=lambda: time.sleep(FOR_EVER)):
    made = []

    def factory():
        made.append(Stuck(len(made), where, hang))
        return made[-1]

    return factory


def spin():
    while True:
        pass


def wait_for_a_lock():
    lock = threading.Lock()
    lock.acquire()
    lock.acquire()


def sleep_through_errors():
    """As a client that retries whatever goes wrong; it gives in at the third interruption."""
    for attempt in range(3):
        try:
            time.sleep(FOR_EVER)
        except Exception:
            if attempt == 2:
                raise


def column(array_T_B):
    return array_T_B[:, 0].reshape(len(array_T_B)).tolist()


# What is interrupted ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hang", [lambda: time.sleep(FOR_EVER), spin, wait_for_a_lock, sleep_through_errors])
def test_a_step_that_hangs_is_a_failure(hang, make_runner, caplog):
    runner = make_runner(stuck((0, "step", 3), hang=hang), 1, **WATCHED)
    started = time.monotonic()
    sample = runner.sample(6)
    assert 0.2 <= time.monotonic() - started < 5
    assert column(sample.trajectory.obs) == [0, 1, 2, 0, 1, 2]
    assert column(sample.trajectory.mask) == [1, 1, 0, 1, 1, 1]
    assert column(sample.trajectory.truncated) == [0, 1, 0, 0, 0, 0]
    assert sample.env_failures == 1
    assert (
        "EnvTimeout: step() of an environment took longer than fault_tolerance.env_step_timeout_s=0.2 " in caplog.text
    )


def test_a_reset_and_a_close_that_hang_are_interrupted_too(make_runner, caplog):
    sample = make_runner(stuck((0, "reset", 2), (0, "close", 1), (1, "reset", 1)), 1, **WATCHED).sample(6)
    assert column(sample.trajectory.obs) == [0, 1, 2, 3, 0, 1] and sample.trajectory.mask.all()
    assert sample.env_failures == 2 and sample.episodes == [(4.0, 4)]
    assert "and so did its close(): EnvTimeout" in caplog.text


def test_a_vector_environment_that_hangs_is_interrupted(make_runner):
    make = stuck((1, "step", 3))
    sample = make_runner(lambda: SyncVectorEnv([make, make]), 2, **WATCHED).sample(6)
    assert sample.trajectory.mask.all(1).tolist() == [True, True, False, True, True, True]


@pytest.mark.filterwarnings("ignore")  # gymnasium warns of the close, newer Pythons of the fork
def test_processes_of_a_vector_environment_that_hangs_are_ended(make_runner):
    vectors = []

    def vector():
        where = () if vectors else ((0, "step", 3),)
        vectors.append(AsyncVectorEnv([lambda: Stuck(0, where, spin), lambda: Stuck(1, where, spin)]))
        return vectors[-1]

    runner = make_runner(vector, 2, **WATCHED)
    sample = runner.sample(6)
    assert sample.trajectory.mask.all(1).tolist() == [True, True, False, True, True, True]
    assert not any(process.is_alive() for process in vectors[0].processes)
    runner.close()


def test_without_rebuilding_a_hang_ends_the_run(make_runner):
    options = WATCHED | {"on_env_error": "raise"}
    with pytest.raises(EnvTimeout, match=r"step\(\) of an environment") as caught:
        make_runner(stuck((0, "step", 3)), 1, **options).sample(6)
    assert "at step 2 of fragment 0" in caught.value.__notes__[-1]


def test_a_runner_in_a_process_of_its_own_interrupts_its_environments(scripted_policy):
    observation_space, action_space = Stuck.observation_space, Stuck.action_space
    weights = FlatParameters(build_policy(observation_space, action_space)).numpy().copy()
    with actors.runtime("local") as runtime:
        group = RunnerGroup(
            stuck((0, "step", 3)), build_policy, num_runners=1, num_envs=1, runtime=lambda: runtime, **WATCHED
        )
        group.publish(0, weights)
        sample = group.sample(6)
        assert column(sample.trajectory.mask) == [1, 1, 0, 1, 1, 1] and sample.env_failures == 1
        group.close()


# What is not -----------------------------------------------------------------------------------------------------


def test_steps_that_take_less_each_may_take_more_together(make_runner):
    runner = make_runner(lambda: Stuck(0, {(0, "step", k) for k in range(1, 9)}, lambda: time.sleep(0.1)), 1, **WATCHED)
    assert runner.sample(8).env_failures == 0


def test_a_slow_policy_is_not_interrupted(make_runner):
    runner = make_runner(stuck(), 1, **WATCHED)
    act = runner._acting.act

    def slow(t, obs_B):
        if t == 2:
            time.sleep(0.6)
        return act(t, obs_B)

    runner._acting.act = slow
    assert runner.sample(4).env_failures == 0
    time.sleep(0.6)  # nor whoever comes after
    assert runner.sample(4).env_failures == 0


def test_in_another_thread_nothing_is_interrupted_and_the_main_thread_least(make_runner):
    runner = make_runner(stuck((0, "step", 3), (0, "step", 9), hang=lambda: time.sleep(0.6)), 1, **WATCHED)
    runner.sample(1)  # the watchdog has begun in the main thread
    counts = []
    thread = threading.Thread(target=lambda: counts.append(runner.sample(6).env_failures))
    thread.start()
    time.sleep(0.5)
    thread.join()
    assert counts == [0]
    assert runner.sample(4).env_failures == 1


def test_an_interrupted_step_is_not_watched_any_more(make_runner):
    runner = make_runner(stuck((0, "step", 2), hang=lambda: signal.raise_signal(signal.SIGINT)), 1, **WATCHED)
    with pytest.raises(KeyboardInterrupt):
        runner.sample(4)
    assert runner._failures.watchdog.call is None
    time.sleep(0.5)
    assert runner.sample(4).env_failures == 0


def test_a_debugger_has_time(make_runner):
    def debug():
        sys.settrace(lambda *_: None)
        try:
            time.sleep(0.5)
        finally:
            sys.settrace(None)

    assert make_runner(stuck((0, "step", 3), hang=debug), 1, **WATCHED).sample(4).env_failures == 0


def test_a_runner_without_a_deadline_has_no_watchdog_and_a_runner_that_is_gone_leaves_none(make_runner):
    def watchdogs():
        return {thread for thread in threading.enumerate() if thread.name == "rlx-env-watchdog"}

    before = watchdogs()
    runner = make_runner(stuck(), 1, on_env_error="rebuild")
    runner.sample(1)
    assert watchdogs() <= before
    runner = make_runner(stuck(), 1, on_env_error="rebuild", env_step_timeout_s=600.0)
    runner.sample(1)
    (thread,) = watchdogs() - before
    del runner
    gc.collect()
    thread.join(5)
    assert not thread.is_alive()


def test_a_signal_that_comes_late_spares_the_next_call_also_if_it_looks_the_same():
    watchdog = Watchdog(FOR_EVER)
    watchdog.watch()
    calls = []

    def first():
        calls.append(watchdog.call)

    def second():
        assert watchdog.call == calls[0]
        deadline._late = (watchdog, calls[0])
        signal.raise_signal(deadline.INTERRUPT)
        calls.append("spared")
        deadline._late = (watchdog, watchdog.call)
        signal.raise_signal(deadline.INTERRUPT)
        raise AssertionError("the second signal was for this call")

    watchdog.run("step", 0, first)
    deadline._late = (watchdog, calls[0])
    signal.raise_signal(deadline.INTERRUPT)
    with pytest.raises(EnvTimeout):
        watchdog.run("step", 0, second)
    assert calls[1:] == ["spared"]
    signal.raise_signal(deadline.INTERRUPT)


@pytest.fixture
def quick_threads():
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)  # else a thread waits 5 ms for its turn
    yield
    sys.setswitchinterval(before)


def test_calls_that_end_as_their_deadline_comes_are_hit_inside_or_not_at_all(quick_threads, monkeypatch):
    """Hundreds of calls that last about as long as the deadline, with other work between them that must not be hit.

    What is raised outside of a call fails the test by itself.
    """
    rng = random.Random(0)
    watchdog = Watchdog(0.002)
    watchdog.watch()
    told: list[bool] = []

    def call(ends_at):
        told.append(False)
        try:
            while time.perf_counter() < ends_at:
                pass
        except EnvTimeout:
            told[-1] = True
            raise

    raised = 0
    ends = time.monotonic() + 4
    while time.monotonic() < ends:
        try:
            watchdog.run("step", 0, call, time.perf_counter() + rng.uniform(0.001, 0.007))
        except EnvTimeout:
            raised += 1
        for _ in range(rng.randrange(3000)):
            assert watchdog.call is None
    assert len(told) > 100 and 20 < raised < len(told) - 20
    # One that is hit after its last statement and before the store that ends it does not know of it.
    assert 0 <= raised - sum(told) <= 0.1 * raised
