"""What only processes can do: time out, run beside the caller, be cancelled, be interrupted, fill a socket."""

import os
import random
import signal
import subprocess
import sys
import threading
import time

import cloudpickle
import numpy as np
import psutil
import pytest
import torch

from rlx import actors
from rlx.actors.engines import pickling
from rlx.actors.future import as_completed, wait
from rlx.errors import ActorDied, ActorError, CallCancelled, CallTimeout

cloudpickle.register_pickle_by_value(sys.modules[__name__])

pytestmark = pytest.mark.timeout(60)
T = 20.0


@pytest.fixture(scope="module")
def rt():
    with actors.runtime("local") as runtime:
        yield runtime


@pytest.fixture
def probe(rt):
    handle = rt.spawn(Probe)
    yield handle
    rt.kill(handle)


class Probe:
    """Waits on files, so that a test decides when a method ends."""

    def echo(self, value=None):
        return value

    def wait_for(self, path):
        with open(path) as fifo:
            return fifo.read()

    def sleep(self):
        threading.Event().wait()

    def interrupt(self, pid):
        os.kill(pid, signal.SIGINT)
        return "sent"

    def draw(self):
        return random.random(), float(np.random.rand()), float(torch.rand(1))

    def settings(self):
        return os.getpid(), os.getcwd(), torch.get_num_threads(), sys.stdin.read(), os.environ.get("OMP_NUM_THREADS")

    def learn(self):
        layer = torch.nn.Linear(64, 64)
        layer(torch.ones(32, 64)).sum().backward()
        return float(torch.from_numpy(np.ones((300, 300)) @ np.ones((300, 300))).sum())

    def descriptors(self):
        links = [f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd")]
        return [os.readlink(link).split(":")[0] for link in links if os.path.exists(link) or os.path.islink(link)]

    def complain(self, text):
        print(text, file=sys.stderr)

    def write_into(self, array):
        array += 1
        return array


def test_a_timeout_names_actor_and_method_and_leaves_the_future_good(probe, gate):
    path, open_gate = gate
    future = probe.wait_for.call(path)
    with pytest.raises(CallTimeout, match=rf"{probe.name}\.wait_for\(\) has not answered within 0.05 s"):
        future.result(timeout_s=0.05)
    with pytest.raises(TimeoutError):
        future.exception(timeout_s=0)
    assert not future.done()
    open_gate()
    assert future.result(T) == "open"


def test_group_and_wait_report_who_is_late(rt, probe, gate):
    path, open_gate = gate
    quick = rt.spawn(Probe)
    futures = [probe.wait_for.call(path), quick.echo.call(1)]
    done, pending = rt.wait(futures, count=1, timeout_s=T)
    assert (done, pending) == (futures[1:], futures[:1])
    assert rt.wait(futures, count=2, timeout_s=0.05) == (futures[1:], futures[:1])
    outcomes = rt.group([probe, quick]).echo.call(2).result(timeout_s=1.0)
    assert isinstance(outcomes[0].error, CallTimeout) and probe.name in str(outcomes[0].error)
    assert outcomes[1] == actors.Ok(2)
    assert rt.state()[probe.name].method == "wait_for"
    open_gate()
    assert futures[0].result(T) == "open"


def test_a_call_that_waits_can_be_cancelled_and_one_that_runs_cannot(rt, probe, gate):
    path, _ = gate
    running = probe.wait_for.call(path)
    waiting = [probe.echo.call(n) for n in range(3)]
    with open(path, "w") as fifo:  # opens once the method has begun
        assert waiting[1].cancel() is True and running.cancel() is True
        fifo.write("open")
    assert running.result(T) == "open"
    assert waiting[0].result(T) == 0 and waiting[2].result(T) == 2
    with pytest.raises(CallCancelled, match=r"echo\(\) was cancelled before it ran"):
        waiting[1].result(T)


def test_ten_thousand_small_calls_in_flight_come_back_in_order(probe):
    futures = [probe.echo.call(n) for n in range(10_000)]
    assert [f.result(T) for f in futures] == list(range(10_000))


def test_two_thousand_calls_of_12_kb_fill_both_directions_without_deadlock(probe):
    payload = os.urandom(12_000)
    futures = [probe.echo.call(payload) for _ in range(2_000)]
    assert all(f.result(T) == payload for f in futures)


def test_calls_to_a_busy_actor_return_at_once_whatever_their_size(probe, gate):
    path, open_gate = gate
    running = probe.wait_for.call(path)
    start = time.monotonic()
    futures = [probe.echo.call(np.full(4_000_000, n, np.uint8)) for n in range(5)]
    assert time.monotonic() - start < 1.0 and not running.done()
    open_gate()
    assert [int(f.result(T)[-1]) for f in futures] == [0, 1, 2, 3, 4]


def test_a_100_mb_array_goes_both_ways_with_one_copy_each(probe):
    array = np.arange(100 * 2**20 // 8)
    before = psutil.Process().memory_info().rss
    back = probe.echo.call(array).result(T)
    assert np.array_equal(back, array)
    # Its own copy in shared memory, and the actor's, of which it only has a view.
    assert psutil.Process().memory_info().rss - before < 2.3 * array.nbytes


def test_arrays_and_tensors_leave_as_views_of_their_own_memory():
    array, tensor = np.ones(5_000), torch.ones(5_000)
    body, buffers = pickling.dumps((array, tensor), "a test")
    addresses = [np.frombuffer(buffer, np.uint8).ctypes.data for buffer in buffers]
    assert addresses == [array.ctypes.data, tensor.data_ptr()] and len(body) < 1_000


@pytest.mark.parametrize("size", [4_000, 50_000])
def test_received_arrays_are_read_only_however_they_have_travelled(probe, size):
    with pytest.raises(ValueError, match="read-only"):
        probe.write_into.call(np.zeros(size)).result(T)
    with pytest.raises(ValueError, match="read-only"):
        probe.echo.call(np.zeros(size)).result(T)[0] = 1.0


def test_eight_threads_share_actors_without_losing_an_answer(rt):
    handles, wrong = [rt.spawn(Probe) for _ in range(3)], []

    def work(thread):
        for n in range(150):
            value = (thread, n, b"x" * (n * 50))
            if handles[n % 3].echo.call(value).result(T) != value:
                wrong.append(value)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    [t.start() for t in threads]
    [t.join(T) for t in threads]
    assert not wrong and not any(t.is_alive() for t in threads)


def test_ctrl_c_while_waiting_leaves_future_and_runtime_good(probe):
    future = None
    with pytest.raises(KeyboardInterrupt):
        future = probe.interrupt.call(os.getpid())
        future.result(T)
        threading.Event().wait(T)  # the signal may come after the answer
    assert future is not None and future.result(T) == "sent"
    assert probe.echo.call(1).result(T) == 1


WAYS = {
    "result": lambda futures: futures[0].result(),
    "wait": lambda futures: wait(futures, 1),
    "as_completed": lambda futures: next(as_completed(futures)),
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_a_signal_that_does_not_end_the_system_call_is_heard_soon(rt, way):
    """As one that comes just before it: here another thread gets it, so that the waiting one sleeps on."""
    first, second = rt.spawn(Probe), rt.spawn(Probe)
    main, heard, was_late = threading.get_ident(), threading.Event(), []

    def strike():
        while sys._current_frames()[main].f_code.co_name not in ("lead", "_wait", "as_completed"):
            pass
        signal.pthread_kill(threading.get_ident(), signal.SIGINT)
        was_late.append(not heard.wait(T))
        rt.kill(first)
        rt.kill(second)

    futures = [probe.sleep.call() for probe in (first, second)]
    striker = threading.Thread(target=strike)
    striker.start()
    with pytest.raises(KeyboardInterrupt):
        way(futures)
    heard.set()
    striker.join(2 * T)
    assert was_late == [False]


def test_interrupts_while_calling_leave_the_link_in_step(probe, monkeypatch):
    class Interrupted(KeyboardInterrupt):
        pass

    # One that strikes inside a finalizer cannot be raised, and would strike again in pytest's report of it.
    monkeypatch.setattr(sys, "unraisablehook", lambda _: None)
    armed, interrupts, futures = False, 0, []

    def interrupt(*_):
        if armed:
            raise Interrupted

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.0005, 0.0005)
    try:
        for n in range(100):
            try:
                armed = True
                futures.append((n, probe.echo.call(np.full(400_000, n, np.uint8))))
                armed = False
            except Interrupted:
                armed = False
                interrupts += 1
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert interrupts > 0
    for n, future in futures:
        assert (future.result(T) == n).all()


def test_forked_siblings_draw_different_random_numbers_as_fresh_processes_do():
    with actors.runtime("local", preload=("numpy.random", "torch")) as own:
        first, second = (own.spawn(Probe).draw.call().result(T) for _ in range(2))
    assert all(a != b for a, b in zip(first, second, strict=True)), (first, second)


def test_an_actor_has_the_callers_directory_and_the_threads_it_was_given(rt, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    pid, cwd, threads, stdin, omp = rt.spawn(Probe).settings.call().result(T)
    assert (cwd, threads, stdin, omp) == (str(tmp_path), 1, "", "5") and pid != os.getpid()
    assert rt.spawn(Probe, threads=2, env={"OMP_NUM_THREADS": "2"}).settings.call().result(T)[2::2] == (2, "2")


def test_linear_algebra_and_gradients_work_in_a_forked_actor(rt):
    assert rt.spawn(Probe, threads=2).learn.call().result(T) == 300.0**3


def test_an_actor_holds_no_descriptor_of_its_siblings(rt, probe):
    rt.spawn(Probe).ready(T)
    kinds = rt.spawn(Probe).descriptors.call().result(T)
    assert kinds.count("socket") == 2, kinds  # its link, and the one on which descriptors come


def test_stderr_of_an_actor_shows_up_with_its_name(rt, capfd):
    with actors.runtime("local", preload=()) as own:
        own.spawn(Probe, name="talker").complain.call("careful").result(T)
    assert "[talker] careful\n" in capfd.readouterr().err


def test_modules_of_the_preload_are_in_every_actor_and_a_wrong_one_is_named():
    with actors.runtime("local", preload=("colorsys",)) as own:
        assert own.spawn(_Modules).loaded.call("colorsys", "torch").result(T) == [True, False]
    with actors.runtime("local", preload=("numpy", "no_such_module")) as own:
        actor = own.spawn(_Modules)
        with pytest.raises(ActorDied, match="preload module 'no_such_module' cannot be imported"):
            actor.loaded.call("numpy").result(T)
        with pytest.raises(ActorError, match="preload module 'no_such_module'"):
            own.spawn(_Modules)


class _Modules:
    def loaded(self, *names):
        return [name in sys.modules for name in names]


SCRIPT = """
import numpy as np
from rlx import actors
from rlx.actors.engines import pickling
from rlx.actors.future import as_completed, wait

class Point:
    def __init__(self, x): self.x = x

class Refused(Exception): pass

class Actor:
    def shift(self, point, by): return Point(point.x + by)
    def refuse(self): raise Refused("no")

print("main runs")
rt = actors.runtime("local", preload=("numpy",))
actor = rt.spawn(Actor)
point = actor.shift.call(Point(np.arange(3)), 1).result(30)
assert isinstance(point, Point) and point.x.tolist() == [1, 2, 3]
assert isinstance(actor.refuse.call().exception(30), Refused)
print("done")
"""


@pytest.mark.parametrize("way", ["file", "-c", "stdin"])
def test_a_script_without_main_guard_runs_once_and_exits_without_close(way, tmp_path):
    file = tmp_path / "script.py"
    file.write_text(SCRIPT)
    command = {"file": [str(file)], "-c": ["-c", SCRIPT], "stdin": ["-"]}[way]
    ran = subprocess.run(
        [sys.executable, *command],
        input=SCRIPT if way == "stdin" else "",
        text=True,
        capture_output=True,
        timeout=T,
        check=False,
    )
    assert (ran.stdout, ran.stderr, ran.returncode) == ("main runs\ndone\n", "", 0)


def test_the_package_needs_neither_torch_nor_a_process_to_be_imported():
    code = "import sys; from rlx import actors; actors.runtime('inline').close(); print('torch' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=T, check=True)
    assert ran.stdout == "False\n"
