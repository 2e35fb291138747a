"""Groups of as many runners as there are CPUs: on this machine, and with the ledger of a cluster that changes."""

import logging
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import cloudpickle
import gymnasium
import numpy as np
import pytest

from rlx import actors
from rlx.actors import Resources, Restart
from rlx.actors.cluster.membership import NodeInfo
from rlx.actors.cluster.placement import ClusterPool
from rlx.errors import ActorDied, ActorError, CheckpointError
from rlx.nets.flat import FlatParameters
from rlx.nets.policy import build_policy
from rlx.rollout.env_runner import EnvRunner
from rlx.rollout.free_cpus import FreeCpus
from rlx.rollout.runner_group import RunnerGroup

cloudpickle.register_pickle_by_value(sys.modules[__name__])
pytestmark = pytest.mark.timeout(60)
T = 30.0
ENVS, STEPS = 2, 8
NODES = {number: NodeInfo(f"n{number}", "-", 2, 0, 2**30, {}, number) for number in range(3)}


class Endless(gymnasium.Env):
    """An episode that never ends, and says by its observation how long it has been going on."""

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (1,), np.float32)
    action_space = gymnasium.spaces.Discrete(2)

    def __init__(self, folder="/"):
        if (Path(folder) / "broken").exists():
            raise FloatingPointError("there is no game here")

    def reset(self, *, seed=None, options=None):
        self.steps = 0
        return np.zeros(1, np.float32), {}

    def step(self, action):
        self.steps += 1
        return np.full(1, self.steps, np.float32), 1.0, False, False, {}


@pytest.fixture(scope="module")
def weights():
    return FlatParameters(build_policy(*EnvRunner(Endless, 1, build_policy).spaces(), seed=1)).numpy().copy()


@pytest.fixture
def make_group(weights):
    """Return a function that makes a group of as many runners as there is room for; they are closed in the end."""
    made = []

    def make(runtime, **options):
        group = RunnerGroup(
            *(Endless, build_policy),
            **{"num_runners": "auto", "num_envs": ENVS, "runtime": lambda: runtime, "seed": 4} | options,
        )
        made.append(group)
        group.publish(0, weights)
        return group

    yield make
    for group in made:
        group.close()


class Nodes:
    """The nodes of a cluster, played by this machine: what the ledger says of them, and the actors that are theirs."""

    def __init__(self, runtime, *numbers):
        self.runtime = runtime
        self.pool = runtime._pool = ClusterPool({number: NODES[number] for number in numbers})

    def join(self, number, group):
        self.pool.add(number, NODES[number])
        assert group._free_cpus.wait(T)

    def lose(self, number, group):
        """As the engine does it: what was claimed there is lost, and then its actors end."""
        pids = self.pids(number, group)
        self.pool.remove(number)
        assert group._free_cpus.wait(T)
        for pid in pids:
            os.kill(pid, signal.SIGKILL)

    def stop(self, number, group):
        """Have its actors answer nothing."""
        for pid in self.pids(number, group):
            os.kill(pid, signal.SIGSTOP)

    def pids(self, number, group):
        handles = [handle for handle in group._actors._handles.values() if handle._actor._claim.places == [number]]
        return [self.runtime.state()[handle.name].pid for handle in handles]


@pytest.fixture(scope="module")
def rt():
    with actors.runtime("local", preload=("numpy", "torch", "rlx.rollout.env_runner")) as runtime:
        yield runtime


def started(group):
    """Have all runners started that are on their way."""
    group._follow()
    group._actors.gather(group._actors._starting)


@pytest.mark.parametrize("cpus, kept, expected", [(3, 0, 3), (3, 1, 2), (1, 4, 1), (0.5, 0, 1)])
def test_on_one_machine_there_is_one_for_each_cpu_and_the_log_says_so(make_group, caplog, cpus, kept, expected):
    with actors.runtime("inline", resources=Resources(cpu=cpus)) as runtime, caplog.at_level(logging.INFO, "rlx"):
        group, fixed = make_group(runtime, kept_cpus=kept), make_group
        assert group.num_runners == expected
        assert f"num_env_runners=auto: now {expected}," in caplog.text
        sample = group.sample(STEPS)
        group.close()
        same = fixed(runtime, num_runners=expected).sample(STEPS)
        for name, array in sample.trajectory.arrays().items():
            np.testing.assert_array_equal(array, getattr(same.trajectory, name))


