"""Which machine gets which actor: the ledger by itself, and real daemons."""

import os
import signal
import threading

import cloudpickle
import pytest

from rlx import actors
from rlx.actors import Resources, Restart
from rlx.actors.cluster.membership import NodeInfo
from rlx.actors.cluster.placement import ClusterPool
from rlx.errors import ActorError, Infeasible

cloudpickle.register_pickle_by_value(__import__(__name__, fromlist=["x"]))
pytestmark = pytest.mark.timeout(90)
T = 30.0
CPU = Resources(cpu=1)


def a_pool(*cpus, **labels):
    """Return a pool of machines with so many CPUs, and two GPUs each."""
    infos = [
        NodeInfo(f"n{number}", "-", cpu, 2, 2**30, labels if number == 0 else {}) for number, cpu in enumerate(cpus)
    ]
    return ClusterPool(dict(enumerate(infos)))


@pytest.mark.parametrize(
    "strategy, places",
    [("spread", [0, 1, 2, 0]), ("pack", [0, 0, 0, 1]), ("strict_pack", None), ("strict_spread", None)],
)
def test_four_bundles_on_three_machines_of_three_cpus(strategy, places):
    pool = a_pool(3, 3, 3)
    if places is None:
        with pytest.raises(Infeasible, match=f'do not fit on the machines together with strategy="{strategy}"'):
            pool.claim("four", [CPU] * 4, strategy)
    else:
        assert pool.claim("four", [CPU] * 4, strategy).places == places
    three = a_pool(3, 3, 3).claim("three", [CPU] * 3, strategy).places
    assert three == ([0, 1, 2] if "spread" in strategy else [0, 0, 0])


def test_there_is_room_for_as_many_as_would_be_granted_each_on_its_machine():
    pool = a_pool(1, 3.5, 2, kind="small")
    node = lambda number, **labels: Resources(cpu=1, labels={**labels, "node": f"n{number}"})  # noqa: E731
    assert pool.room_for(CPU) == [node(1)] * 3 + [node(2)] * 2 + [node(0)]
    assert pool.room_for(Resources(cpu=1, labels={"kind": "small"})) == [node(0, kind="small")]
    first = pool.claim("first", [pool.room_for(CPU)[0]])
    assert first.places == [1] and pool.room_for(CPU) == [node(1)] * 2 + [node(2)] * 2 + [node(0)]
    changes = []
    pool.when_changed(lambda: changes.append(len(pool.room_for(CPU)) if pool._closed is None else "closed"))
    pool.remove(1)
    pool.remove(1)
    pool.add(7, NodeInfo("n7", "-", 4, 0, 2**30))
    assert changes == [3, 7] and first.is_lost
    with pytest.raises(Infeasible, match="no machine of this cluster has 1 CPU, node=n1"):
        first.anew()
    waiting = pool.claim("all", [Resources(cpu=1)] * 7)
    assert waiting.granted and not pool.claim("one", [CPU]).granted and pool.room_for(CPU) == []
    waiting.release()
    assert len(pool.room_for(CPU)) == 6
    pool.close("the head is lost")
    assert changes[2:] == ["closed"]  # who waits for a change waits no longer
    with pytest.raises(ActorError, match=r"nobody can have 1 CPU any more: the head is lost\."):
        pool.room_for(CPU)


def test_bundles_that_only_fit_one_way_find_it():
    claim = a_pool(4, 6).claim("g", [Resources(cpu=3), Resources(cpu=3), Resources(cpu=4)], "pack")
    assert claim.granted and claim.places == [1, 1, 0]


def test_an_actor_gets_all_from_one_machine_and_its_gpus_are_that_machines():
    pool = a_pool(2, 8)
    with pytest.raises(Infeasible, match="no machine of this cluster has 9 CPUs: n0: 2 CPUs, 2 GPUs, 1 GiB memory; n1"):
        pool.claim("nine", [Resources(cpu=9)])
    first, second = (pool.claim("gpus", [Resources(cpu=1, gpu=2)]) for _ in range(2))
    assert {first.places[0], second.places[0]} == {0, 1}
    assert first.devices == second.devices == [("0", "1")]
    third = pool.claim("late", [Resources(gpu=0.5)])
    assert not third.granted and "0 GPUs of 4 free" in third.waiting()
    assert third.places == [] and third.devices == []  # it has been asked where it could be, and is nowhere
    second.release()
    assert third.granted and third.places == second.places


