"""Actors on Ray, beside what every engine promises: processes, put, channels, resources, and the same training."""

import os
import signal

import numpy as np
import pytest

from rlx import actors
from rlx.actors import Err
from rlx.algorithms.ppo import PPOConfig
from rlx.errors import ActorDied, ConfigError, Infeasible, NotSupported

pytest.importorskip("ray", reason="needs the extra rlx[ray]")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
T = 60.0  # a deadline, not a delay


class Holder:
    def __init__(self, channel=None):
        self.channel, self.kept = channel, None

    def keep(self, value):
        self.kept = value
        return type(value).__name__

    def total(self, *values):
        return float(sum(np.sum(value) for value in values))

    def writable(self, value):
        return value.flags.writeable

    def take(self):
        found = self.channel.latest()
        return None if found is None else (found.version, found.value)

    def publish(self, value):
        return self.channel.publish(value)

    def count(self, n):
        yield from range(n)

    def pid(self):
        return os.getpid()


@pytest.fixture(scope="module")
def rt():
    with actors.runtime("ray", num_cpus=3) as runtime:
        yield runtime


def test_a_value_is_put_once_and_arrives_as_itself_in_every_actor(rt):
    value = np.arange(100_000, dtype=np.float64)
    ref, group = rt.put(value), rt.group([rt.spawn(Holder) for _ in range(2)])
    assert [answer.value for answer in group.total.call(ref, ref, 1).result(T)] == [2 * value.sum() + 1] * 2
    assert np.array_equal(ref.get(), value)
    assert group.actors[0].writable.call(ref).result(T) is False
    with pytest.raises(NotSupported, match="as an argument"):
        rt.put([ref])


def test_readers_of_a_channel_see_the_newest_version_whoever_publishes(rt):
    channel = rt.channel("weights")
    assert channel.latest() is None
    readers = [rt.spawn(Holder, channel) for _ in range(2)]
    assert readers[0].take.call().result(T) is None
    assert channel.publish(np.ones(50_000), version=7) == 7
    assert readers[1].publish.call({"w": np.full(50_000, 3.0)}).result(T) == 8
    for reader in readers:
        version, value = reader.take.call().result(T)
        assert version == 8 and value["w"].sum() == 150_000
    newest = channel.latest()
    assert newest.version == 8 and channel.latest() is newest
    assert sorted(one.versions_behind for one in channel.readers().values()) == [0, 0, 0]


def test_a_killed_process_is_a_death_that_is_named_and_others_go_on(rt):
    one, other = rt.spawn(Holder), rt.spawn(Holder)
    pid = one.pid.call().result(T)
    os.kill(pid, signal.SIGKILL)
    outcomes = rt.group([one, other]).total.call(2).result(T)
    assert isinstance(outcomes[0], Err) and isinstance(outcomes[0].error, ActorDied)
    assert f"(pid {pid})" in str(outcomes[0].error) and outcomes[1].value == 2


def test_a_stream_is_ahead_by_its_credits_and_can_be_left(rt):
    holder = rt.spawn(Holder)
    assert list(holder.count.stream(5, credits=2)) == [0, 1, 2, 3, 4]
    with holder.count.stream(10**6, credits=2) as items:
        assert items.next(T) == 0
    assert holder.total.call(1).result(T) == 1


def test_one_program_learns_the_same_inline_in_processes_and_on_ray():
    def train(engine):
        made = PPOConfig().environment("CartPole-v1").reporting(progress="none").runtime(engine=engine, seed=3)
        made.env_runners(num_env_runners=2, num_envs_per_env_runner=2, rollout_fragment_length=16)
        with made.training(epochs=2, minibatch_size=16).build() as algorithm:
            rows = [algorithm.train() for _ in range(3)]
        apart = ("time/", "env_steps_per_s")
        return [{name: value for name, value in row.items() if not name.startswith(apart)} for row in rows]

    on_ray = train("ray")
    assert on_ray == train("inline") == train("local") and on_ray[-1]["env_steps"] > 150


def test_a_language_model_learns_the_same_from_runners_on_ray_and_here(tiny_text):
    def train(engine):
        made = tiny_text("grpo", token_runners={"num_token_runners": 2, "torch_threads": 1})
        with made.runtime(engine=engine).build() as algorithm:
            rows = [algorithm.train() for _ in range(2)]
        return [
            {name: value for name, value in row.items() if not name.startswith(("time/", "env_steps_per_s"))}
            for row in rows
        ]

    assert train("ray") == train("local")


def test_resources_are_those_of_the_cluster_and_ray_is_told(rt):
    import ray

    one = rt.spawn(Holder, resources=actors.Resources(cpu=2))
    one.ready(T)
    assert ray.available_resources()["CPU"] == 1
    waiting = rt.spawn(Holder, resources=actors.Resources(cpu=2))
    assert rt.state()[waiting.name].status == "pending"
    rt.kill(one)
    assert waiting.total.call(3).result(T) == 3
    with pytest.raises(Infeasible, match=r"asks for 4 CPUs, and no machine of the Ray cluster has that: 3 CPUs"):
        rt.spawn(Holder, resources=actors.Resources(cpu=4))
    with pytest.raises(ConfigError, match=r"Ray runs in this process already, so num_cpus cannot be set"):
        actors.runtime("ray", num_cpus=2)


def test_an_address_is_for_ray_alone():
    with pytest.raises(ConfigError, match=r"runtime.address=auto is that of a Ray cluster"):
        PPOConfig().environment("CartPole-v1").runtime(address="auto").validate()
    with pytest.raises(ConfigError, match=r"num_learners=2 on the Ray cluster auto may be on several machines"):
        PPOConfig().environment("CartPole-v1").runtime(engine="ray", address="auto").learners(num_learners=2).validate()
