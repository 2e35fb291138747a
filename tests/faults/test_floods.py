"""A lot of everything: calls in flight, slow readers, actors, and generations of them."""

import gc
import os
import signal
import sys
import threading
from collections import Counter

import cloudpickle
import numpy as np
import psutil
import pytest

from rlx import actors
from rlx.actors.future import as_completed
from rlx.errors import ActorError
from tests.polling import until

cloudpickle.register_pickle_by_value(sys.modules[__name__])
T = 30.0
MIB = 2**20


class Worker:
    def echo(self, value):
        return value

    def pid(self):
        return os.getpid()

    def count(self, items, size):
        for _ in range(items):
            yield bytes(size)

    def blob(self, size):
        return np.ones(size, np.uint8)

    def keep(self, array):
        self.kept = array
        return array

    def kept_sum(self):
        return int(self.kept.sum())


def test_ten_thousand_calls_in_flight_with_a_reader_that_is_stopped_first(rt):
    """Nobody reads at first: what is not taken waits here, within bounds, and no caller is blocked for ever."""
    worker = rt.spawn(Worker)
    pid = worker.pid.call().result(T)
    before = psutil.Process().memory_info().rss
    os.kill(pid, signal.SIGSTOP)
    futures = [worker.echo.call(n) for n in range(9_999)]
    assert psutil.Process().memory_info().rss - before < 64 * MIB
    assert not any(future.done() for future in futures)
    os.kill(pid, signal.SIGCONT)
    assert [future.result(T) for future in futures] == list(range(9_999))


def test_nobody_reads_the_answers_of_ten_thousand_calls_to_two_actors_and_none_is_lost(rt):
    workers = [rt.spawn(Worker) for _ in range(2)]
    payload = b"x" * 1000
    futures = [workers[n % 2].echo.call((n, payload)) for n in range(10_000)]
    assert {future.result(T)[0] for future in reversed(futures)} == set(range(10_000))


def test_a_flood_that_begins_while_the_reader_thread_reads_is_answered_though_no_caller_reads(rt):
    """The link is full in both directions: who stopped watching for replies here would never write the calls."""
    worker = rt.spawn(Worker)
    pid = worker.pid.call().result(T)
    reading, flooded = threading.Event(), threading.Event()
    os.kill(pid, signal.SIGSTOP)  # so that the answer comes after the callback, which the reader thread then runs
    worker.pid.call().when_done(lambda: (reading.set(), flooded.wait(T)))
    os.kill(pid, signal.SIGCONT)
    assert reading.wait(T)
    futures = [worker.echo.call((n, b"x" * 1000)) for n in range(5_000)]
    flooded.set()
    assert sum(1 for _ in as_completed(futures, T)) == 5_000  # it waits and does not read itself


def test_a_stream_that_is_read_slowly_is_only_its_credits_ahead(rt):
    worker = rt.spawn(Worker)
    worker.pid.call().result(T)
    actor = psutil.Process(worker.pid.call().result(T))
    here, there = psutil.Process().memory_info().rss, actor.memory_info().rss
    stream = worker.count.stream(5_000, 40_000, credits=4)
    for _ in range(10):
        stream.next(T)
    until(lambda: len(stream._items) == 4 or stream._next + len(stream._items) >= 14)
    assert stream._next + len(stream._items) <= 14  # of 5,000: ten taken, four ahead
    assert sum(1 for _ in stream) == 4_990
    assert psutil.Process().memory_info().rss - here < 32 * MIB and actor.memory_info().rss - there < 32 * MIB


def test_what_a_reader_keeps_stays_valid_after_its_owner_has_died(rt, lent):
    worker = rt.spawn(Worker)
    kept = worker.keep.call(np.arange(4_000_000)).result(T)
    os.kill(worker.pid.call().result(T), signal.SIGKILL)
    worker.pid.call().exception(T)
    until(lambda: lent(rt) == 0)
    rt.close()
    assert kept.sum() == 3_999_999 * 4_000_000 // 2


def test_the_memory_of_a_dead_actor_is_given_back_though_its_handle_is_kept(rt):
    others, worker = mapped_memory(), rt.spawn(Worker)
    kept = worker.blob.call(20 * MIB).result(T)
    rt.kill(worker)
    gc.collect()
    assert sum((mapped_memory() - others).values()) > 20 * MIB  # by the array
    del kept
    gc.collect()
    assert sum((mapped_memory() - others).values()) < MIB and rt.state()[worker.name].status == "dead"


def mapped_memory():
    """Return by inode how many bytes of shared memory are mapped here, touched or not."""
    mapped = Counter()
    with open("/proc/self/maps") as file:
        for line in file:
            if "memfd:" in line:
                span, _, _, _, inode, *_ = line.split()
                start, end = (int(address, 16) for address in span.split("-"))
                mapped[inode] += end - start
    return mapped


def test_a_hundred_actors_answer_and_go(gone):
    with actors.runtime("local", preload=("numpy",)) as rt:
        group = rt.group([rt.spawn(Worker) for _ in range(100)])
        pids = group.pid.call().values(T)
        assert len(set(pids)) == 100
        assert group.echo.call(np.ones(100_000)).values(T)[99].sum() == 100_000
    gone(pids, 1.0)


def test_a_thousand_inline_actors():
    with actors.runtime("inline") as rt:
        group = rt.group([rt.spawn(Worker) for _ in range(1000)])
        assert group.echo.call(3).values(T) == [3] * 1000
        with pytest.raises(ActorError, match="1000 living actors"):
            rt.spawn(Worker)


@pytest.mark.parametrize("generations", [7, pytest.param(1250, marks=[pytest.mark.slow, pytest.mark.timeout(600)])])
def test_generations_of_eight_actors_leave_nothing_in_the_driver_or_the_forkserver(generations):
    with actors.runtime("local", preload=("numpy",)) as rt:
        pid = rt.spawn(Worker, name="first").pid.call().result(T)
        server = psutil.Process(psutil.Process(pid).ppid())

        def generation():
            workers = [rt.spawn(Worker, name=f"worker/{number}") for number in range(8)]
            for future in [worker.echo.call(np.ones(20_000)) for worker in workers]:
                future.result(T)
            pids = [future.result(T) for future in [worker.pid.call() for worker in workers]]
            for pid in pids[1::2]:
                os.kill(pid, signal.SIGKILL)
            for worker in workers[1::2]:
                worker.pid.call().exception(T)
            for worker in workers:
                rt.kill(worker)

        def levels():
            files = [
                os.readlink(f"/proc/self/fd/{fd}") for fd in range(3, 256) if os.path.lexists(f"/proc/self/fd/{fd}")
            ]
            own = sorted(file.split(":")[0] for file in files if not file.endswith("/board"))  # which grows by doubling
            return own, threading.active_count(), server.num_fds(), len(server.children(recursive=True))

        def objects():
            gc.collect()
            return len(gc.get_objects())

        def memory():
            return sum(process.memory_full_info().uss for process in (psutil.Process(), server))

        for _ in range(13):  # the list of actors keeps 64 that have ended
            generation()
        before, objects_before, bytes_before = levels(), objects(), memory()
        for _ in range(generations):
            generation()
        until(lambda: levels() == before, 2.0)
        assert objects() - objects_before < 4_000  # two per actor in the slow case
        assert memory() - bytes_before < 48 * MIB  # it goes up and down by 20 MiB as malloc sees fit
