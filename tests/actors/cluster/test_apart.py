"""Machines that are really apart: a head, a second node and a driver, each at an address of its own behind a router."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import cloudpickle
import numpy as np
import pytest

from rlx.actors.cluster.daemon import parse_address
from rlx.actors.cluster.heartbeat import Patience
from rlx.errors import ActorDied, ActorError
from tests.actors.cluster.namespaces import why_not
from tests.actors.cluster.scenarios import lives
from tests.polling import until

cloudpickle.register_pickle_by_value(__import__(__name__, fromlist=["x"]))
pytestmark = [pytest.mark.timeout(120), pytest.mark.skipif(why_not() is not None, reason=str(why_not()))]
T = 40.0
QUICK = Patience(every_s=0.1, suspect_s=0.3, dead_s=1.0)


class Worker:
    def __init__(self, channel=None):
        self.channel, self.count, self.log = channel, 0, []

    def add(self):
        from rlx.actors.context import current_call

        self.count += 1
        self.log.append((current_call.get()[2], self.count))
        return self.count

    def add_later(self, signal_file):
        while not os.path.exists(signal_file):
            time.sleep(0.01)
        return self.add()

    def calls(self):
        return self.log

    def echo(self, value):
        return value

    def pids(self):
        return os.getpid(), os.getppid()

    def newest(self):
        published = self.channel.latest()
        return published.version, published.value.sum().item()

    def count_up(self, to):
        yield from range(to)


def spawn_on_both(rt, **options):
    """Return an actor on a, and one on b."""
    workers = [rt.spawn(Worker, **options) for _ in range(2)]
    for worker in workers:
        worker.ready(T)
    nodes = [worker._actor.body._node.name for worker in workers]
    return [worker for _, worker in sorted(zip(nodes, workers, strict=True), key=lambda pair: pair[0])]


def test_calls_channels_and_large_values_cross_with_tls(cluster):
    rt = cluster()[2]
    assert {node.link._sock.cipher for node in rt._engine._nodes.values()} <= {
        "TLS_AES_256_GCM_SHA384",
        "TLS_AES_128_GCM_SHA256",
        "TLS_CHACHA20_POLY1305_SHA256",
    }
    channel = rt.channel("weights")
    channel.publish(np.full(1000, 1.0))
    large = np.random.default_rng(0).integers(0, 255, 30_000_000, np.uint8)
    for worker in spawn_on_both(rt, channel=channel):
        assert [worker.add.call().result(T) for _ in range(50)] == list(range(1, 51))
        assert worker.newest.call().result(T) == (1, 1000.0)
        assert (worker.echo.call(large).result(T) == large).all()
        assert list(worker.count_up.stream(200)) == list(range(200))


def test_a_pulled_cable_is_a_lost_node(cluster, network):
    _, _, rt = cluster(patience=QUICK)
    on_a, on_b = spawn_on_both(rt)
    network.pull("b")
    try:
        with pytest.raises(
            ActorDied, match=r"lost with its node b \(10\.77\.2\.2:\d+\), which has been silent for 1 s"
        ):
            on_b.add.call().result(T)
        assert on_a.add.call().result(T) == 1
    finally:
        network.plug("b")


@pytest.mark.slow
def test_a_pulled_cable_is_a_lost_node_within_the_default_patience(cluster, network):
    _, _, rt = cluster(patience=Patience(), of_daemons=Patience())
    _, on_b = spawn_on_both(rt)
    network.pull("b")
    try:
        with pytest.raises(ActorDied, match=r"its node b \(.*\), which has been silent for 1[56] s"):
            on_b.add.call().result(T)
    finally:
        network.plug("b")


@pytest.mark.parametrize("seconds", [0.7, pytest.param(5.0, marks=pytest.mark.slow)])
def test_a_blackout_is_survived_and_no_call_runs_twice(cluster, network, seconds):
    _, _, rt = cluster()
    workers = spawn_on_both(rt)
    calls = [[] for _ in workers]
    over = threading.Event()

    def call_on():
        while not over.is_set() or len(calls[1]) < 300:
            for worker, mine in zip(workers, calls, strict=True):
                mine.append(worker.add.call())
            time.sleep(0.003)

    thread = threading.Thread(target=call_on)
    thread.start()
    network.pull("b")
    over.wait(seconds)
    network.plug("b")
    over.set()
    thread.join()
    for worker, mine in zip(workers, calls, strict=True):
        assert [call.result(T) for call in mine] == list(range(1, len(mine) + 1))
        ids, counts = zip(*worker.calls.call().result(T), strict=True)
        assert len(set(ids)) == len(ids) == len(mine) and counts == tuple(range(1, len(mine) + 1))


@pytest.mark.slow
@pytest.mark.parametrize("direction", [("b", "driver"), ("driver", "b")])
def test_a_network_that_is_open_one_way_only_is_a_lost_node(cluster, network, direction):
    _, _, rt = cluster(patience=QUICK)
    on_a, on_b = spawn_on_both(rt)
    pid = on_b.pids.call().result(T)[0]
    with network.deaf(*direction):
        with pytest.raises(ActorDied, match="lost with its node b"):
            while True:
                on_b.add.call().result(T)
        until(lambda: not lives(pid))  # the node has ended it
        assert on_a.add.call().result(T) == 1


@pytest.mark.slow
def test_a_node_that_comes_back_is_another_one_and_has_none_of_the_old_actors(cluster, network):
    _, other, rt = cluster(patience=QUICK, of_daemons=QUICK)
    worker = spawn_on_both(rt)[1]
    pid, server = worker.pids.call().result(T)
    before = set(rt._engine._nodes)
    network.pull("b")
    with pytest.raises(ActorDied):
        worker.add.call().result(T)
    until(lambda: not lives(pid) and not lives(server))  # the node itself has ended them
    network.plug("b")
    until(lambda: len(rt._engine._nodes) == 2)
    assert set(rt._engine._nodes) - before  # another incarnation
    assert other.process.poll() is None
    on_b = spawn_on_both(rt)[1]
    assert on_b.add.call().result(T) == 1 and on_b.pids.call().result(T)[1] != server


@pytest.mark.slow
def test_a_node_that_only_the_driver_has_lost_is_taken_again(cluster, network):
    _, _, rt = cluster(patience=QUICK)
    worker = spawn_on_both(rt)[1]
    with network.deaf("b", "driver"), pytest.raises(ActorDied):
        worker.add.call().result(T)
    until(lambda: len(rt._engine._nodes) == 2)
    assert [one.add.call().result(T) for one in spawn_on_both(rt)] == [1, 1]


def test_a_killed_node_is_known_at_once(cluster):
    _, other, rt = cluster(patience=Patience())
    worker = spawn_on_both(rt)[1]
    other.end(signal.SIGKILL)
    with pytest.raises(ActorDied, match=r"lost with its node b \(.*\), which (closed its link|has left the cluster)"):
        worker.add.call().result(T)


def test_without_its_head_the_runtime_ends(cluster, network):
    _, _, rt = cluster(patience=QUICK)
    workers = spawn_on_both(rt)
    network.pull("a")
    try:
        for worker in workers:
            with pytest.raises(ActorDied, match=r"(the head|node a) \(10\.77\.1\.2:\d+\),? (which )?has been silent"):
                while True:
                    worker.add.call().result(T)
        with pytest.raises(ActorError, match="has been silent"):
            rt.spawn(Worker)
    finally:
        network.plug("a")


def test_calls_go_on_while_strangers_knock(cluster, network):
    head, _, rt = cluster()
    workers = spawn_on_both(rt)
    rng = np.random.default_rng(1)
    knocks = []
    with network.on("b"):
        for _ in range(40):
            knocks.append(socket.create_connection(parse_address(head.address), T))
            with contextlib.suppress(OSError):
                knocks[-1].send(rng.bytes(int(rng.integers(0, 5000))))
            assert all(worker.add.call().result(T) for worker in workers)
    for knock in knocks:
        knock.close()
    assert [worker.add.call().result(T) for worker in workers] == [41, 41]


@pytest.mark.slow
@pytest.mark.parametrize("network", [{"delays_s": {"b": 0.1}}], indirect=True)
def test_a_network_that_delays_and_loses_is_slow_and_nothing_else(cluster, network):
    _, _, rt = cluster()
    network.poor_cables["b"].loss = 0.05
    channel = rt.channel("weights")
    channel.publish(np.full(1000, 1.0))
    large = np.random.default_rng(0).integers(0, 255, 300_000, np.uint8)
    for worker in spawn_on_both(rt, channel=channel):
        calls = [worker.add.call() for _ in range(1000)]
        assert (worker.echo.call(large).result(T) == large).all()
        assert worker.newest.call().result(T) == (1, 1000.0)
        assert list(worker.count_up.stream(50)) == list(range(50))
        assert [call.result(T) for call in calls] == list(range(1, 1001))
    assert len(rt._engine._nodes) == 2


PROGRAM = """
import json, os, signal, sys
from rlx import actors

