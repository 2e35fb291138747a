"""Actors that are started again: real kills, and budgets counted by hand."""

import gc
import os
import signal
import sys
import threading
import time
import weakref

import cloudpickle
import psutil
import pytest

from rlx import actors
from rlx.actors import Err, Ok, Restart
from rlx.actors.monitor import EventThread
from rlx.actors.supervision import RestartBudget
from rlx.errors import ActorDied, CallCancelled

cloudpickle.register_pickle_by_value(sys.modules[__name__])

pytestmark = pytest.mark.timeout(60)
T = 20.0
QUICK = Restart(max=3, per_s=60, backoff_s=0.01)


@pytest.fixture(scope="module")
def rt():
    with actors.runtime("local", preload=("numpy",)) as runtime:
        yield runtime


class Clerk:
    """Fails in __init__ while the file `fails` holds a number above 0, which each try lowers."""

    def __init__(self, fails=None):
        self.seen = []
        if fails is not None:
            with open(fails) as file:
                left = int(file.read())
            with open(fails, "w") as file:
                file.write(str(left - 1))
            if left > 0:
                raise LookupError(f"start {left} fails")

    def pid(self):
        return os.getpid()

    def note(self, item):
        self.seen.append(item)
        return list(self.seen)

    def die(self, number=signal.SIGKILL):
        os.kill(os.getpid(), number)

    def hang(self):
        time.sleep(3600)

    def leave(self):
        sys.exit(4)


def told(rt, actor, **which):
    """Return a list that fills with what the monitor is told, and a function that waits for its length."""
    news, changed = [], threading.Condition()

    def hear(kind):
        def callback(who, error):
            with changed:
                news.append((kind, who.name, error))
                changed.notify_all()

        return callback

    rt.monitor(actor, **{f"on_{kind}": hear(kind) for kind in which or ("exit", "restart")})

    def wait_for(count):
        with changed:
            assert changed.wait_for(lambda: len(news) >= count, T), news
        return news

    return wait_for


def kill(pid):
    os.kill(pid, signal.SIGKILL)


def test_a_budget_counts_restarts_in_a_sliding_window_and_its_pauses_double():
    now = 100.0
    budget = RestartBudget(Restart(max=3, per_s=10, backoff_s=0.5, max_backoff_s=1.5), clock=lambda: now)
    assert budget.spend() == 0.5  # counted at 100.5, when it happens
    assert budget.spend() == 1.0  # 101.0
    assert budget.spend() == 1.5  # not 2.0, which is above max_backoff_s; 101.5
    assert budget.spend() is None
    now = 110.4
    assert budget.spend() is None
    now = 110.5  # the first is 10 s old
    assert budget.spend() == 1.5
    now = 200.0
    assert budget.spend() == 0.5


@pytest.mark.parametrize("wrong", [{"max": 0}, {"per_s": 0}, {"backoff_s": -1}, {"backoff_s": 11}])
def test_an_impossible_policy_is_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Restart(**wrong)


def test_a_killed_actor_is_started_again_and_loses_exactly_what_it_had_not_answered(rt):
    actor = rt.spawn(Clerk, restart=QUICK)
    news = told(rt, actor)
    assert actor.note.call("a").result(T) == ["a"]
    pid = actor.pid.call().result(T)
    dying, behind = actor.hang.call(), actor.note.call("lost")
    kill(pid)
    for future in (dying, behind):
        with pytest.raises(ActorDied, match=rf"{actor.name} \(pid {pid}\) was killed by SIGKILL in hang\(\)"):
            future.result(T)
    futures = [actor.note.call(item) for item in "bcd"]  # at once, while it restarts
    assert [future.result(T) for future in futures] == [["b"], ["b", "c"], ["b", "c", "d"]]
    actor.ready(T)
    assert actor.incarnation == 1
    kind, name, error = news(1)[0]
    assert (kind, name) == ("restart", actor.name) and "SIGKILL" in str(error)
    state = rt.state()[actor.name]
    assert (state.status, state.restarts, state.error) == ("alive", 1, None) and state.pid != pid
    rt.kill(actor)
    assert [kind for kind, _, _ in news(2)] == ["restart", "exit"]


