"""What is seen of running actors from another process, whatever they and their driver are stuck in."""

import asyncio
import json
import os
import signal
import tempfile
import time

import pytest

from rlx import actors
from rlx.actors import observe, processes
from rlx.actors.board import RuntimeFolder
from rlx.actors.resources import Resources
from rlx.errors import ActorError, ConfigError
from tests.polling import until

T = 20.0
pytestmark = pytest.mark.timeout(60)


def look(name=None):
    runtime = observe.view(observe.find_runtime(None))
    return runtime if name is None else observe.find_actor(runtime, name)


def why(name):
    runtime = observe.measured_view(observe.find_runtime(None))
    return observe.why(runtime, observe.find_actor(runtime, name))


def stack_of(name, *methods):
    """The stack once the actor is inside the methods: its sheet says so a little earlier."""
    runtime = look()
    actor = observe.find_actor(runtime, name)
    return until(
        lambda: text if {f"in {one}" for one in methods} <= ends(text := observe.stack(runtime, actor)) else ""
    )


def ends(text):
    return {line[line.rindex("in ") :] for line in text.splitlines() if "in " in line}


def stop(pid):
    os.kill(pid, signal.SIGSTOP)
    until(lambda: processes.stat(pid).state == "T")


def test_actors_are_seen_with_what_they_run(toy):
    there = toy(busy="spin", idle="idle")
    runtime = observe.measured_view(observe.find_runtime(None))
    busy, idle = runtime.actors
    assert (runtime.driver, runtime.alive, runtime.folder) == (there.driver.pid, True, there.folder)
    assert (busy.name, busy.status, busy.pid, busy.resources) == ("busy", "alive", there.pids["busy"], "cpu 1")
    assert [call.method for call in busy.running] == ["spin"] and 0 < busy.running[0].seconds < T
    assert (busy.pending, busy.done, idle.pending, idle.done) == (1, 1, 0, 1)
    assert idle.running == [] and idle.process == "sleeping" and idle.cpu_percent < 20
    assert busy.cpu_percent > 0 and busy.memory_kind == "PSS" and 2**20 < busy.memory_bytes < 2**28


def test_a_stopped_driver_hides_nothing(toy):
    there = toy(actor="nap")
    stop(there.driver.pid)
    assert [call.method for call in look("actor").running] == ["nap"]
    text = why("actor")
    assert "has run nap() for" in text and f"Its driver (process {there.driver.pid}) is stopped (SIGSTOP)." in text


def test_the_reason_is_told_of_a_long_method(toy):
    there = toy(busy="spin", asleep="nap")
    busy, asleep = why("busy"), why("asleep")
    assert busy.startswith(f"busy (process {there.pids['busy']}) is alive and has run spin() for ")
    assert "no call waits. The process is " in busy and "% of a CPU. `rlx stack busy` shows where." in busy
    assert "The process is sleeping, 0 % of a CPU." in asleep


def test_the_reason_is_told_of_a_stopped_actor(toy):
    there = toy(actor="spin")
    stop(there.pids["actor"])
    assert f"is stopped (SIGSTOP); `kill -CONT {there.pids['actor']}` lets it go on." in why("actor")


@pytest.mark.parametrize(
    ("update", "text"),
    [
        (
            {"status": "pending", "waiting": "waits for gpu 1, held by b", "pid": 0, "sent": 0},
            "is pending: it waits for gpu 1, held by b.",
        ),
        ({"status": "pending", "pid": 0, "sent": 0}, "is pending: it waits for its turn."),
        ({"status": "starting"}, "is starting; no call waits. The process is sleeping"),
        (
            {"status": "pending", "pid": 0, "sent": 0, "held": 2},
            "is pending: it waits for its turn; 2 more calls wait.",
        ),
        ({"sent": 3}, "is alive and runs nothing; 2 more calls wait. The process is sleeping"),
        (
            {"status": "restarting", "restarts": 2, "error": "it crashed"},
            "is restarting, 2 restarts so far; no call waits. It died because: it crashed",
        ),
        ({"status": "restarting", "sent": 9, "held": 1}, "0 restarts so far; 1 more call waits."),
        ({"status": "dead", "error": "was killed by SIGKILL"}, "is dead: was killed by SIGKILL"),
        ({"status": "failed"}, "is failed: the reason is not known"),
    ],
)
def test_the_reason_is_told_of_every_status(toy, update, text):
    toy(a="idle").update("a", **update)
    assert text in why("a")


