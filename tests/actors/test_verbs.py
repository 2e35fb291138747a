"""Streams, async and threaded actors, puts, channels: what every engine promises of them."""

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
from rlx.actors import Restart
from rlx.errors import ActorBusy, ActorDied, CallCancelled, CallTimeout, ObjectMemoryFull
from tests.actors.engines import ALL, PROCESSES, opened
from tests.polling import until

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # a process cannot import a test module by its name

pytestmark = pytest.mark.timeout(180)
T = 60.0  # a deadline, not a delay
MIB = 2**20

on_processes = pytest.mark.parametrize("rt", PROCESSES, indirect=True)
on_this_machine = pytest.mark.parametrize("rt", ["local"], indirect=True)


@pytest.fixture(scope="module", params=ALL)
def rt(request):
    with opened(request.param) as runtime:
        yield runtime


@pytest.fixture
def source(rt):
    handle = rt.spawn(Source)
    yield handle
    rt.kill(handle)


def lines(path):
    return path.read_text().split() if path.exists() else []


class Source:
    """Its generators note in a file what they do."""

    def __init__(self, channel=None):
        self.channel, self.kept = channel, []

    def count(self, end, log=None):
        try:
            for number in range(end):
                if log is not None:
                    _note(log, number)
                yield number
        finally:
            if log is not None:
                _note(log, "ended")

    def arrays(self, end, size):
        for number in range(end):
            yield np.full(size, number, np.uint8)

    def fail_after(self, end):
        yield from range(end)
        raise LookupError("no more")

    def iterator(self):
        return iter([1, 2])

    def number(self):
        return 7

    def echo(self, *args):
        return args

    def total(self, value):
        return float(sum(part.sum() for part in value["nested"]))

    def is_writable(self, *arrays):
        return [array.flags.writeable for array in arrays]

    def keep(self, value):
        self.kept.append(value)

    def let_go(self):
        self.kept.clear()

    def newest(self, channel=None):
        found = (channel or self.channel).latest()
        return None if found is None else (found.version, found.value)

    def context(self):
        call = actors.current()
        return call.actor, call.cancelled()

    def until_cancelled(self, path):
        with open(path, "w") as fifo:
            fifo.write("begun")
        deadline = time.monotonic() + T
        while not actors.current().cancelled():
            assert time.monotonic() < deadline
        return "cancelled"

    def wait_for(self, path):
        with open(path) as fifo:
            return fifo.read()

    def leave(self):
        sys.exit(3)


class Waiter:
    """Most of its methods are tasks of a loop."""

    def __init__(self):
        self.event, self.log = None, []

    async def wait(self):
        self.event = self.event or asyncio.Event()
        await self.event.wait()
        return "waited"

    async def set(self):
        self.event = self.event or asyncio.Event()
        self.event.set()

    async def count(self, end, log=None):
        try:
            for number in range(end):
                await asyncio.sleep(0)
                yield number
        finally:
            if log is not None:
                _note(log, "ended")

    async def sleep(self):
        try:
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            self.log.append("cancelled")
            raise

    def plain(self, value):
        return value, actors.current().actor, list(self.log)

    def plain_count(self, end):
        yield from range(end)

    async def fail_after(self, end):
        for number in range(end):
            yield number
        raise LookupError("no more")


class Meeting:
    """Three calls can only end together."""

    def __init__(self):
        self.barrier, self.lock, self.started = threading.Barrier(3), threading.Lock(), []

    def meet(self, number):
        self.barrier.wait(T)
        return number, threading.get_ident()

    def start(self, number):
        with self.lock:
            self.started.append(number)

    def order(self):
        return self.started


def _note(path, what):
    with open(path, "a") as file:
        file.write(f"{what}\n")


# Streams.


@pytest.mark.parametrize("credits", [1, 2, 3, 8, 100])
def test_a_stream_gives_every_item_in_order_and_then_ends_for_good(source, credits):
    stream = source.count.stream(50, credits=credits)
    assert list(stream) == list(range(50))
    assert list(stream) == []
    assert list(source.count.stream(0, credits=credits)) == []
    assert list(source.iterator.stream(credits=credits)) == [1, 2]


@pytest.mark.parametrize("kind", [Source, Waiter])
def test_an_error_comes_after_the_items_that_were_yielded_before_it(rt, kind):
    stream, got = rt.spawn(kind).fail_after.stream(5, credits=2), []
    with pytest.raises(LookupError, match="no more") as caught:
        for item in stream:
            got.append(item)
    assert got == [0, 1, 2, 3, 4] and "fail_after()" in "".join(caught.value.__notes__)


