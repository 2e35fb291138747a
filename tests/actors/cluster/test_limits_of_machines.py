"""A machine of a cluster has run out of something: disk, or memory. Only what needs it there fails, in one sentence."""

import contextlib
import os
import re

import cloudpickle
import pytest

from rlx import actors
from rlx.actors import Resources
from rlx.actors.cluster import engine
from rlx.errors import ActorDied
from tests.actors.cluster.conftest import Daemon
from tests.polling import until

cloudpickle.register_pickle_by_value(__import__(__name__, fromlist=["x"]))
pytestmark = pytest.mark.timeout(90)
T = 30.0
SHORT = Resources(cpu=0.01, labels={"node": "short"})


class Worker:
    def pid(self):
        return os.getpid()

    def size(self, data):
        return len(data)

    def say(self, text):
        print(text, flush=True)

    def eat(self):
        kept = []
        while True:
            kept.append(b"x" * 2**23)


@pytest.fixture(scope="module")
def head(start):
    return start("head")


@pytest.fixture
def open_runtime(key, head):
    """Return a function that opens a runtime on the cluster."""
    with contextlib.ExitStack() as stack:

        def open_one():
            options = {"address": head.address, "token_file": key.path, "preload": ()}
            return stack.enter_context(actors.runtime("cluster", **options))

        yield open_one


@pytest.fixture
def start_short(key, head):
    """Return a function that starts a node called short, behind a command that limits it."""
    with contextlib.ExitStack() as stack:
        yield lambda *before: stack.enter_context(contextlib.closing(Daemon(key, "short", head.address, before=before)))


def fill(disk):
    """Return a file that has taken all that was left."""
    with open(disk / "filler", "wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))
    return disk / "filler"


def test_a_node_whose_disk_is_full_keeps_its_actors_and_serves_when_there_is_room(
    small_disk, start_short, open_runtime, monkeypatch, caplog
):
    monkeypatch.setattr(engine, "RELINK_EVERY_S", 0.05)
    node, rt = start_short("env", f"TMPDIR={small_disk}"), open_runtime()
    old = rt.spawn(Worker, resources=SHORT)
    pid = old.pid.call().result(T)
    filler, no_space = fill(small_disk), r"\(\[Errno 28\] No space left on device\); make room"
    assert "No space left" in str(old.say.call("x" * 10_000).exception(T))
    assert old.size.call(bytes(1_000_000)).result(T) == 1_000_000
    assert rt.spawn(Worker, resources=SHORT).pid.call().result(T)  # for as many as there are places on the board
    with pytest.raises(ActorDied, match=rf"worker/\d+ on short could not be started: .*board cannot grow .*{no_space}"):
        for _ in range(10):
            rt.spawn(Worker, resources=SHORT).ready(T)
    other = open_runtime()
    assert len(other._engine._nodes) == 1 and other.spawn(Worker).pid.call().result(T)
    (warning,) = [line for line in caplog.messages if "belongs to the cluster and cannot be used" in line]
    assert re.search(rf"it takes no actors: .* cannot be written to {no_space}", warning)
    filler.unlink()
    until(lambda: len(other._engine._nodes) == 2)
    assert all(one.spawn(Worker, resources=SHORT).pid.call().result(T) for one in (rt, other))
    assert old.pid.call().result(T) == pid and node.process.poll() is None


def test_an_actor_on_a_node_that_the_kernel_kills_for_memory_is_said_to_have_lacked_memory(
    memory_group, start_short, open_runtime
):
    start_short("sh", "-c", 'echo $$ > "$0/cgroup.procs"; exec "$@"', str(memory_group))
    rt = open_runtime()
    hog, beside = (rt.spawn(Worker, name=name, resources=SHORT) for name in ("hog", "beside"))
    others = [beside, rt.spawn(Worker)]
    pids = [other.pid.call().result(T) for other in others]
    with pytest.raises(
        ActorDied,
        match=r"hog \(pid \d+ on short\) was killed by SIGKILL in eat\(\), cgroup oom_kill \+1: memory ran out",
    ):
        hog.eat.call().result(T)
    assert [other.pid.call().result(T) for other in others] == pids
    assert rt.spawn(Worker, resources=SHORT).pid.call().result(T)