def test_what_others_have_claimed_is_not_counted(make_group):
    with actors.runtime("inline", resources=Resources(cpu=4)) as runtime:
        runtime.spawn(dict, resources=Resources(cpu=2.5))
        assert make_group(runtime).num_runners == 1


@pytest.mark.parametrize(
    "sizes, given", [((2, 1), [1]), ((1, 2), [0]), ((3, 2), [0, 0, 0]), ((1, 1, 1), [0]), ((4, 1), [1, 0, 0])]
)
def test_what_is_kept_for_learners_is_on_one_machine_where_one_has_so_much(rt, sizes, given):
    pool = ClusterPool({number: replace(NODES[number], cpu=cpu) for number, cpu in enumerate(sizes)})
    runtime = SimpleNamespace(room_for=pool.room_for, when_resources_change=pool.when_changed)
    taken = FreeCpus(runtime, kept=2).take(0)  # type: ignore[arg-type]
    assert [want.labels for want in taken if want is not None] == [{"node": f"n{number}"} for number in given]


def test_what_learners_have_claimed_is_not_kept_twice(make_group, rt):
    nodes = Nodes(rt, 0, 1)
    group = make_group(rt, kept_cpus=2)
    assert group.num_runners == 2
    learners = rt.reserve([Resources(cpu=1)] * 2, T, "strict_pack")
    group.keep_cpus(0)
    nodes.join(2, group)
    started(group)
    assert group.sample(STEPS).env_steps == 4 * ENVS * STEPS
    learners.release()


@pytest.mark.parametrize("restart", [None, Restart(max=3, per_s=60)])
def test_runners_come_and_go_with_nodes(make_group, rt, restart):
    nodes = Nodes(rt, 0)
    group = make_group(rt, restart=restart)
    assert group.sample(STEPS).trajectory.mask.shape == (STEPS, 2 * ENVS)
    nodes.join(1, group)
    assert group.sample(STEPS).trajectory.mask.shape == (STEPS, 2 * ENVS)  # nobody waits for their start
    started(group)
    sample = group.sample(STEPS)
    assert sample.trajectory.obs[0, :, 0].tolist() == [16] * 4 + [0] * 4
    nodes.lose(0, group)
    sample = group.sample(STEPS)
    assert sample.trajectory.obs[0, :, 0].tolist() == [8] * 4 and group._actors.numbers == [2, 3]
    nodes.join(2, group)
    started(group)
    sample = group.sample(STEPS)
    assert sample.trajectory.obs[0, :, 0].tolist() == [0] * 4 + [16] * 4 and sample.runner_restarts == 0
    assert group._actors.numbers == [0, 1, 2, 3] and group._actors.calls == [4, 4, 3, 3]


@pytest.mark.parametrize("restart", [None, Restart(max=3, per_s=60)])
def test_a_fragment_that_is_lost_with_a_node_is_missing_and_nothing_else(make_group, rt, restart):
    nodes = Nodes(rt, 0, 1)
    group = make_group(rt, restart=restart)
    group.sample(STEPS)
    nodes.stop(0, group)
    group.begin(STEPS)
    nodes.lose(0, group)
    sample = group.sample(STEPS)
    assert sample.trajectory.obs[0, :, 0].tolist() == [8] * 4 and sample.runner_restarts == 0
    assert group.num_runners == 2


def test_without_any_node_a_group_waits_for_one_and_says_so_in_the_end(make_group, rt, monkeypatch):
    nodes = Nodes(rt, 0)
    group = make_group(rt)
    nodes.stop(0, group)
    group.begin(STEPS)
    nodes.lose(0, group)
    group._free_cpus._changed.clear()
    wait = group._free_cpus.wait
    monkeypatch.setattr(group._free_cpus, "wait", lambda timeout_s: nodes.pool.add(1, NODES[1]) or wait(timeout_s))
    assert group.sample(STEPS).trajectory.obs[0, :, 0].tolist() == [0] * 4
    monkeypatch.setattr(group._free_cpus, "wait", wait)
    nodes.lose(1, group)
    monkeypatch.setattr(rt, "system_timeout_s", 0.1)
    with pytest.raises(
        ActorDied, match=r"all env runners were lost .* no node .* within 0.1 s; start one with `rlx start`"
    ):
        group.sample(STEPS)
    nodes.join(2, group)
    assert group.sample(STEPS).env_steps == 2 * ENVS * STEPS