class Sleeper:
    def pids(self):
        return os.getpid(), os.getppid()

    def sleep(self):
        signal.pause()

import cloudpickle
cloudpickle.register_pickle_by_value(sys.modules["__main__"])
rt = actors.runtime("cluster", address=sys.argv[1], token_file=sys.argv[2], preload=())
sleepers = [rt.spawn(Sleeper) for _ in range(4)]
print(json.dumps([sleeper.pids.call().result(30) for sleeper in sleepers]), flush=True)
calls = [sleeper.sleep.call() for sleeper in sleepers]
signal.pause()
"""


def test_a_killed_driver_leaves_nothing_on_the_nodes(start_apart, network, key):
    head = start_apart("a")
    other = start_apart("b", head.address)
    before = [len(os.listdir(f"/proc/{daemon.process.pid}/fd")) for daemon in (head, other)]
    command = [*network.command("driver"), sys.executable, "-c", PROGRAM, head.address, str(key.path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as driver:
        pids = {pid for pair in json.loads(driver.stdout.readline()) for pid in pair}
        assert len(pids) == 6  # four actors of two forkservers
        driver.kill()
    until(lambda: not any(map(lives, pids)))
    until(lambda: [len(os.listdir(f"/proc/{daemon.process.pid}/fd")) for daemon in (head, other)] == before)
