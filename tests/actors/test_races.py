"""What must hold whoever interrupts, waits, drops or ends what at the worst moment; local engine."""

import asyncio
import contextlib
import errno
import gc
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time

import cloudpickle
import numpy as np
import pytest

from rlx import actors
from rlx.actors import Err, Ok
from rlx.actors.future import Future, as_completed
from rlx.actors.life import ActorLife
from rlx.actors.stream import Stream
from rlx.errors import ActorBusy, ActorDied, ActorError, CallCancelled, ObjectMemoryFull
from tests.polling import until

cloudpickle.register_pickle_by_value(sys.modules[__name__])

pytestmark = pytest.mark.timeout(60)
T = 20.0
MIB = 2**20


@pytest.fixture(scope="module")
def rt():
    with actors.runtime("local", preload=("numpy",)) as runtime:
        yield runtime


@pytest.fixture
def worker(rt):
    handle = rt.spawn(Worker)
    handle.ready(T)
    yield handle
    rt.kill(handle)


class Worker:
    def echo(self, value=None):
        return value

    def wait_for(self, path):
        with open(path) as fifo:
            return fifo.read()

    def count(self, end):
        yield from range(end)

    def leave(self, code):
        sys.exit(code)

    def explode(self, size):
        error = ValueError("too much to carry")
        error.payload = np.zeros(size, np.uint8)
        raise error


class Tasks:
    """Its methods are tasks of a loop."""

    async def wait_for(self, path):
        return await asyncio.to_thread(_read, path)

    async def sleep(self):
        await asyncio.sleep(3600)

    async def echo(self, value):
        return value

    async def count(self, end):
        for number in range(end):
            yield number

    def pause(self, seconds):
        time.sleep(seconds)

    async def leave(self, code):
        sys.exit(code)


def _read(path):
    with open(path) as fifo:
        return fifo.read()


def held_by(rt, handle):
    return rt._engine.memory.arena.holders().get(handle.name, 0)


# Interrupts.


class Interrupted(KeyboardInterrupt):
    pass


def test_replies_that_an_interrupted_caller_had_received_are_given_out_without_new_traffic(worker, gate):
    """Nine replies come in one read; the interrupt strikes at the second. No later frame makes up for it."""
    path, _ = gate
    link, free = worker._actor.body._link, threading.Event()
    take, taken = link._take, []

    def interrupted_take(frame):
        taken.append(frame)
        if len(taken) == 2:
            raise Interrupted
        take(frame)

    # The reactor is kept busy, so that all replies are in the socket when this thread begins to read.
    busy = threading.Event()
    link._reactor.set_deadline("test", 0.0, lambda: (busy.set(), free.wait(T)))
    assert busy.wait(T)  # else it might read them first
    futures = [worker.echo.call(n) for n in range(9)]
    running = worker.wait_for.call(path)
    link._uncork()  # what the reactor would do
    with open(path, "w") as fifo:  # opens when the method has begun
        link._take = interrupted_take
        with pytest.raises(Interrupted):
            futures[-1].result(T)
        free.set()
        assert [future.result(T) for future in futures] == list(range(9))
        fifo.write("open")
    assert running.result(T) == "open"


def test_an_interrupt_while_a_caller_stops_reading_does_not_leave_the_link_without_a_reader(worker):
    link = worker._actor.body._link
    arm, calls = link._arm, []

    def interrupted_arm():
        calls.append(link._leader)
        if len(calls) == 2:  # the first is at the start
            raise Interrupted
        arm()

    link._arm = interrupted_arm
    with pytest.raises(Interrupted):
        worker.echo.call(1).result(T)
    link._arm = arm
    assert next(worker.count.stream(3)) == 0  # a stream is read by the reactor alone


def test_an_interrupted_call_leaves_no_place_taken(worker, monkeypatch):
    from rlx.actors.engines import wire

    def interrupted(*_):
        raise Interrupted

    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(wire, "encode", interrupted)
        worker.echo.call(1)
    assert worker.echo.call(2).result(T) == 2
    assert worker._actor.state().pending == 0


