"""Functions that do not return are left behind, and nothing of them is left over."""

import contextlib
import subprocess
import sys
import threading
import time

import pytest

from rlx.text.time_limit import DeadlinePassed, call_within


def spin():
    while True:
        pass


def spin_stubbornly():
    while True:
        with contextlib.suppress(Exception):
            spin()


def ended(thread):
    thread.join(timeout=30)
    return not thread.is_alive()


def test_a_value_or_an_exception_comes_as_it_is():
    assert call_within(30, divmod, 7, 2) == call_within(None, divmod, 7, 2) == (3, 1)
    with pytest.raises(ZeroDivisionError):
        call_within(30, divmod, 7, 0)


@pytest.mark.parametrize("function", [spin, spin_stubbornly])
def test_a_loop_is_left_behind_and_then_ends(function):
    before = set(threading.enumerate())
    with pytest.raises(DeadlinePassed, match=r"took longer than 0\.05 s"):
        call_within(0.05, function)
    assert all(ended(thread) for thread in set(threading.enumerate()) - before)


def test_without_a_deadline_it_runs_in_the_callers_thread():
    assert call_within(None, threading.current_thread) is threading.current_thread()
    assert call_within(30, threading.current_thread) is not threading.current_thread()


def test_who_ends_just_at_the_deadline_either_returns_or_is_late_and_no_thread_complains(monkeypatch):
    complaints = []
    monkeypatch.setattr(threading, "excepthook", complaints.append)
    outcomes = set()
    for lap in range(300):
        try:
            outcomes.add(call_within(0.002, time.sleep, 0.0015 + lap % 10 * 1e-4))
        except DeadlinePassed:
            outcomes.add("late")
    mine = [thread for thread in threading.enumerate() if thread.name == "rlx-time-limit"]
    assert all(ended(thread) for thread in mine)
    assert outcomes <= {None, "late"} and complaints == []


HANGING = """\
import threading
from rlx.text.time_limit import DeadlinePassed, call_within

lock = threading.Lock()
lock.acquire()
try:
    call_within(0.05, lock.acquire)  # native code that never returns
except DeadlinePassed:
    print("left behind", [thread.name for thread in threading.enumerate()][1:])
"""


def test_a_process_ends_although_a_function_never_does():
    done = subprocess.run([sys.executable, "-c", HANGING], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "left behind ['rlx-time-limit']\n", "")