def test_while_it_restarts_it_says_so_and_its_calls_can_be_cancelled_and_kill_ends_it(rt):
    actor = rt.spawn(Clerk, restart=Restart(backoff_s=30, max_backoff_s=30))
    with pytest.raises(ActorDied):
        actor.die.call().result(T)
    waiting, unwanted = actor.pid.call(), actor.pid.call()
    state = rt.state()[actor.name]
    assert (state.status, state.pid, state.pending, state.method) == ("restarting", None, 2, None)
    assert "SIGKILL" in (state.error or "")
    assert unwanted.cancel()
    with pytest.raises(CallCancelled):
        unwanted.result(T)
    rt.kill(actor)
    with pytest.raises(ActorDied, match=r"was ended by kill\(\) while restarting"):
        waiting.result(T)
    assert rt.state()[actor.name].status == "dead"
    with pytest.raises(ActorDied):
        actor.ready(T)


def test_an_exhausted_budget_ends_it_and_the_error_counts_and_says_why(rt):
    actor = rt.spawn(Clerk, restart=Restart(max=2, per_s=60, backoff_s=0.01))
    news = told(rt, actor)
    for _ in range(3):
        with pytest.raises(ActorDied, match="SIGKILL"):
            actor.die.call().result(T)
    with pytest.raises(ActorDied, match=r"was restarted 2 times within 60 s .*was killed by SIGKILL in die\(\)"):
        actor.pid.call().result(T)
    assert [kind for kind, _, _ in news(3)] == ["restart", "restart", "exit"]
    assert rt.state()[actor.name].status == "dead" and actor.incarnation == 2


def test_sys_exit_is_a_death_like_any_other(rt):
    actor = rt.spawn(Clerk, restart=QUICK)
    with pytest.raises(ActorDied, match="exit code 4"):
        actor.leave.call().result(T)
    assert actor.note.call(1).result(T) == [1]
    rt.kill(actor)


def test_a_start_that_fails_twice_is_tried_a_third_time_and_the_calls_wait_for_it(rt, tmp_path):
    fails = tmp_path / "fails"
    fails.write_text("2")
    actor = rt.spawn(Clerk, str(fails), restart=Restart(max=5, backoff_s=0.01))
    assert actor.note.call(1).result(T) == [1]
    assert actor.incarnation == 2
    fails.write_text("2")  # the failures before are forgotten, so that these are not the third and fourth in a row
    with pytest.raises(ActorDied):
        actor.die.call().result(T)
    assert actor.note.call(2).result(T) == [2]
    assert actor.incarnation == 5
    rt.kill(actor)


def test_three_failing_starts_in_a_row_end_it_with_the_first_traceback(rt, tmp_path):
    fails = tmp_path / "fails"
    fails.write_text("9")
    actor = rt.spawn(Clerk, str(fails), restart=Restart(max=100, backoff_s=0.01))
    with pytest.raises(LookupError, match="start 9 fails") as caught:
        actor.pid.call().result(T)
    notes = "".join(caught.value.__notes__)
    assert "in __init__" in notes and "failed 3 times in a row" in notes
    with pytest.raises(LookupError, match="start 9 fails"):
        actor.ready(T)
    assert fails.read_text() == "6"
    assert rt.state()[actor.name].status == "failed"


def test_without_a_policy_the_first_failure_is_final(rt, tmp_path):
    fails = tmp_path / "fails"
    fails.write_text("1")
    with pytest.raises(LookupError):
        rt.spawn(Clerk, str(fails)).ready(T)
    assert fails.read_text() == "0"


def test_restart_ends_a_hanging_incarnation(rt):
    actor = rt.spawn(Clerk, restart=QUICK)
    hanging = actor.hang.call()
    actor.ready(T)
    rt.restart(actor)
    with pytest.raises(ActorDied, match=r"was ended by restart\(\) in hang\(\)"):
        hanging.result(T)
    assert actor.note.call(1).result(T) == [1] and actor.incarnation == 1
    rt.kill(actor)
    plain = rt.spawn(Clerk)
    with pytest.raises(ValueError, match="cannot be restarted"):
        rt.restart(plain)
    rt.kill(plain)