def test_interrupts_at_any_moment_of_synchronous_calls_and_streams_lose_nothing(worker, monkeypatch):
    """Twenty thousand chances: while it calls, waits, reads, and stops to read."""
    monkeypatch.setattr(sys, "unraisablehook", lambda _: None)
    armed, interrupts, unsettled = False, 0, []

    def interrupt(*_):
        nonlocal armed
        if armed:
            armed = False  # one at a time: two within a microsecond are not what a person can do
            raise Interrupted

    def strike():
        while not over.wait(0.0007):
            signal.pthread_kill(main, signal.SIGUSR1)

    main, over = threading.get_ident(), threading.Event()
    before = signal.signal(signal.SIGUSR1, interrupt)
    striker = threading.Thread(target=strike)
    striker.start()
    try:
        end = time.monotonic() + 3.0
        while time.monotonic() < end:
            futures = []
            try:
                armed = True
                for n in range(5):
                    futures.append((n, worker.echo.call(n)))
                for n, future in futures:
                    assert future.result(T) == n
                armed = False
            except Interrupted:
                interrupts += 1
                unsettled += futures
    finally:
        armed = False
        over.set()
        striker.join(T)
        signal.signal(signal.SIGUSR1, before)
    assert interrupts > 100
    _, pending = actors.future.wait([future for _, future in unsettled], len(unsettled), T)
    assert not pending and all(future.result() == n for n, future in unsettled)
    assert list(worker.count.stream(20, credits=2)) == list(range(20))
    until(lambda: worker._actor.state().pending == 0)


def test_an_item_whose_unpickling_was_interrupted_is_the_next_one():
    stream, answers = Stream("actor", "items", credits=2), [Interrupted(), Ok(5)]

    def answer():
        outcome = answers.pop(0)
        if isinstance(outcome, Interrupted):
            raise outcome
        return outcome

    stream.feed(0, answer)
    with pytest.raises(Interrupted):
        stream.next(T)
    assert stream.next(T) == 5


def test_an_item_that_is_fed_twice_is_given_out_once():
    stream = Stream("actor", "items")
    for index in (0, 0, 1, 0, 1):
        stream.feed(index, lambda index=index: Ok(index))
    assert [stream.next(T), stream.next(T)] == [0, 1]
    stream.feed(1, lambda: Ok(1))
    stream.finish(lambda: Ok(None))
    assert list(stream) == []


def test_an_arrival_that_is_told_twice_is_yielded_once():
    futures = [Future("actor", str(n)) for n in range(2)]
    arriving, told = as_completed(futures, timeout_s=T), []
    futures[0].when_done(lambda: told.append(0))
    threading.Timer(0.05, futures[1].settle, [lambda: Ok(1)]).start()

    def settle_twice():
        callbacks = futures[0]._callbacks[:]
        futures[0].settle(lambda: Ok(0))
        [callback() for callback in callbacks]

    threading.Timer(0.01, settle_twice).start()
    assert list(arriving) == futures


# Waiting.


@pytest.mark.parametrize("timeout_s", [1e9, float("inf")])
def test_a_very_long_timeout_is_a_timeout_like_any_other(rt, worker, timeout_s):
    assert worker.echo.call(1).result(timeout_s) == 1
    future = worker.echo.call(2)
    assert list(rt.as_completed([future], timeout_s)) == [future]
    assert rt.wait([worker.echo.call(3), worker.echo.call(4)], 1, timeout_s)[0]


def test_all_ways_of_waiting_together_on_one_actor_get_every_answer(rt, worker):
    wrong = []

    def check(work):
        try:
            work()
        except BaseException as error:
            wrong.append(error)

    def by_result():
        for n in range(300):
            assert worker.echo.call(n).result(T) == n

    def by_wait():
        for _ in range(40):
            pending = [worker.echo.call(n) for n in range(8)]
            while pending:
                _, pending = rt.wait(pending, 1, T)

    def by_arrival():
        for _ in range(40):
            assert len(list(rt.as_completed([worker.echo.call(n) for n in range(8)], T))) == 8

    def by_await():
        async def main():
            for _ in range(40):
                assert await asyncio.gather(*[_answer(worker.echo.call(n)) for n in range(8)]) == list(range(8))

        asyncio.run(main())

    def by_stream():
        for _ in range(10):
            assert list(worker.count.stream(30, credits=3)) == list(range(30))

    kinds = [by_result, by_wait, by_arrival, by_await, by_stream, by_result]
    threads = [threading.Thread(target=check, args=(kind,), daemon=True) for kind in kinds]
    [thread.start() for thread in threads]
    [thread.join(T) for thread in threads]
    assert not wrong and not any(thread.is_alive() for thread in threads)


