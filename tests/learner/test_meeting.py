"""How learners meet: over which addresses, and what is said where one does not come."""

import contextlib
import os
import signal
import socket
from functools import partial

import numpy as np
import pytest

from rlx import actors
from rlx.actors.cluster.credentials import ClusterKey
from rlx.actors.machine import Node
from rlx.errors import Infeasible, RlxError
from rlx.learner.learner import Learner
from rlx.learner.learner_group import LearnerGroup, LearnersLost
from rlx.learner.meeting import Meeting, interface_of, open_store
from tests.actors.cluster.conftest import Daemon
from tests.actors.cluster.namespaces import Network, why_not

A, B = Node("a", "127.0.0.1"), Node("b", "127.0.0.2")
NAMES = ["learner/0", "learner/1"]


@pytest.fixture(scope="module")
def rt():
    with actors.runtime("local") as rt:
        yield rt


@pytest.fixture
def two_learners(problem, rt):
    learners = [rt.spawn(Learner, partial(problem.build, seed=seed), problem.loss) for seed in range(2)]
    yield learners
    for learner in learners:
        rt.kill(learner)


def test_learners_on_one_machine_meet_over_loopback_whatever_its_address_and_others_over_their_own():
    elsewhere = Node("c", "10.0.0.3")
    assert Meeting.of(NAMES, [elsewhere, elsewhere]) == (("127.0.0.1",) * 2, ("learner/0", "learner/1"), 0)
    assert not Meeting.of(NAMES, [elsewhere, elsewhere]).is_exposed and not Meeting.of(NAMES, [A, B]).is_exposed
    apart = Meeting.of(NAMES, [A, elsewhere])
    assert apart.is_exposed and apart.hosts == ("127.0.0.1", "10.0.0.3")
    assert apart.names == ("learner/0 on node a (127.0.0.1)", "learner/1 on node c (10.0.0.3)")


def test_a_store_listens_at_its_address_alone():
    store = open_store("127.0.0.2")
    socket.create_connection(("127.0.0.2", store.port), 10.0).close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", store.port), 10.0)


def test_learners_meet_at_the_addresses_of_their_nodes_and_again_at_a_new_port(two_learners):
    ports = set()
    for _ in range(2):
        meeting = Meeting.of(NAMES, [B, A])
        ports.add(port := two_learners[0].open_store.call(meeting.hosts[0]).result(30.0))
        joins = [
            learner.join.call(rank, meeting._replace(port=port), 30.0) for rank, learner in enumerate(two_learners)
        ]
        for join in joins:
            join.result(30.0)
        weights = [learner.weights.call().result(10.0).tobytes() for learner in two_learners]
        assert weights[0] == weights[1]
    assert len(ports) == 2


def test_who_does_not_come_is_named_with_its_node(two_learners):
    meeting = Meeting.of(NAMES, [A, B])
    meeting = meeting._replace(port=two_learners[0].open_store.call(A.host).result(30.0))
    said = rf"^learner/1 on node b \(127.0.0.2\) has not come to 127.0.0.1 port {meeting.port}, .* within 0.5 s: "
    with pytest.raises(RlxError, match=said):
        two_learners[0].join.call(0, meeting, 0.5).result(30.0)


def test_who_reaches_no_store_says_so(two_learners):
    with socket.create_server((B.host, 0)) as listener:
        port = listener.getsockname()[1]
    meeting = Meeting.of(NAMES, [B, A])._replace(port=port)
    said = rf"^learner/1 on node a .* does not reach learner/0 on node b \(127.0.0.2\) at 127.0.0.2 port {port}, "
    with pytest.raises(RlxError, match=said):
        two_learners[1].join.call(1, meeting, 0.5).result(30.0)


def test_a_group_refuses_what_would_leave_the_machine_unless_it_may(problem, rt, monkeypatch):
    """Placement keeps them together; this is for where that fails."""

    class Astray(Learner):
        def node(self):
            current = actors.current()
            return Node("n", f"10.0.0.{current.actor[-1]}")

    monkeypatch.setattr("rlx.learner.learner_group.Learner", Astray)
    with pytest.raises(
        RlxError, match=r"learner/1 on node n \(10.0.0.1\) would .* set learners.allow_plain_gradients=true"
    ):
        LearnerGroup(problem.build, problem.loss, device="cpu", num_learners=2, runtime=lambda: rt)


@pytest.mark.slow
def test_two_learners_at_two_addresses_of_a_cluster_equal_one(problem, tmp_path):
    """Without leave they have no room; with it they meet again at another port when one has died."""
    key = ClusterKey.create(tmp_path / "cluster.key")
    options = {"device": "cpu", "num_learners": 2, "start_timeout_s": 30.0}
    with contextlib.ExitStack() as stack:
        head = stack.enter_context(contextlib.closing(Daemon(key, "a", cpu=1)))
        stack.enter_context(contextlib.closing(Daemon(key, "b", head.address, host="127.0.0.2", cpu=1)))
        rt = stack.enter_context(actors.runtime("cluster", address=head.address, token_file=key.path))
        with pytest.raises(Infeasible, match=r"lower .* or set learners.allow_plain_gradients=true"):
            LearnerGroup(problem.build, problem.loss, runtime=lambda: rt, **options)
        restart = actors.Restart(max=1, backoff_s=0.01)
        options |= {"allow_plain_gradients": True, "restart": restart, "runtime": lambda: rt}
        one = LearnerGroup(problem.build, problem.loss, device="cpu")
        two = LearnerGroup(problem.build, problem.loss, **options)
        assert [actor.node.call().result(10.0) for actor in two._actors] == [A, B]
        state = two.get_state()
        one.update(problem.batch(seed=1), **problem.update, seed=1)
        for _ in range(2):
            two.update(problem.batch(seed=1), **problem.update, seed=1)
            np.testing.assert_allclose(two.weights(), one.weights(), rtol=0, atol=1e-6)
            if not any(two._incarnations()):
                os.kill(rt.state()["learner/0"].pid, signal.SIGKILL)
                with pytest.raises(LearnersLost):
                    two.update(problem.batch(seed=2), **problem.update, seed=2)
                two.set_state(state)
        assert two._incarnations() == [1, 1]
        two.close()


@pytest.mark.slow
@pytest.mark.skipif(why_not() is not None, reason=str(why_not()))
def test_the_interface_of_an_address_is_found():
    assert interface_of("127.0.0.2") == interface_of("::1") == "lo"
    assert interface_of("203.0.113.7") is interface_of("2001:db8::7") is None
    with contextlib.closing(Network("a")) as network, network.on("a"):
        assert interface_of(network.address("a")) == "eth0"
