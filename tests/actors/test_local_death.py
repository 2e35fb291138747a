"""Real kills: every death is told at once and says why, and nothing outlives its owner."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time

import cloudpickle
import numpy as np
import psutil
import pytest

from rlx import actors
from rlx.actors import Err
from rlx.errors import ActorDied, ActorError

cloudpickle.register_pickle_by_value(sys.modules[__name__])

pytestmark = pytest.mark.timeout(60)
T = 20.0


@pytest.fixture
def rt():
    with actors.runtime("local", preload=("numpy",)) as runtime:
        yield runtime


class Victim:
    def __init__(self, path=None):
        self.path = path

    def pid(self):
        return os.getpid()

    def blob(self, size):
        return np.zeros(size, np.uint8)

    def die(self, how):
        print("last words", file=sys.stderr)
        if isinstance(how, int):
            os.kill(os.getpid(), how)
        elif how == "exit":
            os._exit(3)
        else:
            import ctypes

            ctypes.string_at(0)

    def hang(self, how="sleep"):
        while how == "spin":
            pass
        time.sleep(3600)

    def family(self):
        """Processes of all kinds below this one: in its group, in a session of its own, orphaned by its parent."""
        sleep = [sys.executable, "-c", "import time; time.sleep(3600)"]
        child = subprocess.Popen(sleep)
        loner = subprocess.Popen(sleep, start_new_session=True)
        code = (
            f"import subprocess; print(subprocess.Popen({sleep!r}, start_new_session=True, stdout=-3, stderr=-3).pid)"
        )
        orphan = int(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout)
        return [child.pid, loner.pid, orphan]

    def keep_link_open_in_a_child(self):
        pid = os.fork()
        if pid == 0:
            time.sleep(3600)
        return pid


def wait_gone(pids, timeout_s=3.0):
    """Return those of the processes that still run after timeout_s; a failed test leaves none of them behind."""
    deadline = time.monotonic() + timeout_s
    left = [pid for pid in pids if runs(pid)]
    while left and time.monotonic() < deadline:
        time.sleep(0.005)
        left = [pid for pid in left if runs(pid)]
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    return left


def runs(pid):
    try:
        return psutil.Process(pid).status() != "zombie"
    except psutil.NoSuchProcess:
        return False


@pytest.mark.parametrize(
    ("how", "words"),
    [
        (signal.SIGKILL, r"was killed by SIGKILL in die\(\) with 2 more calls waiting"),
        (signal.SIGTERM, r"was killed by SIGTERM in die\(\)"),
        (signal.SIGABRT, r"was killed by SIGABRT in die\(\)"),
        ("segfault", r"was killed by SIGSEGV in die\(\)[^$]*test_local_death.py.* in die"),
        ("exit", r"ended with exit code 3 in die\(\)"),
    ],
)
def test_the_death_of_a_process_is_told_within_a_second_and_says_why(rt, how, words):
    victim, bystander = rt.spawn(Victim, name="victim"), rt.spawn(Victim)
    pid = victim.pid.call().result(T)
    bystander.pid.call().result(T)
    start = time.monotonic()
    pending = [victim.die.call(how), victim.pid.call(), victim.pid.call()]
    errors = [future.exception(T) for future in pending]
    assert time.monotonic() - start < 1.0
    with pytest.raises(ActorDied, match=words):
        pending[0].result()
    for error in errors:
        assert isinstance(error, ActorDied) and f"victim (pid {pid})" in str(error)
        assert "last words" in str(error)
    assert len({id(error) for error in errors}) == 3
    assert bystander.pid.call().result(T)


def test_death_in_init_is_told_too(rt):
    actor = rt.spawn(_DiesInInit)
    with pytest.raises(ActorDied, match=r"was killed by SIGKILL in __init__\(\)"):
        actor.ready(T)
    assert rt.state()[actor.name].status == "dead"


class _DiesInInit:
    def __init__(self):
        os.kill(os.getpid(), signal.SIGKILL)


def test_answers_sent_before_the_death_are_not_lost(rt):
    victim = rt.spawn(Victim)
    pid = victim.pid.call().result(T)

    def hear_of_the_death_first():
        assert wait_gone([pid]) == []
        victim._actor.body.die("was killed by SIGKILL")

    # In the reader's own thread, so that all the answers are still unread when the news comes.
    victim._actor.body._engine.reactor.set_deadline("test", 0.0, hear_of_the_death_first)
    futures = [victim.blob.call(40_000) for _ in range(4)]
    last = victim.die.call(signal.SIGKILL)
    assert isinstance(last.exception(T), ActorDied)
    assert [len(future.result(T)) for future in futures] == [40_000] * 4


@pytest.mark.parametrize("state", ["idle", "sleep", "spin", "stopped", "unborn"])
def test_kill_ends_an_actor_in_any_state(rt, state):
    victim = rt.spawn(Victim)
    pid = 0 if state == "unborn" else victim.pid.call().result(T)
    future = victim.hang.call("spin" if state == "spin" else "sleep") if state != "idle" else None
    if state == "stopped":
        os.kill(pid, signal.SIGSTOP)
    rt.kill(victim)
    if future is not None:
        with pytest.raises(ActorDied, match=r"was ended by kill\(\)"):
            future.result(0)
    assert pid == 0 or not psutil.pid_exists(pid)


def test_a_child_that_holds_the_link_open_does_not_hide_the_death(rt):
    victim = rt.spawn(Victim)
    child = victim.keep_link_open_in_a_child.call().result(T)
    start = time.monotonic()
    assert isinstance(victim.die.call(signal.SIGKILL).exception(T), ActorDied)
    assert time.monotonic() - start < 1.0
    assert wait_gone([child]) == []


def test_grandchildren_go_with_their_actor_and_only_with_theirs(rt):
    victim, bystander = rt.spawn(Victim), rt.spawn(Victim)
    doomed, spared = victim.family.call().result(T), bystander.family.call().result(T)
    rt.kill(victim)
    assert wait_gone(doomed) == []
    assert all(psutil.pid_exists(pid) for pid in spared)
    rt.close()
    assert wait_gone(spared) == []


def test_the_death_of_the_forkserver_is_a_clear_error_everywhere(rt):
    busy, idle = rt.spawn(Victim), rt.spawn(Victim)
    pids = [actor.pid.call().result(T) for actor in (busy, idle)]
    family = idle.family.call().result(T)
    future = busy.hang.call("spin")
    server = psutil.Process(pids[0]).ppid()
    start = time.monotonic()
    os.kill(server, signal.SIGKILL)
    with pytest.raises(ActorDied, match=rf"the forkserver of this runtime \(process {server}\) was killed by SIGKILL"):
        future.result(T)
    assert time.monotonic() - start < 2.0
    assert isinstance(idle.pid.call().exception(T), ActorDied)
    with pytest.raises(ActorError, match="cannot be started: the forkserver"):
        rt.spawn(Victim)
    rt.kill(busy)
    assert wait_gone([*pids, family[0]]) == []
    [os.kill(pid, signal.SIGKILL) for pid in family[1:]]  # in sessions of their own: nobody is left who knows them


def test_a_stopped_forkserver_is_an_error_after_the_system_timeout():
    with actors.runtime("local", preload=()) as runtime:
        first = runtime.spawn(Victim)
        server = psutil.Process(first.pid.call().result(T)).ppid()
        runtime.system_timeout_s = runtime._engine.system_timeout_s = 1.0  # a busy machine starts the first later
        os.kill(server, signal.SIGSTOP)
        assert isinstance(runtime.spawn(Victim).pid.call().exception(T), ActorDied)
    assert wait_gone([server]) == []


def test_close_is_quick_and_ends_actors_in_every_state(rt):
    victims = [rt.spawn(Victim) for _ in range(4)]
    pids = [victim.pid.call().result(T) for victim in victims]
    futures = [victims[0].hang.call("spin"), victims[1].hang.call("sleep"), victims[2].hang.call()]
    os.kill(pids[2], signal.SIGSTOP)
    start = time.monotonic()
    rt.close()
    assert time.monotonic() - start < 2.0
    assert not [pid for pid in pids if psutil.pid_exists(pid)]
    for future in futures:
        with pytest.raises(ActorDied, match=r"was closed with its runtime in hang\(\)"):
            future.result(0)


def test_one_way_calls_made_before_close_are_still_run(rt, tmp_path):
    writer = rt.spawn(_Writer, tmp_path / "out")
    writer.write.call("a").result(T)
    for _ in range(200):
        writer.write.send("b")
    rt.close()
    assert (tmp_path / "out").read_text() == "a" + 200 * "b"


class _Writer:
    def __init__(self, path):
        self.path = path

    def write(self, text):
        with open(self.path, "a") as file:
            file.write(text)


def test_rounds_of_spawn_and_kill_leave_no_descriptor_thread_or_process():
    def census():
        me = psutil.Process()
        return me.num_fds(), threading.active_count(), len(me.children(recursive=True)), sorted(os.listdir("/dev/shm"))

    before = census()
    with actors.runtime("local", preload=()) as runtime:
        first = psutil.Process(runtime.spawn(Victim, name="first").pid.call().result(T))
        server = psutil.Process(first.ppid())
        for n in range(90):
            victim = runtime.spawn(Victim, name=f"round/{n % 3}")
            assert victim.pid.call().result(T)
            runtime.kill(victim)
            if n == 70:  # the list of actors keeps 64 that have ended, and has grown to that
                inside, server_fds = census(), server.num_fds()
        assert (census(), server.num_fds()) == (inside, server_fds)
    assert census() == before


# A driver of its own, ended in every way.

DRIVER = """
import json, os, sys, time
from rlx import actors
how = sys.argv[1]