def test_one_for_all_takes_the_others_down_and_says_because_of_whom(rt):
    members = [rt.spawn(Clerk, name=f"ring/{rank}") for rank in range(3)]
    group = rt.group(members, restart=QUICK, strategy="one_for_all")
    pids = group.pid.call().values(T)
    hanging = [members[0].hang.call(), members[2].hang.call()]
    kill(pids[1])
    for future in hanging:
        with pytest.raises(ActorDied, match=r"with its group \(ring/1 .* SIGKILL\) in hang\(\)"):
            future.result(T)
    again = group.pid.call().values(T)
    assert not set(again) & set(pids)
    assert [member.incarnation for member in members] == [1, 1, 1]
    rt.kill(members[0])  # is no death: the others go on
    assert group.pid.call().result(T)[1:] == [Ok(again[1]), Ok(again[2])]
    for pid in again[1:]:  # both at once are one restart for the group
        kill(pid)
    members[1].pid.call().exception(T)
    assert isinstance(members[1].pid.call().result(T), int)
    members[2].die.call().exception(T)
    assert isinstance(members[1].pid.call().result(T), int)
    members[2].die.call().exception(T)
    outcomes = group.pid.call().result(T)
    assert all(isinstance(outcome, Err) for outcome in outcomes)
    with pytest.raises(ActorDied, match=r"actor ring/2 was restarted 3 times within 60 s"):
        members[1].pid.call().result(T)


def test_who_hears_of_a_death_and_calls_another_member_reaches_its_next_incarnation(rt):
    members = [rt.spawn(Clerk) for _ in range(2)]
    rt.group(members, restart=Restart(max=50, backoff_s=0.001, max_backoff_s=0.001), strategy="one_for_all")
    for incarnation in range(20):
        before = members[1].pid.call().result(T)
        members[0].die.call().exception(T)
        assert members[1].pid.call().result(T) != before
        assert members[1].incarnation == incarnation + 1
    for member in members:
        rt.kill(member)


def test_a_welcome_that_comes_after_the_death_of_another_member_lets_no_call_in(rt):
    busy = threading.Event()
    rt._work.post(busy.wait, T)  # the thread that welcomes is late
    members = [rt.spawn(Clerk) for _ in range(2)]
    rt.group(members, restart=QUICK, strategy="one_for_all")
    before = members[1].pid.call().result(T)
    members[0].die.call().exception(T)
    after = members[1].pid.call()
    busy.set()
    assert after.result(T) != before
    for member in members:
        rt.kill(member)


def test_one_for_one_restarts_the_dead_member_alone(rt):
    members = [rt.spawn(Clerk) for _ in range(2)]
    group = rt.group(members, restart=QUICK)
    before = group.pid.call().values(T)
    kill(before[0])
    members[0].pid.call().exception(T)
    after = group.pid.call().values(T)
    assert after[0] != before[0] and after[1] == before[1]
    with pytest.raises(ValueError, match="is supervised already"):
        rt.group(members, restart=QUICK)
    for member in members:
        rt.kill(member)
    with pytest.raises(ValueError, match="one_for_some"):
        rt.group(members, restart=QUICK, strategy="one_for_some")
    with pytest.raises(ValueError, match="says how to restart"):
        rt.group(members, strategy="one_for_all")


def test_random_kills_lose_no_call_and_run_none_twice(rt, tmp_path):
    """Every call is answered by its own log line, or fails with ActorDied; what was sent later still runs later."""
    log = tmp_path / "log"
    actor = rt.spawn(Ledger, str(log), restart=Restart(max=100, backoff_s=0.001, max_backoff_s=0.001))
    futures = []
    for batch in range(10):
        futures += [actor.write.call(20 * batch + offset) for offset in range(20)]
        futures[-20].exception(T)  # it has begun with them
        pid = rt.state()[actor.name].pid
        if pid is not None:
            kill(pid)
    answered = [number for number, future in enumerate(futures) if future.exception(T) is None]
    assert all(isinstance(future.exception(T), ActorDied | None) for future in futures)
    written = [int(line) for line in log.read_text().splitlines()]
    assert written == sorted(set(written)) and set(answered) <= set(written)
    assert 0 < len(answered) < 200 and actor.incarnation > 1
    rt.kill(actor)


class Ledger:
    def __init__(self, path):
        self.file = open(path, "a", buffering=1)  # noqa: SIM115

    def write(self, number):
        self.file.write(f"{number}\n")