@pytest.fixture
def own_folder(tmp_path, monkeypatch):
    """The only runtime in sight is the one that the test opens."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


class Waiter:
    def items(self):
        yield from range(100)


class Tasks:
    async def wait(self):
        await asyncio.sleep(60)


def test_a_stream_whose_reader_rests_is_told(own_folder):
    with actors.runtime("local", preload=("numpy",)) as runtime:
        actor = runtime.spawn(Waiter, name="a")
        with actor.items.stream(credits=2) as stream:
            assert stream.next(T) == 0
            until(lambda: [call.waits_for_reader for call in look("a").running] == [True])
            assert "items() waits for the reader of its stream to take the next item or close it." in why("a")
        until(lambda: look("a").running == [])
        assert "reader" not in why("a")


def test_all_calls_of_an_async_actor_are_seen_to_run(own_folder):
    with actors.runtime("local", preload=("numpy",)) as runtime:
        actor = runtime.spawn(Tasks, name="a")
        waiting = [actor.wait.call() for _ in range(8)]
        until(lambda: len(look("a").running) == 8)
        text = why("a")
        assert text.count("wait() for") == 5 and " and 3 more; no call waits." in text
        runtime.kill(actor)
        assert len(waiting) == 8


def test_calls_that_wait_with_their_actor_are_counted(own_folder):
    one = Resources(custom={"seat": 1})
    with actors.runtime("local", preload=("numpy",), resources=one) as runtime:
        first = runtime.spawn(Waiter, name="first", resources=one)
        second = runtime.spawn(Tasks, name="second", resources=one)
        calls = [second.wait.call() for _ in range(3)]
        assert look("second").pending == 3 and "; 3 more calls wait." in why("second")
        calls[0].cancel()
        assert look("second").pending == 2
        runtime.kill(first)
        until(lambda: len(look("second").running) == 2)
        assert look("second").pending == 2


def test_a_death_that_the_driver_has_not_noticed_is_seen(toy):
    there = toy(a="print_and_nap")
    until(lambda: "line 29" in there.log("a"))
    os.kill(there.pids["a"], signal.SIGKILL)
    until(lambda: look("a").process == "ended")
    text = why("a")
    assert "is alive for its driver, which has not noticed yet that the process has ended." in text
    assert text.endswith("Its last lines:\n  line 25\n  line 26\n  line 27\n  line 28\n  line 29")
    actor = look("a")
    assert (actor.running, actor.memory_bytes, actor.cpu_percent) == ([], None, None)


def test_the_end_of_the_driver_is_told(toy):
    there = toy(a="nap")
    there.driver.kill()
    there.driver.wait(T)
    with pytest.raises(ActorError, match="no runtime of yours is running here"):
        observe.find_runtime(None)
    runtime = observe.view(observe.find_runtime(str(there.driver.pid)))
    assert (runtime.alive, runtime.process, runtime.actors[0].process) == (False, "ended", "ended")
    assert "has ended, and with it all its actors." in observe.why(runtime, runtime.actors[0])


def test_what_an_earlier_process_ran_is_not_the_restarted_ones(toy):
    toy(a="spin").update("a", pid=os.getpid(), sent=4)
    assert (look("a").running, look("a").pending, look("a").done) == ([], 4, 0)


def test_the_newest_actor_of_a_name_is_meant(toy):
    there = toy(a="idle")
    runtime = look()
    double = observe.ActorView(**{**vars(runtime.actors[0]), "serial": 2})
    both = observe.RuntimeView(**{**vars(runtime), "actors": [runtime.actors[0], double]})
    assert observe.find_actor(both, "a") is double
    with pytest.raises(ConfigError, match=r"no actor is named 'b'; there is a\."):
        observe.find_actor(runtime, "b")
    assert there.folder == runtime.folder


def test_a_runtime_is_found_by_its_driver_its_folder_and_its_name(toy):
    first, second = toy(a="idle"), toy(b="idle")
    for which in (str(second.driver.pid), str(second.folder), second.folder.name):
        assert observe.find_runtime(which).folder == second.folder
    with pytest.raises(ConfigError, match="2 runtimes are meant; name one with --runtime") as refused:
        observe.find_runtime(None)
    assert str(first.folder) in str(refused.value) and "toy_runtime.py" in str(refused.value)
    with pytest.raises(ConfigError, match="17 is neither the process id of a driver nor"):
        observe.find_runtime("17")
    with pytest.raises(ConfigError, match="is no folder of a runtime"):
        observe.find_runtime(str(first.folder / "logs"))


def test_a_runtime_of_another_container_is_not_touched(toy):
    there = toy(a="idle")
    file = there.folder / "info.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"pid_namespace": "pid:[1]"}))
    assert observe.find_runtimes(None) == []
    with pytest.raises(ConfigError, match="is in another container"):
        observe.find_runtime(str(there.folder))


@pytest.mark.parametrize("method", ["spin", "nap", "hold_the_gil", "in_threads"])
def test_stacks_are_shown_whatever_runs(toy, method):
    toy(a=method)
    text = stack_of("a", *(["spin", "nap"] if method == "in_threads" else [method]))
    if method == "in_threads":
        main, thread = text.split("thread 2:\n")
        assert (
            main.startswith("main thread:\n")
            and "in spin" in main.splitlines()[1]
            and "in nap" in thread.splitlines()[0]
        )
    else:
        assert f"in {method}" in text.splitlines()[0]
    assert "0x" not in text


def test_equal_stacks_are_shown_once(toy):
    toy(a="nap", b="nap", c="spin", deaf="deaf")
    for name, method in (("a", "nap"), ("b", "nap"), ("c", "spin")):
        stack_of(name, method)
    runtime = look()
    groups = observe.stacks(runtime, runtime.actors)
    assert [names for names, _ in groups] == [["a", "b"], ["c"], ["deaf"]]
    assert "in nap" in groups[0][1] and "shows no stacks: it is still starting" in groups[2][1]
    with pytest.raises(ActorError, match="shows no stacks: it is still starting"):
        observe.stack(runtime, runtime.actors[3])
    assert processes.stat(runtime.actors[3].pid).state == "S"  # the signal would have ended it


def test_a_stopped_actor_is_not_waited_for(toy):
    there = toy(a="nap")
    stop(there.pids["a"])
    runtime, before = look(), time.monotonic()
    with pytest.raises(ActorError, match=r"is stopped \(SIGSTOP\), and shows no stacks"):
        observe.stack(runtime, runtime.actors[0])
    assert time.monotonic() - before < 1.0


def test_an_actor_that_does_not_answer_is_not_waited_for_long(toy, monkeypatch):
    there = toy(a="nap")
    monkeypatch.setattr("rlx.actors.stacks.ANSWER_S", 0.2)
    monkeypatch.setattr("rlx.actors.stacks.STACK_SIGNAL", signal.SIGINT)  # handled, but not by writing stacks
    runtime = look()
    with pytest.raises(ActorError, match=r"has not shown its stacks within 0.2 s; it is "):
        observe.stack(runtime, runtime.actors[0])
    assert there.pids["a"] == runtime.actors[0].pid


def test_an_ended_actor_has_no_stacks(toy):
    toy(a="nap").update("a", status="dead")
    with pytest.raises(ActorError, match="a has no process: it is dead"):
        observe.stack(look(), look("a"))


def test_a_trace_has_the_ended_and_the_running_calls(toy):
    toy(a="nap", b="idle")
    before = time.monotonic() * 1e6
    found = json.loads(json.dumps(observe.trace(observe.find_runtime(None))))["traceEvents"]
    names = {event["pid"]: event["args"]["name"] for event in found if event["name"] == "process_name"}
    calls = [(names[event["pid"]], event["name"], event["cat"]) for event in found if event["ph"] == "X"]
    assert calls == [("a", "__init__", "returned"), ("a", "nap", "running"), ("b", "__init__", "returned")]
    init, nap = [event for event in found if event["ph"] == "X"][:2]
    assert init["tid"] == nap["tid"] == 1 and init["ts"] + init["dur"] <= nap["ts"] < before
    assert nap["ts"] + nap["dur"] >= before


def test_calls_at_once_are_drawn_in_rows_of_their_own():
    span = observe.Span
    ended = [
        span("a", 1.0, 4.0, True),
        span("b", 2.0, 3.0, False),
        span("c", 3.0, 5.0, True),
        span("d", 4.0, 6.0, True),
    ]
    events = observe._events(7, ended, [span("e", 4.5, 0.0, False)], now=9.0)
    assert [(e["name"], e["tid"], e["dur"], e["cat"]) for e in events if e["ph"] == "X"] == [
        ("a", 1, 3e6, "returned"),
        ("b", 2, 1e6, "raised"),
        ("c", 2, 2e6, "returned"),
        ("d", 1, 2e6, "returned"),
        ("e", 3, 4.5e6, "running"),
    ]
    assert [event["args"]["name"] for event in events if event["ph"] == "M"] == ["calls 1", "calls 2", "calls 3"]


def test_an_empty_runtime_is_seen_as_such(toy):
    folder = RuntimeFolder.create()
    assert observe.view(observe.find_runtime(None)).actors == []
    assert observe.trace(observe.find_runtime(None))["traceEvents"] == []
    folder.remove()
