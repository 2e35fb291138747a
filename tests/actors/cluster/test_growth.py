"""Runs with `num_env_runners: auto` on a real cluster: nodes join and are killed while they go on."""

import logging
import signal
from typing import ClassVar

import pytest

from rlx.algorithms.impala import IMPALAConfig
from rlx.algorithms.ppo import PPOConfig
from rlx.callbacks import Callback
from rlx.errors import ActorError
from rlx.metrics import read_metrics

pytestmark = [pytest.mark.timeout(120), pytest.mark.slow]
ENVS, STEPS = 4, 16
ASYNCHRONOUS = {"updates_per_iteration": 4}
IN_STEP = {"minibatch_size": 64, "epochs": 1}


class Story(Callback):
    """Has things happen to the cluster while `fit` goes on, and counts what is learned from."""

    tell = None
    """A generator: it gets an algorithm after every iteration, and the run stops when it has ended."""
    steps = episodes = 0
    widths: ClassVar[set[int]] = set()

    def on_train_result(self, algorithm, metrics):
        try:
            Story.tell.send(algorithm)
        except StopIteration:
            algorithm.request_stop("the story is over")

    def on_sample_end(self, algorithm, trajectory):
        done = (trajectory.terminated | trajectory.truncated) & trajectory.mask
        Story.steps += int(trajectory.mask.sum())
        Story.episodes += int(done.sum())
        Story.widths |= {trajectory.mask.shape[1] // ENVS}


def begin(tell, *arguments):
    Story.steps = Story.episodes = 0
    Story.widths = set()
    Story.tell = tell(*arguments)
    next(Story.tell)


def config(kind, key, head, **training):
    made = kind().environment("CartPole-v1").reporting(progress="none").training(**training).callbacks([Story])
    made.env_runners(num_env_runners="auto", num_envs_per_env_runner=ENVS, rollout_fragment_length=STEPS)
    return made.runtime(engine="cluster", address=head.address, token_file=str(key.path)).stop(iterations=100_000)


def kept(kind):
    """Return how many CPUs are left to a driver that learns while runners are at work."""
    return int(kind is IMPALAConfig)


def places(algorithm):
    """Return on which nodes its env runners are, the number of each."""
    names = [handle._actor.body._node.name for handle in algorithm.runners._actors._handles.values()]
    return {name: names.count(name) for name in names}


def number(algorithm):
    return algorithm.runners.num_runners


def there_and_back(start, name, head, end):
    """A node joins, and is ended by this signal when its runners have been taken in."""
    algorithm = yield
    assert number(algorithm) == 2
    other = start(f"{name}-b", head.address, cpu=2)
    while number(algorithm) < 4:
        algorithm = yield
    assert places(algorithm) == {f"{name}-a": 2, f"{name}-b": 2}
    yield
    other.end(end)
    while number(algorithm) > 2:
        algorithm = yield
    assert places(algorithm) == {f"{name}-a": 2}
    yield


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM], ids=["killed", "left"])
@pytest.mark.parametrize("kind, training", [(PPOConfig, IN_STEP), (IMPALAConfig, ASYNCHRONOUS)])
def test_a_run_grows_with_a_node_and_goes_on_without_it(start, key, tmp_path, caplog, kind, training, end):
    name = f"{kind.__name__}-{end.name}"
    head = start(f"{name}-a", cpu=2 + kept(kind))
    begin(there_and_back, start, name, head, end)
    caplog.set_level(logging.INFO, "rlx")
    made = config(kind, key, head, **training).fault_tolerance(max_restarts=3 * (end == signal.SIGKILL))
    with made.build(tmp_path / "run") as algorithm:
        last = algorithm.fit()
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    numbers = [row["num_env_runners"] for row in rows]
    assert numbers[0] == numbers[-1] == 2 and max(numbers) == 4 and {2, 4} <= Story.widths <= {1, 2, 3, 4}
    assert last["env_steps"] + last["dropped_env_steps"] == Story.steps
    assert last["runner_restarts"] == last["env_failures"] == 0
    if kind is PPOConfig:
        assert last["episodes"] == Story.episodes
        before = 0
        for row in rows:  # reset steps of vector environments are not counted
            assert 0.8 < (row["env_steps"] - before) / (row["num_env_runners"] * ENVS * STEPS) <= 1
            before = row["env_steps"]
    for count in (2, 4):
        assert f"num_env_runners=auto: now {count}, one for each free CPU" in caplog.text
    assert caplog.text.count("is given up, and the run goes on without it") == 2


@pytest.mark.parametrize("kind, training", [(PPOConfig, IN_STEP), (IMPALAConfig, ASYNCHRONOUS)])
def test_a_run_is_resumed_with_other_nodes(start, key, tmp_path, caplog, kind, training):
    name = f"{kind.__name__}-again"
    head = start(f"{name}-a", cpu=1 + kept(kind))
    other = start(f"{name}-b", head.address, cpu=2)
    begin(lambda: (yield))
    made = config(kind, key, head, **training)
    with made.build(tmp_path / "run") as algorithm:
        first = algorithm.fit()
    steps, episodes = Story.steps, Story.episodes
    assert first["num_env_runners"] == 3
    other.end(signal.SIGKILL)
    begin(lambda: (yield))
    caplog.set_level(logging.INFO, "rlx")
    with made.build(tmp_path / "run", restore=tmp_path / "run") as algorithm:
        last = algorithm.fit()
    assert (last["iteration"], last["num_env_runners"]) == (first["iteration"] + 1, 1)
    assert last["env_steps"] + last["dropped_env_steps"] == steps + Story.steps
    assert last["episodes"] == episodes + Story.episodes or kind is IMPALAConfig
    assert "3 env runners were saved and there are 1: of 2 the unfinished episodes are lost" in caplog.text


def test_a_run_whose_head_is_lost_says_so(start, key):
    head = start("head-of-growth", cpu=1)
    begin(lambda: (yield))
    with config(PPOConfig, key, head, **IN_STEP).build() as algorithm:
        head.end(signal.SIGKILL)
        with pytest.raises(ActorError, match=r"the head of the cluster \(.*\) closed its link"):
            algorithm.train()
