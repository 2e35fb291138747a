"""Training, and many calls, while frames are doubled and late and connections are cut, as a seed wants it."""

import contextlib
import itertools
import time

import pytest

from rlx import actors
from rlx.actors import Restart
from rlx.actors.cluster import engine
from rlx.actors.cluster.handshake import Role
from rlx.actors.cluster.heartbeat import Patience
from rlx.actors.engines import wire
from rlx.algorithms.impala import IMPALAConfig
from rlx.algorithms.ppo import PPOConfig
from rlx.building import LazyRuntime
from rlx.errors import ActorDied
from tests.actors.cluster.faults import BEHIND, DELAY, DOUBLE, INSIDE, Fault, Faults
from tests.actors.cluster.scenarios import Stage, lives
from tests.polling import until

pytestmark = pytest.mark.timeout(120)
BOTH_WAYS = (("CALL", True), ("SEND", True), ("SPAWN", True), ("PUBLISH", True), ("REPLY", False), ("PING", False))
DOUBLED = [Fault(DOUBLE, kind, to_node, nth=0, chance=0.5) for kind, to_node in BOTH_WAYS]
LATE = [Fault(DELAY, kind, to_node, nth=0, chance=0.03) for kind, to_node in BOTH_WAYS]


@pytest.fixture(scope="module")
def head(start):
    head = start("a")
    start("b", head.address)
    return head


@pytest.fixture
def behind(key, head):
    """Return a function that opens a runtime behind a middle with that seed; it returns both."""
    with contextlib.ExitStack() as stack, pytest.MonkeyPatch.context() as patch:

        def open_behind(seed, preload=()):
            faults = Faults(seed)
            faults.install(patch)
            patch.setattr(engine, "RELINK_EVERY_S", 0.05)
            options = {"address": head.address, "token_file": key.path, "preload": preload}
            patience = Patience(every_s=0.1, suspect_s=30.0, dead_s=60.0)
            return faults, stack.enter_context(actors.runtime("cluster", patience=patience, **options))

        yield open_behind


def test_a_seed_strikes_the_same_frames_again():
    frames = [(wire.CALL, number, "run") for number in range(1, 200)] + [(wire.PING, 0, "")] * 200
    done = []
    for seed in (1, 1, 2):
        faults = Faults(seed)
        with faults(*DOUBLED, *LATE):
            for frame in frames if len(done) != 1 else reversed(frames):  # each name has its own luck
                faults.strike(*frame, True, Role.DRIVER)
            done.append(sorted(faults.done))
    assert done[0] and done[0] == done[1] != done[2]


@pytest.mark.parametrize("seed", [1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(2, 12))])
def test_calls_run_once_at_most_and_in_order_whatever_happens(behind, tmp_path, seed):
    faults, rt = behind(seed)
    stage = Stage(rt, faults, tmp_path)
    workers = [stage.living(restart=Restart(max=1000, backoff_s=0.01)) for _ in range(4)]
    cuts = [Fault(INSIDE, "CALL", True, nth=0, chance=0.02), Fault(BEHIND, "REPLY", False, nth=0, chance=0.02)]
    lost = 0
    with faults(*cuts, *DOUBLED, *LATE):
        for _ in range(10):
            for token, call in [stage.begin(worker) for worker in workers for _ in range(3)]:
                try:
                    assert stage.end(token, call) == token, faults
                except ActorDied:
                    lost += 1
    assert len(stage.answered) + lost == 120, faults
    assert lost < 100 and any(done.startswith("cut") for done in faults.done), faults
    stage.check()
    rt.close()
    until(lambda: not any(map(lives, stage.processes())))


# Training. ------------------------------------------------------------------------------------------------------------


def ppo(max_restarts=0):
    made = PPOConfig().environment("CartPole-v1").reporting(progress="none").runtime(seed=3)
    made.env_runners(num_env_runners=2, num_envs_per_env_runner=4, rollout_fragment_length=32)
    return made.training(epochs=2, minibatch_size=32).fault_tolerance(max_restarts=max_restarts)


def computed(row):
    watched = ("time/", "env_steps_per_s", "learner_restarts", "runner_restarts")
    return {name: value for name, value in row.items() if not name.startswith(watched)}


@pytest.mark.slow
def test_ppo_computes_the_same_behind_doubled_and_late_frames(behind, monkeypatch):
    with ppo().build() as algorithm:
        expected = [computed(algorithm.train()) for _ in range(4)]
    faults, rt = behind(1, preload=("numpy", "torch", "gymnasium"))
    monkeypatch.setattr(LazyRuntime, "__call__", lambda self: rt)
    with faults(*DOUBLED, *LATE), ppo().build() as algorithm:
        rows = [computed(algorithm.train()) for _ in range(4)]
        assert any(done.startswith(DOUBLE) for done in faults.done), faults
    assert repr(rows) == repr(expected), faults


@pytest.mark.slow
@pytest.mark.parametrize("config", [PPOConfig, IMPALAConfig])
def test_training_goes_on_to_its_end_when_connections_are_cut_and_counts_every_batch_once(behind, monkeypatch, config):
    faults, rt = behind(2, preload=("numpy", "torch", "gymnasium"))
    monkeypatch.setattr(LazyRuntime, "__call__", lambda self: rt)
    made = config().environment("CartPole-v1").reporting(progress="none").fault_tolerance(max_restarts=100)
    made.env_runners(num_env_runners=2, num_envs_per_env_runner=4, rollout_fragment_length=32)
    made.training(batch_size=256) if config is IMPALAConfig else made.training(minibatch_size=64, epochs=1)
    cuts = [Fault(INSIDE, "CALL", True, nth=number) for number in (9, 30)] + [Fault(BEHIND, "REPLY", False, nth=20)]
    with made.build() as algorithm:
        rows = [algorithm.train()]
        with faults(*cuts, *DOUBLED, *LATE):
            deadline = time.monotonic() + 60.0
            while sum(done.startswith("cut") for done in faults.done) < 3:
                assert time.monotonic() < deadline, faults
                rows.append(algorithm.train())
        rows += [algorithm.train() for _ in range(2)]
    assert [row["iteration"] for row in rows] == list(range(1, len(rows) + 1))
    assert rows[-1]["runner_restarts"] >= 1
    steps = rows[0]["gradient_steps"]
    assert [row["gradient_steps"] for row in rows] == [steps * row["iteration"] for row in rows], faults
    collected = steps * 256 if config is IMPALAConfig else 256  # of which those that begin an episode do not count
    per_row = [after["env_steps"] - before["env_steps"] for before, after in itertools.pairwise(rows)]
    assert all(0.8 * collected < count <= collected for count in per_row), faults
