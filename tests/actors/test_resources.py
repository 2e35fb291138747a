"""Who gets what, who waits for whom, and that nothing is lost: totals given by hand, so no GPU is needed."""

import itertools
import os
import signal
import sys
import threading
import time

import cloudpickle
import pytest

from rlx import actors
from rlx.actors import Resources, Restart, machine, reservation
from rlx.actors.resources import Pool
from rlx.errors import ActorDied, ActorError, CallTimeout, Infeasible

cloudpickle.register_pickle_by_value(sys.modules[__name__])

pytestmark = pytest.mark.timeout(60)
T = 20.0
GIB = 2**30


@pytest.fixture
def rt(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    total = Resources(cpu=4, gpu=2, memory=8 * GIB, custom={"license": 1})
    with actors.runtime("local", preload=("numpy",), resources=total) as runtime:
        yield runtime


class User:
    def __init__(self, fails=False):
        self.devices = os.environ.get("CUDA_VISIBLE_DEVICES")
        if fails:
            raise LookupError("no such file")

    def gpus(self):
        return self.devices

    def die(self):
        os.kill(os.getpid(), signal.SIGKILL)

    def add(self, number):
        return number + 1


def status(rt, actor):
    return rt.state()[actor.name].status


def pool(**given):
    devices = dict.fromkeys("01"[: int(given.get("gpu", 0))], 1.0)
    return Pool("this runtime", Resources(**given), devices)


# The ledger alone.


def test_shares_of_a_gpu_go_where_they_leave_the_least_so_whole_ones_stay_whole():
    ledger = pool(gpu=2)
    first, second = ledger.claim("a", [Resources(gpu=0.5)]), ledger.claim("b", [Resources(gpu=0.25)])
    whole = ledger.claim("c", [Resources(gpu=1)])
    third = ledger.claim("d", [Resources(gpu=0.25)])
    assert [claim.devices for claim in (first, second, whole, third)] == [[("0",)], [("0",)], [("1",)], [("0",)]]
    fourth = ledger.claim("e", [Resources(gpu=0.1)])
    assert not fourth.granted
    whole.release()
    assert fourth.granted and fourth.devices == [("1",)]


def test_three_thirds_are_one_gpu_and_come_back_whole():
    ledger = pool(gpu=1)
    claims = [ledger.claim(name, [Resources(gpu=1 / 3)]) for name in "abc"]
    assert all(claim.granted for claim in claims)
    whole = ledger.claim("d", [Resources(gpu=1)])
    for claim in claims:
        assert not whole.granted
        claim.release()
        claim.release()  # twice gives back once
    assert whole.granted


def test_who_came_first_is_served_first_so_a_large_claim_is_not_overtaken_for_ever():
    ledger = pool(cpu=4)
    small = [ledger.claim(f"small/{n}", [Resources(cpu=1)]) for n in range(2)]
    large, late = ledger.claim("large", [Resources(cpu=4)]), ledger.claim("late", [Resources(cpu=1)])
    assert not large.granted and not late.granted
    assert large.waiting() == "waits for 4 CPUs: 2 CPUs of 4 free; held by small/0 (1 CPU), small/1 (1 CPU)"
    assert (late.waiting() or "").endswith("large (4 CPUs) is first in the queue")
    large.release()  # it gives up, and late need not wait any more
    assert late.granted and late.waiting() is None
    assert [claim.granted for claim in small] == [True, True]


def test_several_bundles_are_granted_together_or_not_at_all():
    ledger = pool(gpu=2, cpu=4)
    one = ledger.claim("one", [Resources(gpu=1)])
    both = ledger.claim("both", [Resources(gpu=1, cpu=1), Resources(gpu=1, cpu=2)])
    assert not both.granted
    one.release()
    assert both.granted and sorted(both.devices) == [("0",), ("1",)]


@pytest.mark.parametrize(
    ("wants", "text"),
    [
        (Resources(gpu=3), "a asks for 3 GPUs, and this runtime has 2 GPUs"),
        (
            Resources(cpu=8, memory=3 * GIB),
            "a asks for 8 CPUs, 3 GiB memory, and this runtime has 4 CPUs, 2 GiB memory",
        ),
        (Resources(custom={"licence": 1}), "a asks for 1 licence, and this runtime has 0 licence"),
    ],
)
def test_what_can_never_be_is_refused_at_once_naming_asked_and_total(wants, text):
    with pytest.raises(Infeasible, match=text):
        pool(cpu=4, gpu=2, memory=2 * GIB, custom={"license": 1}).claim("a", [wants])


def test_shares_that_no_device_can_hold_together_are_infeasible():
    with pytest.raises(Infeasible, match="a share of a GPU lies on one device"):
        pool(gpu=2).claim("a", [Resources(gpu=0.6)] * 3)


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ({"gpu": 1.5}, "gpu=1.5 must be a fraction up to 1 or a whole number"),
        ({"cpu": -1}, "cpu=-1 must be a number of at least 0"),
        ({"memory": float("nan")}, "memory=nan must be a number"),
        ({"custom": {"gpu": 1}}, "names 'gpu'; that is a field of its own"),
    ],
)
def test_impossible_resources_are_refused_in_a_sentence(wrong, text):
    with pytest.raises(ValueError, match=text):
        Resources(**wrong)


