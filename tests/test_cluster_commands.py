"""rlx start, status, stop, launch and k8s render: real daemons on loopback, noted in a folder of the test's own."""

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
import yaml

from rlx import cli, cluster_launch
from rlx.actors import processes
from rlx.actors.cluster import roll_call
from rlx.actors.cluster.credentials import ClusterKey
from rlx.errors import ActorError

pytestmark = pytest.mark.timeout(90)
T = 60.0
HERE = ("--host", "127.0.0.1")
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
rm "$RLX_HOME/stdin"
wait
"""
FAKE_SCONTROL = """#!/bin/sh
[ "$*" = "show hostnames n[1-3]" ] && printf 'n1\\nn2\\nn3\\n'
"""


class Terminal:
    """Where a user types, with a folder of their own and programs that stand first on PATH."""

    def __init__(self, folder):
        self.home, self.bin = folder / "rlx", folder / "bin"
        self.bin.mkdir()
        path = f"{self.bin}:{os.environ['PATH']}"
        self.env = os.environ | {"RLX_HOME": str(self.home), "PATH": path, "PYTHONWARNINGS": "error"}

    def type(self, *words, code=0, **env):
        """Return what a command prints, stdout and stderr, when it ends as it should."""
        done = subprocess.run(
            [sys.executable, "-m", "rlx.cli", *words],
            **{"env": self.env | env, "text": True, "timeout": T, "stdin": subprocess.DEVNULL},
            **{"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT},
        )
        assert done.returncode == code, done.stdout
        assert "Traceback" not in done.stdout
        return done.stdout

    def start_head(self, *words):
        """Start a head; return its address."""
        return re.search(r"at (\S+) \(pid", self.type("start", "--head", *HERE, *words))[1]

    def daemons(self):
        return {daemon["name"]: daemon for daemon in json.loads(self.type("status", "--json"))}

    def program(self, name, text):
        file = self.bin / name
        file.write_text(text)
        file.chmod(0o755)


@pytest.fixture
def terminal(tmp_path):
    terminal = Terminal(tmp_path)
    yield terminal
    terminal.type("stop", "--all")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """A cluster of two nodes, that tests look at; (terminal, address of the head)."""
    terminal = Terminal(tmp_path_factory.mktemp("cluster"))
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
    with_its_name = terminal.start_head("--name", "a")
    assert "which of your 2" in terminal.type("stop", "a", code=2)
    assert "there are: a (127.0.0.1:" in terminal.type("status", "--head", code=2)
    assert with_its_name in terminal.type("stop", with_its_name)
    os.kill(terminal.daemons()["a"]["pid"], signal.SIGSTOP)
    assert "killed, as it had not ended 1 s after SIGTERM" in terminal.type("stop", "a", "--timeout", "1")
    assert terminal.daemons() == {}


# launch ---------------------------------------------------------------------------------------------------------


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
    assert words[7:] == ["<", "~/.rlx/cluster.key"]
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


# k8s ------------------------------------------------------------------------------------------------------------


def rendered(capsys, *words):
    assert cli.main(["k8s", "render", "--nodes", "3", "--image", "rlx:0.1", *words]) == 0
    found = list(yaml.safe_load_all(capsys.readouterr().out))
    assert all(one["apiVersion"] and one["metadata"]["name"] for one in found)
    return {one["kind"]: one for one in found}


def check_job(spec, head):
    """Check what batch/v1 requires of a JobSpec and its PodSpec, and what pods are told; return the container."""
    assert spec["completionMode"] == "Indexed" and spec["completions"] == spec["parallelism"] == 3
    assert spec["successPolicy"] == {"rules": [{"succeededIndexes": "0"}]}
    pod = spec["template"]["spec"]
    assert pod["restartPolicy"] in ("Never", "OnFailure")  # a Job knows no other
    (container,) = pod["containers"]
    assert container["image"] == "rlx:0.1" and container["name"]
    env = {one["name"]: one for one in container["env"]}
    assert env["RLX_ADDRESS"]["value"] == f"{head}:6380"
    assert env["POD_IP"]["valueFrom"] == {"fieldRef": {"fieldPath": "status.podIP"}}
    (volume,), (mount,) = pod["volumes"], container["volumeMounts"]
    assert volume["name"] == mount["name"] and volume["secret"]["defaultMode"] & 0o077 == 0
    assert env["RLX_TOKEN_FILE"]["value"] == f"{mount['mountPath']}/cluster.key"
    assert all(isinstance(one.get("value", ""), str) for one in container["env"])  # Kubernetes takes no numbers
    (script,) = container["args"]
    assert subprocess.run(["sh", "-n", "-c", script], timeout=T).returncode == 0
    for line in script.replace("|| exit", "").splitlines():  # every command can be typed
        words = shlex.split(line.strip().removeprefix("exec "))
        if words[0] == "rlx":
            cli._parser().parse_args([word.replace("$RLX_ADDRESS", "h:1") for word in words[1:]])
    return container, volume["secret"]["secretName"]


@pytest.fixture
def key_file(tmp_path):
    return ClusterKey.create(tmp_path / "cluster.key").path


def test_a_job_is_rendered(capsys, key_file):
    found = rendered(
        capsys, "--token-file", str(key_file), "--name", "big", "--gpu", "8", "--command", "rlx train 'a b'"
    )
    assert list(found) == ["Secret", "Service", "Job"]
    job, service, secret = found["Job"], found["Service"], found["Secret"]
    container, of_key = check_job(job["spec"], "big-0.big")
    assert secret["metadata"]["name"] == of_key and secret["stringData"] == {"cluster.key": key_file.read_text()}
    assert job["apiVersion"] == "batch/v1" and "labels" not in job["metadata"]
    assert service["metadata"]["name"] == job["spec"]["template"]["spec"]["subdomain"] == "big"
    assert service["spec"]["clusterIP"] == "None" and service["spec"]["publishNotReadyAddresses"] is True
    assert service["spec"]["selector"] == {"batch.kubernetes.io/job-name": job["metadata"]["name"]}
    assert service["spec"]["ports"][0]["port"] == container["ports"][0]["containerPort"] == 6380
    assert container["resources"]["limits"] == {"nvidia.com/gpu": "8"}
    assert "exec sh -c 'rlx train '\"'\"'a b'\"'\"''" in container["args"][0]


def test_a_job_set_in_a_queue_is_rendered(capsys, key_file):
    found = rendered(capsys, "--jobset", "--queue", "team", "--secret", "mine", "--cpu", "4", "--memory", "8Gi")
    assert list(found) == ["JobSet"]  # which makes the Service itself
    job_set = found["JobSet"]
    assert job_set["apiVersion"] == "jobset.x-k8s.io/v1alpha2"
    assert job_set["metadata"]["labels"] == {"kueue.x-k8s.io/queue-name": "team"}
    (one,) = job_set["spec"]["replicatedJobs"]
    network = job_set["spec"]["network"]
    assert network == {"enableDNSHostnames": True, "subdomain": "rlx", "publishNotReadyAddresses": True}
    container, of_key = check_job(one["template"]["spec"], f"rlx-{one['name']}-0-0.{network['subdomain']}")
    assert of_key == "mine" and one["replicas"] == 1 and one["template"]["spec"]["backoffLimit"] == 0
    assert container["resources"]["limits"] == {"cpu": "4", "memory": "8Gi"}
    assert container["args"][0].count("--block") == 2  # nothing to run: the cluster stays


@pytest.mark.slow
def test_the_script_of_the_pods_makes_a_cluster(terminal, key_file, capsys):
    free = terminal.start_head().partition(":")[2]
    terminal.type("stop", "--all")
    command = "rlx status --address $RLX_ADDRESS --token-file $RLX_TOKEN_FILE"
    words = ("--token-file", str(key_file), "--port", free, "--command", command)
    container = rendered(capsys, *words)["Job"]["spec"]["template"]["spec"]["containers"][0]
    terminal.program("rlx", f'#!/bin/sh\nexec {sys.executable} -m rlx.cli "$@"\n')
    # Pods have an address each, and so may listen at the same port; here they are of one machine, and have names.
    script = container["args"][0]
    node = script.replace(f"--port {free}", '--port 0 --name "pod-$JOB_COMPLETION_INDEX"')
    env = {"RLX_ADDRESS": f"127.0.0.1:{free}", "RLX_TOKEN_FILE": str(key_file), "POD_IP": "127.0.0.1"}
    pods = [
        subprocess.Popen(
            [*container["command"], script if index == 0 else node],
            **{"env": terminal.env | env | {"JOB_COMPLETION_INDEX": str(index)}, "stdout": subprocess.PIPE},
        )
        for index in (1, 2, 0)
    ]
    try:
        said, _ = pods[-1].communicate(timeout=T)
        assert pods[-1].returncode == 0 and b"pod-1" in said and b"pod-2" in said
    finally:
        for pod in pods:
            pod.terminate()
            pod.communicate(timeout=T)
