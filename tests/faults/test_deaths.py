"""An actor dies, stops, spins or breeds: who has called hears why, and nobody else notices."""

import ctypes
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
from rlx.actors import Restart
from rlx.errors import ActorDied, ActorError, CallTimeout
from tests.polling import until

cloudpickle.register_pickle_by_value(sys.modules[__name__])
T = 20.0


class Victim:
    def pid(self):
        return os.getpid()

    def total(self, array):
        return int(array.sum())

    def die(self, how, *kept):
        print("last words", file=sys.stderr)
        if isinstance(how, signal.Signals):
            os.kill(os.getpid(), how)
        elif how == "null pointer":
            ctypes.string_at(0)
        elif how == "os._exit":
            os._exit(3)
        sys.exit(4)

    def begin(self, path, how, *kept):
        with open(path, "w") as file:
            file.write("begun")
        if how == "spin":
            while True:
                pass
        if how == "hold the GIL":
            ctypes.PyDLL(None).sleep(3600)
        time.sleep(3600)

    def breed(self, count):
        """Children that breed children in sessions of their own, like a fork bomb with a fuse."""
        code = "import os, time\nfor _ in range(3):\n  if os.fork() == 0: os.setsid()\ntime.sleep(3600)"
        for _ in range(count):
            subprocess.Popen([sys.executable, "-c", code])

    def load(self, workers):
        import torch
        from torch.utils.data import DataLoader, TensorDataset

        self.loader = iter(DataLoader(TensorDataset(torch.arange(64.0)), batch_size=8, num_workers=workers))
        return [float(batch.sum()) for (batch,) in self.loader]

    def keep_loading(self):
        from torch.utils.data import DataLoader

        self.loader = iter(DataLoader(range(10_000), batch_size=1, num_workers=2))
        next(self.loader)
        return [child.pid for child in psutil.Process().children()]


WORDS = {
    signal.SIGKILL: "was killed by SIGKILL",
    signal.SIGSEGV: "was killed by SIGSEGV",
    signal.SIGABRT: "was killed by SIGABRT",
    "null pointer": "was killed by SIGSEGV",
    "os._exit": "ended with exit code 3",
    "sys.exit": "ended with exit code 4",
}


@pytest.mark.parametrize("how", WORDS, ids=str)
def test_every_death_mid_call_is_told_with_cause_method_and_last_words(rt, lent, how):
    victim, bystander = rt.spawn(Victim, name="victim"), rt.spawn(Victim)
    pid, array = victim.pid.call().result(T), np.arange(1_000_000)
    sums, stop = [], threading.Event()

    def go_on():
        while not stop.is_set():
            sums.append(bystander.total.call(array).result(T))

    thread = threading.Thread(target=go_on)
    thread.start()
    try:
        start = time.monotonic()
        error = victim.die.call(how, array).exception(T)
        assert time.monotonic() - start < 1.0
        count = len(sums)
        bystander.total.call(array).result(T)
    finally:
        stop.set()
        thread.join(T)
    assert isinstance(error, ActorDied)
    assert f"victim (pid {pid}) {WORDS[how]} in die()" in str(error) and "last words" in str(error)
    assert set(sums) == {499_999_500_000} and len(sums) > count
    rt.kill(bystander)
    assert lent(rt) == 0


def test_what_a_dead_reader_held_comes_back(rt, lent, tmp_path):
    victims = [rt.spawn(Victim) for _ in range(3)]
    array, pids = np.ones(4_000_000), [victim.pid.call().result(T) for victim in victims]
    futures = [victim.begin.call(str(tmp_path / str(n)), "sleep", array) for n, victim in enumerate(victims)]
    until(lambda: len(list(tmp_path.iterdir())) == 3)
    assert lent(rt) >= 3 * array.nbytes
    for pid, future in zip(pids, futures, strict=True):
        os.kill(pid, signal.SIGKILL)
        assert isinstance(future.exception(T), ActorDied)
    until(lambda: lent(rt) == 0)


def test_an_init_that_always_raises_is_no_restart_storm(rt, tmp_path):
    log = tmp_path / "starts"
    actor = rt.spawn(Broken, str(log), restart=Restart(max=100, backoff_s=0.1))
    start = time.monotonic()
    with pytest.raises(ZeroDivisionError) as caught:
        actor.anything.call().result(T)
    assert time.monotonic() - start >= 0.1 + 0.2  # the pauses before the second and the third
    assert "in __init__" in "".join(caught.value.__notes__)
    assert log.read_text() == "started\n" * 3


class Broken:
    def __init__(self, path):
        with open(path, "a") as file:
            file.write("started\n")
        raise ZeroDivisionError("no")


