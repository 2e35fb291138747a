"""What every engine promises."""

import asyncio
import os
import sys
import threading
import time

import cloudpickle
import numpy as np
import pytest
import torch

from rlx import actors
from rlx.actors import Err, Future, GroupFuture, Ok, Resources, Restart
from rlx.actors.future import as_completed
from rlx.algorithms.ppo import PPOConfig
from rlx.errors import (
    ActorDied,
    ActorError,
    CallTimeout,
    ConfigError,
    Infeasible,
    MissingExtra,
    NotSupported,
    RemoteError,
)
from tests.actors.engines import ALL, PROCESSES, another, opened

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # a process cannot import a test module by its name

pytestmark = pytest.mark.timeout(180)
T = 60.0  # a deadline, not a delay


@pytest.fixture(scope="module", params=ALL)
def rt(request):
    # Actors that send exceptions of this module import it, and what it imports.
    with opened(request.param, preload=("numpy", "torch", "rlx.algorithms.ppo", "pytest")) as runtime:
        yield runtime


@pytest.fixture
def counter(rt):
    handle = rt.spawn(Counter, 3)
    yield handle
    rt.kill(handle)


class Refused(Exception):
    def __init__(self, code, *, why):
        super().__init__(code)
        self.why = why

    def __reduce__(self):
        return _refused, (self.args[0], self.why)


def _refused(code, why):
    return Refused(code, why=why)


class Sealed(Exception):
    """Its __init__ needs what pickle does not give it."""

    def __init__(self, *, key):
        super().__init__(f"key {key}")


class Counter:
    def __init__(self, start, step=1):
        self.value, self.step, self.log = start, step, []

    def add(self, count=None):
        self.value += self.step if count is None else count
        return self.value

    def set(self, value):
        if value < 0:
            raise ValueError(f"negative: {value}")
        self.value = value

    def note(self, item):
        self.log.append(item)

    def get(self, name):
        return getattr(self, name)

    def echo(self, *args, **kwargs):
        return args, kwargs

    def refuse(self):
        raise Refused(7, why="closed")

    def seal(self):
        raise Sealed(key=3)

    def leave(self, code):
        sys.exit(code)

    def lock(self):
        return {"inner": threading.Lock()}

    def variable(self, name):
        return os.environ.get(name)


class Waiter:
    """Its methods are coroutines, and its lock belongs to the loop they run in."""

    def __init__(self):
        self.lock = asyncio.Lock()
        self.count = 0

    async def add(self, number):
        async with self.lock:
            await asyncio.sleep(0)
            self.count += number
        return self.count

    async def refuse(self):
        await asyncio.sleep(0)
        raise Refused(7, why="closed")


class Broken:
    def __init__(self, what):
        raise LookupError(f"no {what}")

    def add(self):
        return 1


def test_calls_return_what_the_method_returns(counter):
    assert counter.add.call(2).result(T) == 5
    assert counter.add.call().result(T) == 6
    assert counter.echo.call(1, "a", k=None).result(T) == ((1, "a"), {"k": None})


def test_keyword_arguments_reach_init(rt):
    actor = rt.spawn(Counter, 1, step=10)
    assert actor.add.call().result(T) == 11


def test_calls_and_sends_of_one_caller_run_in_order(counter):
    for item in range(300):
        counter.note.send(item) if item % 3 else counter.note.call(item)
    assert counter.get.call("log").result(T) == list(range(300))


def test_threads_calling_one_actor_lose_nothing_and_each_keeps_its_order(counter):
    def work(thread):
        for item in range(100):
            counter.note.call((thread, item))

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    [t.start() for t in threads]
    [t.join(T) for t in threads]
    log = counter.get.call("log").result(T)
    assert len(log) == 400
    for thread in range(4):
        assert [item for t, item in log if t == thread] == list(range(100))


def test_an_exception_arrives_as_itself_with_a_note_of_actor_and_method(counter):
    future = counter.refuse.call()
    with pytest.raises(Refused) as caught:
        future.result(T)
    assert caught.value.args == (7,) and caught.value.why == "closed"
    assert f"raised in {counter.name}.refuse()" in caught.value.__notes__[0]
    assert isinstance(future.exception(T), Refused)
    assert counter.add.call(1).result(T) == 4