class Victim:
    def pid(self): return os.getpid()
    def hang(self, how):
        while how == "spin": pass
        time.sleep(3600)
    def family(self):
        import subprocess
        sleep = [sys.executable, "-c", "import time; time.sleep(3600)"]
        return [subprocess.Popen(sleep).pid, subprocess.Popen(sleep, start_new_session=True).pid]

rt = actors.runtime("local", preload=("numpy",))
victims = [rt.spawn(Victim) for _ in range(4)]
pids = [o.value for o in rt.group(victims).pid.call().result(30)]
family = victims[3].family.call().result(30)
with open(f"/proc/{pids[0]}/stat") as file:
    server = int(file.read().split()[3])
victims[0].hang.call("spin"), victims[1].hang.call("sleep"), victims[2].hang.call("sleep")
os.kill(pids[2], 19)
if how == "fork":  # a copy of the driver that holds all its sockets
    if os.fork() == 0:
        time.sleep(3600)
print(json.dumps([server, *pids, *family]), flush=True)
if how == "raise":
    raise RuntimeError("boom")
if how == "sys.exit":
    sys.exit(5)
if how != "end":
    sys.stdin.read()
"""


@pytest.mark.parametrize(
    "how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT, "raise", "sys.exit", "end", "fork", "both"]
)
def test_nothing_outlives_its_driver(how):
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(how)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    with driver:
        assert driver.stdout is not None
        pids = json.loads(driver.stdout.readline())
        if how in (signal.SIGKILL, "fork"):
            driver.kill()
        elif how == "both":  # then the kernel has to end the actors, and nobody knows of their children
            os.kill(driver.pid, signal.SIGKILL)
            os.kill(pids[0], signal.SIGKILL)
            for pid in pids[5:]:
                with contextlib.suppress(ProcessLookupError):  # it may have noticed already
                    os.kill(pid, signal.SIGKILL)
        elif isinstance(how, int):
            driver.send_signal(how)
        assert len(pids) == 7 and wait_gone(pids) == []
        if how == "fork":
            os.killpg(driver.pid, signal.SIGKILL)
        driver.wait(T)


def test_a_driver_killed_while_the_forkserver_imports_leaves_nothing(tmp_path):
    """A module that takes its time to import stands for torch."""
    (tmp_path / "slow_module.py").write_text(
        "import os, time\nprint(os.getpid(), flush=True)\nwhile True: time.sleep(0.01)\n"
    )
    code = f"import sys; sys.path.append({str(tmp_path)!r})\n"
    code += "from rlx import actors; rt = actors.runtime('local', preload=['slow_module']); input()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as driver:
        assert driver.stdout is not None
        server = int(driver.stdout.readline())
        driver.kill()
        assert wait_gone([server]) == []


CTRL_C = """
import os
from rlx import actors

class Actor:
    def pid(self): return os.getpid()

with actors.runtime("local", preload=()) as rt:
    actor = rt.spawn(Actor)
    pid = actor.pid.call().result(30)
    try:
        print(pid, flush=True)
        input()
    except KeyboardInterrupt:
        print(actor.pid.call().result(30) == pid)
"""


def test_ctrl_c_in_the_terminal_hits_only_the_driver():
    """SIGINT to the whole foreground group, as a terminal sends it."""
    with subprocess.Popen(
        [sys.executable, "-c", CTRL_C],
        start_new_session=True,
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as driver:
        assert driver.stdout is not None
        actor = int(driver.stdout.readline())
        os.kill(actor, signal.SIGINT)
        os.killpg(driver.pid, signal.SIGINT)
        assert driver.stdout.readline() == "True\n"
        assert driver.wait(T) == 0


def test_a_group_call_with_a_dying_member_still_gives_the_others(rt):
    members = [rt.spawn(Victim) for _ in range(3)]
    outcomes = rt.group(members).die.map([signal.SIGCONT, signal.SIGKILL, signal.SIGCONT]).result(T)
    assert [isinstance(outcome, Err) for outcome in outcomes] == [False, True, False]
