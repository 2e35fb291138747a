"""rlx launch with programs in the place of ssh, srun and scontrol, which start real daemons on this machine."""

import os
import shlex
import signal
import stat
import subprocess

import pytest

from rlx import cli, cluster_launch
from rlx.actors.cluster.credentials import ClusterKey

pytestmark = pytest.mark.timeout(90)
T = 60.0
FAKE_SSH = """#!/bin/sh
# Stands in for ssh: takes the same arguments, notes them, and runs the command in a shell of this machine.
printf '%s\\n' "$@" >> "$RLX_HOME/ssh.log"
while [ "$1" = -o ]; do shift 2; done
case "$1" in bad*) echo "ssh: Could not resolve hostname $1" >&2; exit 255;; esac
shift
exec sh -c "$*"
"""
FAKE_SRUN = """#!/bin/sh
# Stands in for srun: runs the command once for each node of --nodelist, each with the stdin that srun was given.
printf '%s\\n' "$@" > "$RLX_HOME/srun.arguments"
while [ "$1" != sh ]; do [ "$1" = --nodelist ] && nodes=$2; shift; done
cat > "$RLX_HOME/stdin"
trap 'kill $(jobs -p); wait' TERM
for node in $(echo "$nodes" | tr , ' '); do SLURMD_NODENAME=$node "$@" < "$RLX_HOME/stdin" & done
wait
"""
FAKE_SCONTROL = """#!/bin/sh
[ "$*" = "show hostnames n[1-3]" ] && printf 'n1\\nn2\\nn3\\n'
"""


def mode(path):
    return stat.S_IMODE(os.stat(path).st_mode)


def test_launch_starts_nodes_by_ssh(terminal):
    terminal.program("ssh", FAKE_SSH)
    said = terminal.type("launch", "--hosts", "me@h1,h2", "--head-host", "127.0.0.1")
    assert "3 nodes are there" in said and {"h1", "h2"} < set(terminal.daemons())
    noted = (terminal.home / "ssh.log").read_text()
    key = ClusterKey.load(terminal.home / "cluster.key")
    assert key.token not in noted.encode() and "PRIVATE" not in noted
    copies = list(terminal.home.glob("cluster-*.key"))
    assert [mode(copy) for copy in copies] == [0o600] and copies[0].read_text() == key.path.read_text()
    assert not list(terminal.home.glob(".key-*"))


def test_launch_names_who_is_missing_and_why(terminal):
    terminal.program("ssh", FAKE_SSH)
    said = terminal.type("launch", "--hosts", "h1,bad2", "--head-host", "127.0.0.1", code=1)
    error = said.splitlines()[-1]
    assert "1 of 3 nodes have not joined: bad2;" in error
    assert "bad2: ssh ended with exit code 255: ssh: Could not resolve hostname bad2" in error


@pytest.mark.slow
def test_launch_starts_nodes_by_srun(terminal):
    for name, text in (("srun", FAKE_SRUN), ("scontrol", FAKE_SCONTROL)):
        terminal.program(name, text)
    words = ["launch", "--slurm", "--head-host", "127.0.0.1"]
    assert "SLURM_JOB_NODELIST is not set" in terminal.type(*words, code=2)
    said = terminal.type(*words, SLURM_JOB_NODELIST="n[1-3]", SLURMD_NODENAME="n1")
    assert "3 nodes are there: n1, n" in said
    daemons = terminal.daemons()
    assert sorted(daemons) == ["n1", "n2", "n3"] and daemons["n2"]["log"] == ""  # srun.log has it
    arguments = (terminal.home / "srun.arguments").read_text().split("\n")
    assert arguments[: arguments.index("sh")] == [
        *("--overlap", "--cpu-bind=none", "--kill-on-bad-exit=0", "--wait=0"),
        *("--nodes", "2", "--ntasks", "2", "--ntasks-per-node", "1", "--nodelist", "n2,n3"),
    ]


@pytest.mark.parametrize("stays", [False, True])
def test_a_starter_that_does_not_return_is_ended_unless_it_is_to_stay(stays, key_file, tmp_path, monkeypatch):
    monkeypatch.setattr(cluster_launch, "END_TIMEOUT_S", 0.2)
    starter = cluster_launch.Starter(("tail", "-f", "/dev/null"), ("h",), stays)
    with cluster_launch._running(starter, ClusterKey.load(key_file), tmp_path) as running:
        assert running.is_busy() and running.how() == "h: tail has not returned: it said nothing"
    if stays:
        os.kill(running.process.pid, signal.SIGKILL)
        os.waitpid(running.process.pid, 0)
    else:
        assert running.process.returncode == -signal.SIGTERM


def test_launch_prints_what_it_would_do(terminal):
    (command,) = terminal.type("launch", "--hosts", "h1", "--python", "/opt/my env/python", "--dry-run").splitlines()
    words = shlex.split(command)
    assert words[:6] == ["ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=10", "h1"]
    assert words[7:] == ["<", str(terminal.home / "cluster.key")]
    shell, c, script = shlex.split(words[6])
    assert (shell, c) == ("sh", "-c")
    assert "'/opt/my env/python' -m rlx.cli start --address HEAD:PORT" in script and script.startswith("umask 077;")


@pytest.mark.parametrize("hosts", ["-oProxyCommand=x", "a,a", "a;b", ""])
def test_a_host_is_a_host(hosts, capsys):
    with pytest.raises(SystemExit):
        cli.main(["launch", f"--hosts={hosts}", "--dry-run"])
    assert "argument --hosts" in capsys.readouterr().err


def test_the_script_of_another_machine_keeps_quotes():
    starter = cluster_launch.by_ssh("u@h", "/a b/python", "10.0.0.1:1", "f")
    assert starter.nodes == ("h",) and len(starter.command) == 7
    assert subprocess.run(["sh", "-n", "-c", starter.command[-1]], timeout=T).returncode == 0
