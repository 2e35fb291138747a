"""A node on the driver's own machine: its actors are reached as those of engine local, and belong to the cluster."""

import errno
import json
import os
import signal
import threading
import time
from pathlib import Path

import cloudpickle
import numpy as np
import pytest

from rlx import actors
from rlx.actors import Resources, Restart, processes
from rlx.cli import main
from rlx.errors import ActorDied, ActorError
from tests.polling import until

cloudpickle.register_pickle_by_value(__import__(__name__, fromlist=["x"]))
pytestmark = pytest.mark.timeout(90)
T = 30.0
HOME, AWAY = Resources(cpu=1, labels={"node": "home"}), Resources(cpu=1, labels={"node": "away"})


class Worker:
    def where(self):
        return os.getpid(), os.getppid()

    def publish(self, channel, value):
        return channel.publish(value)

    def newest(self, channel):
        return channel.latest().value.sum().item()

    def hang_here(self):
        print("waiting", flush=True)
        threading.Event().wait(60)


@pytest.fixture
def head(start):
    """The node on this machine, cpu 2; it is the head, and another one counts as a machine of its own."""
    return start("home", cpu=2, apart=False)


@pytest.fixture
def rt(start, head, key):
    away = start("away", head.address, cpu=2)
    with actors.runtime("cluster", address=head.address, token_file=key.path, preload=("numpy",)) as runtime:
        yield runtime
    away.close()
    head.close()


def parent(pid):
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def runs_in(runtime):
    """Return the forkserver of a new actor, None where it died with an old one."""
    try:
        return runtime.spawn(Worker).where.call().result(T)[1]
    except ActorError:
        return None


def test_its_actors_are_the_drivers_own_processes_and_others_the_daemons(rt):
    home, away = (rt.spawn(Worker, name=name, resources=want) for name, want in (("h", HOME), ("w", AWAY)))
    assert parent(home.where.call().result(T)[1]) == os.getpid()
    assert parent(away.where.call().result(T)[1]) != os.getpid()


def test_channels_reach_from_each_kind_of_actor_to_the_other(rt):
    home, away = (rt.spawn(Worker, name=name, resources=want) for name, want in (("h", HOME), ("w", AWAY)))
    for publisher, reader, name in ((home, away, "there"), (away, home, "here")):
        channel = rt.channel(name)
        for number in range(3):
            publisher.publish.call(channel, np.full(50_000, number)).result(T)
            assert reader.newest.call(channel).result(T) == number * 50_000
    assert "w" in rt.channel("there").readers() and "h" in rt.channel("here").readers()


def test_a_daemon_that_ends_takes_the_actors_on_its_machine_along(rt, start, head, key):
    second = start("second", head.address, cpu=1, apart=False)
    with actors.runtime("cluster", address=head.address, token_file=key.path, preload=("numpy",)) as runtime:
        worker = runtime.spawn(Worker, name="w", resources=Resources(cpu=1, labels={"node": "second"}))
        pid, _ = worker.where.call().result(T)
        future = worker.hang_here.call()
        second.end(signal.SIGKILL)
        with pytest.raises(
            ActorDied, match=r"^w \(pid \d+\) was lost with its node second \(.*\), which .* in hang_here"
        ):
            future.result(T)
        while processes.stat(pid) is not None:  # until the timeout of this test
            time.sleep(0.01)


def test_a_forkserver_that_is_killed_is_replaced(head, key):
    with actors.runtime("cluster", address=head.address, token_file=key.path, preload=("numpy",)) as runtime:
        worker = runtime.spawn(Worker, name="w")
        _, server = worker.where.call().result(T)
        os.kill(server, signal.SIGKILL)
        with pytest.raises(
            ActorDied, match=rf"the forkserver of this runtime \(process {server}\) was killed by SIGKILL"
        ):
            worker.hang_here.call().result(T)
        while (found := runs_in(runtime)) is None:  # until the timeout of this test: the old one may not be gone yet
            pass
        assert found != server


def test_a_forkserver_that_could_not_be_replaced_at_first_is_replaced_later(head, key, monkeypatch):
    with actors.runtime("cluster", address=head.address, token_file=key.path, preload=()) as rt:
        engine, start, refused = rt._engine, rt._engine._start_forkserver, []

        def start_at_the_second_try(preload):
            if not refused:
                refused.append(preload)
                raise OSError(errno.EMFILE, "too many open files")
            start(preload)

        monkeypatch.setattr(engine, "_start_forkserver", start_at_the_second_try)
        server = engine._server
        os.kill(server.pid, signal.SIGKILL)
        until(lambda: engine._server is not server)
        assert refused and until(lambda: runs_in(rt)) == engine._server.pid


def test_who_is_started_again_at_once_waits_for_the_new_forkserver(head, key):
    with actors.runtime("cluster", address=head.address, token_file=key.path, preload=("numpy",)) as runtime:
        at_once = Restart(max=1, backoff_s=0)
        workers = [runtime.spawn(Worker, name=f"w{number}", restart=at_once) for number in range(4)]
        workers += [runtime.spawn(Worker, name=f"h{number}", restart=at_once, resources=HOME) for number in range(2)]
        servers = {worker.where.call().result(T)[1] for worker in workers}
        os.kill(*servers, signal.SIGKILL)
        while not all(worker.incarnation for worker in workers):  # until the timeout of this test
            time.sleep(0.01)
        assert not servers & {worker.where.call().result(T)[1] for worker in workers}


def test_the_end_of_a_runtime_leaves_no_process_of_a_busy_actor(start, head, key):
    with actors.runtime("cluster", address=head.address, token_file=key.path, preload=("numpy",)) as runtime:
        worker = runtime.spawn(Worker, name="w")
        pid, server = worker.where.call().result(T)
        worker.hang_here.call()
    assert all(processes.stat(one) is None for one in (pid, server))


@pytest.mark.slow
def test_the_commands_see_each_actor_once(rt, head, key, capsys):
    home, away = (rt.spawn(Worker, name=name, resources=want) for name, want in (("h", HOME), ("w", AWAY)))
    for worker in (home, away):
        worker.where.call().result(T)
        worker.hang_here.call()
    cluster = ["--address", head.address, "--token-file", str(key.path)]
    main(["ps", "--json", *cluster])
    found = json.loads(capsys.readouterr().out)
    assert {node: [one["name"] for one in runtimes[0]["actors"]] for node, runtimes in found.items()} == {
        "home": ["h"],
        "away": ["w"],
    }
    for name, node in (("h", "home"), ("w", "away")):
        main(["why", name, *cluster])
        out = capsys.readouterr().out
        assert out.startswith(f"node {node}\n") and out.count("hang_here()") == 1 and "\n\n" not in out
        main(["logs", name, *cluster])
        assert capsys.readouterr().out.splitlines()[1:] == ["waiting"]
    for worker in (home, away):
        rt.kill(worker)