def test_when_the_head_is_lost_nobody_waits(make_group, rt):
    nodes = Nodes(rt, 0)
    group = make_group(rt)
    nodes.pool.close("the head of the cluster (h:1) closed its link")
    nodes.lose(0, group)
    with pytest.raises(
        ActorError, match=r"nobody can have 1 CPU any more: the head of the cluster \(h:1\) closed its link."
    ):
        group.sample(STEPS)


def test_a_node_on_which_runners_cannot_start_is_done_without(make_group, rt, tmp_path, caplog):
    nodes = Nodes(rt, 0)
    group = make_group(rt, kwargs={"folder": str(tmp_path)}, start_timeout_s=T)
    (tmp_path / "broken").touch()
    nodes.join(1, group)
    group._follow()
    rt.wait([call.future for call in group._actors._starting], 2, T)
    for _ in range(2):
        assert group.sample(STEPS).env_steps == 2 * ENVS * STEPS
    assert caplog.text.count("there is no game here") == 2 and not group._actors.starting
    (tmp_path / "broken").unlink()
    nodes.join(2, group)
    started(group)
    assert group.sample(STEPS).env_steps == 6 * ENVS * STEPS  # n1 gets another try when nodes change


@pytest.mark.parametrize("per_batch", [None, 3])
def test_arrivals_come_from_whoever_is_there(make_group, rt, per_batch):
    nodes = Nodes(rt, 0)
    group = make_group(rt)

    def arrive():
        group.used()
        sample = group.arrive(STEPS, per_batch=per_batch, max_ahead=2)
        assert sample.env_steps == sample.trajectory.mask.size
        return sample.trajectory.mask.shape[1] // ENVS

    assert {arrive() for _ in range(4)} == {per_batch or 2}
    nodes.join(1, group)
    group._follow()
    group._actors.gather(group._actors._starting)
    assert [arrive() for _ in range(6)][-1] == (per_batch or 4) and group.num_runners == 4
    nodes.stop(1, group)
    arrivals = group._arrivals
    arrivals.pause()
    nodes.lose(1, group)
    assert [arrive() for _ in range(8)][-1] == (per_batch or 2) and group.num_runners == 2
    assert group.ahead <= 2 * (per_batch or 2)
    nodes.lose(0, group)
    nodes.join(2, group)
    assert [arrive() for _ in range(8)][-1] == (per_batch or 2) and group._actors.numbers == [0, 1]


@pytest.mark.parametrize("saved, now", [((0,), (0, 1)), ((0, 1), (0,)), ((0, 1), (0, 1))])
def test_a_state_goes_on_with_another_number_of_runners(make_group, rt, caplog, saved, now):
    caplog.set_level(logging.INFO, "rlx")
    nodes = Nodes(rt, *saved)
    group = make_group(rt)
    group.sample(STEPS)
    state = group.get_state()
    group.close()
    nodes = Nodes(rt, *now)
    group = make_group(rt)
    group.set_state(state)
    sample = group.sample(STEPS)
    old, new = min(len(saved), len(now)), max(0, len(now) - len(saved))
    assert sample.trajectory.obs[0, :, 0].tolist() == [8] * 2 * ENVS * old + [0] * 2 * ENVS * new
    told = f"{2 * len(saved)} env runners were saved and there are {2 * len(now)}"
    assert (told in caplog.text) == (saved != now)
    if len(saved) > len(now):  # whoever has a number of these later does not begin as the first one did
        assert group._actors.calls == [3, 3, 2, 2]
        nodes.join(1, group)
        started(group)
        assert group.sample(STEPS).env_steps == 4 * ENVS * STEPS
        assert group._actors.calls == [4, 4, 3, 3]
    with pytest.raises(CheckpointError, match=f"holds {2 * len(saved)} env runners and this group has 1"):
        make_group(rt, num_runners=0).set_state(state)
