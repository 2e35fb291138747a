"""rlx start, status and stop: real daemons on loopback, noted in a folder of the test's own."""

import json
import os
import re
import select
import shlex
import signal
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rlx.actors import processes
from rlx.actors.cluster import roll_call
from rlx.actors.cluster.credentials import ClusterKey
from rlx.errors import ActorError

pytestmark = pytest.mark.timeout(90)
T = 60.0
HERE = ("--host", "127.0.0.1")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory, terminals):
    """A cluster of two nodes, that tests look at; (terminal, address of the head)."""
    terminal = terminals(tmp_path_factory.mktemp("cluster"))
    address = terminal.start_head("--name", "a", "--cpu", "3", "--memory", str(2**30))
    terminal.type("start", "--address", address, "--name", "b", "--gpu", "2", "--label", "zone=eu", "--label", "x=1")
    yield terminal, address
    terminal.type("stop", "--all")


def mode(path):
    return stat.S_IMODE(os.stat(path).st_mode)


# start ----------------------------------------------------------------------------------------------------------


def test_a_head_makes_the_key_and_says_how_others_join(terminal):
    said = terminal.type("start", "--head", *HERE, "--name", "a")
    key = terminal.home / "cluster.key"
    assert f"made {key}" in said and mode(key) == 0o600
    command = re.search(r"^  (rlx start .*)$", said, re.MULTILINE)[1]
    assert command == f"rlx start --address {terminal.daemons()['a']['address']} --token-file {key}"
    log = re.search(r"^log: (.*)$", said, re.MULTILINE)[1]
    assert Path(log).is_file() and mode(terminal.home / "nodes") == 0o700
    joined = terminal.type(*shlex.split(command)[1:], "--name", "b")
    assert re.search(r"b: joined the cluster of 127\.0\.0\.1:\d+, at 127\.0\.0\.1:\d+ ", joined)  # its own address
    assert "has joined" in Path(log).read_text()
    token = ClusterKey.load(key).token
    terminal.type("stop", "--all")
    assert "made" not in terminal.type("start", "--head", *HERE) and ClusterKey.load(key).token == token


def test_without_a_host_the_head_has_an_address_of_this_machine(terminal):
    said = terminal.type("start", "--head", "--token-file", str(terminal.home / "own.key"))
    assert re.search(r"at \d+\.\d+\.\d+\.\d+:\d+ ", said)
    assert f"--token-file {terminal.home / 'own.key'}" in said and not (terminal.home / "cluster.key").exists()


@pytest.mark.slow
def test_a_head_waits_for_its_nodes(terminal):
    waiting = subprocess.Popen(
        [sys.executable, "-m", "rlx.cli", "start", "--head", *HERE, "--name", "a", "--nodes", "a,b", "--timeout", "50"],
        **{"env": terminal.env, "stdout": subprocess.PIPE, "text": True},
    )
    with waiting:
        address = re.search(r"at (\S+) ", waiting.stdout.readline())[1]
        terminal.type("start", "--address", address, "--name", "b")
        assert waiting.wait(T) == 0
        assert "2 nodes are there: a, b" in waiting.stdout.read()


@pytest.mark.slow
def test_a_wait_for_nodes_that_is_interrupted_says_that_the_head_goes_on(terminal):
    waiting = subprocess.Popen(
        [sys.executable, "-m", "rlx.cli", "start", "--head", *HERE, "--name", "a", "--nodes", "2"],
        **{"env": terminal.env, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True},
    )
    with waiting:
        while not waiting.stdout.readline().startswith("  rlx start"):  # the last line before it waits
            pass
        time.sleep(0.5)
        waiting.send_signal(signal.SIGINT)
        assert waiting.wait(T) == 130
        assert "the head goes on: `rlx stop a` ends it" in waiting.stderr.read()
    assert list(terminal.daemons()) == ["a"]


@pytest.mark.parametrize(
    "nodes, sentence",
    [
        ("3", "2 of 3 nodes have not joined within 1 s; a is here; the head goes on: `rlx stop a` ends it."),
        ("a,b,c", "2 of 3 nodes have not joined within 1 s: b, c; a is here; the head goes on: `rlx stop a` ends it."),
    ],
)
def test_a_head_names_who_is_missing(terminal, nodes, sentence):
    said = terminal.type("start", "--head", *HERE, "--name", "a", "--nodes", nodes, "--timeout", "1", code=1)
    assert said.splitlines()[-1] == f"rlx: error: {sentence}"
    assert list(terminal.daemons()) == ["a"]


