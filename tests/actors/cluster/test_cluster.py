"""Daemons of their own processes, a driver, and actors behind them: calls, channels, joining, leaving and dying."""

import collections
import contextlib
import dataclasses
import errno
import itertools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import cloudpickle
import numpy as np
import pytest

from rlx import actors
from rlx.actors import Restart
from rlx.actors.cluster import greeting
from rlx.actors.cluster.daemon import NodeDaemon, Options, parse_address
from rlx.actors.cluster.handshake import Role, connect
from rlx.actors.cluster.heartbeat import Patience
from rlx.actors.cluster.membership import Membership, NodeInfo
from rlx.actors.cluster.relay import NodeEngine
from rlx.actors.cluster.remote import RemoteActor
from rlx.actors.engines import wire
from rlx.actors.engines.reactor import Reactor
from rlx.actors.engines.wire import Frame
from rlx.actors.future import LONGEST_WAIT_S, wait
from rlx.errors import ActorBusy, ActorDied, ActorError, HandshakeError
from tests.polling import until

cloudpickle.register_pickle_by_value(__import__(__name__, fromlist=["x"]))
pytestmark = pytest.mark.timeout(90)
T = 30.0
QUICK = Patience(every_s=0.1, suspect_s=0.3, dead_s=1.0)


class Worker:
    def __init__(self, channel=None):
        self.channel, self.count = channel, 0

    def add(self, count=1):
        self.count += count
        return self.count

    def echo(self, value):
        return value

    def daemon(self):
        return os.getppid(), os.environ.get("RLX_TEST_PASSED_ON")

    def publish(self, channel, value):
        return channel.publish(value)

    def newest(self, channel=None):
        published = (channel or self.channel).latest()
        return None if published is None else (published.version, published.value.sum().item())

    def say(self, text):
        print(text, flush=True)

    def pause(self):
        os.kill(os.getpid(), signal.SIGSTOP)

    def wait(self):
        threading.Event().wait()


@pytest.fixture(scope="module")
def head(start):
    return start("a")


@pytest.fixture(scope="module")
def second(start, head):
    return start("b", head.address)


@pytest.fixture
def rt(key, head, second):
    with actors.runtime("cluster", address=head.address, token_file=key.path, preload=("numpy",)) as runtime:
        yield runtime


@pytest.fixture
def open_runtime(key):
    opened = []

    def open_one(address, **options):
        opened.append(actors.runtime("cluster", address=address, token_file=key.path, preload=("numpy",), **options))
        return opened[-1]

    yield open_one
    for one in opened:
        one.close()


def spawn_on_both(rt, **options):
    """Return one actor of each of two nodes."""
    return [rt.spawn(Worker, **options) for _ in range(2)]


def test_actors_are_spread_over_the_nodes_and_get_the_environment(rt, monkeypatch):
    monkeypatch.setenv("RLX_TEST_PASSED_ON", "yes")
    found = [worker.daemon.call().result(T) for worker in spawn_on_both(rt)]
    assert len({parent for parent, _ in found}) == 2  # the forkservers of two daemons
    assert [passed_on for _, passed_on in found] == ["yes", "yes"]


def test_what_was_published_before_a_call_is_there_before_it(rt):
    channel = rt.channel("weights")
    channel.publish(np.full(100_000, 1.0))
    first, second = spawn_on_both(rt, channel=channel)
    assert [worker.newest.call().result(T) for worker in (first, second)] == [(1, 100_000.0)] * 2
    for version in range(2, 30):
        channel.publish(np.full(10, float(version)))
        assert [worker.newest.call().result(T) for worker in (first, second)] == [(version, 10.0 * version)] * 2


def test_what_an_actor_publishes_is_everywhere_before_its_answer(rt):
    publisher, reader = spawn_on_both(rt)
    channel = rt.channel("of an actor")
    assert reader.newest.call(channel).result(T) is None
    for version in range(1, 30):
        assert publisher.publish.call(channel, np.full(5, float(version))).result(T) == version
        assert channel.latest().version == version
        assert reader.newest.call(channel).result(T) == (version, 5.0 * version)