def test_a_stopped_actor_stalls_honours_timeouts_and_can_be_killed(rt, tmp_path):
    victim, stalls = rt.spawn(Victim, stall_after_s=1.0, restart=Restart(backoff_s=0.01)), []
    pid = victim.pid.call().result(T)  # first: on a busy machine the start is a stall too
    rt.monitor(victim, on_stall=lambda _, stall: stalls.append(stall))
    os.kill(pid, signal.SIGSTOP)
    start = time.monotonic()
    late = victim.pid.call()
    with pytest.raises(CallTimeout):
        late.result(0.2)
    assert time.monotonic() - start < 1.0
    (stall,) = until(lambda: stalls)
    assert time.monotonic() - start < 10.0
    assert stall.stopped and stall.method == "pid" and "SIGSTOP" in stall.reason and psutil.pid_exists(pid)
    os.kill(pid, signal.SIGCONT)
    assert late.result(T) == pid  # a stall is no death
    os.kill(pid, signal.SIGSTOP)
    lost = victim.pid.call()
    rt.restart(victim)
    assert isinstance(lost.exception(T), ActorDied)
    assert victim.pid.call().result(T) != pid and victim.incarnation == 1
    os.kill(victim.pid.call().result(T), signal.SIGSTOP)
    rt.kill(victim)


def test_the_answer_of_an_earlier_incarnation_is_nobodys(rt):
    """Replies are still in the socket when the process has died, and the next one counts its calls from 1 again."""
    victim = rt.spawn(Victim, restart=Restart(max=100, backoff_s=0.0))
    for _ in range(5):
        pid = victim.pid.call().result(T)
        os.kill(pid, signal.SIGSTOP)
        futures = [victim.pid.call() for _ in range(20)]
        os.kill(pid, signal.SIGCONT)
        rt.restart(victim)
        seen = [future.exception(T) or future.result() for future in futures]
        answered = [one == pid for one in seen]
        assert all(one == pid or isinstance(one, ActorDied) for one in seen)
        assert answered == sorted(answered, reverse=True)  # the answers first, then the deaths
        assert victim.pid.call().result(T) != pid


@pytest.mark.parametrize(("how", "reason"), [("spin", "running on the CPU"), ("hold the GIL", "sleeping or waiting")])
def test_an_actor_that_holds_the_gil_is_reported_and_not_killed(rt, how, reason, tmp_path):
    victim, stalls = rt.spawn(Victim, stall_after_s=0.5), []
    pid = victim.pid.call().result(T)  # first: on a busy machine the start is a stall too
    rt.monitor(victim, on_stall=lambda _, stall: stalls.append(stall))
    future = victim.begin.call(str(tmp_path / "begun"), how)
    until((tmp_path / "begun").exists)
    (stall,) = until(lambda: stalls)
    assert (stall.method, stall.reason, stall.stopped, stall.pid) == ("begin", reason, False, pid)
    assert not future.done() and rt.state()[victim.name].status == "alive"
    rt.kill(victim)
    assert isinstance(future.exception(T), ActorDied)


def test_a_dead_forkserver_ends_its_actors_and_the_next_runtime_works(rt, gone):
    victims = [rt.spawn(Victim, restart=Restart(backoff_s=0.01)) for _ in range(3)]
    pids = [victim.pid.call().result(T) for victim in victims]
    server = psutil.Process(pids[0]).ppid()
    os.kill(server, signal.SIGKILL)
    gone([server, *pids])
    for victim in victims:
        with pytest.raises(ActorError, match=rf"forkserver of this runtime \(process {server}\) was killed by SIGKILL"):
            victim.pid.call().result(T)
    with pytest.raises(ActorError, match=r"cannot be started: the forkserver .* open a new runtime"):
        rt.spawn(Victim)
    with actors.runtime("local", preload=()) as other:
        assert other.spawn(Victim).pid.call().result(T) not in pids


def test_whatever_an_actor_has_bred_is_gone_with_it(rt, gone):
    victim, bystander = rt.spawn(Victim), rt.spawn(Victim)
    pid, spared = victim.pid.call().result(T), bystander.pid.call().result(T)
    victim.breed.call(4).result(T)
    family = until(lambda: found if len(found := psutil.Process(pid).children(recursive=True)) == 32 else None)
    rt.kill(victim)
    gone([pid, *(child.pid for child in family)])
    assert bystander.pid.call().result(T) == spared


def test_a_data_loader_works_inside_an_actor_and_its_workers_go_with_it(gone):
    with actors.runtime("local", preload=("numpy", "torch")) as rt:
        victim = rt.spawn(Victim)
        assert victim.load.call(2).result(T) == [28.0 + 64 * n for n in range(8)]
        workers = victim.keep_loading.call().result(T)
        assert len(workers) >= 2
        os.kill(victim.pid.call().result(T), signal.SIGKILL)
        gone(workers)