def test_close_in_a_back_off_leaves_nothing():
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    threads = threading.active_count()
    runtime = actors.runtime("local", preload=("numpy",))
    actor = runtime.spawn(Clerk, restart=Restart(backoff_s=30, max_backoff_s=30))
    heard = told(runtime, actor)
    with pytest.raises(ActorDied):
        actor.die.call().result(T)
    waiting = actor.pid.call()
    start = time.monotonic()
    runtime.close()
    assert time.monotonic() - start < 10
    with pytest.raises(ActorDied, match="was closed with its runtime while restarting"):
        waiting.result(T)
    assert heard(0) == []
    assert {child.pid for child in psutil.Process().children(recursive=True)} == before
    assert threading.active_count() == threads


def test_a_call_beyond_max_pending_waits_while_the_actor_restarts(rt):
    actor = rt.spawn(Clerk, max_pending=2, restart=Restart(backoff_s=30, max_backoff_s=30))
    with pytest.raises(ActorDied):
        actor.die.call().result(T)
    futures = [actor.pid.call() for _ in range(2)]
    third = threading.Thread(target=lambda: futures.append(actor.pid.call()))
    third.start()
    third.join(0.1)
    assert third.is_alive() and len(futures) == 2
    assert futures[0].cancel()  # which makes room
    third.join(T)
    assert not third.is_alive() and len(futures) == 3
    rt.kill(actor)
    assert all(future.done() for future in futures)


def test_what_an_ended_actor_was_made_of_is_let_go(rt):
    made_of = Clerk()
    alive = weakref.ref(made_of)
    actor = rt.spawn(Keeper, made_of, restart=QUICK)
    actor.ready(T)
    del made_of
    gc.collect()
    assert alive() is not None  # it is needed to start it again
    rt.kill(actor)
    gc.collect()
    assert alive() is None


class Keeper:
    def __init__(self, thing):
        self.thing = thing


@pytest.mark.parametrize("is_told", [False, True])
def test_a_restart_that_nobody_is_told_of_is_logged(rt, caplog, is_told):
    actor, back = rt.spawn(Clerk, restart=QUICK), threading.Event()
    if is_told:
        rt.monitor(actor, on_restart=lambda *_: back.set())
    actor.die.send()
    while actor.incarnation == 0:
        time.sleep(0.001)
    actor.ready(T)
    assert (f"actor {actor.name} is started again (restart 1)" in caplog.text) != is_told
    assert not is_told or back.wait(T)
    rt.kill(actor)


def test_a_stopped_actor_is_a_stall_in_the_monitor_and_the_log_and_no_death(rt, caplog):
    heard, told = [], threading.Event()
    actor = rt.spawn(Clerk, stall_after_s=0.2)
    actor.ready(T)
    pid = rt.state()[actor.name].pid
    rt.monitor(actor, on_stall=lambda who, stall: (heard.append((who, stall)), told.set()))
    os.kill(pid, signal.SIGSTOP)
    future = actor.pid.call()
    assert told.wait(T)
    who, stall = heard[0]
    assert who is actor and (stall.actor, stall.pid, stall.method, stall.stopped) == (actor.name, pid, "pid", True)
    assert 0.2 <= stall.running_s < T
    assert f"{actor.name} has been in pid() for" in caplog.text and "stopped by a signal (SIGSTOP)" in caplog.text
    os.kill(pid, signal.SIGCONT)
    assert future.result(T) == pid and len(heard) == 1
    rt.kill(actor)


def test_an_event_thread_keeps_the_order_of_time_and_drops_what_is_for_later():
    thread, ran, last = EventThread("test-events"), [], threading.Event()
    thread.after(0.02, lambda: (ran.append("later"), last.set()))
    thread.after(60, ran.append, "never")
    for name in ("first", "second"):
        thread.post(ran.append, name)
    assert last.wait(T)
    thread.post(ran.append, "at the end")
    start = time.monotonic()
    thread.close(T)
    assert ran == ["first", "second", "later", "at the end"] and time.monotonic() - start < 10
    thread.post(ran.append, "after")
    assert len(ran) == 4


def test_an_event_thread_that_could_not_be_started_is_started_by_the_next_event(monkeypatch):
    def refuse(_):
        raise RuntimeError("can't start new thread")

    thread, ran = EventThread("test-events"), threading.Event()
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="can't start new thread"):
        patch.setattr(threading.Thread, "start", refuse)
        thread.post(ran.clear)
    thread.post(ran.set)
    assert ran.wait(T)
    thread.close(T)