def test_a_node_that_is_killed_takes_its_actors_along_and_they_start_on_another(start, key, open_runtime):
    head = start("a-of-kill")
    other = start("b-of-kill", head.address)
    rt = open_runtime(head.address)
    moved = threading.Event()
    workers = [rt.spawn(Worker, restart=Restart(max=3, backoff_s=0.01)) for _ in range(2)]
    parents = [worker.daemon.call().result(T)[0] for worker in workers]
    lost = rt.spawn(Worker, name="lost/0"), rt.spawn(Worker, name="lost/1")
    for worker in (*workers, *lost):
        worker.ready(T)
        rt.monitor(worker, on_restart=lambda *_: moved.set())
    other.end(signal.SIGKILL)
    assert moved.wait(T)
    died = [worker.add.call().exception(T) for worker in lost]
    texts = [str(error) for error in died if error is not None]
    assert len(texts) == 1 and "was lost with its node b-of-kill" in texts[0] and "closed its link" in texts[0]
    assert len({worker.daemon.call().result(T)[0] for worker in workers} & set(parents)) == 1


def has_stopped(pid):
    """Whether all of its threads have: on another core one goes on for a moment, and passes on a call."""
    for thread in os.listdir(f"/proc/{pid}/task"):
        with open(f"/proc/{pid}/task/{thread}/stat") as file:
            if file.read().rpartition(")")[2].split()[0] != "T":
                return False
    return True


def test_a_node_that_is_silent_counts_as_lost_and_is_fenced(start, open_runtime):
    head = start("a-of-silence", patience={"every_s": 0.1, "suspect_s": 0.3, "dead_s": 30.0})
    other = start("b-of-silence", head.address)
    rt = open_runtime(head.address, patience=QUICK)
    workers = spawn_on_both(rt)
    for worker in workers:
        worker.ready(T)
    ended = threading.Event()
    for worker in workers:
        rt.monitor(worker, on_exit=lambda *_: ended.set())
    other.process.send_signal(signal.SIGSTOP)
    until(lambda: has_stopped(other.process.pid))
    calls = [worker.add.call() for worker in workers]
    assert ended.wait(T)
    errors = [call.exception(T) for call in calls]
    (error,) = [error for error in errors if error is not None]
    assert isinstance(error, ActorDied) and "b-of-silence" in str(error) and "silent for 1 s in add()" in str(error)
    other.process.send_signal(signal.SIGCONT)
    (living,) = [worker for worker, error in zip(workers, errors, strict=True) if error is None]
    assert living.add.call().result(T) == 2  # nothing that the fenced one says is taken


def test_a_node_that_joins_later_gets_actors(start, open_runtime):
    head = start("a-of-join")
    rt = open_runtime(head.address)
    alone = rt.spawn(Worker).daemon.call().result(T)[0]
    assert rt.spawn(Worker).daemon.call().result(T)[0] == alone
    joined = threading.Event()
    rt.when_resources_change(joined.set)
    start("b-of-join", head.address)
    assert joined.wait(T)
    assert rt.spawn(Worker).daemon.call().result(T)[0] != alone  # which has two, and the new one none


def test_without_its_head_a_runtime_ends_with_a_sentence(start, open_runtime):
    head = start("a-of-head")
    start("b-of-head", head.address)
    rt = open_runtime(head.address)
    workers = spawn_on_both(rt)
    for worker in workers:
        worker.ready(T)
    ended = threading.Semaphore(0)
    for worker in workers:
        rt.monitor(worker, on_exit=lambda *_: ended.release())
    head.end(signal.SIGKILL)
    assert ended.acquire(timeout=T) and ended.acquire(timeout=T)
    for worker in workers:
        with pytest.raises(ActorDied, match=re.escape(head.address)):
            worker.add.call().result(T)
    with pytest.raises(ActorError, match=r"the head of the cluster .* closed its link"):
        rt.spawn(Worker)