# The machine.


def test_the_cpus_of_a_cgroup_count_where_they_are_fewer(monkeypatch, tmp_path):
    """Here: a quota of 1.5 CPUs two levels up, in a version 2 tree."""
    group = tmp_path / "outer" / "inner"
    group.mkdir(parents=True)
    (tmp_path / "outer" / "cpu.max").write_text("150000 100000\n")
    (group / "cpu.max").write_text("max 100000\n")
    (tmp_path / "outer" / "memory.max").write_text("1048576\n")
    (group / "memory.max").write_text("max\n")
    listing = tmp_path / "cgroup"
    listing.write_text("0::/outer/inner\n")
    monkeypatch.setattr(machine, "CGROUPS", tmp_path)
    monkeypatch.setattr(machine, "MEMBERSHIP", listing)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3})
    assert machine.cpu_count() == 1.5
    assert machine.memory_bytes() == 1048576


def test_without_limits_it_is_the_machine(monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "MEMBERSHIP", tmp_path / "none")
    assert machine.cpu_count() == len(os.sched_getaffinity(0))
    assert machine.memory_bytes() == os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


HAS_GPU = os.path.exists("/dev/nvidiactl")


@pytest.mark.skipif(HAS_GPU, reason="this machine has a GPU")
def test_a_machine_without_gpus_says_so_when_asked_for_one():
    with (
        actors.runtime("inline") as runtime,
        pytest.raises(Infeasible, match=r"asks for 1 GPU, and this runtime has 0 GPUs \(NVML finds no NVIDIA driver"),
    ):
        runtime.spawn(User, resources=Resources(gpu=1))


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_GPU, reason="this machine has no GPU")
def test_the_gpus_of_this_machine_are_counted_and_can_be_hidden(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    names, _ = machine.gpus()
    assert names and names == [str(index) for index in range(len(names))]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", f"0,{len(names)},0")
    assert machine.gpus()[0] == ["0"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert machine.gpus() == ([], "CUDA_VISIBLE_DEVICES='' hides them")


def test_the_devices_given_out_are_those_the_driver_may_see(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3, GPU-5f")
    with actors.runtime("inline", resources=Resources(gpu=2)) as runtime:
        devices = [runtime.spawn(User, resources=Resources(gpu=1)).gpus.call().result(T) for _ in range(2)]
        assert sorted(devices) == ["3", "GPU-5f"]
    with pytest.raises(ValueError, match=r"gpu=3: CUDA_VISIBLE_DEVICES lists \['3', 'GPU-5f'\]"):
        actors.runtime("inline", resources=Resources(gpu=3))


# Actors.


def test_actors_see_the_gpus_they_got_and_others_see_what_the_driver_sees(rt):
    whole = rt.spawn(User, resources=Resources(gpu=1))
    halves = [rt.spawn(User, resources=Resources(gpu=0.5)) for _ in range(2)]
    plain = rt.spawn(User, resources=Resources(cpu=1))
    assert [actor.gpus.call().result(T) for actor in (whole, *halves, plain)] == ["0", "1", "1", None]
    assert rt.state()[whole.name].resources == "1 GPU"
    for actor in (whole, *halves):
        rt.kill(actor)
    assert rt.spawn(User, resources=Resources(gpu=2)).gpus.call().result(T) == "0,1"


def test_an_actor_waits_in_the_queue_with_its_calls_until_another_ends(rt):
    first = rt.spawn(User, resources=Resources(gpu=2))
    second = rt.spawn(User, resources=Resources(gpu=1))
    call = second.add.call(1)
    state = rt.state()[second.name]
    assert (state.status, state.pid, state.pending) == ("pending", None, 1)
    assert state.waiting == f"waits for 1 GPU: 0 GPUs of 2 free; held by actor {first.name} (2 GPUs)"
    with pytest.raises(CallTimeout, match=rf"{second.name} is not ready after 0.01 s: it waits for 1 GPU"):
        second.ready(0.01)
    rt.kill(first)
    assert call.result(T) == 2 and second.gpus.call().result(T) == "0"
    assert rt.state()[second.name].waiting is None and status(rt, second) == "alive"


@pytest.mark.parametrize("end", ["kill", "die", "init"])
def test_resources_come_back_however_the_actor_ends(rt, end):
    holder = rt.spawn(User, end == "init", resources=Resources(cpu=4))
    waiting = rt.spawn(User, resources=Resources(cpu=4))
    if end == "kill":
        rt.kill(holder)
    elif end == "die":
        holder.die.call().exception(T)
    assert waiting.add.call(1).result(T) == 2


def test_a_restarted_actor_keeps_its_devices(rt):
    actor = rt.spawn(User, resources=Resources(gpu=1), restart=Restart(backoff_s=0.01))
    waiting = rt.spawn(User, resources=Resources(gpu=2))
    device = actor.gpus.call().result(T)
    actor.die.call().exception(T)
    assert actor.gpus.call().result(T) == device and actor.incarnation == 1
    assert status(rt, waiting) == "pending"
    rt.kill(actor)
    assert waiting.gpus.call().result(T) == "0,1"


def test_a_pending_actor_can_be_killed_and_lets_the_next_one_through(rt):
    rt.spawn(User, resources=Resources(cpu=1))
    large, small = rt.spawn(User, resources=Resources(cpu=4)), rt.spawn(User, resources=Resources(cpu=1))
    call = large.add.call(1)
    rt.kill(large)
    with pytest.raises(ActorDied, match=r"was ended by kill\(\) while pending"):
        call.result(T)
    assert small.add.call(1).result(T) == 2


def test_waiting_for_longer_than_pending_timeout_s_ends_it_naming_the_holder(monkeypatch, caplog):
    monkeypatch.setattr("rlx.actors.life.WAIT_WARNING_S", 0.05)
    given = Resources(custom={"license": 1})
    with actors.runtime("inline", resources=given, pending_timeout_s=0.2) as runtime:
        runtime.spawn(User, name="holder", resources=given)
        late = runtime.spawn(User, resources=given)
        with pytest.raises(ActorError, match=r"was not started within 0.2 s: .* held by actor holder \(1 license\)"):
            late.add.call(1).result(T)
        assert status(runtime, late) == "dead"
        assert "waits for 1 license: 0 license of 1 free; held by actor holder" in caplog.text


def test_a_pending_actor_ends_with_its_runtime():
    runtime = actors.runtime("inline", resources=Resources(custom={"license": 1}))
    for _ in range(2):
        actor = runtime.spawn(User, resources=Resources(custom={"license": 1}))
    call = actor.add.call(1)
    runtime.close()
    with pytest.raises(ActorDied, match="was closed with its runtime while pending"):
        call.result(T)


def test_a_visible_device_list_of_ones_own_and_asking_for_gpus_exclude_each_other(rt):
    with pytest.raises(ValueError, match="leave one out"):
        rt.spawn(User, env={"CUDA_VISIBLE_DEVICES": "1"}, resources=Resources(gpu=2))
    assert rt.spawn(User, resources=Resources(gpu=2)).gpus.call().result(T) == "0,1"  # what was refused holds nothing


@pytest.mark.parametrize("wanted", [Resources(), Resources(cpu=1, gpu=1)])
def test_there_is_room_for_what_can_be_counted_only(rt, wanted):
    with pytest.raises(ValueError, match=f"and {wanted} was asked for"):
        rt.room_for(wanted)


def test_no_more_actors_live_than_max_actors():
    with actors.runtime("inline", max_actors=2) as runtime:
        first, _ = runtime.spawn(User), runtime.spawn(User)
        with pytest.raises(ActorError, match="has 2 living actors, and that is its limit"):
            runtime.spawn(User)
        runtime.kill(first)
        assert runtime.spawn(User).add.call(1).result() == 2


# Reservations.


def test_actors_draw_from_the_bundle_they_are_given(rt):
    with rt.reserve([Resources(gpu=1, cpu=2), Resources(gpu=1)]) as reserved:
        outside = rt.spawn(User, resources=Resources(gpu=1))
        halves = [rt.spawn(User, resources=Resources(gpu=0.5), reservation=reserved[0]) for _ in range(2)]
        whole = rt.spawn(User, reservation=reserved[1])
        assert [actor.gpus.call().result(T) for actor in (*halves, whole)] == ["0", "0", "1"]
        with pytest.raises(Infeasible, match="bundle 1 of the reservation has 0 CPUs"):
            rt.spawn(User, resources=Resources(cpu=1), reservation=reserved[1])
        queued = rt.spawn(User, resources=Resources(cpu=2), reservation=reserved[0])
        assert queued.add.call(1).result(T) == 2
        late = rt.spawn(User, resources=Resources(gpu=1), reservation=reserved[0])
        assert status(rt, late) == status(rt, outside) == "pending"
    with pytest.raises(ActorError, match="the reservation has been released"):
        rt.spawn(User, reservation=reserved[0])
    with pytest.raises(ActorError, match="the reservation has been released"):
        late.ready(T)
    assert whole.add.call(1).result(T) == 2  # release ends nobody, and gives away nothing that is in use
    assert status(rt, outside) == "pending"
    for actor in (*halves, whole, queued):
        rt.kill(actor)
    assert outside.gpus.call().result(T) == "0"


def test_reservations_made_at_once_never_wait_for_each_other(rt):
    """Each takes both GPUs in opposite order, over and over; taken one by one they would hang."""
    rounds = []

    def work(orders):
        for _ in range(50):
            with rt.reserve(orders, timeout_s=T):
                rounds.append(1)

    both = [Resources(gpu=1, cpu=1), Resources(gpu=1)]
    threads = [threading.Thread(target=work, args=(order,)) for order in (both, both[::-1], both)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(T)
    assert len(rounds) == 150


def test_a_reservation_that_is_not_granted_in_time_says_who_holds_what_and_leaves_the_queue(rt, caplog, monkeypatch):
    monkeypatch.setattr(reservation, "WAIT_WARNING_S", 0.01)
    holder = rt.spawn(User, resources=Resources(gpu=1))
    start = time.monotonic()
    with pytest.raises(CallTimeout, match=rf"was not granted within 0.1 s: .*held by actor {holder.name} \(1 GPU\)"):
        rt.reserve([Resources(gpu=2)], timeout_s=0.1)
    assert 0.1 <= time.monotonic() - start < T
    assert "a reservation waits for 2 GPUs" in caplog.text
    assert rt.spawn(User, resources=Resources(gpu=1)).gpus.call().result(T) == "1"
    with pytest.raises(Infeasible, match="a reservation asks for 2 GPUs"):
        rt.reserve([Resources(gpu=2), Resources(gpu=1)])


# At the worst moment.


class Interrupted(KeyboardInterrupt):
    pass


def interrupted_at(call, ledger, monkeypatch):
    """Have the ledger be interrupted in this of its looks at who may be granted something."""
    calls, fit = itertools.count(1), ledger._fit

    def interrupted_fit(claim):
        if next(calls) == call:
            raise Interrupted
        return fit(claim)

    monkeypatch.setattr(ledger, "_fit", interrupted_fit)


def test_what_was_granted_before_an_interrupt_is_told_of(monkeypatch):
    ledger, told = pool(cpu=2), []
    holder = ledger.claim("holder", [Resources(cpu=2)])
    for name in "ab":
        ledger.claim(name, [Resources(cpu=1)]).when_decided(lambda error, name=name: told.append((name, error)))
    interrupted_at(2, ledger, monkeypatch)
    with pytest.raises(Interrupted):
        holder.release()
    ledger.grant_waiting()
    assert told == [("a", None), ("b", None)]


def test_a_claim_that_an_interrupt_keeps_from_its_holder_holds_nothing(monkeypatch):
    ledger = pool(cpu=2)
    interrupted_at(1, ledger, monkeypatch)
    with pytest.raises(Interrupted):
        ledger.claim("interrupted", [Resources(cpu=2)])
    assert not ledger.in_use()


def test_an_actor_that_is_killed_before_its_resources_are_noted_gives_them_back(rt, monkeypatch):
    claim = Pool.claim

    def late(self, holder, wants, *how):
        granted = claim(self, holder, wants, *how)
        rt.kill(rt.lookup("killed"))
        return granted

    with monkeypatch.context() as patch:
        patch.setattr(Pool, "claim", late)
        rt.spawn(User, name="killed", resources=Resources(cpu=4))
    assert len(rt.room_for(Resources(cpu=1))) == 4