def test_an_exception_does_not_hold_up_or_reorder_the_next_calls(counter):
    futures = [counter.add.call(1), counter.refuse.call(), counter.add.call(1)]
    assert [f.exception(T) is None for f in futures] == [True, False, True]
    assert futures[2].result(T) == 5


def test_an_unknown_method_is_an_attribute_error_naming_class_and_method(counter):
    with pytest.raises(AttributeError, match=r"'Counter' object has no attribute 'ad'"):
        counter.ad.call(1).result(T)


def test_init_errors_arrive_at_ready_and_at_every_call(rt):
    actor = rt.spawn(Broken, "such file", name="broken")
    future = actor.add.call()
    for _ in range(2):
        with pytest.raises(LookupError, match="no such file"):
            actor.ready(T)
    for f in (future, actor.add.call(), actor.add.call()):
        with pytest.raises(LookupError, match="no such file") as caught:
            f.result(T)
        assert "broken.__init__()" in "".join(caught.value.__notes__)
    assert rt.state()["broken"].status == "failed"
    rt.spawn(Counter, 1, name="broken").ready(T)


def test_ready_returns_when_init_has_run(counter):
    assert counter.ready(T) is None


def test_an_actor_that_has_ended_is_not_ready_and_says_how_it_ended(rt, counter):
    counter.ready(T)
    rt.kill(counter)
    with pytest.raises(ActorDied, match="counter"):
        counter.ready(T)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"concurrency": 0}, "concurrency=0"),
        ({"threads": -1}, "threads=-1"),
        ({"max_pending": 0}, "max_pending=0"),
        ({"env": {"A": 1}}, "names and values are strings"),
        ({"name": "a\nb"}, "cannot be printed"),
    ],
)
def test_options_that_make_no_sense_are_refused_at_once(rt, options, message):
    before = set(rt.state())
    with pytest.raises((ValueError, TypeError), match=message):
        rt.spawn(Counter, 0, **options)
    assert set(rt.state()) == before


def test_what_is_meant_otherwise_says_how(rt, counter):
    with pytest.raises(TypeError, match=r"counter.*\.add\(\.\.\.\) runs nothing; use .*\.add\.call"):
        counter.add(3)
    with pytest.raises(TypeError, match=r"give its \.futures"):
        rt.wait([rt.group([counter]).add.call()])


def test_a_name_is_taken_while_its_actor_lives(rt):
    first = rt.spawn(Counter, 0, name="only")
    with pytest.raises(ValueError, match="already an actor named 'only'"):
        rt.spawn(Counter, 0, name="only")
    rt.kill(first)
    assert rt.spawn(Counter, 5, name="only").add.call().result(T) == 6


def test_env_is_set_for_the_actor_and_not_for_the_caller(rt):
    actor = rt.spawn(Counter, 0, env={"RLX_TEST_COLOUR": "blue"})
    assert actor.variable.call("RLX_TEST_COLOUR").result(T) == "blue"
    assert "RLX_TEST_COLOUR" not in os.environ
    assert actor.variable.call("PATH").result(T) == os.environ["PATH"]


def test_a_group_call_gives_one_outcome_per_member_and_never_raises(rt, counter):
    doomed = rt.spawn(Counter, 0)
    rt.kill(doomed)
    group = rt.group([counter, rt.spawn(Counter, 10), doomed, rt.spawn(Broken, "way")])
    outcomes = group.add.call().result(T)
    assert outcomes[:2] == [Ok(4), Ok(11)]
    assert isinstance(outcomes[2], Err) and isinstance(outcomes[2].error, ActorDied)
    assert isinstance(outcomes[3], Err) and isinstance(outcomes[3].error, LookupError)
    assert len(group) == 4


def test_group_map_gives_each_member_its_own_arguments(rt, counter):
    group = rt.group([counter, rt.spawn(Counter, 10)])
    assert group.add.map([1, 2]).result(T) == [Ok(4), Ok(12)]
    assert group.echo.map([1, 2], ["a", "b"]).result(T) == [Ok(((1, "a"), {})), Ok(((2, "b"), {}))]
    with pytest.raises(ValueError, match="got 3 arguments for 2 members"):
        group.add.map([1, 2, 3])


