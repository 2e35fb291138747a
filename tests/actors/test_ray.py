"""Actors on Ray, beside what every engine promises: processes, put, channels, resources, and the same training."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import cloudpickle
import numpy as np
import pytest
import torch

from rlx import actors
from rlx.actors import Err, Resources, Restart
from rlx.actors.future import Future
from rlx.actors.interface import ActorSpec, Listener
from rlx.algorithms.ppo import PPOConfig
from rlx.errors import ActorDied, ActorError, CallCancelled, CallTimeout, ConfigError, Infeasible, NotSupported
from rlx.rollout import text_envs
from rlx.rollout.deadline import EnvTimeout, Watchdog
from rlx.rollout.text_env_host import Key
from rlx.rollout.text_envs import TextEnvs
from tests.rollout.scripted_env import Talkative

pytest.importorskip("ray", reason="needs the extra rlx[ray]")
from rlx.actors.engines import pickling
from rlx.actors.engines.ray_data import Parcel
from rlx.actors.engines.ray_host import VALUE, LoopHost
from tests.polling import until

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

    def own(self):
        import ray

        return ray.put(1).owner_address()

    def count_looks(self, looks):
        asked, look = [], self.channel._look
        self.channel._look = lambda: (asked.append(1), look())[1]
        for _ in range(looks):
            self.channel.latest()
        return len(asked)

    def wait_for(self, version, path):
        with open(path, "w") as fifo:
            fifo.write(str(self.channel.latest().version))
        deadline = time.monotonic() + T
        while (found := self.channel.latest()).version != version:
            assert time.monotonic() < deadline
        return found.version

    def count(self, n):
        yield from range(n)

    def leave_after(self, n):
        yield from range(n)
        sys.exit(3)

    def stop(self):
        raise StopIteration("of a method")

    def leave(self, code):
        sys.exit(code)

    def note(self, path):
        with open(path, "a") as file:
            file.write("x")

    def hang(self):
        def spin():
            while True:
                pass

        watchdog = Watchdog(0.2)
        watchdog.watch()
        return watchdog.run("step", 0, spin)

    def pid(self):
        return os.getpid()


class Late:
    """Is made when somebody writes into a pipe."""

    def __init__(self, path):
        with open(path) as fifo:
            self.word = fifo.read()

    def say(self):
        return self.word


class Noting:
    def __init__(self):
        self.begun = []

    def begin(self, number):
        self.begun.append(number)

    def all(self):
        return self.begun

    def until_cancelled(self, path):
        with open(path, "w") as fifo:
            fifo.write("begun")
        deadline = time.monotonic() + T
        while not actors.current().cancelled():
            assert time.monotonic() < deadline
        return "cancelled"


class Tasks:
    def __init__(self):
        self.event, self.begun = asyncio.Event(), []

    def begin(self, number):
        self.begun.append(number)

    def all(self):
        return self.begun

    async def wait(self):
        await self.event.wait()
        return "waited"

    async def set(self):
        self.event.set()


class Inheriting(Tasks):
    pass


cloudpickle.register_pickle_by_value(sys.modules[__name__])  # a process cannot import a test module by its name


@pytest.fixture(scope="module")
def rt():
    with actors.runtime("ray", num_cpus=3) as runtime:
        yield runtime


@pytest.fixture
def pipe(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    return tmp_path / "pipe"


def test_a_value_is_put_once_and_arrives_as_itself_in_every_actor(rt):
    value = np.arange(100_000, dtype=np.float64)
    ref, group = rt.put(value), rt.group([rt.spawn(Holder) for _ in range(2)])
    assert [answer.value for answer in group.total.call(ref, ref, 1).result(T)] == [2 * value.sum() + 1] * 2
    assert np.array_equal(ref.get(), value)
    assert group.actors[0].writable.call(ref).result(T) is False
    with pytest.raises(NotSupported, match="as an argument"):
        rt.put([ref])


# Channels.


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
    behind = {name: one.versions_behind for name, one in channel.readers().items()}
    assert behind == dict.fromkeys(["the driver", *(one.name for one in readers)], 0)
    rt.kill(readers[0])
    assert set(channel.readers()) == {"the driver", readers[1].name}


def test_a_value_outlives_the_actor_that_published_it(rt):
    import ray

    channel = rt.channel("of an actor")
    publisher, reader = rt.spawn(Holder, channel), rt.spawn(Holder, channel)
    assert publisher.publish.call(np.ones(200_000)).result(T) == 1
    owner = publisher.own.call().result(T)
    _, _, (reference,), _ = ray.get(channel._board.newest.remote(channel.name, ("nobody", None), 0, 0.0))
    rt.kill(publisher)
    assert reference.owner_address() != owner  # Ray forgets an object with its owner, be it in a moment or in a minute
    version, value = reader.take.call().result(T)
    assert version == 1 and value.sum() == 200_000


def test_a_call_asks_for_the_newest_version_once_and_is_told_of_those_that_come_while_it_runs(rt, pipe):
    channel = rt.channel("looked at")
    reader = rt.spawn(Holder, channel)
    channel.publish(1)
    assert reader.count_looks.call(1000).result(T) == 1
    waiting = reader.wait_for.call(2, str(pipe))
    assert pipe.read_text() == "1"
    channel.publish(2)
    assert waiting.result(T) == 2


def test_a_version_that_did_not_arrive_is_asked_for_again(rt, monkeypatch):
    channel = rt.channel("late")
    channel.publish(5)
    with monkeypatch.context() as patch:
        patch.setattr("rlx.actors.engines.ray_data.pickling.loads", lambda message: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            channel.latest()
    assert channel.latest().value == 5


def test_a_channel_whose_board_has_ended_says_so(rt):
    import ray

    with actors.runtime("ray") as other:
        channel = other.channel("kept no more")
        channel.publish(1)
        ray.kill(channel._board)
        with pytest.raises(ActorError, match="channel 'kept no more' is gone: the Ray actor that keeps it has ended"):
            while True:  # until Ray knows
                channel.latest()


# Calls and streams.


def test_a_stream_is_ahead_by_its_credits_and_can_be_left(rt):
    holder = rt.spawn(Holder)
    assert list(holder.count.stream(5, credits=2)) == [0, 1, 2, 3, 4]
    with holder.count.stream(10**6, credits=2) as items:
        assert items.next(T) == 0
    assert holder.total.call(1).result(T) == 1


def test_calls_before_an_actor_of_several_threads_is_made_wait_for_that(rt, pipe):
    actor = rt.spawn(Late, str(pipe), concurrency=3)
    calls = [actor.say.call() for _ in range(3)]
    pipe.write_text("made")
    assert [call.result(T) for call in calls] == ["made"] * 3


@pytest.mark.parametrize("made", [Noting, Tasks])
def test_calls_that_come_in_any_order_begin_by_their_numbers(made):
    async def bring(numbers):
        host = LoopHost("host", {}, torch.get_num_threads(), 1)
        await host.make(*Parcel((made, (), {}), "it").arguments)
        await asyncio.gather(*(host.run(n, "begin", *Parcel(((n,), {}), "it").arguments) for n in numbers))
        kind, _, message = await host.run(len(numbers) + 1, "all", *Parcel(((), {}), "it").arguments)
        assert kind == VALUE
        return pickling.loads(message)

    assert asyncio.run(bring([3, 1, 4, 2])) == [1, 2, 3, 4]


def test_a_call_that_runs_in_a_thread_hears_that_it_was_cancelled_and_one_that_has_not_begun_never_runs(rt, pipe):
    actor = rt.spawn(Noting, concurrency=2)
    call = actor.until_cancelled.call(str(pipe))
    assert pipe.read_text() == "begun"
    other = actor.until_cancelled.call(str(pipe))
    assert pipe.read_text() == "begun"
    third = actor.begin.call(3)
    assert third.cancel()
    with pytest.raises(CallCancelled, match="before it ran"):
        call.cancel(), other.cancel(), third.result(T)
    assert [call.result(T), other.result(T), actor.all.call().result(T)] == ["cancelled", "cancelled", []]


def test_a_task_that_is_cancelled_says_so_and_inherited_coroutines_are_tasks(rt):
    actor = rt.spawn(Inheriting)
    waiting, cancelled = actor.wait.call(), actor.wait.call()
    actor.all.call().result(T)
    assert cancelled.cancel()
    with pytest.raises(CallCancelled, match=r"wait\(\) was cancelled while it ran"):
        cancelled.result(T)
    actor.set.call()
    assert waiting.result(T) == "waited"


def test_an_environment_is_interrupted_at_its_deadline(rt):
    with pytest.raises(EnvTimeout, match=r"step\(\) of an environment took longer"):
        rt.spawn(Holder).hang.call().result(T)


def test_sys_exit_in_a_generator_ends_the_actor_and_stop_iteration_of_a_method_is_an_error(rt):
    actor = rt.spawn(Holder)
    assert isinstance(actor.stop.call().exception(T), StopIteration)
    items = actor.leave_after.stream(2)
    assert [items.next(T), items.next(T)] == [0, 1]
    with pytest.raises(ActorDied, match=r"ended with exit code 3 in leave_after\(\)"):
        items.next(T)


# Deaths.


def test_a_killed_process_is_a_death_that_is_named_and_others_go_on(rt):
    one, other = rt.spawn(Holder), rt.spawn(Holder)
    pid = one.pid.call().result(T)
    os.kill(pid, signal.SIGKILL)
    outcomes = rt.group([one, other]).total.call(2).result(T)
    assert isinstance(outcomes[0], Err) and isinstance(outcomes[0].error, ActorDied)
    text = str(outcomes[0].error)
    assert f"(pid {pid})" in text and "\n" not in text and len(text) < 500 and outcomes[1].value == 2


def test_the_death_of_an_idle_actor_is_noticed(rt):
    actor, heard = rt.spawn(Holder, restart=Restart(max=1, backoff_s=0.01)), threading.Event()
    rt.monitor(actor, on_restart=lambda who, error: heard.set())
    os.kill(actor.pid.call().result(T), signal.SIGKILL)
    assert heard.wait(T) and actor.total.call(1).result(T) == 1


def test_a_death_does_not_hold_the_lock_that_calls_need(rt):
    life, told = threading.Lock(), threading.Event()

    def exited(why):
        told.set()
        with life:  # as ActorLife takes its own, which it holds while it posts calls
            pass

    engine = rt._engine
    body = engine.spawn(ActorSpec("alone", Holder, (), {}, {}), Listener(exited, lambda why: None, lambda stall: None))
    body.ready.result(T)
    future = Future("alone", "total")
    with life:
        body.end("was ended")
        assert told.wait(T)
        body.post("total", engine.pack((1,), {}), future)
    with pytest.raises(ActorDied):
        future.result(T)


def test_an_actor_that_cannot_be_reached_is_ended_since_it_may_have_done_what_it_was_asked(rt):
    from ray.exceptions import ActorUnavailableError

    class Done:
        def exception(self):
            return ActorUnavailableError("the network is down", None)

    actor = rt.spawn(Holder)
    pid = actor.pid.call().result(T)
    body = actor._actor.body
    body._on_answer(Done(), 1000, "total", None)
    with pytest.raises(ActorDied, match=r"was ended as it could not be reached: .*the network is down"):
        actor.total.call(1).result(T)
    body.gone.result(T)
    until(lambda: not os.path.exists(f"/proc/{pid}"))


# Runtimes and clusters.


def test_runtimes_of_one_process_share_ray_and_the_last_one_ends_it(rt):
    import ray

    from rlx.actors.engines.ray_cluster import connection

    with actors.runtime("ray") as other:
        actor = other.spawn(Holder)
        connection.leave(rt._engine._session)  # as its close() does
        assert ray.is_initialized() and actor.total.call(2).result(T) == 2
        rt._engine._session = connection.join(None, T, {})
    assert rt.spawn(Holder).total.call(3).result(T) == 3


def test_idle_actors_finish_what_they_were_sent_before_a_runtime_is_closed(rt, tmp_path):
    with actors.runtime("ray") as other:
        actor = other.spawn(Holder)
        actor.ready(T)
        for _ in range(200):
            actor.note.send(str(tmp_path / "notes"))
    assert (tmp_path / "notes").read_text() == "x" * 200


def test_what_ray_is_started_with_is_the_first_runtimes_to_say(rt):
    with pytest.raises(ConfigError, match=r"Ray runs in this process already, so num_cpus cannot be set"):
        actors.runtime("ray", num_cpus=2)
    with pytest.raises(ConfigError, match=r"already, at .*, so runtime.address=10.1.2.3:6379 cannot be joined"):
        actors.runtime("ray", address="10.1.2.3:6379")


@pytest.mark.parametrize("address", ["127.0.0.1:1", "auto", "ray://there:10001"])
def test_an_address_without_a_cluster_is_an_error_that_names_the_setting(monkeypatch, address):
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    with pytest.raises(ConfigError, match=f"there is no Ray cluster at runtime.address={address} ") as caught:
        actors.runtime("ray", address=address)
    assert "\n" not in str(caught.value)


def test_who_listens_and_is_no_cluster_is_not_waited_for_long(monkeypatch):
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr("rlx.actors.engines.ray_cluster.JOIN_S", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(ConfigError, match=rf"runtime.address={address} \(.* not answered as Ray does within 1 s\)"):
            actors.runtime("ray", address=address)


def test_the_programs_own_handler_of_sigterm_is_put_back(monkeypatch):
    from rlx.actors.engines.ray_cluster import Connection

    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr("ray.init", lambda **options: signal.signal(signal.SIGTERM, lambda *_: None))
    own = lambda *_: None  # noqa: E731
    before = signal.signal(signal.SIGTERM, own)
    try:
        Connection().join(None, T, {})
        assert signal.getsignal(signal.SIGTERM) is own
    finally:
        signal.signal(signal.SIGTERM, before)


SHUT_DOWN_EARLY = """
import ray
from rlx import actors
from rlx.actors.engines import ray as engine
from rlx.errors import ActorDied, ActorError

