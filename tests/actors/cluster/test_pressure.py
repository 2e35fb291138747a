"""More than somebody takes: actors, drivers, forkservers and readers that do not read hold up nobody else."""

import os
import re
import select
import signal
import socket
import threading
import time
import weakref

import cloudpickle
import numpy as np
import pytest

from rlx import actors
from rlx.actors.cluster.heartbeat import Patience
from rlx.actors.cluster.secure_socket import SecureSocket
from rlx.actors.engines import wire
from rlx.actors.engines.link import BACKLOG_BYTES, Link
from rlx.actors.engines.reactor import Reactor
from rlx.actors.future import Future, nothing
from rlx.errors import ActorBusy
from tests.polling import until

cloudpickle.register_pickle_by_value(__import__(__name__, fromlist=["x"]))
pytestmark = pytest.mark.timeout(90)
T = 30.0
QUICK = Patience(every_s=0.1, suspect_s=0.5, dead_s=2.0)
CALM = Patience(every_s=0.1, suspect_s=30.0, dead_s=60.0)
MB = 2**20


class Worker:
    def __init__(self, channel=None):
        self.channel, self.kept, self.taken = channel, [], 0

    def hold(self, path):
        """Do nothing until the file is there."""
        while not os.path.exists(path):
            time.sleep(0.01)

    def take(self, value):
        self.taken += 1
        return value.nbytes

    def count(self):
        return self.taken

    def pids(self):
        return os.getpid(), os.getppid()

    def echo(self, value, path):
        with open(path, "a") as file:
            file.write(".")
        return value

    def keep(self):
        published = self.channel.latest()
        self.kept.append(published.value)
        return published.version

    def let_go(self):
        self.kept.clear()

    def newest(self):
        return self.channel.latest().version


@pytest.fixture(scope="module")
def head(start):
    return start("alone")


@pytest.fixture
def open_runtime(key, head):
    opened = []

    def open_one(**options):
        opened.append(actors.runtime("cluster", address=head.address, token_file=key.path, preload=(), **options))
        return opened[-1]

    yield open_one
    for one in opened:
        one.close()


def own_bytes(pid):
    """What is not shared memory."""
    with open(f"/proc/{pid}/status") as file:
        return int(re.search(r"RssAnon:\s+(\d+) kB", file.read())[1]) * 1024


@pytest.mark.parametrize("size", [20_000, MB])
def test_who_sends_more_than_an_actor_reads_is_held_up(open_runtime, head, tmp_path, size):
    rt = open_runtime(system_timeout_s=1.0, object_memory=32 * MB, patience=QUICK)
    busy, other = rt.spawn(Worker, max_pending=10**6), rt.spawn(Worker)
    other.ready(T)
    busy.ready(T)
    before = own_bytes(head.process.pid)
    busy.hold.send(str(tmp_path / "go on"))
    value, sent = np.zeros(size, np.uint8), 0
    with pytest.raises(ActorBusy, match="has read nothing for 1 s"):
        while sent * max(size, 1000) < 2000 * MB:
            busy.take.send(value)
            sent += 1
    assert own_bytes(head.process.pid) - before < 4 * BACKLOG_BYTES
    assert other.take.call(value).result(T) == size
    (tmp_path / "go on").touch()
    assert busy.count.call().result(T) == sent


def test_what_the_object_memory_of_a_node_does_not_hold_travels_without_it(open_runtime):
    rt = open_runtime(object_memory=8 * MB)
    worker = rt.spawn(Worker)
    assert worker.take.call(np.zeros(30 * MB, np.uint8)).result(T) == 30 * MB


def test_a_driver_that_does_not_read_holds_up_its_actors(open_runtime, head, tmp_path):
    rt = open_runtime(patience=CALM)
    worker = rt.spawn(Worker)
    worker.ready(T)
    (node,) = rt._engine._nodes.values()
    before = own_bytes(head.process.pid)
    node.link.read_on(False)
    progress = tmp_path / "progress"
    value = np.arange(4 * MB, dtype=np.uint8)
    calls = [worker.echo.call(value, str(progress)) for _ in range(80)]
    until(lambda: progress.exists() and progress.stat().st_size == len(calls))  # what is lent lies with the actor
    assert own_bytes(head.process.pid) - before < 3 * BACKLOG_BYTES
    node.link.read_on(True)
    assert all((call.result(T) == value).all() for call in calls)