def test_labels_choose_the_machine():
    pool = a_pool(1, 4, kind="h200")
    assert pool.claim("a", [Resources(labels={"kind": "h200"})]).places == [0]
    assert pool.claim("b", [Resources(cpu=1, labels={"node": "n1"})]).places == [1]
    with pytest.raises(Infeasible, match=r"has kind=tpu: n0: .*kind=h200"):
        pool.claim("c", [Resources(labels={"kind": "tpu"})])


def test_a_machine_that_joins_serves_who_waits_and_one_that_leaves_takes_its_claims_along():
    pool = a_pool(1)
    held, waiting = pool.claim("held", [CPU]), pool.claim("waits", [CPU])
    assert held.granted and not waiting.granted
    pool.add(7, NodeInfo("late", "-", 1, 0, 0))
    assert waiting.granted and waiting.places == [7]
    pool.remove(7)
    assert waiting.is_lost and not held.is_lost
    waiting.release()
    again = pool.claim("again", [CPU])
    assert not again.granted
    held.release()
    assert again.places == [0]


def test_bundles_that_are_lost_with_their_machine_are_claimed_anew_together_and_beside_the_others():
    pool = a_pool(1, 2, 2)
    reserved = pool.reserve([CPU] * 3, T, "pack")
    assert [reserved[index].place for index in range(3)] == [0, 1, 1]
    claims = [reserved[index].claim(f"actor {index}", [CPU]) for index in range(3)]
    other = pool.claim("other", [CPU])
    reserved.release()  # nobody new; who draws from it may go on elsewhere
    pool.remove(1)
    assert [claim.is_lost for claim in claims] == [False, True, True] and other.places == [2]
    first = claims[1].anew()
    assert not first.granted and "waits for 2 times 1 CPU: " in first.waiting()  # for both, or for none
    second = claims[2].anew()
    other.release()
    assert first.granted and second.granted and first.places == second.places == [2]
    assert not (first.is_lost or second.is_lost)
    everything = pool.claim("everything", [Resources(cpu=2), CPU])
    for claim in (claims[0], first, second):
        assert not everything.granted
        claim.release()
    assert everything.granted


def test_a_machine_that_is_linked_anew_under_its_number_is_whole_and_gets_nothing_back_of_what_was_lost_with_it():
    pool = a_pool(2, 2)
    info = NodeInfo("n1", "-", 2, 2, 2**30)
    claims = [pool.claim("c", [CPU]) for _ in range(4)]
    pool.remove(1)
    pool.add(1, info)
    for claim in claims:
        claim.release()
    assert len(pool.room_for(CPU)) == 4


def test_a_bundle_that_comes_back_to_the_machine_that_it_was_lost_with_is_lost_no_more():
    pool = a_pool(2)
    reserved = pool.reserve([CPU], T, "strict_pack")
    first, other = (reserved[0].claim(name, [Resources(cpu=0.5)]) for name in ("first", "other"))
    reserved.release()
    for _ in range(2):
        pool.remove(0)
        pool.add(0, NodeInfo("n0", "-", 2, 2, 2**30))
        first = first.anew()
        assert first.granted and not first.is_lost and other.is_lost
        other = other.anew()
        assert other.granted and not other.is_lost
        assert len(pool.room_for(CPU)) == 1  # it is claimed once, whoever is started again
    first.release()
    other.release()
    assert len(pool.room_for(CPU)) == 2


def test_bundles_that_can_never_be_had_again_say_so():
    pool = a_pool(1, 2)
    reserved = pool.reserve([CPU, CPU], T, "strict_pack")
    claim = reserved[0].claim("actor 0", [CPU])
    pool.remove(1)
    with pytest.raises(Infeasible, match=r'asks for 2 times 1 CPU, which do not fit .* strategy="strict_pack"'):
        claim.anew()
    pool.add(2, NodeInfo("new", "-", 2, 0, 0))
    assert claim.anew().places == [2]