def test_what_an_actor_has_printed_is_kept_by_the_driver_also_of_a_node_that_is_lost(start, key, tmp_path, capfd):
    head = start("a-of-lines")
    options = {"address": head.address, "token_file": key.path, "preload": ("numpy",), "log_folder": tmp_path}
    with actors.runtime("cluster", **options) as rt:
        worker = rt.spawn(Worker, name="worker/0")
        worker.say.call("first words").result(T)
        worker.say.call("last words").result(T)
        (file,) = tmp_path.iterdir()
        while "last words" not in file.read_text():  # until the timeout of this test
            worker.add.call().result(T)
        head.process.send_signal(signal.SIGKILL)
        error = worker.pause.call().exception(T)
        assert str(error).endswith("The last lines that it wrote:\n  first words\n  last words")
    assert capfd.readouterr().err.count("[worker/0] last words") == 1


def test_no_cluster_no_runtime(key, other_key, head):
    with pytest.raises(HandshakeError, match=r"nobody listens at 127\.0\.0\.1:1"):
        actors.runtime("cluster", address="127.0.0.1:1", token_file=key.path)
    with pytest.raises(HandshakeError, match="belongs to another cluster"):
        actors.runtime("cluster", address=head.address, token_file=other_key.path)
    with pytest.raises(ValueError, match="'here' is not HOST:PORT"):
        actors.runtime("cluster", address="here", token_file=key.path)


def test_two_nodes_of_one_name_are_one_too_many(start, head, second):
    daemon = start("b", head.address)
    assert "there is a node b" in daemon.news["error"] and daemon.process.wait(T) == 1


def test_a_machine_that_was_switched_off_and_on_takes_its_place_again(start):
    quick = {"every_s": 0.1, "suspect_s": 0.3, "dead_s": 60.0}
    head = start("a-of-power", patience=quick)
    off = start("b-of-power", head.address, patience=quick)
    off.process.send_signal(signal.SIGSTOP)  # nobody says that its connections are dead
    deadline = time.monotonic() + T
    while "error" in (again := start("b-of-power", head.address, patience=quick)).news:
        assert time.monotonic() < deadline and again.process.wait(T) == 1
    assert again.address != off.address


def first_answer(rt):
    """Return what a new actor answers; None if it was lost with its node."""
    try:
        return rt.spawn(Worker).add.call().result(T)
    except ActorDied:
        return None


def test_a_node_whose_forkserver_is_killed_gets_another_one(start, open_runtime):
    head = start("alone-of-forkserver")
    rt = open_runtime(head.address)
    worker = rt.spawn(Worker)
    server = worker.daemon.call().result(T)[0]
    ended = threading.Event()
    rt.monitor(worker, on_exit=lambda *_: ended.set())
    os.kill(server, signal.SIGKILL)
    assert ended.wait(T)
    with pytest.raises(ActorDied, match=rf"the forkserver of this runtime \(process {server}\) was killed by SIGKILL"):
        worker.add.call().result(T)
    while (count := first_answer(rt)) is None:  # until the timeout of this test: the node may not have left yet
        pass
    assert count == 1  # it has waited for the node, of which there is no other


@pytest.mark.parametrize("is_closed", [True, False])
def test_a_head_that_says_nothing_is_an_error_in_time(key, open_door, is_closed):
    door = open_door()
    if is_closed:
        threading.Thread(target=lambda: door.next()[0].shutdown(socket.SHUT_RDWR)).start()
    says = r"the head of the cluster \(127.0.0.1:\d+\) has not said within 0.5 s which nodes belong to it"
    if is_closed:
        says = r"the daemon at 127.0.0.1:\d+ closed its link: it is not the head of a cluster, or has ended\."
    with pytest.raises(ActorError, match=says):
        address, timeout_s = "{}:{}".format(*door.address), T if is_closed else 0.5
        actors.runtime("cluster", address=address, token_file=key.path, system_timeout_s=timeout_s)


