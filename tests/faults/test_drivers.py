"""The driver ends, in whatever way: three seconds later there is no process, no file and no memory of it."""

import json
import os
import signal
import subprocess
import sys

import pytest

from tests.polling import until

T = 30.0

DRIVER = """
import json, os, subprocess, sys, time
import numpy as np
from rlx import actors

class Victim:
    def pids(self, array):
        self.kept = array
        sleep = [sys.executable, "-c", "import time; time.sleep(3600)"]
        loner = subprocess.Popen(sleep, start_new_session=True)
        return [os.getpid(), os.getppid(), loner.pid]
    def spin(self):
        while True: pass
    def latest(self, channel): self.seen = channel.latest()

rt = actors.runtime("local", preload=("numpy",))
channel = rt.channel("weights")
channel.publish(np.ones(1_000_000))
victims = [rt.spawn(Victim, restart=actors.Restart()) for _ in range(3)]
pids = {pid for victim in victims for pid in victim.pids.call(np.ones(1_000_000)).result(30)}
[victim.latest.call(channel).result(30) for victim in victims]
busy = victims[0].spin.call()
end = sys.argv[1] if len(sys.argv) > 1 else "kernel"
print(json.dumps(sorted(pids)), flush=True)
if end == "exception":
    raise RuntimeError("boom")
if end == "os._exit":
    os._exit(7)
if end == "in result":
    busy.result()
if end == "input":
    sys.stdin.read()
"""


@pytest.mark.parametrize(
    ("end", "signals", "code"),
    [
        ("input", [signal.SIGKILL], -9),
        ("input", [signal.SIGTERM], -15),
        ("in result", [signal.SIGINT], -2),
        ("in result", [signal.SIGINT, signal.SIGINT], -2),
        ("in result", [signal.SIGTERM], -15),
        ("input", [signal.SIGSTOP, signal.SIGKILL], -9),
        ("exception", [], 1),
        ("os._exit", [], 7),
    ],
    ids=str,
)
def test_nothing_of_a_driver_outlives_it(end, signals, code, own_tmp, gone):
    shared = set(os.listdir("/dev/shm"))
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER, end],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    with driver:
        assert driver.stdout is not None
        pids = json.loads(driver.stdout.readline())
        assert len(pids) == 7 and list(own_tmp.glob("rlx-*/*"))
        for number in signals:
            os.killpg(driver.pid, number)  # as a terminal does: to the whole foreground group
        gone([*pids, driver.pid], 3.0)
        until(lambda: not list(own_tmp.glob("rlx-*/*")), 1.0)
        assert set(os.listdir("/dev/shm")) == shared
        assert abs(driver.wait(T)) in (abs(code), 128 + abs(code))


def test_the_next_runtime_removes_what_a_driver_and_its_forkserver_left_when_both_were_killed(own_tmp, gone):
    with subprocess.Popen(
        [sys.executable, "-c", DRIVER, "input"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as driver:
        assert driver.stdout is not None
        pids = json.loads(driver.stdout.readline())
        server = os.getpgid(pids[0])  # every actor leads its own group; the forkserver is their parent
        for pid in [driver.pid, *pids]:
            os.kill(pid, signal.SIGKILL)
        gone([*pids, server])
    from rlx import actors

    assert list(own_tmp.glob("rlx-*/*"))
    with actors.runtime("inline"), actors.runtime("local", preload=()):
        assert [path.name.split("-")[0] for path in own_tmp.glob("rlx-*/*")] == [str(os.getpid())]


NOTEBOOK = """
import sys
from jupyter_client import KernelManager

manager = KernelManager()
manager.start_kernel()
client = manager.blocking_client()
client.start_channels()
client.wait_for_ready(timeout=30)
show = lambda message: print(message["content"].get("text", ""), end="", flush=True)
client.execute_interactive(sys.argv[1], timeout=30, output_hook=show)
sys.stdin.readline()
manager.restart_kernel(now=True)
print("restarted", flush=True)
sys.stdin.readline()
client.stop_channels()
manager.shutdown_kernel(now=True)
"""


@pytest.mark.slow
def test_a_restarted_notebook_kernel_leaves_nothing(gone, own_tmp):
    pytest.importorskip("ipykernel")
    pytest.importorskip("jupyter_client")
    code = DRIVER.replace("sys.argv[1]", "'kernel'")
    command = [sys.executable, "-W", "ignore", "-c", NOTEBOOK, code]
    with subprocess.Popen(command, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as notebook:
        assert notebook.stdin is not None and notebook.stdout is not None
        pids = json.loads(next(line for line in notebook.stdout if line.startswith("[")))
        assert len(pids) == 7 and list(own_tmp.glob("rlx-*/*"))
        notebook.stdin.write("restart\n")
        notebook.stdin.flush()
        assert notebook.stdout.readline() == "restarted\n"
        gone(pids, 3.0)
        until(lambda: not list(own_tmp.glob("rlx-*/*")), 1.0)
        notebook.stdin.write("end\n")
    assert notebook.returncode == 0
