"""Training whose env runners are on machines that are really apart: the numbers of one machine, and a node killed."""

import collections
import os
import signal
import socket
import subprocess
import time

import pytest

from rlx.actors.cluster.heartbeat import Patience
from rlx.algorithms.impala import IMPALAConfig
from rlx.algorithms.ppo import PPOConfig
from rlx.building import LazyRuntime
from rlx.errors import ActorError, Infeasible
from tests.actors.cluster.namespaces import why_not

pytestmark = [
    pytest.mark.timeout(180),
    pytest.mark.slow,
    pytest.mark.skipif(why_not() is not None, reason=str(why_not())),
]
LISTEN = "0A"  # in /proc/net/tcp
PRELOAD = ("numpy", "torch", "gymnasium")


def ppo(**fault_tolerance):
    made = PPOConfig().environment("CartPole-v1").reporting(progress="none")
    made.env_runners(num_env_runners=2, num_envs_per_env_runner=4, rollout_fragment_length=32)
    return made.training(epochs=2, minibatch_size=32).fault_tolerance(**fault_tolerance)


def computed(row):
    watched = ("time/", "env_steps_per_s", "learner_restarts", "runner_restarts")
    return {name: value for name, value in row.items() if not name.startswith(watched)}


def wait_for_restart(rt, name):
    """What a runner collects depends on whether it was asked before or after it was killed: this is after."""
    deadline = time.monotonic() + 30.0
    while (state := rt.state()[name]).restarts == 0 or state.status != "alive":
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture
def on_cluster(cluster, monkeypatch):
    """Return the daemons and the runtime of a cluster, on which runs are trained from now on."""
    head, other, rt = cluster(preload=PRELOAD)
    monkeypatch.setattr(LazyRuntime, "__call__", lambda self: rt)
    return head, other, rt


def node_of(rt, name):
    return rt._actors[name]._actor.body._node.name


def train(config, updates):
    with config.build() as algorithm:
        return [computed(algorithm.train()) for _ in range(updates)]


def test_ppo_computes_the_same_on_every_engine(request):
    inline = train(ppo().runtime(engine="inline", seed=3), 4)
    local = train(ppo().runtime(engine="local", seed=3), 4)
    rt = request.getfixturevalue("on_cluster")[2]
    cluster = train(ppo().runtime(seed=3), 4)
    assert {node_of(rt, f"env_runner/{index}") for index in range(2)} == {"a", "b"}
    assert repr(cluster) == repr(local) == repr(inline)  # repr: nan is not equal to itself


def listening(network, machine):
    """Return at which addresses a machine listens, with how many ports each."""
    table = subprocess.run([*network.command(machine), "cat", "/proc/net/tcp"], capture_output=True, check=True)
    fields = [line.split() for line in table.stdout.decode().splitlines()[1:]]
    hosts = [bytes.fromhex(field[1].partition(":")[0])[::-1] for field in fields if field[3] == LISTEN]
    return collections.Counter(map(socket.inet_ntoa, hosts))


@pytest.mark.parametrize("spread", [True, False])
def test_two_learners_compute_the_same_on_two_machines_as_on_one(spread, network, start_apart, open_apart, monkeypatch):
    """And expose what they have to: each of two machines a daemon's port, and beyond that only where they are apart."""
    local = train(ppo().learners(num_learners=2).runtime(seed=3), 4)
    head = start_apart("a", cpu=1)
    start_apart("b", head.address, cpu=1 if spread else 2)
    rt = open_apart(head, preload=PRELOAD)
    monkeypatch.setattr(LazyRuntime, "__call__", lambda self: rt)
    made = ppo().learners(num_learners=2, allow_plain_gradients=spread).runtime(seed=3)
    with made.build() as algorithm:
        assert [node_of(rt, f"learner/{rank}") for rank in range(2)] == (["a", "b"] if spread else ["b", "b"])
        on_b = algorithm.learners._actors[1].node.call().result(30.0)
        cluster = [computed(algorithm.train()) for _ in range(4)]
        ports = {machine: listening(network, machine) for machine in ("a", "b")}
    assert str(on_b) == "b (10.77.2.2)"
    assert repr(cluster) == repr(local)
    if spread:
        assert {machine: set(found) for machine, found in ports.items()} == {"a": {"10.77.1.2"}, "b": {"10.77.2.2"}}
    else:
        assert ports["b"].pop("127.0.0.1") >= 3
        assert ports == {"a": {"10.77.1.2": 1}, "b": {"10.77.2.2": 1}}


def test_a_language_model_is_shared_out_over_two_machines(tiny_text, start_apart, open_apart, monkeypatch):
    def made(**learners):
        return tiny_text("sft", learners={"num_learners": 2, "sharding": "full"} | learners).runtime(seed=3)

    local = train(made(), 2)
    head = start_apart("a", cpu=1)
    start_apart("b", head.address, cpu=1)
    rt = open_apart(head, preload=("numpy", "torch"))
    monkeypatch.setattr(LazyRuntime, "__call__", lambda self: rt)
    with made(allow_plain_gradients=True).build() as algorithm:
        assert [node_of(rt, f"learner/{rank}") for rank in range(2)] == ["a", "b"]
        assert repr([computed(algorithm.train()) for _ in range(2)]) == repr(local)