class Waiting:
    def wait(self):
        import threading
        threading.Event().wait()

engine.LOOK_EVERY_S = 2.0
rt = actors.runtime("ray", num_cpus=1)
actor = rt.spawn(Waiting)
actor.ready(60)
call = actor.wait.call()
ray.shutdown()
for fails in (
    lambda: actor.wait.call().result(60),
    lambda: next(actor.wait.stream()),
    lambda: rt.spawn(Waiting),
    lambda: call.result(60),
):
    try:
        fails()
    except ActorError as error:
        print(type(error).__name__, "shut down under" in str(error))
rt.close()
print(ray.is_initialized())
"""


def test_ray_may_be_shut_down_before_the_runtime_is_closed():
    done = subprocess.run([sys.executable, "-c", SHUT_DOWN_EARLY], capture_output=True, text=True, timeout=200)
    assert done.stdout.splitlines() == [
        "ActorDied True",
        "ActorDied True",
        "ActorError True",
        "ActorDied True",
        "False",
    ], done.stderr


def test_an_address_is_for_ray_alone():
    with pytest.raises(ConfigError, match=r"runtime.address=auto is that of a cluster"):
        PPOConfig().environment("CartPole-v1").runtime(address="auto").validate()


# Resources.


def test_resources_are_those_of_the_cluster_and_ray_is_told(rt):
    import ray

    one = rt.spawn(Holder, resources=Resources(cpu=2))
    one.ready(T)
    assert ray.available_resources()["CPU"] == 1
    waiting = rt.spawn(Holder, resources=Resources(cpu=2))
    assert rt.state()[waiting.name].status == "pending"
    rt.kill(one)
    assert waiting.total.call(3).result(T) == 3
    with pytest.raises(Infeasible, match=r"asks for 4 CPUs, and no machine of the Ray cluster has that: 3 CPUs"):
        rt.spawn(Holder, resources=Resources(cpu=4))
    with pytest.raises(NotSupported, match=r"asks for 1 CPU, node=here: machines of the Ray cluster have no labels"):
        rt.spawn(Holder, resources=Resources(cpu=1, labels={"node": "here"}))
    rt.kill(waiting)


def test_a_reservation_is_set_aside_in_ray_until_its_last_actor_has_ended(rt):
    import ray

    free = lambda: ray.available_resources().get("CPU", 0)  # noqa: E731
    until(lambda: free() == 3)
    with rt.reserve([Resources(cpu=1), Resources(), Resources(cpu=2)]) as reserved:
        assert free() == 0
        one = rt.spawn(Holder, reservation=reserved[2])
        other = rt.spawn(Holder, resources=Resources(cpu=1), reservation=reserved[0])
        assert rt.group([one, other]).total.call(1).values(T) == [1, 1]
    assert free() == 0
    rt.kill(one), rt.kill(other)
    until(lambda: free() == 3)


def test_a_reservation_that_others_leave_no_room_for_is_late_and_leaves_nothing_behind(rt):
    import ray

    @ray.remote(num_cpus=2)
    class Stranger:
        def up(self):
            return True

    stranger = Stranger.remote()
    assert ray.get(stranger.up.remote())
    with pytest.raises(CallTimeout, match=r"within 0.1 s: Ray has not set aside 2 CPUs, which other jobs may hold"):
        rt.reserve([Resources(cpu=2)], timeout_s=0.1)
    ray.kill(stranger)
    rt.reserve([Resources(cpu=3)], timeout_s=T).release()


# Training.


def test_the_start_of_an_environments_process_is_no_lost_time(rt, monkeypatch):
    """It takes seconds on Ray, and the answer that is waited for meanwhile has one."""
    monkeypatch.setattr(text_envs, "MARGIN_S", 0.99)
    envs = TextEnvs(Talkative, timeout_s=0.01, num_actors=1, runtime=lambda: rt, restart=Restart(max=1))
    begun = {Key(0, 0, 0): (3, {"prompt": [1], "record": {"turns": 2, "what": ""}})}
    assert envs.reset(begun)[Key(0, 0, 0)].tokens.tolist() == [1, 3]
    os.kill(rt.state()["text_env/0"].pid, signal.SIGKILL)
    assert envs.reset(begun)[Key(0, 0, 0)].tokens.tolist() == [1, 3]
    assert envs.take_restarts() == 1
    envs.close()


@pytest.mark.parametrize("num_learners", [0, 2])
def test_one_program_learns_the_same_inline_in_processes_and_on_ray(num_learners):
    def train(engine):
        made = PPOConfig().environment("CartPole-v1").reporting(progress="none").runtime(engine=engine, seed=3)
        made.learners(num_learners=num_learners)
        made.env_runners(num_env_runners=2, num_envs_per_env_runner=2, rollout_fragment_length=16)
        with made.training(epochs=2, minibatch_size=16).build() as algorithm:
            rows = [algorithm.train() for _ in range(3)]
        apart = ("time/", "env_steps_per_s")
        return [{name: value for name, value in row.items() if not name.startswith(apart)} for row in rows]

    on_ray = train("ray")
    assert on_ray == train("local") and on_ray[-1]["env_steps"] > 150
    if not num_learners:
        assert on_ray == train("inline")


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
