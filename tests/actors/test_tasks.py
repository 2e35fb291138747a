"""Tasks on every engine: results in order, failures that name the function, and workers that come and go."""

import itertools
import os
import signal
import sys
import threading

import cloudpickle
import pytest

from rlx import actors
from rlx.actors import machine, tasks
from rlx.actors.life import ActorLife
from rlx.errors import ActorDied, CallCancelled, CallTimeout, NotSupported, ObjectMemoryFull
from tests.actors.engines import ALL, opened
from tests.polling import until

cloudpickle.register_pickle_by_value(sys.modules[__name__])

pytestmark = pytest.mark.timeout(60)
T = 20.0


@pytest.fixture(scope="module", params=ALL)
def rt(request):
    with opened(request.param) as runtime:
        yield runtime


@pytest.fixture
def local(monkeypatch):
    """A runtime with two workers at most, whatever the machine."""
    monkeypatch.setattr(machine, "cpu_count", lambda: 2.0)
    with actors.runtime("local", preload=("numpy",)) as runtime:
        yield runtime


def square(number, plus=0):
    return number * number + plus


def fail(number):
    raise LookupError(f"no {number}")


def leave():
    sys.exit(3)


def wait_for(path):
    until(lambda: os.path.exists(path))
    return "went on"


def wait_and_log(path):
    wait_for(path)
    with open(path + ".log", "w"):
        return path


def pid_of_worker():
    return os.getpid()


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def workers(rt):
    return {
        state.pid for name, state in rt.state().items() if name.startswith("task_worker") and state.status == "alive"
    }


@pytest.fixture
def gate(tmp_path):
    """A path that a task can wait on, and the function that lets it go on."""
    path = tmp_path / "gate"
    return str(path), path.touch


def test_a_task_returns_what_the_function_returns(rt):
    assert rt.submit(square, 3, plus=1).result(T) == 10
    assert rt.submit(lambda: "a lambda").result(T) == "a lambda"


def test_many_tasks_all_get_their_own_answer(rt):
    futures = [rt.submit(square, number) for number in range(100)]
    assert [future.result(T) for future in futures] == [number**2 for number in range(100)]


def test_an_exception_arrives_as_itself_with_its_traceback(rt):
    with pytest.raises(LookupError, match="no 7") as caught:
        rt.submit(fail, 7).result(T)
    assert "task_worker/" in "".join(caught.value.__notes__)
    if "processes" in rt.capabilities:
        assert 'raise LookupError(f"no {number}")' in "".join(caught.value.__notes__)
    assert rt.submit(square, 2).result(T) == 4


def test_a_worker_that_ends_fails_its_task_by_name_and_no_other(rt):
    futures = [rt.submit(square, 1), rt.submit(leave), rt.submit(square, 2)]
    assert futures[0].result(T) == 1 and futures[2].result(T) == 4
    with pytest.raises(ActorDied, match=r"task leave\(\) was lost: .* ended with exit code 3"):
        futures[1].result(T)


def test_map_yields_results_in_order_as_the_builtin_does(rt):
    assert list(rt.map(square, range(50), itertools.repeat(1))) == [number**2 + 1 for number in range(50)]
    assert list(rt.map(square, [])) == []
    with pytest.raises(ValueError, match="in_flight=0 must be at least 1"):
        rt.map(square, [1], in_flight=0)