def test_a_node_that_is_stopped_says_so(start, open_runtime):
    head = start("a-of-stop")
    other = start("b-of-stop", head.address)
    rt = open_runtime(head.address)
    workers = spawn_on_both(rt)
    for worker in workers:
        worker.ready(T)
    assert other.end() == 0
    errors = [str(error) for error in (worker.add.call().exception(T) for worker in workers) if error is not None]
    assert len(errors) == 1 and "was lost with its node b-of-stop" in errors[0]


def test_a_member_that_talks_nonsense_loses_its_own_connection_only(key, head, rt):
    sock = connect(parse_address(head.address), key, Role.NODE)
    greeting.send(sock, wire.JOIN, {"neither": "name nor address"}, T)
    with contextlib.suppress(ActorError), contextlib.closing(sock):
        while True:  # signs of life, until it is closed
            greeting.receive(sock, T)
    assert [worker.add.call().result(T) for worker in spawn_on_both(rt)] == [1, 1]


def test_a_member_that_does_not_begin_as_nodes_do_is_hung_up_on(key, head):
    with contextlib.closing(connect(parse_address(head.address), key, Role.NODE)) as sock:
        greeting.send(sock, wire.OPEN, {}, T)
        with pytest.raises(ActorError, match="it closed the connection"):
            while True:
                greeting.receive(sock, T)


def test_what_is_printed_while_an_actor_is_started_disturbs_nobody(rt, monkeypatch):
    body = rt.spawn(Worker)._actor.body
    node, keep = body._node, body.keep_lines

    def keep_and_start_another(lines):
        keep(lines)
        node.actors[-1] = None  # on its way

    monkeypatch.setattr(body, "keep_lines", keep_and_start_another)
    node._take(Frame(wire.PRINTED, 0, body.name, b"a line\n"))
    node.remove(-1)
    assert rt._engine.logs.tail(body.name) == ["a line"]


@pytest.mark.parametrize("step", ["_node.remove", "_reactor.clear_deadline", "_fail_all"])
def test_a_death_of_which_an_interrupt_has_cut_the_news_short_is_told_of(rt, monkeypatch, step):
    """A caller that waits for another answer on the same link takes them, and may be interrupted."""
    handle = rt.spawn(Worker)
    handle.ready(T)
    waiting, body = handle.wait.call(), handle._actor.body
    *path, name = step.split(".")
    part = getattr(body, path[0]) if path else body
    do = getattr(part, name)

    def do_and_be_interrupted(*words):
        do(*words)
        if threading.current_thread() is threading.main_thread():
            raise KeyboardInterrupt

    frame = Frame(wire.EXITED, body._first_call, "actor has ended.", b"")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(part, name, do_and_be_interrupted, raising=True)
        body._node._take(frame)
    rt._engine.reactor.post(lambda: body._node._take(frame))  # as its link does with what was not dealt with
    assert isinstance(waiting.exception(T), ActorDied)
    assert wait([body.gone], 1, T)[0]


def test_an_actor_that_cannot_be_sent_what_it_is_made_of_leaves_nothing(rt, monkeypatch):
    def busy(*_):
        raise ActorBusy("much is waiting for it")

    before = set(os.listdir("/proc/self/fd"))
    with monkeypatch.context() as patch, pytest.raises(ActorBusy):
        patch.setattr(RemoteActor, "start", busy)
        rt.spawn(Worker)
    until(lambda: set(os.listdir("/proc/self/fd")) <= before)
    assert [dict(node.actors) for node in rt._engine._nodes.values()] == [{}, {}]


def test_a_node_that_answers_when_its_cluster_has_ended_is_let_go(rt, monkeypatch):
    engine = rt._engine
    info, greet, socks = next(iter(engine._present.values())), engine._greet, []

    def greet_and_lose_the_head(sock, is_home):
        greet(sock, is_home)
        socks.append(sock)
        monkeypatch.setattr(engine, "_head_lost", "it is gone")

    monkeypatch.setattr(engine, "_greet", greet_and_lose_the_head)
    engine._link(99, info)
    assert 99 not in engine._nodes and socks[0].fileno() == -1