def test_one_node_more_than_expected_is_an_error(cluster):
    terminal, address = cluster
    key = ClusterKey.load(terminal.home / "cluster.key")
    assert [node.name for node in roll_call.wait_for(address, key, 2, T)] == ["a", "b"]
    assert [node.name for node in roll_call.wait_for(address, key, ["b", "a"], T)] == ["a", "b"]
    with pytest.raises(ActorError, match="2 nodes have joined where 1 were expected: a, b"):
        roll_call.wait_for(address, key, 1, T)
    with pytest.raises(ActorError, match="b joined, where only a, c were expected"):
        roll_call.wait_for(address, key, ["a", "c"], T)


def test_what_keeps_a_node_from_joining_is_one_sentence(cluster, tmp_path):
    terminal, address = cluster
    other = ClusterKey.create(tmp_path / "other.key").path
    for words, code, sentence in [
        (["--token-file", str(other)], 1, f"{address} belongs to another cluster than the key {other}"),
        (["--token-file", str(tmp_path / "none.key")], 2, "there is no cluster key"),
        (["--name", "b"], 1, "there is a node b (127.0.0.1:"),
        (["--name", "c", "--host", "203.0.113.7"], 2, "rlx cannot listen at 203.0.113.7:0 (Cannot assign"),
        (["--name", "c", "--port", address.partition(":")[2]], 2, "(Address already in use)"),
        (["--name", "c", "--host", "0.0.0.0"], 2, "--host 0.0.0.0 is no address that others can connect to"),
        (["--nodes", "3"], 2, "--nodes goes with --head"),
    ]:
        said = terminal.type("start", "--address", address, *words, code=code)
        assert said.startswith("rlx: error: ") and sentence in said and said.count("\n") == 1, said
        assert said.endswith(".\n"), said
    said = terminal.type("start", "--address", "127.0.0.1:1", code=1)
    assert said.startswith("rlx: error: nobody listens at 127.0.0.1:1")
    assert sorted(terminal.daemons()) == ["a", "b"]


def test_a_daemon_that_is_no_head_takes_no_node(cluster):
    terminal, _ = cluster
    said = terminal.type("start", "--address", terminal.daemons()["b"]["address"], "--name", "c", code=1)
    assert "give the address of the head's daemon" in said and said.count("\n") == 1


def test_a_node_waits_for_a_head_that_is_still_to_start(terminal):
    key = ClusterKey.create(terminal.home / "cluster.key")
    address = terminal.start_head()  # for a port that is free
    terminal.type("stop", "--all")
    words = ["start", "--address", address, "--token-file", str(key.path), "--name", "b", "--timeout", "50"]
    with subprocess.Popen(
        [sys.executable, "-m", "rlx.cli", *words], env=terminal.env, stdout=subprocess.PIPE, text=True
    ) as node:
        terminal.type("start", "--head", *HERE, "--port", address.partition(":")[2], "--name", "a", "--nodes", "a,b")
        assert node.wait(T) == 0 and "joined the cluster" in node.stdout.read()


def test_block_stays_until_sigterm_and_takes_the_daemon_along(terminal):
    words = ["start", "--head", *HERE, "--name", "a", "--block"]
    with subprocess.Popen(
        [sys.executable, "-m", "rlx.cli", *words], env=terminal.env, stdout=subprocess.PIPE, text=True
    ) as blocking:
        for line in blocking.stdout:
            if line.startswith("  rlx start"):
                break
        (note,) = terminal.daemons().values()
        blocking.send_signal(signal.SIGTERM)
        assert blocking.wait(T) == 0
    assert not processes.is_running(note["pid"], note["start_ticks"])