def test_map_takes_no_more_than_it_needs_and_raises_at_the_item_that_failed(rt):
    taken = []

    def numbers():
        for number in itertools.count():
            taken.append(number)
            yield number

    results = rt.map(lambda number: 6 // (3 - number), numbers(), in_flight=2)
    assert taken == []
    assert next(results) == 2 and taken == [0, 1, 2]
    assert next(results) == 3 and next(results) == 6
    with pytest.raises(ZeroDivisionError):
        next(results)
    assert taken == [0, 1, 2, 3, 4]


def test_a_task_that_submits_is_refused_in_a_sentence(rt):
    with pytest.raises(
        NotSupported, match=r"a task cannot submit tasks|a runtime cannot be sent to an actor or a task"
    ):
        rt.submit(lambda: rt.submit(square, 1).result(T)).result(T)
    assert rt.submit(square, 2).result(T) == 4


def test_an_argument_that_cannot_be_sent_is_refused_at_submit(rt):
    if "processes" in rt.capabilities:
        with pytest.raises(TypeError, match=r"arguments\[0\]\[1\] is a _thread.lock"):
            rt.submit(square, threading.Lock())
        assert rt.submit(square, 2).result(T) == 4


# With processes.


def test_a_killed_worker_is_replaced(local):
    with pytest.raises(ActorDied, match=r"task die\(\) was lost: .* was killed by SIGKILL in run\(\)"):
        local.submit(die).result(T)
    assert [local.submit(square, number).result(T) for number in range(3)] == [0, 1, 4]


def test_an_idle_worker_that_was_killed_costs_no_task(local):
    pid = local.submit(pid_of_worker).result(T)
    os.kill(pid, signal.SIGKILL)
    until(lambda: pid not in workers(local))
    assert local.submit(pid_of_worker).result(T) != pid


def test_the_pool_grows_to_the_cpus_and_queues_beyond(local, gate):
    path, open_gate = gate
    first = local.submit(pid_of_worker).result(T)
    assert local.submit(pid_of_worker).result(T) == first  # an idle one is taken before a new one is made
    busy = [local.submit(wait_for, path) for _ in range(2)]
    waiting, unwanted = local.submit(square, 5), local.submit(square, 6)
    until(lambda: len(workers(local)) == 2)
    assert not waiting.done()
    with pytest.raises(CallTimeout, match=r"task.square\(\) has not answered"):
        waiting.result(0.01)
    assert unwanted.cancel()
    with pytest.raises(CallCancelled, match=r"task square\(\) was cancelled before it ran"):
        unwanted.result(T)
    open_gate()
    assert waiting.result(T) == 25
    assert [future.result(T) for future in busy] == ["went on"] * 2
    assert len(workers(local)) == 2


def test_idle_workers_end_and_new_tasks_get_new_ones(local, monkeypatch):
    monkeypatch.setattr(tasks, "IDLE_S", 0.2)
    first = local.submit(pid_of_worker).result(T)
    until(lambda: not workers(local))
    assert local.submit(pid_of_worker).result(T) != first
    until(lambda: not workers(local))
    assert local.state().keys() <= {"task_worker/0", "task_worker/1"}  # names are used again


def test_leaving_a_map_cancels_what_has_not_begun(local, gate):
    path, open_gate = gate
    busy = [local.submit(wait_for, path) for _ in range(2)]
    results = local.map(wait_and_log, itertools.repeat(path, 10), in_flight=4, timeout_s=0.01)
    with pytest.raises(CallTimeout, match=r"task.wait_and_log\(\) has not answered within 0.01 s"):
        next(results)
    open_gate()
    assert [future.result(T) for future in busy] == ["went on"] * 2
    assert local.submit(os.path.exists, path + ".log").result(T) is False


def test_close_fails_what_has_not_begun(gate):
    runtime = actors.runtime("local", preload=("numpy",))
    limit = runtime._tasks._limit
    futures = [runtime.submit(wait_for, gate[0]) for _ in range(limit)] + [runtime.submit(square, 1)]
    runtime.close()
    for future in futures[:-1]:
        with pytest.raises(ActorDied, match=r"task wait_for\(\) was lost: .* was closed with its runtime"):
            future.result(T)
    with pytest.raises(ActorDied, match=r"task square\(\) was not run: its runtime was closed"):
        futures[-1].result(T)


def test_a_task_that_no_worker_can_be_sent_fails_alone_and_its_worker_takes_the_next(local, monkeypatch):
    def full(self, *_):
        raise ObjectMemoryFull("no room for it")

    with monkeypatch.context() as patch:
        patch.setattr(ActorLife, "post", full)
        lost = [local.submit(square, number) for number in range(4)]  # more than there are workers
        assert [type(task.exception(T)) for task in lost] == [ObjectMemoryFull] * 4
    assert local.submit(square, 5).result(T) == 25