def test_what_yields_nothing_is_a_type_error(source):
    with pytest.raises(TypeError, match=r"number\(\) returned a int; stream\(\) needs a generator or an iterator"):
        source.number.stream().next(T)
    with pytest.raises(AttributeError, match="no attribute 'cuont'"):
        source.cuont.stream(3).next(T)
    with pytest.raises(ValueError, match="credits=0"):
        source.count.stream(3, credits=0)


@pytest.mark.parametrize("credits", [1, 3, 8])
def test_credits_bound_how_far_the_actor_is_ahead(source, tmp_path, credits):
    log = tmp_path / "log"
    stream = source.count.stream(1000, str(log), credits=credits)
    for taken in range(1, 20):
        assert stream.next(T) == taken - 1
        assert len(lines(log)) <= taken + credits
    until(lambda: len(lines(log)) >= 19 + (credits + 1) // 2)  # and it does run ahead


def test_the_actor_stands_still_when_the_credits_are_used_up(source, tmp_path):
    log = tmp_path / "log"
    stream = source.count.stream(1000, str(log), credits=4)
    until(lambda: len(lines(log)) == 4)
    with pytest.raises(AssertionError):  # a fifth would come at once
        deadline = time.monotonic() + 0.2
        while len(lines(log)) == 4:
            assert time.monotonic() < deadline
    assert stream.next(T) == 0


@pytest.mark.parametrize("end", ["close", "with", "drop"])
def test_a_stream_that_is_left_early_ends_its_generator(source, tmp_path, end):
    log = tmp_path / "log"
    stream = source.count.stream(10**9, str(log), credits=2)
    assert stream.next(T) == 0
    if end == "close":
        stream.close()
        stream.close()
        assert list(stream) == []
    elif end == "with":
        with stream:
            assert stream.next(T) == 1
        assert list(stream) == []
    del stream
    until(lambda: lines(log)[-1] == "ended")
    assert source.number.call().result(T) == 7
    assert len(lines(log)) < 10


def test_a_closed_stream_of_an_async_generator_has_run_its_finally(rt, tmp_path):
    log, actor = tmp_path / "log", rt.spawn(Waiter)
    stream = actor.count.stream(10**9, str(log), credits=2)
    assert [stream.next(T), stream.next(T)] == [0, 1]
    stream.close()
    until(lambda: lines(log) == ["ended"])
    assert actor.plain.call(1).result(T)[0] == 1
    rt.kill(actor)


def test_async_generators_and_plain_ones_of_an_async_actor_are_streams_too(rt):
    actor = rt.spawn(Waiter)
    assert list(actor.count.stream(300, credits=8)) == list(range(300))
    assert list(actor.plain_count.stream(20, credits=1)) == list(range(20))
    rt.kill(actor)


def test_a_stream_can_be_read_by_a_coroutine(source):
    async def main():
        return [item async for item in source.count.stream(30, credits=2)]

    assert asyncio.run(main()) == list(range(30))


def test_large_items_arrive_whole(source):
    for number, array in enumerate(source.arrays.stream(20, MIB, credits=2)):
        assert array.shape == (MIB,) and array[0] == array[-1] == number


def test_a_stream_of_a_dead_actor_says_so(rt):
    actor = rt.spawn(Source)
    stream = actor.count.stream(10**9, credits=2)
    assert stream.next(T) == 0
    rt.kill(actor)
    with pytest.raises(ActorDied):
        for _ in range(10):
            stream.next(T)
    with pytest.raises(ActorDied, match=r"was ended by kill\(\)"):
        actor.count.stream(3).next(T)


@on_processes
def test_a_late_item_is_a_timeout_and_the_stream_goes_on(rt, source, gate):
    path, open_gate = gate
    running, stream = source.wait_for.call(path), source.count.stream(3)
    with pytest.raises(CallTimeout, match=r"count\(\)( on \w+)? has yielded nothing for 0.05 s"):
        stream.next(0.05)
    open_gate()
    assert running.result(T) == "open" and list(stream) == [0, 1, 2]


# Calls that run at once.


@on_processes
def test_tasks_run_at_once_and_plain_methods_in_between(rt):
    actor = rt.spawn(Waiter)
    waiting = [actor.wait.call() for _ in range(50)]
    assert actor.plain.call(5).result(T) == (5, actor.name, [])
    assert not any(future.done() for future in waiting)
    actor.set.call().result(T)
    assert [future.result(T) for future in waiting] == ["waited"] * 50


@on_processes
def test_a_running_task_can_be_cancelled(rt):
    actor = rt.spawn(Waiter)
    sleeping, other = actor.sleep.call(), actor.wait.call()
    assert actor.plain.call(1).result(T)[2] == []  # it has begun
    assert sleeping.cancel()
    with pytest.raises(CallCancelled, match=r"sleep\(\) was cancelled while it ran"):
        sleeping.result(T)
    assert actor.plain.call(1).result(T)[2] == ["cancelled"] and not other.done()
    actor.set.call().result(T)
    assert other.result(T) == "waited"


@on_processes
def test_concurrency_bounds_the_tasks(rt):
    actor = rt.spawn(Waiter, concurrency=2)
    waiting = [actor.wait.call() for _ in range(2)]
    setting = actor.set.call()
    with pytest.raises(CallTimeout):
        setting.result(0.1)
    assert waiting[0].cancel()
    setting.result(T)
    assert waiting[1].result(T) == "waited"


@on_processes
def test_calls_of_a_threaded_actor_run_at_once_and_start_in_order(rt):
    actor = rt.spawn(Meeting, concurrency=3)
    met = [future.result(T) for future in [actor.meet.call(n) for n in range(3)]]
    assert [number for number, _ in met] == [0, 1, 2] and len({thread for _, thread in met}) == 3
    single = rt.spawn(Meeting, concurrency=2)
    waiting = [single.meet.call(n) for n in range(2)]  # a third would be needed, and has no place
    with pytest.raises(CallTimeout):
        rt.group([single]).meet.call(2).values(0.1)
    assert not any(future.done() for future in waiting)
    rt.kill(single)
    for n in range(200):
        actor.start.send(n)
    until(lambda: len(actor.order.call().result(T)) == 200)


def test_streams_and_calls_of_a_threaded_actor_do_not_hold_each_other_up(rt):
    actor = rt.spawn(Source, concurrency=3)
    streams = [actor.count.stream(100, credits=1) for _ in range(2)]
    for n in range(50):
        assert [stream.next(T) for stream in streams] == [n, n]
        assert actor.number.call().result(T) == 7
    streams[0].close()
    assert list(streams[1]) == list(range(50, 100))


@pytest.mark.parametrize("concurrency", [None, 3])
def test_a_call_knows_its_actor_and_that_nobody_has_cancelled_it(rt, concurrency):
    actor = rt.spawn(Source, concurrency=concurrency)
    assert actor.context.call().result(T) == (actor.name, False)
    assert actors.current() is None


@on_processes
@pytest.mark.parametrize("concurrency", [None, 3])
def test_a_running_method_sees_that_it_was_cancelled(rt, gate, concurrency):
    if concurrency is None and "cancellation" not in rt.capabilities:
        pytest.skip("needs the capability 'cancellation'")
    actor = rt.spawn(Source, concurrency=concurrency)
    running = actor.until_cancelled.call(gate[0])
    with open(gate[0]) as fifo:
        assert fifo.read() == "begun"
    assert running.cancel()
    assert running.result(T) == "cancelled"


def test_max_pending_makes_the_next_call_wait_and_fail_at_last(gate):
    path, open_gate = gate
    with actors.runtime("local", preload=()) as own:
        actor = own.spawn(Source, max_pending=3)
        actor.ready(T)
        own._engine.system_timeout_s = 0.5  # only now: to start takes longer on a busy machine
        futures = [actor.wait_for.call(path), actor.number.call(), actor.number.call()]
        with pytest.raises(ActorBusy, match=r"has 3 unanswered calls and finished none within 0.5 s"):
            actor.number.call()
        own._engine.system_timeout_s = T
        threading.Timer(0.05, open_gate).start()
        assert actor.number.call().result(T) == 7  # it waits for the place
        assert [future.result(T) for future in futures] == ["open", 7, 7]


def test_first_ready_iteration_keeps_every_actor_busy_and_loses_none(rt):
    """The pattern of a driver that hands out new work to whoever is done."""
    members = [rt.spawn(Source) for _ in range(4)]
    work = iter(range(400))
    running = {member.echo.call(next(work)): member for member in members}
    done = []
    while running:
        ready, _ = rt.wait(list(running), 1, T)
        assert ready
        for future in ready:
            member = running.pop(future)
            done += future.result(T)
            item = next(work, None)
            if item is not None:
                running[member.echo.call(item)] = member
    assert sorted(done) == list(range(400))


# Data.


def test_a_put_arrives_as_its_value_at_any_depth(rt, source):
    array = np.arange(100_000, dtype=np.float64)
    ref = rt.put({"nested": [array, array]})
    assert source.total.call(ref).result(T) == 2 * array.sum()
    part = rt.put(array)
    assert source.total.call({"nested": (part, part)}).result(T) == 2 * array.sum()
    assert np.array_equal(ref.get()["nested"][1], array)
    small = rt.put("small")
    assert source.echo.call([small], {"key": small}).result(T) == (["small"], {"key": "small"})


def test_a_put_is_a_copy_of_what_the_value_was(rt, source):
    array = np.zeros(100_000)
    ref = rt.put({"nested": [array]})
    array[:] = 1
    assert source.total.call(ref).result(T) == 0


@on_this_machine
@pytest.mark.parametrize(
    "value", [np.zeros(4 * MIB, np.uint8), torch.zeros(MIB), b"x" * 4 * MIB], ids=["array", "tensor", "bytes"]
)
def test_a_put_is_one_copy_for_all_and_free_when_ref_and_views_are_gone(rt, source, value):
    arena, other = rt._engine.memory.arena, rt.spawn(Source)
    gone = lambda: arena.reclaim() == 0  # noqa: E731
    until(gone)
    ref = rt.put(value)
    one = arena.used_bytes
    assert 4 * MIB <= one < 5 * MIB
    for member in (source, other):
        member.keep.call([ref]).result(T)
    assert arena.reclaim() == one
    del ref
    assert arena.reclaim() == one or isinstance(value, bytes)  # bytes are unpickled into memory of their own
    source.let_go.call().result(T)
    rt.kill(other)
    until(gone)


@on_this_machine
def test_a_long_body_travels_in_shared_memory(rt, source):
    before = rt._engine.memory.arena.reclaim()
    value = os.urandom(3 * MIB)
    future = source.echo.call(value)
    assert rt._engine.memory.arena.used_bytes >= before + 3 * MIB
    assert future.result(T) == (value,)
    text = "ü" * MIB
    assert source.echo.call(text, 1).result(T) == (text, 1)


def test_a_message_beyond_the_object_memory_is_an_error_and_the_actor_lives():
    with actors.runtime("local", preload=("numpy",), object_memory=4 * MIB) as own:
        actor = own.spawn(Source)
        with pytest.raises(ObjectMemoryFull, match=r"no room for a message of 8.0 MiB"):
            actor.echo.call(np.zeros(8 * MIB, np.uint8))
        with pytest.raises(ObjectMemoryFull, match=r"no room for a message of 8.0 MiB"):
            actor.arrays.stream(1, 8 * MIB).next(T)
        assert actor.number.call().result(T) == 7


@on_processes
@pytest.mark.parametrize("size", [4_000, 50_000])
def test_arrays_are_read_only_whether_they_come_in_the_frame_or_in_shared_memory(rt, source, size):
    array = np.zeros(size)
    assert source.is_writable.call(array, rt.put(array)).result(T) == [False, False]
    (back,) = source.echo.call(array).result(T)
    assert not back.flags.writeable


# Channels.


def test_a_channel_reaches_its_reader_through_the_constructor_and_through_a_call(rt):
    channel = rt.channel(f"weights {rt._engine.__class__.__name__} {id(rt)}")
    by_init, by_call = rt.spawn(Source, channel), rt.spawn(Source)
    assert by_init.newest.call().result(T) is None and by_call.newest.call(channel).result(T) is None
    for version in (1, 2):
        assert channel.publish(np.full(50_000, version)) == version
        for future in (by_init.newest.call(), by_call.newest.call(channel)):
            number, value = future.result(T)
            assert number == version and (value == version).all()
    assert channel.publish("nine", version=9) == 9
    assert by_init.newest.call().result(T) == (9, "nine")


@on_processes
def test_channels_reach_the_next_incarnation_too(rt):
    init, call = rt.channel("of init"), rt.channel("of call")
    actor = rt.spawn(Source, init, restart=Restart(max=2, backoff_s=0.01))
    init.publish("a"), call.publish("b")
    assert actor.newest.call().result(T) == (1, "a") and actor.newest.call(call).result(T) == (1, "b")
    for _ in range(2):
        assert isinstance(actor.leave.call().exception(T), ActorDied)
        assert actor.newest.call(call).result(T) == (1, "b") and actor.newest.call().result(T) == (1, "a")
    assert list(init.readers()) == [actor.name] and list(call.readers()) == [actor.name]


@on_processes
def test_threads_of_an_actor_that_meet_new_channels_at_once_all_get_theirs(rt):
    for round_ in range(10):
        actor = rt.spawn(Source, concurrency=4)
        channels = [rt.channel(f"many {round_} {n}") for n in range(8)]
        for n, channel in enumerate(channels):
            channel.publish(n)
        futures = [actor.newest.call(channel) for channel in channels]
        assert [future.result(T) for future in futures] == [(1, n) for n in range(8)]
        rt.kill(actor)