def test_who_waits_for_a_node_hears_signals(rt, monkeypatch):
    engine, waits = rt._engine, []
    monkeypatch.setattr(engine, "_nodes", {})
    monkeypatch.setattr(engine, "system_timeout_s", T)

    def wait_and_be_told(timeout_s):
        waits.append(timeout_s)
        monkeypatch.setattr(engine, "_head_lost", "it is gone")

    monkeypatch.setattr(engine._placeable, "wait", wait_and_be_told)
    with pytest.raises(ActorError, match="it is gone"):
        rt.spawn(Worker)
    assert waits == [LONGEST_WAIT_S]


def test_a_membership_that_is_left_while_it_knocks_does_not_enter_again(request, closing):
    reactor = Reactor()
    request.addfinalizer(lambda: reactor.close(T))
    ours, theirs = map(closing, socket.socketpair())
    info = NodeInfo("b", "127.0.0.1:1", 1, 0, 0)
    membership = Membership(reactor, lambda: None, info, QUICK, lambda why: None)
    membership.close()
    ours.setblocking(False)
    membership._enter(ours)
    theirs.settimeout(T)
    assert theirs.recv(1) == b""


def test_a_daemon_that_has_just_taken_over_the_signal_ends_by_it(key, tmp_path):
    script = (
        "import os, signal, sys\nfrom rlx.actors.cluster import daemon\nreal = signal.signal\n"
        "def strike(number, handler):\n    before = real(number, handler)\n"
        "    if number == signal.SIGTERM: os.kill(os.getpid(), number)\n    return before\n"
        "signal.signal = strike\nsys.exit(daemon.main())"
    )
    options = json.dumps({"name": "struck", "key": str(key.path), "host": "127.0.0.1"})
    env = os.environ | {"RLX_HOME": str(tmp_path)}
    with subprocess.Popen([sys.executable, "-c", script, options], stdout=subprocess.DEVNULL, env=env) as process:
        try:
            assert process.wait(T) == 0
        finally:
            process.kill()


def test_an_order_that_finds_no_descriptors_keeps_none(monkeypatch):
    orders, copies, opened, closed = collections.deque(), itertools.count(1000), [], []

    def dup(_):
        if len(opened) == 2:
            raise OSError(errno.EMFILE, "too many open files")
        opened.append(next(copies))
        return opened[-1]

    engine = SimpleNamespace(reactor=SimpleNamespace(ident=threading.get_ident()), _orders=orders)
    with monkeypatch.context() as patch, pytest.raises(OSError, match="too many open files"):
        patch.setattr(os, "dup", dup)
        patch.setattr(os, "close", closed.append)
        NodeEngine._order(engine, 1.0, [3, 4, 5], do="spawn")
    assert sorted(closed) == opened and not orders


def test_a_daemon_that_ends_hangs_up_on_drivers_that_do_not(key):
    daemon = NodeDaemon(Options("ends first", str(key.path), "127.0.0.1"))
    opening = {"system_timeout_s": T, "patience": dataclasses.asdict(QUICK), "preload": [], "object_memory": 2**20}
    with contextlib.closing(connect(parse_address(daemon.address), key, Role.DRIVER)) as sock:
        greeting.send(sock, wire.OPEN, opening, T)
        assert greeting.receive(sock, T).kind == wire.OPEN
        daemon.close()
        with pytest.raises(ActorError, match="it closed the connection"):
            while True:
                greeting.receive(sock, T)


def test_large_values_come_back_equal(rt):
    values = [np.random.default_rng(size).integers(0, 255, size, np.uint8) for size in (1, 70_000, 30_000_000)]
    for worker in spawn_on_both(rt):
        for value in values:
            assert (worker.echo.call(value).result(T) == value).all()