def test_group_send_reaches_all(rt, counter):
    group = rt.group([counter, rt.spawn(Counter, 10)])
    group.set.send(7)
    assert group.add.call(0).result(T) == [Ok(7), Ok(7)]


def test_wait_returns_done_and_pending_in_the_order_given(rt, counter):
    futures = [counter.add.call(1) for _ in range(5)]
    done, pending = rt.wait(futures, count=5, timeout_s=T)
    assert done == futures and pending == []
    assert rt.wait([], count=0) == ([], [])
    with pytest.raises(ValueError, match="count=6 of 5 futures"):
        rt.wait(futures, count=6)


def test_as_completed_yields_each_future_once_and_names_who_is_late(rt, counter):
    futures = [counter.add.call(1) for _ in range(5)]
    assert {id(future) for future in rt.as_completed(futures, timeout_s=T)} == {id(future) for future in futures}
    assert list(rt.as_completed([])) == []
    twice = list(rt.as_completed([futures[0], futures[0]]))
    assert twice == [futures[0], futures[0]]
    late = Future("nobody", "answers")
    results = rt.as_completed([late, futures[0]], timeout_s=0.01)
    assert next(results) is futures[0]
    with pytest.raises(CallTimeout, match=r"1 of 2 calls have not answered within 0.01 s: nobody.answers\(\)"):
        next(results)


def test_as_completed_yields_in_the_order_of_arrival():
    futures = [Future("actor", f"number {number}") for number in range(3)]
    arriving = as_completed(futures, timeout_s=T)
    futures[2].settle(lambda: Ok(2))
    assert next(arriving) is futures[2]
    threading.Timer(0.01, lambda: [futures[1].settle(lambda: Ok(1)), futures[0].settle(lambda: Ok(0))]).start()
    assert list(arriving) == [futures[1], futures[0]]


def test_the_answers_of_a_group_come_with_their_member(rt, counter):
    ten, broken = rt.spawn(Counter, 10), rt.spawn(Broken, "way")
    answers = dict(rt.group([counter, ten, broken]).add.call().as_completed(T))
    assert answers[counter] == Ok(4) and answers[ten] == Ok(11)
    assert isinstance(answers[broken], Err) and isinstance(answers[broken].error, LookupError)
    by_name = GroupFuture([counter.add.call(), ten.add.call()]).as_completed(T)
    assert dict(by_name) == {counter.name: Ok(5), ten.name: Ok(12)}


def test_lookup_finds_an_actor_by_name_or_names_the_nearest(rt, counter):
    assert rt.lookup(counter.name) is counter
    near = counter.name.replace("counter", "cuonter")
    with pytest.raises(ActorError, match=rf"there is no actor named '{near}'; the nearest are .*counter/"):
        rt.lookup(near)
    with pytest.raises(ActorError, match=r"no actor named 'xyzzy'; there are \d+, see state\(\)"):
        rt.lookup("xyzzy")


def test_a_dead_actor_is_started_again_and_takes_the_calls_that_waited(rt):
    actor = rt.spawn(Counter, 3, restart=Restart(max=1, backoff_s=0.01))
    heard, told = [], threading.Event()
    rt.monitor(
        actor,
        on_restart=lambda who, error: heard.append(("restart", str(error))),
        on_exit=lambda who, error: (heard.append(("exit", str(error))), told.set()),
    )
    assert actor.add.call(1).result(T) == 4
    with pytest.raises(ActorDied, match=r"exit code 3 in leave\(\)"):
        actor.leave.call(3).result(T)
    assert [actor.add.call(1).result(T) for _ in range(2)] == [4, 5]
    actor.ready(T)
    state = rt.state()[actor.name]
    assert (actor.incarnation, state.restarts, state.status) == (1, 1, "alive")
    with pytest.raises(ActorDied, match="exit code 4"):
        actor.leave.call(4).result(T)
    with pytest.raises(ActorDied, match="was restarted 1 times within 60 s"):
        actor.add.call(1).result(T)
    assert told.wait(T)
    assert [kind for kind, _ in heard] == ["restart", "exit"] and "exit code 3" in heard[0][1]
    assert rt.state()[actor.name].status == "dead"