async def _answer(future):
    return await future


def test_everybody_who_waits_hears_of_a_death_while_one_of_them_reads(rt, gate):
    doomed, errors = rt.spawn(Worker), []
    future = doomed.wait_for.call(gate[0])
    others = [doomed.echo.call(n) for n in range(6)]
    waits = [
        lambda: future.result(T),
        lambda: others[0].result(T),
        lambda: actors.future.wait([others[1], others[2]], 1, T)[0][0].result(),
        lambda: next(as_completed(others[3:5], T)).result(),
        lambda: asyncio.run(_answer(others[5])),
    ]

    def wait(how):
        try:
            how()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=wait, args=(how,), daemon=True) for how in waits]
    [thread.start() for thread in threads]
    until(lambda: doomed._actor.body._link._leader is not None)
    rt.kill(doomed)
    [thread.join(T) for thread in threads]
    assert [type(error) for error in errors] == [ActorDied] * 5


def test_close_releases_who_waits_and_who_spawns():
    own = actors.runtime("local", preload=())
    busy, errors, ready = own.spawn(Worker), [], threading.Event()

    def wait():
        future = busy.wait_for.call("/dev/stdin-that-is-not-there")
        stream = busy.count.stream(10**9, credits=2)
        ready.set()
        errors.append(future.exception(T))
        with contextlib.suppress(ActorDied):
            for _ in stream:
                pass
        errors.append("stream")

    def spawn():
        try:
            while True:
                own.spawn(Worker).echo.call(1).result(T)
        except ActorError as error:
            errors.append(error)

    threads = [threading.Thread(target=work, daemon=True) for work in (wait, spawn, spawn)]
    [thread.start() for thread in threads]
    assert ready.wait(T)
    own.close()
    [thread.join(T) for thread in threads]
    assert len(errors) == 4, errors


def test_a_monitor_callback_may_wait_for_the_actor_that_others_read_from(rt, worker):
    first, answers = rt.spawn(Worker), []
    told = threading.Event()
    rt.monitor(first, on_exit=lambda *_: (answers.append(worker.echo.call(7).result(T)), told.set()))
    rt.kill(first)
    while not told.is_set():
        assert worker.echo.call(1).result(T) == 1
    assert answers == [7]


def test_a_call_beyond_max_pending_goes_on_when_any_call_is_answered(rt, gate):
    """Not only the oldest, which may wait for this very call."""
    path, open_gate = gate
    actor = rt.spawn(Tasks, max_pending=2)
    oldest = actor.wait_for.call(path)
    assert [actor.echo.call(n).result(T) for n in range(5)] == list(range(5))
    streams = [actor.count.stream(1000, credits=1)]
    threading.Timer(0.05, streams[0].close).start()
    assert actor.echo.call(1).result(T) == 1
    open_gate()
    assert oldest.result(T) == "open"


def test_what_an_actor_leaves_unread_is_bounded(monkeypatch, gate):
    path, open_gate = gate
    monkeypatch.setattr("rlx.actors.engines.link.BACKLOG_BYTES", 4 * MIB)
    with actors.runtime("local", preload=()) as own:
        busy = own.spawn(Worker)
        busy.ready(T)
        own._engine.system_timeout_s = 0.5
        running = busy.wait_for.call(path)
        with pytest.raises(ActorBusy, match=r"has read nothing for 0.5 s"):
            for _ in range(200):
                busy.echo.send(bytes(60_000))
        assert busy._actor.body._link._outbox.waiting_bytes() < 5 * MIB
        open_gate()
        assert running.result(T) == "open" and busy.echo.call(1).result(T) == 1


def test_buffers_are_the_callers_again_when_a_call_returns_also_to_a_busy_actor(worker, gate):
    path, open_gate = gate
    running, array = worker.wait_for.call(path), np.zeros(5_000)
    futures = []
    for n in range(40):
        array[:] = n
        futures.append(worker.echo.call(array))
    array[:] = -1
    open_gate()
    assert running.result(T) == "open"
    assert [float(future.result(T).max()) for future in futures] == list(range(40))
    assert [float(future.result(T).min()) for future in futures] == list(range(40))