def test_learners_that_fit_on_no_machine_together_need_leave_to_be_on_several(start_apart, open_apart, monkeypatch):
    head = start_apart("a", cpu=1)
    start_apart("b", head.address, cpu=1)
    rt = open_apart(head, preload=PRELOAD)
    monkeypatch.setattr(LazyRuntime, "__call__", lambda self: rt)
    said = r"num_learners=2: a reservation asks for 2 times 1 CPU.*; lower .*set learners.allow_plain_gradients=true"
    with pytest.raises(Infeasible, match=said):
        ppo().learners(num_learners=2).build()
    assert not [name for name, state in rt.state().items() if name.startswith("learner") and state.status == "alive"]


def test_impala_learns_across_machines(on_cluster):
    made = IMPALAConfig().environment("CartPole-v1").reporting(progress="none")
    made.env_runners(num_env_runners=2, num_envs_per_env_runner=8, rollout_fragment_length=32)
    with made.training(batch_size=512).build() as algorithm:
        rows = [algorithm.train() for _ in range(8)]
    steps = [row["env_steps"] for row in rows]
    assert steps == sorted(steps) and steps[-1] > 0
    assert len(rows) == 8


def test_a_killed_node_costs_its_runners_a_restart_and_nothing_is_counted_twice(on_cluster, monkeypatch):
    _, other, rt = on_cluster
    with ppo(max_restarts=3).build() as algorithm:
        rows = [algorithm.train() for _ in range(2)]
        assert {node_of(rt, f"env_runner/{index}") for index in range(2)} == {"a", "b"}
        lost = next(index for index in range(2) if node_of(rt, f"env_runner/{index}") == "b")
        other.end(signal.SIGKILL)
        wait_for_restart(rt, f"env_runner/{lost}")
        rows += [algorithm.train() for _ in range(4)]
        assert {node_of(rt, f"env_runner/{index}") for index in range(2)} == {"a"}
    assert rows[-1]["runner_restarts"] == 1
    monkeypatch.undo()
    with ppo(max_restarts=3).build() as algorithm:  # on one machine, where just the one runner is killed
        expected = [algorithm.train() for _ in range(2)]
        os.kill(algorithm._runtime().state()[f"env_runner/{lost}"].pid, signal.SIGKILL)
        wait_for_restart(algorithm._runtime(), f"env_runner/{lost}")
        expected += [algorithm.train() for _ in range(4)]
    assert repr([*map(computed, rows)]) == repr([*map(computed, expected)])


def learning(**fault_tolerance):
    """Two learners, and nobody else beside the driver."""
    made = ppo(**fault_tolerance).learners(num_learners=2, allow_plain_gradients=True)
    return made.env_runners(num_env_runners=0).checkpointing(interval=1).runtime(seed=3)


@pytest.fixture(scope="module")
def undisturbed():
    return train(learning(), 6)


ONE_EACH = {"a": 1, "b": 1, "driver": 1}


@pytest.mark.parametrize(
    "victim, cpus, before, after",
    [
        ("learner/1 killed", ONE_EACH, ["a", "b"], ["a", "b"]),
        ("learner/1 stopped", ONE_EACH, ["a", "b"], ["a", "b"]),
        ("b killed", ONE_EACH, ["a", "b"], ["a", "driver"]),
        ("b unplugged", ONE_EACH, ["a", "b"], ["a", "driver"]),
        ("b killed", {"a": 0.5, "b": 1, "driver": 2}, ["b", "driver"], ["driver", "driver"]),
    ],
)
def test_learners_go_on_from_the_last_save_elsewhere_when_one_dies_with_its_node(
    victim, cpus, before, after, undisturbed, network, start_apart, open_apart, monkeypatch, caplog
):
    patience = Patience(every_s=0.1, suspect_s=0.5, dead_s=3.0)
    head = start_apart("a", cpu=cpus["a"], patience=patience)
    other = start_apart("b", head.address, cpu=cpus["b"], patience=patience)
    start_apart("driver", head.address, cpu=cpus["driver"], patience=patience)
    rt = open_apart(head, preload=PRELOAD, patience=patience)
    monkeypatch.setattr(LazyRuntime, "__call__", lambda self: rt)
    with learning(max_restarts=2, update_timeout_s=6.0 if "stopped" in victim else 300.0).build() as algorithm:
        rows = {number: algorithm.train() for number in range(1, 4)}
        assert [node_of(rt, f"learner/{rank}") for rank in range(2)] == before
        if victim.startswith("learner/1"):
            number = signal.SIGKILL if "killed" in victim else signal.SIGSTOP
            os.kill(rt.state()["learner/1"].pid, number)
        elif victim == "b killed":
            other.end(signal.SIGKILL)
        else:
            network.pull("b")
        try:
            while 6 not in rows:
                row = algorithm.train()
                rows[row["iteration"]] = row
        finally:
            network.plug("b")
        assert [node_of(rt, f"learner/{rank}") for rank in range(2)] == after
    assert rows[6]["learner_restarts"] == 1
    if "stopped" in victim:
        assert "learner/1.update() on node b (10.77.2.2) has not answered within 6 s" in caplog.text
    assert repr([computed(rows[number]) for number in range(1, 7)]) == repr(undisturbed)


def test_learners_for_which_there_is_no_room_any_more_end_the_run_and_say_so(start_apart, open_apart, monkeypatch):
    head = start_apart("a", cpu=1)
    other = start_apart("b", head.address, cpu=1)
    rt = open_apart(head, preload=PRELOAD)
    monkeypatch.setattr(LazyRuntime, "__call__", lambda self: rt)
    with learning(max_restarts=2).build() as algorithm:
        algorithm.train()
        other.end(signal.SIGKILL)
        algorithm.learners._start_timeout_s = 2.0
        with pytest.raises(ActorError, match=r"learner/1.* 2 s: it waits for 1 CPU: 0 CPUs of 1 free; held by .*"):
            algorithm.train()