def test_an_actor_whose_init_always_raises_is_tried_three_times(rt):
    actor = rt.spawn(Broken, "such file", restart=Restart(max=10, backoff_s=0.01))
    with pytest.raises(LookupError, match="no such file") as caught:
        actor.add.call().result(T)
    assert "failed 3 times in a row" in "".join(caught.value.__notes__)
    assert rt.state()[actor.name].status == "failed" and actor.incarnation == 2


def test_resources_are_waited_for_in_order(rt):
    if "resources" not in rt.capabilities:
        with pytest.raises(NotSupported, match="a cluster has what its nodes have"):
            another(rt, resources=Resources(gpu=1))
        return
    with another(rt, resources=Resources(gpu=1)) as other:
        first = other.spawn(Counter, 0, resources=Resources(gpu=1))
        second = other.spawn(Counter, 5, resources=Resources(gpu=1))
        call = second.variable.call("CUDA_VISIBLE_DEVICES")
        assert first.variable.call("CUDA_VISIBLE_DEVICES").result(T) == "0"
        assert other.state()[second.name].status == "pending" and not call.done()
        other.kill(first)
        assert call.result(T) == "0"
        with pytest.raises(Infeasible, match="2 GPUs"):
            other.spawn(Counter, 0, resources=Resources(gpu=2))


def test_futures_can_be_awaited_in_any_loop(rt, counter):
    async def main():
        one = await counter.add.call(1)
        both = await asyncio.gather(_await(counter.add.call(1)), _await(counter.add.call(1)))
        group = await rt.group([counter]).add.call(1)
        with pytest.raises(Refused):
            await counter.refuse.call()
        return one, both, group

    assert asyncio.run(main()) == (4, [5, 6], [Ok(7)])


async def _await(future):
    return await future


def test_a_dead_actor_fails_pending_and_later_calls_at_once(rt, counter):
    rt.kill(counter)
    rt.kill(counter)  # to kill the dead is no error
    start = time.monotonic()
    with pytest.raises(ActorDied, match=rf"{counter.name} .*was ended by kill\(\)"):
        counter.add.call(1).result(T)
    assert time.monotonic() - start < 1
    assert rt.state()[counter.name].status == "dead"
    assert "was ended by kill()" in rt.state()[counter.name].error


def test_sys_exit_in_a_method_ends_the_actor_and_names_code_and_method(rt):
    actor = rt.spawn(Counter, 0)
    with pytest.raises(ActorDied, match=r"ended with exit code 3 in leave\(\)"):
        actor.leave.call(3).result(T)
    with pytest.raises(ActorDied):
        actor.add.call().result(T)


def test_the_monitor_hears_of_an_exit_also_when_it_asks_late(rt):
    heard = []
    actor, told = rt.spawn(Counter, 0), threading.Event()
    rt.monitor(actor, on_exit=lambda who, error: (heard.append((who, error)), told.set()))
    rt.kill(actor)
    assert told.wait(T)
    told.clear()
    rt.monitor(actor, on_exit=lambda who, error: (heard.append((who, error)), told.set()))
    assert told.wait(T)
    assert [who for who, _ in heard] == [actor, actor]
    assert all(isinstance(error, ActorDied) for _, error in heard)


def test_a_failed_one_way_call_reaches_monitor_and_log_and_not_the_caller(rt, counter, caplog):
    heard, told = [], threading.Event()
    rt.monitor(counter, on_failure=lambda who, error: (heard.append(error), told.set()))
    counter.set.send(-1)
    assert told.wait(T)
    assert isinstance(heard[0], ValueError) and "negative: -1" in str(heard[0])
    assert f"{counter.name}.set()" in heard[0].__notes__[0]
    assert f"a one-way call to {counter.name} failed" in caplog.text
    assert counter.add.call(0).result(T) == 3


