"""What machines do to actors on other nodes: deaths, stops, a clock that jumps, too little of something."""

import contextlib
import ctypes
import itertools
import os
import resource
import signal
import subprocess
import sys
import threading
import time
import zlib

import cloudpickle
import numpy as np
import psutil
import pytest

from rlx import actors
from rlx.actors import Restart
from rlx.actors.cluster.daemon import NodeDaemon, Options
from rlx.actors.cluster.heartbeat import Patience
from rlx.errors import ActorDied, ActorError, CallTimeout
from tests.actors.cluster.scenarios import lives
from tests.polling import until

cloudpickle.register_pickle_by_value(__import__(__name__, fromlist=["x"]))
pytestmark = pytest.mark.timeout(120)
T = 40.0
GB = 2**30


class Worker:
    def __init__(self, channel=None):
        self.channel, self.count = channel, 0

    def add(self):
        self.count += 1
        return self.count

    def pid(self):
        return os.getpid()

    def end(self, how):
        print("the last words", file=sys.stderr, flush=True)
        if how == "_exit":
            os._exit(3)
        if how == "exit":
            sys.exit(4)
        os.kill(os.getpid(), how)

    def doze(self, seconds, *kept):
        time.sleep(seconds)
        return "late"

    def hold_the_gil(self, how):
        while how == "on the CPU":
            pass
        ctypes.PyDLL(None).sleep(3600)

    def breed(self, count):
        """Children that breed children in sessions of their own, like a fork bomb with a fuse."""
        code = "import os, time\nfor _ in range(3):\n  if os.fork() == 0: os.setsid()\ntime.sleep(3600)"
        for _ in range(count):
            subprocess.Popen([sys.executable, "-S", "-c", code])

    def keep(self, value):
        self.kept = value
        return len(value)

    def kept_sum(self):
        return self.kept.sum().item()

    def take_slowly(self, number):
        if number % 1000 == 0:
            time.sleep(0.02)
        return number

    def sum(self, value):
        return value.sum().item()

    def count_up(self, count):
        return np.arange(count)

    def watch(self, count):
        """Return how many versions were seen, all of them complete and each newer than the one before."""
        seen, newest = 0, 0
        while newest < count:
            published = self.channel.latest()
            if published is None or published.version == newest:
                continue
            data, checksum = published.value
            assert published.version > newest and zlib.crc32(data) == checksum
            seen, newest = seen + 1, published.version
        return seen


@pytest.fixture(scope="module")
def nodes(start):
    head = start("a")
    return head, start("b", head.address)


@pytest.fixture
def rt(key, nodes):
    options = {"address": nodes[0].address, "token_file": key.path, "preload": ("numpy",)}
    with actors.runtime("cluster", **options) as rt:
        yield rt


def pair(rt, **options):
    """Return one actor on each node."""
    workers = [rt.spawn(Worker, **options) for _ in range(2)]
    for worker in workers:
        worker.ready(T)
    return workers


@pytest.fixture
def memories(key, tmp_path, monkeypatch):
    """A runtime, an actor on each of two nodes, and what returns the object memory held: on these, by the driver."""
    monkeypatch.setenv("RLX_HOME", str(tmp_path))
    with contextlib.ExitStack() as stack:
        nodes = []
        for name in ("a", "b"):
            head = nodes[0].address if nodes else None
            options = Options(name, str(key.path), "127.0.0.1", head=head, apart=True)
            nodes.append(stack.enter_context(contextlib.closing(NodeDaemon(options))))
        options = {"address": nodes[0].address, "token_file": key.path, "preload": ("numpy",)}
        rt = stack.enter_context(actors.runtime("cluster", **options))
        engines = [engine for node in nodes for engine in node._engines]
        yield rt, pair(rt), lambda: [engine.memory.arena.reclaim() for engine in [*engines, rt._engine]]


HOW = {
    signal.SIGKILL: r"was killed by SIGKILL",
    signal.SIGSEGV: r"was killed by SIGSEGV",
    signal.SIGABRT: r"was killed by SIGABRT",
    "_exit": "ended with exit code 3",
    "exit": "ended with exit code 4",
}


@pytest.mark.parametrize("how", HOW)
def test_the_death_of_an_actor_on_a_node_is_told_in_full_and_others_go_on(rt, how):
    doomed, other = pair(rt)
    with pytest.raises(ActorDied, match=rf"(?s)pid \d+ on [ab]\) {HOW[how]} in end\(\).*\n  the last words"):
        doomed.end.call(how).result(T)
    assert other.add.call().result(T) == 1
    assert rt.spawn(Worker).add.call().result(T) == 1