def test_a_daemon_ends_whichever_of_its_threads_gets_the_signal(start, head):
    daemons = [start(f"stopped/{index}", head.address) for index in range(4)]
    for daemon in daemons:
        daemon.process.send_signal(signal.SIGSTOP)
        daemon.process.send_signal(signal.SIGTERM)
    for daemon in daemons:
        daemon.process.send_signal(signal.SIGCONT)
    assert [daemon.process.wait(T) for daemon in daemons] == [0] * 4


@pytest.fixture
def written(rt):
    """Return the frames, as lists of (kind, call id, bytes), that go to each node from now on."""
    frames = {}
    for node in rt._engine._nodes.values():
        frames[node.name] = sent = []

        def write(parts, *args, write=node.link.write, sent=sent, **options):
            _, kind, _, _, call_id, _ = wire.HEADER.unpack_from(parts[0])
            sent.append((kind & ~wire.SHARED_BODY, call_id, sum(map(len, parts))))
            write(parts, *args, **options)

        node.link.write = write
    return frames


def test_a_value_that_was_put_crosses_to_a_node_once_and_is_forgotten_with_its_last_reference(rt, written):
    workers = [rt.spawn(Worker) for _ in range(4)]  # two on each of two nodes
    data = np.arange(500_000, dtype=np.float64)
    ref, plain = rt.put(data), [data, "twice", data[:1000]]
    for _ in range(3):
        for found in rt.group(workers).echo.call(ref).result(T):
            np.testing.assert_array_equal(found.value, data)
    for sent in written.values():
        assert data.nbytes < sum(size for *_, size in sent) < data.nbytes + 20_000
    del ref, found
    for sent in written.values():
        (number,) = [number for kind, number, _ in sent if kind == wire.KEEP]
        while (wire.DROP, number) not in [(kind, call_id) for kind, call_id, _ in sent]:  # until the test's timeout
            time.sleep(0.01)
        sent.clear()
    for found in rt.group(workers).echo.call(plain).result(T):  # one message for all, in one block
        np.testing.assert_array_equal(found.value[2], data[:1000])
    for sent in written.values():
        assert data.nbytes < sum(size for *_, size in sent) < 2 * data.nbytes


def test_what_crossed_in_a_call_that_was_interrupted_is_forgotten_there_too(rt, written, monkeypatch):
    worker, data = rt.spawn(Worker), np.arange(500_000, dtype=np.float64)
    worker.ready(T)
    for node in rt._engine._nodes.values():

        def write(parts, *args, write=node.link.write, **options):
            write(parts, *args, **options)
            if len(parts) > 1:
                raise KeyboardInterrupt

        monkeypatch.setattr(node.link, "write", write)
    with pytest.raises(KeyboardInterrupt):
        worker.echo.call(data)
    monkeypatch.undo()
    [sent] = [sent for sent in written.values() if any(kind == wire.KEEP for kind, *_ in sent)]
    (number,) = [number for kind, number, _ in sent if kind == wire.KEEP]
    while (wire.DROP, number) not in [(kind, call_id) for kind, call_id, _ in sent]:  # until the test's timeout
        time.sleep(0.01)
    np.testing.assert_array_equal(worker.echo.call(data).result(T), data)


def test_a_slice_of_what_an_actor_returned_crosses_alone(rt, written):
    first, second = rt.spawn(Worker), rt.spawn(Worker)
    whole = first.echo.call(np.arange(1_000_000, dtype=np.float64)).result(T)
    for sent in written.values():
        sent.clear()
    part = whole[:20_000]
    np.testing.assert_array_equal(second.echo.call(part).result(T), part)
    assert max(size for sent in written.values() for *_, size in sent) < part.nbytes + 1000


def test_where_object_memory_is_full_what_comes_goes_elsewhere(open_runtime, head, second):
    rt = open_runtime(head.address, object_memory=3 * 2**20)
    worker = rt.spawn(Worker)
    data = np.arange(2**17, dtype=np.float64)  # 1 MiB
    kept = [worker.echo.call(data).result(T) for _ in range(8)]
    assert all(np.array_equal(one, data) for one in kept)