def test_a_monitor_callback_may_use_the_runtime_and_its_errors_are_logged(rt, caplog):
    first, done, answers = rt.spawn(Counter, 0), threading.Event(), []

    def respawn(who, error):
        answers.append(rt.spawn(Counter, 41).add.call().result(T))
        done.set()
        raise RuntimeError("a bug in a callback")

    rt.monitor(first, on_exit=respawn)
    rt.monitor(first, on_exit=lambda who, error: last.set())
    last = threading.Event()
    rt.kill(first)
    assert done.wait(T) and answers == [42]
    assert last.wait(T) and "a bug in a callback" in caplog.text


def test_cancel_is_refused_once_the_answer_is_here(counter):
    future = counter.add.call(1)
    future.result(T)
    assert future.cancel() is False
    assert future.result(T) == 4


def test_state_names_every_actor(rt, counter):
    counter.ready(T)
    state = rt.state()[counter.name]
    assert (state.name, state.status, state.pending, state.method, state.error) == (
        counter.name,
        "alive",
        0,
        None,
        None,
    )
    assert state.pid is not None


def test_of_the_ended_actors_only_the_latest_are_known(rt, monkeypatch):
    monkeypatch.setattr(sys.modules["rlx.actors.runtime"], "KEPT_ENDED", 2)
    living, ended = rt.spawn(Counter, 0, name="living"), [rt.spawn(Counter, 0, name=f"ended/{n}") for n in range(5)]
    for handle in ended:
        rt.kill(handle)
    last = rt.spawn(Counter, 0, name="last")
    known = [name for name in rt.state() if name in ("living", "last") or name.startswith("ended")]
    assert known == ["living", "ended/3", "ended/4", "last"]
    with pytest.raises(ActorError, match="there is no actor named 'ended/0'"):
        rt.lookup("ended/0")
    assert isinstance(ended[0].add.call(1).exception(T), ActorDied)  # who has the handle is told as before
    assert living.add.call(1).result(T) == last.add.call(1).result(T) == 1
    rt.kill(living), rt.kill(last)


def test_private_names_are_not_methods(counter):
    with pytest.raises(AttributeError, match="private"):
        counter._value  # noqa: B018


def test_a_closed_runtime_refuses_and_its_actors_are_dead(rt):
    other = another(rt)
    actor, heard = other.spawn(Counter, 0), []
    actor.ready(T)
    other.monitor(actor, on_exit=lambda *a: heard.append(a))
    other.close()
    other.close()
    with pytest.raises(ActorDied, match="was closed with its runtime"):
        actor.add.call().result(T)
    with pytest.raises(ActorError, match="this runtime is closed"):
        other.spawn(Counter, 0)
    assert heard == []


def test_an_unknown_engine_is_refused_by_name():
    with pytest.raises(
        ConfigError, match="engine 'lcoal' is not an actor engine; use 'local', 'inline', 'cluster', 'ray'"
    ):
        actors.runtime("lcoal")


def test_an_engine_that_is_not_installed_is_refused_with_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(
        MissingExtra, match=r"^engine 'ray' needs Ray, which is not installed: pip install 'rlx\[ray\]'.$"
    ):
        actors.runtime("ray")
    with pytest.raises(MissingExtra, match=r"pip install 'rlx\[ray\]'"):  # also where no actor will be needed
        PPOConfig().environment("CartPole-v1").runtime(engine="ray").build()


# What engine "inline" does with coroutines; other engines follow.

in_the_caller = pytest.mark.parametrize("rt", ["inline", "strict"], indirect=True)


@in_the_caller
def test_coroutine_methods_run_to_the_end_in_one_loop_also_below_a_running_one(rt):
    actor = rt.spawn(Waiter, concurrency=4)
    assert [actor.add.call(number).result(T) for number in (1, 2)] == [1, 3]
    with pytest.raises(Refused, match="7"):
        actor.refuse.call().result(T)

    async def main():
        return await actor.add.call(4), asyncio.get_running_loop() is not None

    assert asyncio.run(main()) == (7, True)
    rt.kill(actor)  # and its loop is closed: an open one would warn


# Messages: what goes through pickle on the engines that have it.

pickling_engines = pytest.mark.parametrize("rt", ["strict", *PROCESSES], indirect=True)


@pickling_engines
def test_the_remote_traceback_arrives_as_a_note(counter):
    error = counter.refuse.call().exception(T)
    assert error is not None
    assert "in refuse" in error.__notes__[0] and 'raise Refused(7, why="closed")' in error.__notes__[0]


