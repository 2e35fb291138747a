"""An actor that writes down what it runs, a runtime whose book is checked, and what brings each kind of frame about."""

import contextlib
import itertools
import os
import threading
import time

import cloudpickle
import numpy as np
import pytest

from rlx import actors
from rlx.errors import ActorDied, CallCancelled, RlxError

cloudpickle.register_pickle_by_value(__import__(__name__, fromlist=["x"]))
T = 20.0


class Worker:
    """Writes down what it runs, where no death and no lost answer can take it back."""

    def __init__(self, book, token, fails=False):
        self.book = os.open(book, os.O_WRONLY | os.O_APPEND)
        self.note(f"born {token} {os.getpid()}")
        if fails:
            raise ValueError("born to fail")

    def note(self, what):
        os.write(self.book, f"{what}\n".encode())

    def run(self, token):
        self.note(f"ran {token} {os.getpid()}")
        return token

    def family(self, token):
        """Return who else was started on this node, for this driver."""
        self.run(token)
        parent = os.getppid()
        with open(f"/proc/{parent}/task/{parent}/children") as file:
            return file.read().split()

    def fail(self, token):
        self.run(token)
        raise ValueError(f"failed {token}")

    def count_up(self, token, to):
        self.run(token)
        yield from range(to)

    def wait(self, token):
        self.run(token)
        while not actors.current().cancelled():
            time.sleep(0.001)
        raise CallCancelled("while it waited")

    def rest(self, token, seconds):
        self.run(token)
        time.sleep(seconds)
        return token

    def wait_for(self, token, path):
        self.run(token)
        while not os.path.exists(path):
            time.sleep(0.001)
        return token

    def take(self, token, value):
        return self.run(token)

    def total(self, token, value):
        self.run(token)
        return value.sum().item()

    def newest(self, token, channel):
        self.run(token)
        published = channel.latest()
        return None if published is None else (published.version, published.value.sum().item())

    def publish(self, token, channel, value):
        self.run(token)
        return channel.publish(value)

    def say(self, token):
        self.run(token)
        print(f"said {token}", flush=True)


class Stage:
    """A runtime behind the middle, and the book in which its actors write down what they ran."""

    def __init__(self, rt, faults, folder):
        self.rt, self.faults, self.folder = rt, faults, folder
        self.book = folder / "book"
        self.book.touch()
        self._tokens = itertools.count(1)
        self.answered = set()
        self.spawned = []
        self.failures = []
        self.patience_s = self.birth_s = T

    def token(self):
        return next(self._tokens)

    def channel(self):
        """Return a channel that none has used before."""
        return self.rt.channel(f"{self.folder.name}/{self.token()}")

    def spawn(self, **options):
        spawning = {name: options.pop(name) for name in ("restart", "stall_after_s", "max_pending") if name in options}
        worker = self.rt.spawn(Worker, str(self.book), self.token(), **options, **spawning)
        self.spawned.append(worker)
        return worker

    def living(self, **options):
        worker = self.spawn(**options)
        worker.ready(T)
        return worker

    def begin(self, worker, method="run", *args):
        """Call a method; return its token and its future."""
        token = self.token()
        return token, getattr(worker, method).call(token, *args)

    def end(self, token, future):
        answer = future.result(self.patience_s)
        self.answered.add(token)
        return answer

    def ask(self, worker, method="run", *args):
        return self.end(*self.begin(worker, method, *args))

    def ran(self):
        """Return the tokens of what was run, in order, by process."""
        ran = {}
        for line in self.book.read_text().splitlines():
            what, token, pid = line.split()
            if what == "ran":
                ran.setdefault(pid, []).append(int(token))
        return ran

    def check(self):
        """No call has run twice or out of order, and every answer is that of a call that has run."""
        ran = self.ran()
        tokens = [token for of_one in ran.values() for token in of_one]
        assert len(set(tokens)) == len(tokens)
        assert self.answered <= set(tokens)
        assert all(of_one == sorted(of_one) for of_one in ran.values())

    def processes(self):
        return [int(line.split()[2]) for line in self.book.read_text().splitlines() if line.startswith("born")]

    def clear(self):
        """End the actors that are left."""
        for worker in self.spawned:
            with contextlib.suppress(RlxError):
                self.rt.kill(worker)


def lives(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):  # the latter between open and read
        return False


# What brings each kind of frame about. Each asserts that all is right, or raises what its caller would get. -----------


def calls(stage, worker):
    begun = [stage.begin(worker) for _ in range(5)]
    assert [stage.end(*call) for call in begun] == [token for token, _ in begun]


def births(stage, worker):
    born = stage.spawn()
    born.ready(stage.birth_s)
    calls(stage, born)
    children = stage.ask(born, "family")  # in the order in which they were asked for
    assert len(children) == len(stage.spawned)


def miscarriages(stage, worker):
    born = stage.spawn(fails=True)
    with pytest.raises(ValueError, match="born to fail"):
        born.ready(stage.patience_s)


def errors(stage, worker):
    token, call = stage.begin(worker, "fail")
    with pytest.raises(ValueError, match=f"failed {token}"):
        stage.end(token, call)


def sends(stage, worker):
    tokens = [stage.token() for _ in range(5)]
    for token in tokens:
        worker.run.send(token)
    calls(stage, worker)
    assert set(tokens) <= {token for of_one in stage.ran().values() for token in of_one}


