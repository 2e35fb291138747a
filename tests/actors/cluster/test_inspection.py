"""What another terminal sees of actors on many machines."""

import json
import os
import threading

import cloudpickle
import pytest

from rlx import actors
from rlx.cli import main

cloudpickle.register_pickle_by_value(__import__(__name__, fromlist=["x"]))
pytestmark = pytest.mark.timeout(90)
T = 30.0


class Worker:
    def work(self):
        print("at work", flush=True)

    def hang_here(self):
        print("waiting", flush=True)
        threading.Event().wait(60)


@pytest.fixture(scope="module")
def cluster(start, key):
    """A runtime with an actor on each of two nodes, of which worker/1 hangs; and how commands name the cluster."""
    head = start("a")
    start("b", head.address)
    with actors.runtime("cluster", address=head.address, token_file=key.path, preload=("numpy",)) as rt:
        workers = [rt.spawn(Worker, name=f"worker/{number}") for number in range(2)]
        for worker in workers:
            worker.work.call().result(T)
        workers[1].hang_here.call()
        yield ["--address", head.address, "--token-file", str(key.path)]
        rt.kill(workers[1])


def rlx(capsys, *words):
    code = main([*words])
    out, err = capsys.readouterr()
    return code, out, err


@pytest.mark.parametrize(
    ("words", "alien"),
    [
        (["logs", "a/0", "--follow"], "--follow"),
        (["logs", "a/0", "--run", "runs/x", "--follow"], "--run and no --follow"),
        (["logs", "a/0", "--runtime", "7", "--json"], "--runtime and no --json"),
        (["ps", "--runtime", "7", "--json"], "--runtime"),
        (["why", "a/0", "--json"], "--json"),
        (["stack", "--runtime", "7"], "--runtime"),
        (["trace", "--runtime", "7"], "--runtime"),
    ],
)
def test_options_of_one_machine_are_refused_with_an_address(capsys, words, alien):
    code, _, err = rlx(capsys, *words, "--address", "127.0.0.1:1")
    assert code == 2 and err == f"rlx: error: rlx {words[0]} has no {alien} with --address; leave one out.\n"


@pytest.mark.parametrize("command", ["ps", "status"])
def test_a_key_of_no_cluster_is_refused(capsys, command):
    code, _, err = rlx(capsys, command, "--token-file", "k")
    assert code == 2 and "--token-file is the key of the cluster at --address: give both, or neither" in err


@pytest.mark.slow
def test_ps_shows_the_actors_of_every_node(cluster, capsys):
    code, out, _ = rlx(capsys, "ps", *cluster)
    first, second = out.split("\n\n")
    assert code == 0 and {first.splitlines()[0], second.splitlines()[0]} == {"node a", "node b"}
    assert out.count("worker/0") == 1 and out.count("worker/1") == 1 and "hang_here()" in out
    code, out, _ = rlx(capsys, "ps", "--json", *cluster)
    nodes = json.loads(out)
    assert sorted(nodes) == ["a", "b"]
    assert {actor["status"] for runtimes in nodes.values() for one in runtimes for actor in one["actors"]} == {"alive"}


@pytest.mark.slow
def test_the_drivers_machine_counts_what_is_unanswered_elsewhere(cluster, capsys):
    code, out, _ = rlx(capsys, "ps", "--json")
    [driver] = [runtime for runtime in json.loads(out) if runtime["driver"] == os.getpid()]
    assert code == 0 and {actor["name"]: actor["pending"] for actor in driver["actors"]} == {
        "worker/0": 0,
        "worker/1": 1,
    }


@pytest.mark.slow
def test_an_actor_is_found_on_its_node(cluster, capsys):
    assert "hang_here()" in rlx(capsys, "why", "worker/1", *cluster)[1]
    assert "in hang_here" in rlx(capsys, "stack", "worker/1", *cluster)[1]
    assert rlx(capsys, "logs", "worker/0", *cluster)[1].splitlines()[1:] == ["at work"]
    code, _, err = rlx(capsys, "why", "worker/7", *cluster)
    assert code == 1 and "no node of the cluster can tell: node a: no actor is named 'worker/7'; there is" in err
    assert "; node b: " in err and err.endswith(".\n")


@pytest.mark.slow
def test_a_trace_has_the_calls_of_all_nodes(cluster, capsys, tmp_path):
    code, out, _ = rlx(capsys, "trace", "-o", str(tmp_path / "trace.json"), "--json", *cluster)
    calls = [event for event in json.loads((tmp_path / "trace.json").read_text())["traceEvents"] if event["ph"] == "X"]
    assert code == 0 and json.loads(out) == {"file": str(tmp_path / "trace.json"), "events": len(calls)}
    assert {event["pid"].partition(":")[0] for event in calls if event["name"] == "work"} == {"a", "b"}