def test_block_says_how_its_daemon_has_ended(terminal):
    words = ["start", "--head", *HERE, "--name", "a", "--block"]
    with subprocess.Popen(
        [sys.executable, "-m", "rlx.cli", *words], env=terminal.env, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as blocking:
        os.kill(int(re.search(rb"pid (\d+)", blocking.stdout.readline())[1]), signal.SIGKILL)
        assert blocking.wait(T) == 1
        assert b"rlx: error: the daemon a (pid " in (said := blocking.stderr.read()) and b"has ended by SIGKILL" in said


# status and stop ------------------------------------------------------------------------------------------------


def test_status_shows_the_nodes_of_a_cluster(cluster):
    terminal, address = cluster
    names, first, second = terminal.type("status", "--address", address).splitlines()
    assert names.split() == ["node", "address", "CPUs", "GPUs", "memory", "silent", "labels"]
    assert first.split()[:6] == ["a", address, "3", "0", "1.0", "GiB"]
    assert second.split()[0] == "b" and second.split()[3] == "2" and second.endswith("zone=eu, x=1")
    nodes = json.loads(terminal.type("status", "--address", address, "--json"))
    assert [node["name"] for node in nodes] == ["a", "b"] and nodes[0]["memory"] == 2**30


def test_status_shows_the_daemons_of_this_machine(cluster):
    terminal, address = cluster
    names, first, second = terminal.type("status").splitlines()
    assert names.split() == ["node", "address", "role", "pid", "key", "log"]
    assert terminal.type("status", "--head") == f"{address}\n"
    assert first.split()[:3] == ["a", address, "head"] and f"of {address}" in second


def test_status_shows_for_how_long_a_node_has_been_silent(cluster):
    terminal, address = cluster
    key = ClusterKey.load(terminal.home / "cluster.key")
    pid = terminal.daemons()["b"]["pid"]
    os.kill(pid, signal.SIGSTOP)
    try:
        deadline = time.monotonic() + T
        while (silent_s := roll_call.present(address, key)[1].silent_s) < 1.5:  # a sign of life comes every second
            assert time.monotonic() < deadline
        assert 1.5 <= silent_s < 15
    finally:
        os.kill(pid, signal.SIGCONT)


def test_status_of_what_is_no_head(cluster):
    terminal, _ = cluster
    said = terminal.type("status", "--address", terminal.daemons()["b"]["address"], code=1)
    assert "it is not the head of a cluster" in said and said.count("\n") == 1
    assert "nobody listens at" in terminal.type("status", "--address", "127.0.0.1:1", code=1)


def test_notes_of_daemons_that_have_ended_are_removed(terminal):
    terminal.start_head("--name", "a")
    note = terminal.daemons()["a"]
    (file,) = (terminal.home / "nodes").glob("*.json")
    os.kill(note["pid"], signal.SIGKILL)
    assert_ended(note["pid"])
    assert "No daemon of yours" in terminal.type("status") and not file.exists()
    ours = file.with_name(file.name.replace(str(note["pid"]), str(os.getpid())))
    ours.write_text(json.dumps(note | {"pid": os.getpid()}))  # another process has the number now
    theirs = file.with_name(f"{socket.gethostname()}.domain.{file.name.partition('.')[2]}")
    theirs.write_text(json.dumps(note))  # of a machine whose name begins as ours does, in a folder that both share
    assert "No daemon of yours" in terminal.type("stop", "--all")
    assert not ours.exists() and theirs.exists()


def assert_ended(pid):
    """Wait until a process, no child of ours, has ended."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    with open(pidfd, "rb"):
        assert select.select([pidfd], [], [], T)[0]


@pytest.mark.slow
def test_stop_asks_which_and_kills_who_does_not_end(terminal):
    address = terminal.start_head("--name", "a")
    terminal.type("start", "--address", address, "--name", "b")
    said = terminal.type("stop", code=2)
    assert "which of your 2 daemons?" in said and "--all" in said
    assert "is c; these run: a (" in terminal.type("stop", "c", code=2)
    assert re.fullmatch(r"b \(\S+, pid \d+\): ended\n", terminal.type("stop", "b"))
    said = terminal.type("start", "--head", *HERE, "--name", "a")
    assert f"rlx: a cluster of its own, beside that of a ({address}) on this machine" in said
    with_its_name = re.search(r"at (\S+) \(pid", said)[1]
    assert "which of your 2" in terminal.type("stop", "a", code=2)
    assert "there are: a (127.0.0.1:" in terminal.type("status", "--head", code=2)
    assert with_its_name in terminal.type("stop", with_its_name)
    os.kill(terminal.daemons()["a"]["pid"], signal.SIGSTOP)
    assert "killed, as it had not ended 1 s after SIGTERM" in terminal.type("stop", "a", "--timeout", "1")
    assert terminal.daemons() == {}