@pickling_engines
def test_an_exception_that_cannot_be_rebuilt_is_a_remote_error_with_the_traceback(counter):
    with pytest.raises(RemoteError, match="Sealed: key 3") as caught:
        counter.seal.call().result(T)
    assert "in seal" in str(caught.value)
    assert counter.add.call(1).result(T) == 4


@pickling_engines
def test_an_argument_that_cannot_be_pickled_is_refused_at_the_call_by_its_path(counter):
    with pytest.raises(TypeError, match=r"arguments\[0\]\[1\]\['inner'\] is a _thread.lock, which cannot be sent"):
        counter.echo.call(1, {"inner": threading.Lock()})
    assert counter.add.call(1).result(T) == 4


@pickling_engines
def test_a_result_that_cannot_be_pickled_is_an_error_by_its_path_and_the_actor_lives(counter):
    with pytest.raises(TypeError, match=r"the result of .*\.lock\(\)\['inner'\] is a _thread.lock"):
        counter.lock.call().result(T)
    assert counter.add.call(1).result(T) == 4


@pickling_engines
def test_a_future_cannot_be_sent_and_says_what_can(counter):
    with pytest.raises(TypeError, match=r"send its result\(\)"):
        counter.echo.call(counter.add.call())


@pickling_engines
def test_a_handle_cannot_be_sent_yet(counter):
    with pytest.raises(NotSupported, match="cannot be sent"):
        counter.echo.call(counter)


@pickling_engines
def test_messages_share_no_memory_with_the_sender(counter):
    array = np.zeros(100_000)
    counter.set.call(array.size)
    counter.note.call(array).result(T)
    array[:] = 1
    assert counter.get.call("log").result(T)[0].sum() == 0


@pickling_engines
def test_functions_lambdas_and_local_classes_travel(counter):
    class Local:
        value = 5

    (function, made), _ = counter.echo.call(lambda x: x + 1, Local()).result(T)
    assert function(1) == 2 and isinstance(made, Local) and made.value == 5


@pickling_engines
@pytest.mark.parametrize("size", [0, 1, 16 * 1024 - 1, 16 * 1024, 300_000])
def test_arrays_of_every_size_and_layout_come_back_equal(counter, size):
    rng = np.random.default_rng(size)
    array = rng.integers(0, 255, size, dtype=np.uint8)
    fortran = np.asfortranarray(rng.normal(size=(max(size // 16, 1), 2)))
    sent = {"plain": array, "strided": array[::3], "fortran": fortran, "bytes": array.tobytes(), "empty": b""}
    ((got,), _) = counter.echo.call(sent).result(T)
    for key, value in sent.items():
        np.testing.assert_array_equal(got[key], value)


@pickling_engines
def test_tensors_keep_dtype_shape_gradient_flag_and_value(counter):
    base = torch.arange(30_000, dtype=torch.float32)
    sent = [
        base,
        base.view(100, 300).t(),
        base.to(torch.bfloat16),
        base > 7,
        torch.tensor(3.5, dtype=torch.float64),
        torch.empty(0, 4),
        torch.tensor([1 + 2j, 3j]).conj(),
        torch.ones(3, requires_grad=True),
        torch.nn.Parameter(torch.ones(20_000), requires_grad=False),
        torch.eye(3).to_sparse(),
    ]
    (got, _) = counter.echo.call(*sent).result(T)
    for want, have in zip(sent, got, strict=True):
        assert (have.dtype, have.shape, have.requires_grad, have.layout) == (
            want.dtype,
            want.shape,
            want.requires_grad,
            want.layout,
        )
        assert type(have) is type(want)
        assert torch.equal(have.to_dense(), want.to_dense())


@pickling_engines
def test_one_object_sent_twice_is_one_object_there(counter):
    tensor = torch.ones(20_000)
    ((first, second), _) = counter.echo.call(tensor, tensor).result(T)
    assert first is second


def test_inline_passes_objects_as_they_are():
    with actors.runtime("inline") as runtime:
        marker = object()
        assert runtime.spawn(Counter, 0).echo.call(marker).result() == ((marker,), {})