def test_a_stopped_actor_on_a_node_is_a_stall_and_what_it_says_late_is_taken(rt):
    slow, other = pair(rt, stall_after_s=0.2)
    stalled = threading.Event()
    rt.monitor(slow, on_stall=lambda *_: stalled.set())
    pid = slow.pid.call().result(T)
    os.kill(pid, signal.SIGSTOP)
    call = slow.add.call()
    assert stalled.wait(10.0)
    with pytest.raises(CallTimeout, match=r"add\(\) on [ab] has not answered within 0\.1 s"):
        call.result(0.1)
    assert other.add.call().result(T) == 1
    os.kill(pid, signal.SIGCONT)
    assert call.result(T) == 1
    os.kill(pid, signal.SIGSTOP)
    rt.kill(slow)
    with pytest.raises(ActorDied, match=r"was ended by kill\(\)"):
        slow.add.call().result(T)


def test_an_actor_on_a_node_that_holds_the_gil_is_a_stall_and_not_killed(rt):
    reasons = {"on the CPU": "running on the CPU", "in C": "sleeping or waiting"}
    holders = {how: rt.spawn(Worker, name=how, stall_after_s=0.3) for how in reasons}
    others, stalls = pair(rt), {}
    pids = {how: worker.pid.call().result(T) for how, worker in holders.items()}
    for worker in holders.values():
        rt.monitor(worker, on_stall=lambda _, stall: stalls.update({(stall.actor, stall.method): stall}))
    calls = {how: worker.hold_the_gil.call(how) for how, worker in holders.items()}
    for how in holders:
        until(lambda how=how: (how, "hold_the_gil") in stalls)  # a slow start is a stall, too
        stall = stalls[how, "hold_the_gil"]
        assert (stall.pid, stall.reason, stall.stopped) == (pids[how], reasons[how], False)
        assert rt.state()[how].status == "alive" and not calls[how].done()
    assert [other.add.call().result(T) for other in others] == [1, 1]
    for how, worker in holders.items():
        rt.kill(worker)
        assert "was ended by kill() in hold_the_gil()" in str(calls[how].exception(T)) and not lives(pids[how])


def test_whatever_an_actor_on_a_node_has_bred_is_gone_with_it(rt):
    parents, spared = pair(rt), pair(rt)
    pids = [parent.pid.call().result(T) for parent in parents]
    for parent in parents:
        parent.breed.call(4).result(T)
    families = [psutil.Process(pid) for pid in pids]
    until(lambda: [len(family.children(recursive=True)) for family in families] == [32, 32])
    bred = [child.pid for family in families for child in family.children(recursive=True)]
    rt.kill(parents[0])
    os.kill(pids[1], signal.SIGKILL)
    until(lambda: not any(map(lives, [*pids, *bred])))
    assert [one.add.call().result(T) for one in spared] == [1, 1]


def test_what_a_reader_on_a_node_held_comes_back_when_it_dies(memories):
    _, readers, lent = memories
    array, pids = np.ones(1_000_000), [reader.pid.call().result(T) for reader in readers]
    for reader in readers:
        assert reader.keep.call(array).result(T) == len(array)
    reading = [reader.doze.call(3600, array) for reader in readers]
    until(lambda: min(lent()[:2]) >= 2 * array.nbytes)
    for pid, call in zip(pids, reading, strict=True):
        os.kill(pid, signal.SIGKILL)
        assert isinstance(call.exception(T), ActorDied)
    until(lambda: lent() == [0, 0, 0])


def test_a_view_on_a_node_outlives_its_owner_on_another_one(memories):
    _, (owner, reader), lent = memories
    value, pid = owner.count_up.call(1_000_000).result(T), owner.pid.call().result(T)
    assert reader.keep.call(value).result(T) == len(value)
    os.kill(pid, signal.SIGKILL)
    assert isinstance(owner.add.call().exception(T), ActorDied)
    assert reader.kept_sum.call().result(T) == value.sum() == 499_999_500_000
    del value
    until(lambda: lent()[2] == 0)
    assert max(lent()) >= 8_000_000 and reader.kept_sum.call().result(T) == 499_999_500_000
    assert reader.keep.call("").result(T) == 0
    until(lambda: lent() == [0, 0, 0])


def test_ten_thousand_calls_are_under_way_both_ways_to_actors_that_are_slow(rt):
    workers = pair(rt, max_pending=20_000)
    calls = [worker.take_slowly.call(number) for number in range(5000) for worker in workers]
    assert [call.result(T) for call in calls] == [number for number in range(5000) for _ in workers]