# Dropping.


def test_a_stream_that_the_collector_finds_while_its_actor_is_called_is_no_deadlock(worker):
    """The collector runs anywhere, also in the thread that has just taken the actor's lock."""
    stream = worker.count.stream(10**9, credits=1)
    assert next(stream) == 0
    cycle = [stream]
    cycle.append(cycle)
    body = worker._actor.body
    del stream, cycle

    def collect():
        with body._lock:
            gc.collect()

    thread = threading.Thread(target=collect, daemon=True)
    thread.start()
    thread.join(T)
    assert not thread.is_alive()
    assert worker.echo.call(1).result(T) == 1  # the generator has ended
    assert body.state().pending == 0


def test_cancelled_calls_and_dropped_streams_give_back_what_was_lent(rt, worker, gate):
    path, open_gate = gate
    running, array = worker.wait_for.call(path), np.zeros(MIB, np.uint8)
    futures = [worker.echo.call(array) for _ in range(4)]
    streams = [worker.count.stream(array) for _ in range(4)]
    until(lambda: held_by(rt, worker) == 8 * MIB)
    assert all(future.cancel() for future in futures)
    del streams
    open_gate()
    assert running.result(T) == "open"
    assert all(isinstance(future.exception(T), CallCancelled) for future in futures)
    assert worker.echo.call(1).result(T) == 1
    until(lambda: held_by(rt, worker) == 0)


def test_two_threads_that_share_a_stream_lose_no_credit(worker):
    stream, got = worker.count.stream(3_000, credits=2), []

    def consume():
        for item in stream:
            got.append(item)

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=consume, daemon=True) for _ in range(3)]
        [thread.start() for thread in threads]
        [thread.join(T) for thread in threads]
    finally:
        sys.setswitchinterval(before)
    assert sorted(got) == list(range(3_000))


# Tasks and threads in an actor.


def test_credits_and_cancellations_that_come_while_plain_methods_hold_the_loop_are_not_lost(rt):
    """One place is free at a time, so calls wait in the actor while news of the others comes in."""
    actor = rt.spawn(Tasks, concurrency=3)
    for _ in range(3):
        sleeper, stream = actor.sleep.call(), actor.count.stream(6, credits=1)
        calls = [actor.pause.call(0.004) for _ in range(30)]
        assert [stream.next(T) for _ in range(6)] == list(range(6))
        calls += [actor.pause.call(0.004) for _ in range(5)]
        assert sleeper.cancel()
        with pytest.raises(CallCancelled, match=r"sleep\(\) was cancelled while it ran"):
            sleeper.result(T)
        assert list(stream) == [] and [future.result(T) for future in calls] == [None] * 35


def test_a_task_that_is_cancelled_before_its_first_step_is_answered(rt):
    actor = rt.spawn(Tasks, concurrency=1)
    for _ in range(100):
        first, second = actor.sleep.call(), actor.sleep.call()
        first.cancel(), second.cancel()
        for future in (first, second):
            assert isinstance(future.exception(T), CallCancelled)


@pytest.mark.parametrize(("kind", "concurrency"), [("Worker", None), ("Worker", 3), ("Tasks", None)])
def test_sys_exit_ends_an_actor_of_any_kind_at_once_and_says_why(rt, kind, concurrency, gate):
    actor = rt.spawn({"Worker": Worker, "Tasks": Tasks}[kind], concurrency=concurrency)
    others = [actor.sleep.call() for _ in range(2)] if kind == "Tasks" else []
    if concurrency:
        others = [actor.wait_for.call(gate[0]) for _ in range(2)]
    future = actor.leave.call("no more")
    for one in (future, *others):
        with pytest.raises(ActorDied, match=r"ended with exit code 1[^$]*no more"):
            one.result(T)
    code = rt.spawn({"Worker": Worker, "Tasks": Tasks}[kind], concurrency=concurrency).leave.call(3)
    with pytest.raises(ActorDied, match="ended with exit code 3"):
        code.result(T)