def failing_sends(stage, worker):
    heard = threading.Event()
    stage.rt.monitor(worker, on_failure=lambda _, error: (stage.failures.append(str(error)), heard.set()))
    token = stage.token()
    worker.fail.send(token)
    calls(stage, worker)
    assert heard.wait(stage.patience_s) and f"failed {token}" in stage.failures[0]


def streams(stage, worker):
    stream = worker.count_up.stream(stage.token(), 30, credits=4)
    items = []
    with contextlib.suppress(StopIteration):
        while True:
            items.append(stream.next(stage.patience_s))
    assert items == list(range(30))


def cancellations(stage, worker):
    _, call = stage.begin(worker, "wait")
    assert call.cancel()
    with pytest.raises(CallCancelled):
        call.result(stage.patience_s)
    calls(stage, worker)


def kills(stage, worker):
    doomed = stage.spawn()
    token, call = stage.begin(doomed, "wait")
    stage.rt.kill(doomed)
    with pytest.raises(ActorDied, match=r"was ended by kill\(\)|was lost with its node"):
        stage.end(token, call)


def channels_in_calls(stage, worker):
    channel = stage.channel()
    channel.publish(np.full(10, 1.0))
    assert stage.ask(worker, "newest", channel) == (1, 10.0)


def versions(stage, worker):
    channel = stage.channel()
    assert stage.ask(worker, "newest", channel) is None
    for version in range(1, 4):
        channel.publish(np.full(1000, version))
        assert stage.ask(worker, "newest", channel) == (version, version * 1000)


def versions_of_actors(stage, worker):
    channel = stage.channel()
    for version in range(1, 4):
        assert stage.ask(worker, "publish", channel, np.full(1000, version)) == version
        published = channel.latest()
        assert published is not None and (published.version, published.value.sum()) == (version, version * 1000)


def readers(stage, worker):
    channel = stage.channel()
    channel.publish(np.zeros(10))
    assert stage.ask(worker, "newest", channel) == (1, 0.0)
    assert {name: how.version for name, how in channel.readers().items()} == {worker.name: 1}


def puts(stage, worker):
    for number in range(1, 4):
        ref = stage.rt.put(np.full(50_000, number))
        for _ in range(2):
            assert stage.ask(worker, "total", ref) == number * 50_000


def drops(stage, worker):
    puts(stage, worker)
    beats(stage, worker)


def stalls(stage, worker):
    stalled, path = threading.Event(), stage.folder / f"go on {stage.token()}"
    slow = stage.living(stall_after_s=0.05)
    stage.rt.monitor(slow, on_stall=lambda *_: stalled.set(), on_exit=lambda *_: stalled.set())
    token, call = stage.begin(slow, "wait_for", str(path))
    heard = stalled.wait(min(3.0, stage.patience_s * 10))
    path.touch()
    stage.end(token, call)
    assert heard


def prints(stage, worker):
    token = stage.token()
    worker.say.call(token).result(stage.patience_s)
    log, deadline = stage.rt._engine.logs, time.monotonic() + stage.patience_s
    while f"said {token}" not in log.tail(worker.name):
        assert time.monotonic() < deadline, "the line has not come"
        calls(stage, worker)


def beats(stage, worker):
    done, deadline = len(stage.faults.done), time.monotonic() + 2.0
    while len(stage.faults.done) == done and time.monotonic() < deadline:
        stage.ask(worker, "rest", 0.01)


def pressure(stage, worker):
    """More than the daemon is to keep for an actor that reads nothing."""
    path = stage.folder / f"go on {stage.token()}"
    busy = stage.living(max_pending=10_000)
    held = stage.begin(busy, "wait_for", str(path))
    value = np.zeros(2**21, np.uint8)
    opener = threading.Thread(target=_open_when_full, args=(stage, busy, path))
    opener.start()
    try:
        begun = [stage.begin(busy, "take", value) for _ in range(45)]
    finally:
        opener.join()
    for call in (held, *begun):
        stage.end(*call)
    stage.ask(busy)


def _open_when_full(stage, busy, path):
    body, deadline = busy._actor.body, time.monotonic() + T
    while not (body._room or body.gone.done() or stage.faults.done) and time.monotonic() < deadline:
        time.sleep(0.005)
    path.touch()


TO_NODE = {
    "SPAWN": births,
    "CALL": calls,
    "SEND": sends,
    "STREAM": streams,
    "CREDIT": streams,
    "CANCEL": cancellations,
    "KILL": kills,
    "KEEP": puts,
    "DROP": drops,
    "CHANNEL": channels_in_calls,
    "PUBLISH": versions,
    "READERS": readers,
    "PING": beats,
}
FROM_NODE = {
    "STARTED": births,
    "READY": births,
    "INIT_FAILED": miscarriages,
    "REPLY": calls,
    "ERROR": errors,
    "SEND_FAILED": failing_sends,
    "CANCELLED": cancellations,
    "ITEM": streams,
    "EXITED": kills,
    "STALLED": stalls,
    "PRINTED": prints,
    "PUBLISH": versions_of_actors,
    "READERS": readers,
    "PING": beats,
    "FULL": pressure,
    "ROOM": pressure,
}
FRAMES = [(kind, True) for kind in TO_NODE] + [(kind, False) for kind in FROM_NODE]
