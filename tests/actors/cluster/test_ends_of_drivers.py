"""The driver of a cluster ends, in whatever way: soon there is no process and no file of it on any node."""

import json
import os
import signal
import subprocess
import sys

import pytest

from tests.actors.cluster.scenarios import lives
from tests.polling import until

pytestmark = pytest.mark.timeout(90)
T = 30.0

DRIVER = """
import json, os, signal, subprocess, sys
import numpy as np
from rlx import actors

class Victim:
    def pids(self, array):
        self.kept = array
        sleep = [sys.executable, "-c", "import time; time.sleep(3600)"]
        loner = subprocess.Popen(sleep, start_new_session=True)
        return [os.getpid(), os.getppid(), loner.pid]
    def latest(self, channel): self.seen = channel.latest()
    def spin(self):
        while True: pass

address, key, end = sys.argv[1:]
rt = actors.runtime("cluster", address=address, token_file=key, preload=())
channel = rt.channel("weights")
channel.publish(np.ones(100_000))
victims = [rt.spawn(Victim, restart=actors.Restart()) for _ in range(4)]
calls = [victim.pids.call(np.ones(100_000)) for victim in victims]
pids = {pid for call in calls for pid in call.result(30)}
[victim.latest.call(channel).result(30) for victim in victims]
busy = [victim.spin.call() for victim in victims[:2]]
print(json.dumps(sorted(pids)), flush=True)
if end == "exception":
    raise RuntimeError("boom")
if end == "os._exit":
    os._exit(7)
if end == "in close":  # Ctrl-C comes again when all have ended and the files are still there
    follower, close = rt._engine._follower, rt._engine._follower.close
    follower.close = lambda: (os.kill(os.getpid(), signal.SIGINT), close())
if end in ("in result", "in close"):
    busy[1].result()
if end == "input":
    sys.stdin.read()
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The temporary folder of daemons and drivers."""
    folder = tmp_path_factory.mktemp("t")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", str(folder))
        yield folder


@pytest.fixture(scope="module")
def nodes(start, folder):
    """A node on the drivers' own machine, and one that counts as another machine."""
    home = start("home", apart=False)
    return home, start("away", home.address)


def held(node):
    """Return the descriptors and the children of a daemon."""
    pid = node.process.pid
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        return len(os.listdir(f"/proc/{pid}/fd")), file.read()


@pytest.mark.parametrize(
    ("end", "signals", "code"),
    [
        ("input", [signal.SIGTERM], -15),
        ("in result", [signal.SIGINT], -2),
        pytest.param("in result", [signal.SIGINT, signal.SIGINT], -2, marks=pytest.mark.slow),
        ("in close", [signal.SIGINT], -2),
        ("exception", [], 1),
        ("os._exit", [], 7),
    ],
    ids=str,
)
def test_nothing_of_a_driver_outlives_it_on_any_node(nodes, key, folder, end, signals, code):
    before = [held(node) for node in nodes]
    with subprocess.Popen(
        [sys.executable, "-c", DRIVER, nodes[0].address, str(key.path), end],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    ) as driver:
        assert driver.stdout is not None and driver.stderr is not None
        pids = json.loads(driver.stdout.readline())
        assert len(pids) == 4 + 4 + 2  # actors, what they have started, and a forkserver on each node
        assert len(list(folder.glob("rlx-*/*"))) == 2
        for number in signals:
            os.killpg(driver.pid, number)  # as a terminal does: to the whole foreground group
            driver.stderr.readline()  # it has ended, or begins to say so: the next one interrupts its last steps
        assert abs(driver.wait(T)) in (abs(code), 128 + abs(code))
    until(lambda: not any(map(lives, pids)))
    until(lambda: not list(folder.glob("rlx-*/*")))
    until(lambda: [held(node) for node in nodes] == before)