@pytest.mark.parametrize("concurrency", [None, 3])
def test_an_error_that_carries_more_than_the_object_memory_holds_arrives_as_its_text(concurrency):
    with actors.runtime("local", preload=("numpy",), object_memory=4 * MIB) as own:
        actor = own.spawn(Worker, concurrency=concurrency)
        error = actor.explode.call(8 * MIB).exception(T)
        assert error is not None and "too much to carry" in str(error)
        assert isinstance(actor.echo.call(np.zeros(MIB, np.uint8)).exception(T), type(None))


# Ends.


def test_a_group_call_gives_the_others_answers_when_one_member_takes_no_call(rt, gate):
    path, open_gate = gate
    with actors.runtime("local", preload=()) as own:
        free, full = own.spawn(Worker), own.spawn(Worker, max_pending=1)
        full.ready(T)
        own._engine.system_timeout_s = 0.2  # only now: to start takes longer on a busy machine
        running = full.wait_for.call(path)
        outcomes = own.group([free, full, free]).echo.call(5).result(T)
        assert [type(outcome) for outcome in outcomes] == [Ok, Err, Ok]
        assert isinstance(outcomes[1].error, ActorBusy)
        open_gate()
        assert running.result(T) == "open"


def test_a_held_call_that_cannot_be_delivered_fails_alone():
    with actors.runtime("local", preload=("numpy",), object_memory=4 * MIB) as own:
        actor = own.spawn(Worker, restart=actors.Restart(max=1, backoff_s=0.01))
        actor.ready(T)
        assert isinstance(actor.leave.call(1).exception(T), ActorDied)
        large, small = actor.echo.call(np.zeros(8 * MIB, np.uint8)), actor.echo.call(1)
        assert isinstance(large.exception(T), ObjectMemoryFull)
        assert small.result(T) == 1 and own.state()[actor.name].status == "alive"


def test_a_fork_of_the_driver_is_refused_and_disturbs_nothing(rt, worker):
    stream, future = worker.count.stream(10, credits=2), worker.echo.call(1)
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        words = []
        for act in (lambda: worker.echo.call(2), lambda: future.result(T)):
            try:
                act()
                words.append("done")
            except ActorError as error:
                words.append(str(error))
        stream = None
        gc.collect()
        os.write(write, "\n".join(words).encode())
        os._exit(0)
    os.close(write)
    os.waitpid(pid, 0)
    with os.fdopen(read) as file:
        words = file.read()
    assert words.count(f"process {os.getpid()}") == 2 and "done" not in words
    assert list(stream) == list(range(10)) and future.result(T) == 1


def test_a_link_lost_before_the_news_of_the_start_ends_the_actor_all_the_same(worker, gate):
    """An actor may answer, and break its link, before the forkserver has said that it exists."""
    running, body = worker.wait_for.call(gate[0]), worker._actor.body
    body._engine.reactor.post(lambda: (body._lose_link("closed its link"), body.on_started(body.pid)))
    with pytest.raises(ActorDied, match="closed its link"):
        running.result(T)


@pytest.mark.parametrize(
    "step", ["_work.close", "_tasks.close", "_engine._server.wait", "_engine.reactor.close", "_engine.memory.close"]
)
def test_a_close_that_an_interrupt_has_cut_short_may_be_called_again(step, monkeypatch):
    before, own = set(os.listdir("/proc/self/fd")), actors.runtime("local", preload=())
    actor = own.spawn(Worker)
    actor.ready(T)
    server, folder, (*path, name) = own._engine._server, own._engine._folder.path, step.split(".")
    part = own
    for attribute in path:
        part = getattr(part, attribute)
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(part, name, _interrupted(getattr(part, name)))
        own.close()
    own.close()
    own.close()
    assert server.poll() is not None and not folder.exists()
    assert isinstance(actor.echo.call(1).exception(T), ActorDied)
    del actor, part, server
    until(lambda: gc.collect() >= 0 and set(os.listdir("/proc/self/fd")) <= before)


def _interrupted(function):
    """Return what an interrupt cuts short in the main thread, the only one that it comes to."""

    def call(*args, **kwargs):
        if threading.current_thread() is threading.main_thread():
            raise Interrupted
        return function(*args, **kwargs)

    return call


