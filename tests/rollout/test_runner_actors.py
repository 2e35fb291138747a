"""Deadlines of calls to actors that are started again: real kills, and starts that a test holds up."""

import math
import os
import signal
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import cloudpickle
import pytest

from rlx import actors
from rlx.actors import Restart
from rlx.errors import ActorDied
from rlx.rollout.runner_actors import Advice, Call, RunnerActors

cloudpickle.register_pickle_by_value(sys.modules[__name__])

pytestmark = pytest.mark.timeout(60)
ADVICE = Advice(method="work", when_late="Be patient.", when_dead="the load")
TIMEOUT_S = 0.3


class Late:
    """Is there at once the first time; later ones wait until the test writes the file `gate`."""

    def __init__(self, gate, *, policy_channel):
        self.gate = gate
        born = Path(f"{gate}.born")
        if born.exists():
            while not Path(gate).exists():
                time.sleep(0.005)
        born.touch()

    def spaces(self):
        return None

    def work(self, number):
        """Meet what the file `fate` says first; later calls, what comes after it."""
        fate = Path(f"{self.gate}.fate")
        left = fate.read_text().split() if fate.exists() else []
        if left:
            fate.write_text(" ".join(left[1:]))
            os.kill(os.getpid(), signal.Signals[left[0]])
        return number, os.getpid()

    def close(self):
        pass


@pytest.fixture
def make_actors(tmp_path):
    with actors.runtime("local", preload=("numpy",)) as runtime:

        def make(start_timeout_s, restarts=5):
            made = RunnerActors(runtime, start_timeout_s, TIMEOUT_S, Restart(max=restarts, per_s=60), Late, ADVICE)
            made.spawn("late/0", (str(tmp_path / "gate"),), {})
            made.start()
            return made, runtime, tmp_path / "gate"

        yield make


def kill(runtime):
    """Kill it, and return once that is known."""
    pid = runtime.state()["late/0"].pid
    os.kill(pid, signal.SIGKILL)
    while runtime.state()["late/0"].status == "alive":
        time.sleep(0.001)
    return pid


def test_a_start_takes_nothing_of_the_time_that_calls_have(make_actors):
    """The second call is asked of an actor whose death nobody has told the caller yet, and waits for the next one."""
    made, runtime, gate = make_actors(start_timeout_s=30)
    first = made.ask(0, "work", lambda: (1,))
    pid = kill(runtime)
    second = made.ask(0, "work", lambda: (2,))
    deadline = second.deadline

    def open_gate():
        while second.deadline < deadline + 2 * TIMEOUT_S:  # twice the second call would have been late
            time.sleep(0.005)
        gate.touch()

    opener = threading.Thread(target=open_gate, daemon=True)
    opener.start()
    answers = made.gather([first, second])
    assert [number for number, _ in answers] == [1, 2]
    assert made.incarnation(0) == 1 and answers[1][1] not in (None, pid)


def test_a_start_that_takes_too_long_is_told_as_such(make_actors):
    made, runtime, _ = make_actors(start_timeout_s=30, restarts=1)
    made._start_timeout_s = 0.5
    kill(runtime)
    with pytest.raises(ActorDied, match=r"late/0 has not started within 0\.5 s\. Raise fault_tolerance"):
        made.gather([made.ask(0, "work", lambda: (2,))])


def test_who_is_stopped_as_soon_as_it_is_back_is_found_by_the_deadline_of_its_call(make_actors):
    """Not by that of its start, which is long over: the call that was lost is asked of the next one."""
    made, _, gate = make_actors(start_timeout_s=3600)
    gate.touch()
    Path(f"{gate}.fate").write_text("SIGKILL SIGSTOP")
    assert made.gather([made.ask(0, "work", lambda: (1,))])[0][0] == 1
    assert made.incarnation(0) == 2


def test_calls_that_end_between_two_looks_are_asked_again_in_their_order(monkeypatch):
    """Else the next incarnation collects the second one first, and it may be learned from after the first."""
    made = RunnerActors(SimpleNamespace(channel=str, wait=lambda *_: None), 1.0, 1.0, None)  # pyright: ignore
    calls = [Call(made, 0, "sample", tuple, 60.0) for _ in range(2)]
    ended = []

    class Ending(SimpleNamespace):
        def done(self):
            if ended:
                return True
            ended.append(self)
            return False

    for call in calls:
        call.future, call.deadline = Ending(), math.inf  # pyright: ignore
    noted = []
    monkeypatch.setattr(made, "_note", noted.append)
    made._wait(calls, 1)
    assert noted == calls[: len(noted)]