@pytest.mark.slow
def test_a_forkserver_that_reads_no_orders_holds_up_nobody(open_runtime):
    rt = open_runtime(patience=QUICK)
    worker = rt.spawn(Worker)
    server = worker.pids.call().result(T)[1]
    os.kill(server, signal.SIGSTOP)
    try:
        many = [rt.spawn(Worker, name=f"one/{index}") for index in range(350)]
        assert worker.count.call().result(T) == 0
        assert rt._engine._nodes
    finally:
        os.kill(server, signal.SIGCONT)
    for one in many[::50]:
        assert one.count.call().result(2 * T) == 0


def test_versions_do_not_pile_up_before_a_machine_that_takes_none(open_runtime, head):
    rt = open_runtime(patience=CALM)
    channel = rt.channel("weights")
    channel.publish(np.zeros(10))
    worker = rt.spawn(Worker, channel)
    assert worker.newest.call().result(T) == 1
    (node,) = rt._engine._nodes.values()
    head.process.send_signal(signal.SIGSTOP)
    try:
        for _ in range(40):
            version = channel.publish(np.zeros(8 * MB, np.uint8))
            rt._engine.mirrors._look_around()
        assert node.link.is_backlogged and node.link._backlog_bytes < 3 * 8 * MB
    finally:
        head.process.send_signal(signal.SIGCONT)
    assert worker.newest.call().result(T) == version


def test_readers_that_keep_old_versions_hold_up_nobody_else(open_runtime):
    rt = open_runtime(patience=QUICK, object_memory=16 * MB)
    channel = rt.channel("weights")
    channel.publish(np.zeros(3 * MB, np.uint8))
    keeper, other = rt.spawn(Worker, channel), rt.spawn(Worker)
    assert keeper.keep.call().result(T) == 1
    for _ in range(8):
        version = channel.publish(np.zeros(3 * MB, np.uint8))
        keeper.keep.call().result(T)
        assert other.count.call().result(T) == 0
    assert keeper.newest.call().result(T) < version
    keeper.let_go.call().result(T)
    until(lambda: keeper.newest.call().result(T) == version)


def test_what_a_link_has_decrypted_before_it_is_opened_is_taken(tls_pair, request):
    ours, theirs = tls_pair()
    assert isinstance(theirs, SecureSocket)
    theirs.send(b"the last word of a handshake" + b"".join(wire.encode(wire.PING, 7)))
    first = memoryview(bytearray(28))
    while True:
        try:
            assert ours.recv_into(first) == 28
            break
        except BlockingIOError:
            time.sleep(0.01)
    taken, reactor = threading.Event(), Reactor()
    request.addfinalizer(lambda: reactor.close(T))
    link = Link(reactor, ours, lambda frame: taken.set(), lambda how: None)
    link.open()
    assert taken.wait(T)
    reactor.post(lambda: link.finish(link.close))


def test_who_waits_for_an_answer_of_which_half_a_record_comes_waits_on(tcp_pair, key, request):
    ours, pump_ours = tcp_pair()
    theirs, pump_theirs = tcp_pair()
    ends = SecureSocket(ours, key.client_context()), SecureSocket(theirs, key.server_context(), True)
    waits = [1, 1]
    while any(waits):
        waits = [end.negotiate() for end in ends]
        for source, target in ((pump_ours, pump_theirs), (pump_theirs, pump_ours)):
            while select.select([source], [], [], 0.01)[0]:
                target.sendall(source.recv(2**16))
    reactor, answer = Reactor(), Future("peer", "answer")
    request.addfinalizer(lambda: reactor.close(T))
    link = Link(reactor, ends[0], lambda frame: answer.settle(nothing), lambda how: None)
    link.open()

    def pump():
        until(lambda: link._leader not in (None, reactor.ident))
        ends[1].send(b"".join(wire.encode(wire.PING)))
        record = pump_theirs.recv(2**16)
        for index in range(len(record)):
            pump_ours.sendall(record[index : index + 1])
            until(lambda: not select.select([ours], [], [], 0.0)[0])  # it has been read

    thread = threading.Thread(target=pump)
    thread.start()
    link.lead(answer, time.monotonic() + T)
    assert answer.done()
    thread.join()
    reactor.post(lambda: link.finish(link.close))


def test_what_is_written_to_a_link_that_has_ended_is_not_kept(request):
    reactor, (ours, theirs) = Reactor(), socket.socketpair()
    request.addfinalizer(lambda: reactor.close(T))
    ours.setblocking(False)
    ended = threading.Event()
    link = Link(reactor, ours, lambda frame: None, lambda how: link.finish(lambda: (link.close(), ended.set())))
    link.open()
    theirs.close()
    assert ended.wait(T)
    version = np.zeros(MB, np.uint8)
    left = weakref.ref(version)
    for _ in range(2):
        link.write(wire.encode(wire.PUBLISH, message=(b"", [memoryview(version)])), stable=True)
    del version
    assert left() is None and not link.is_full