class Here:
    def parent(self):
        return os.getppid()

    def gpus(self):
        return os.environ.get("CUDA_VISIBLE_DEVICES")


@pytest.fixture(scope="module")
def head(start):
    return start("a", cpu=2, gpu=1, labels={"kind": "big"})


@pytest.fixture(scope="module")
def second(start, head):
    return start("b", head.address, cpu=2)


@pytest.fixture
def rt(key, head, second):
    with actors.runtime("cluster", address=head.address, token_file=key.path, preload=("numpy",)) as runtime:
        yield runtime


def test_actors_run_where_their_resources_are(rt):
    big = rt.spawn(Here, resources=Resources(gpu=1, labels={"kind": "big"}))
    others = [rt.spawn(Here, resources=Resources(cpu=1, labels={"node": "b"})) for _ in range(2)]
    on_b = {worker.parent.call().result(T) for worker in others}
    assert big.gpus.call().result(T) == "0" and len(on_b) == 1 and big.parent.call().result(T) not in on_b
    third = rt.spawn(Here, resources=Resources(cpu=1, labels={"node": "b"}))
    assert rt.state()[third.name].status == "pending"
    rt.kill(others[0])
    assert third.parent.call().result(T) in on_b


def test_a_reservation_lies_on_its_machines(rt):
    with rt.reserve([CPU, CPU], strategy="strict_spread") as apart, rt.reserve([CPU], strategy="pack"):
        workers = [rt.spawn(Here, reservation=apart[index]) for index in range(2)]
        assert len({worker.parent.call().result(T) for worker in workers}) == 2
        with pytest.raises(Infeasible, match="strict_pack"):
            rt.reserve([CPU] * 3, strategy="strict_pack")


def test_an_actor_whose_node_is_lost_is_placed_anew(start, key):
    head = start("a-of-anew", cpu=1)
    other = start("b-of-anew", head.address, cpu=1)
    with actors.runtime("cluster", address=head.address, token_file=key.path, preload=("numpy",)) as rt:
        first = rt.spawn(Here, resources=CPU)
        moved = rt.spawn(Here, resources=CPU, restart=Restart(max=2, backoff_s=0.01))
        parents = first.parent.call().result(T), moved.parent.call().result(T)
        assert parents[0] != parents[1]
        died, back = threading.Event(), threading.Event()
        rt.monitor(moved, on_restart=lambda *_: back.set())
        rt.monitor(first, on_exit=lambda *_: died.set())
        other.end(signal.SIGKILL)
        if not died.wait(0):  # the moved one was on b: it waits until the first one makes room
            rt.kill(first)
        assert back.wait(T)
        assert moved.parent.call().result(T) == parents[0]


def test_actors_of_a_reservation_whose_node_is_lost_are_placed_anew(start, key):
    head = start("a-of-moving", cpu=2)
    other = start("b-of-moving", head.address, cpu=2)
    with actors.runtime("cluster", address=head.address, token_file=key.path, preload=("numpy",)) as rt:
        beside = rt.spawn(Here, resources=Resources(cpu=1, labels={"node": "a-of-moving"}))
        with rt.reserve([CPU, CPU], strategy="strict_pack") as reserved:
            workers = [rt.spawn(Here, reservation=reserved[index]) for index in range(2)]
        rt.group(workers, Restart(max=2, backoff_s=0.01), strategy="one_for_all")
        on_b = {worker.parent.call().result(T) for worker in workers}
        back = [threading.Event() for _ in workers]
        for worker, event in zip(workers, back, strict=True):
            rt.monitor(worker, on_restart=lambda *_, event=event: event.set())
        other.end(signal.SIGKILL)
        rt.kill(beside)  # before there is room for both, none of them starts
        assert all(event.wait(T) for event in back)
        on_a = {worker.parent.call().result(T) for worker in workers}
        assert len(on_b) == len(on_a) == 1 and on_a != on_b