def test_a_runtime_whose_forkserver_cannot_be_started_leaves_nothing(monkeypatch, tmp_path):
    def refuse(*_, **__):
        raise OSError(errno.EMFILE, "too many open files")

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    before, threads = set(os.listdir("/proc/self/fd")), set(threading.enumerate())
    with monkeypatch.context() as patch:
        patch.setattr(subprocess, "Popen", refuse)
        with pytest.raises(OSError, match="too many open files"):
            actors.runtime("local", preload=())
    assert [folder for home in tmp_path.iterdir() for folder in home.iterdir()] == []
    assert set(threading.enumerate()) <= threads
    until(lambda: gc.collect() >= 0 and set(os.listdir("/proc/self/fd")) <= before)


def test_close_ends_a_forkserver_that_reads_no_orders(monkeypatch):
    own = actors.runtime("local", preload=(), system_timeout_s=2.0)
    own.spawn(Worker).ready(T)
    engine = own._engine
    os.kill(engine._server.pid, signal.SIGSTOP)
    with pytest.raises(ActorError, match="has read nothing"):
        while True:
            engine._order(0.0, (), do="kill", actor=0)
    own.close()
    assert engine._server.poll() is not None and not engine.folder.exists()


def test_a_spawn_that_fails_early_does_not_hold_up_close(tmp_path, monkeypatch):
    own = actors.runtime("local", preload=())
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with pytest.raises(FileNotFoundError):
        own.spawn(Worker)
    monkeypatch.chdir(tmp_path)
    start = time.monotonic()
    own.close()
    assert time.monotonic() - start < 5


def test_a_spawn_that_is_interrupted_before_it_began_disturbs_nothing(monkeypatch):
    with actors.runtime("local", preload=()) as own:
        with monkeypatch.context() as patch, pytest.raises(Interrupted):
            patch.setattr(sys.modules["rlx.actors.runtime"], "ActorLife", _interrupted(ActorLife))
            own.spawn(Worker, name="it")
        assert own.state() == {}
        assert own.spawn(Worker, name="it").echo.call(1).result(T) == 1


def test_a_spawn_that_fails_forgets_its_own_actor_and_no_later_one_of_that_name(rt, monkeypatch):
    fail, later = ActorLife.fail, []

    def fail_late(life, error):
        fail(life, error)
        if not later:  # another thread comes in between
            later.append(None)
            patch.setattr(type(rt._engine), "spawn", spawn)
            later[0] = rt.spawn(Worker, name="contended")

    spawn = type(rt._engine).spawn
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(ActorLife, "fail", fail_late)
        patch.setattr(type(rt._engine), "spawn", _interrupted(spawn))
        rt.spawn(Worker, name="contended")
    assert rt.lookup("contended") is later[0]
    rt.kill(later[0])


def test_names_and_environments_may_be_long(rt):
    with pytest.raises(ValueError, match="has 100000 characters; at most 1000 are allowed"):
        rt.spawn(Worker, name="n" * 100_000)
    name = "ü" * 1000
    actor = rt.spawn(Worker, name=name, env={"RLX_LONG": "x" * MIB})
    assert actor.echo.call(1).result(T) == 1
    rt.kill(actor)


def test_a_long_reason_why_modules_cannot_be_imported_arrives(tmp_path, monkeypatch):
    (tmp_path / "talkative.py").write_text("raise RuntimeError('ü' * 100_000)")
    monkeypatch.syspath_prepend(str(tmp_path))
    with actors.runtime("local", preload=("talkative",)) as own:
        actor = own.spawn(Worker)
        with pytest.raises(ActorDied, match="preload module 'talkative' cannot be imported"):
            actor.echo.call(1).result(T)


POSIX = """
import functools
import numpy as np
from rlx import actors
from rlx.actors.engines.shared_memory import SharedMemory

SharedMemory.create = functools.partial(SharedMemory.create.__func__, SharedMemory, posix=True)

class Echo:
    def echo(self, value): return value

with actors.runtime("local", preload=("numpy",), object_memory=16 << 20) as rt:
    actor, ref = rt.spawn(Echo), rt.put(np.arange(100_000))
    assert actor.echo.call(np.arange(200_000)).result(20).sum() == 19_999_900_000
    assert actor.echo.call(ref).result(20)[-1] == 99_999
    print("done")
"""


def test_the_whole_runtime_works_without_memfd_create():
    ran = subprocess.run([sys.executable, "-c", POSIX], capture_output=True, text=True, timeout=T, check=False)
    assert (ran.stdout, ran.stderr) == ("done\n", "")