def test_readers_on_nodes_see_complete_versions_only_while_they_are_killed(rt):
    channel = rt.channel("weights")
    rng = np.random.default_rng(0)
    watchers = pair(rt, channel=channel, restart=Restart(max=100, backoff_s=0.01))
    watching = [watcher.watch.call(120) for watcher in watchers]
    for version in range(1, 121):
        data = rng.bytes(200_000)
        channel.publish((np.frombuffer(data, np.uint8), zlib.crc32(data)), version)
        if version in (30, 60):
            pid = rt.state()[watchers[0].name].pid
            with contextlib.suppress(ProcessLookupError):  # it may not be back yet, from the first time
                if pid is not None:
                    os.kill(pid, signal.SIGKILL)
    assert watching[1].result(T) > 0
    assert isinstance(watching[0].exception(T), ActorDied)
    while True:  # until the timeout of this test: the second death may be yet to come
        with contextlib.suppress(ActorDied):
            assert watchers[0].watch.call(120).result(T) > 0
            break


def test_a_daemon_without_descriptors_starts_no_actor_and_keeps_those_that_it_has(rt, nodes):
    workers = pair(rt)
    limits = [(node.process.pid, resource.prlimit(node.process.pid, resource.RLIMIT_NOFILE)) for node in nodes]
    try:
        for pid, (_, hard) in limits:
            resource.prlimit(pid, resource.RLIMIT_NOFILE, (len(os.listdir(f"/proc/{pid}/fd")) + 2, hard))
        with pytest.raises(ActorError, match=r"on [ab]\)? could not be started.*(Too many open files|ulimit -n)"):
            rt.spawn(Worker).ready(T)
        assert [worker.add.call().result(T) for worker in workers] == [1, 1]
    finally:
        for pid, limit in limits:
            resource.prlimit(pid, resource.RLIMIT_NOFILE, limit)
    assert rt.spawn(Worker).add.call().result(T) == 1


def test_a_clock_that_jumps_is_nobodys_timeout(key, tmp_path, monkeypatch):
    monkeypatch.setenv("RLX_HOME", str(tmp_path))
    quick = Patience(every_s=0.02, suspect_s=0.5, dead_s=5.0)
    real, jumps = time.time, itertools.cycle([0.0, 86_400.0, -86_400.0])
    with contextlib.closing(NodeDaemon(Options("here", str(key.path), "127.0.0.1"))) as node:
        options = {"address": node.address, "token_file": key.path, "preload": (), "patience": quick}
        with actors.runtime("cluster", **options) as rt:
            worker = rt.spawn(Worker)
            worker.ready(T)
            before = dict(rt._engine._nodes)
            monkeypatch.setattr(time, "time", lambda: real() + next(jumps))
            for count in range(1, 50):
                assert worker.add.call().result(1.0) == count
                time.sleep(0.005)  # some beats of both hearts
            with pytest.raises(CallTimeout):
                worker.doze.call(0.2).result(0.05)
            assert rt._engine._nodes == before


def held(nodes):
    """Return how many descriptors, threads and processes the daemons have, their forkservers, and the driver.

    The list of actors, which grows with those that ended lately, is not counted.
    """
    owners = [psutil.Process(node.process.pid) for node in nodes]
    owners += [psutil.Process()] + [child for owner in owners for child in owner.children()]
    return [(descriptors(one.pid), one.num_threads(), len(one.children(recursive=True))) for one in owners]


def descriptors(pid):
    count = 0
    for fd in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(FileNotFoundError):
            count += not os.readlink(f"/proc/{pid}/fd/{fd}").endswith("/board")
    return count


@pytest.mark.slow
def test_rounds_of_spawn_and_death_leave_nothing_on_nodes_and_driver(rt, nodes):
    def play(rounds):
        for _ in range(rounds):
            workers = [rt.spawn(Worker) for _ in range(16)]
            ways = 4 * ("_exit", signal.SIGKILL)
            for ending in [worker.end.call(how) for worker, how in zip(workers[:8], ways, strict=True)]:
                assert isinstance(ending.exception(T), ActorDied)
            for worker in workers[8:]:
                rt.kill(worker)

    play(1)
    before = held(nodes)
    play(10)
    until(lambda: held(nodes) == before)


@pytest.mark.slow
def test_two_hundred_actors_on_two_nodes_answer_and_leave_nothing(rt, nodes):
    for worker in pair(rt):
        rt.kill(worker)
    before = held(nodes)
    workers = [rt.spawn(Worker) for _ in range(200)]
    calls = [worker.pid.call() for worker in workers]
    assert len({call.result(T) for call in calls}) == len(workers)
    assert [processes for _, _, processes in held(nodes)[:2]] == [101, 101]
    for worker in workers:
        rt.kill(worker)
    until(lambda: held(nodes) == before)


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.skipif(psutil.virtual_memory().available < 8 * GB, reason="needs 8 GB of memory")
def test_a_message_of_more_than_two_gigabytes_goes_to_a_node_and_back(rt):
    worker, count = pair(rt)[1], 2_100_000_000 // 8
    assert worker.sum.call(np.arange(count)).result(150.0) == count * (count - 1) // 2
    back = worker.count_up.call(count).result(150.0)
    assert len(back) == count and back.sum() == count * (count - 1) // 2
    assert worker.add.call().result(T) == 1
