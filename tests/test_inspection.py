"""The commands that look at running actors, on a real driver with real actors."""

import contextlib
import json
import os
import pty
import select
import signal
import subprocess
import sys
import time

import pytest

from rlx.cli import main
from tests.polling import until

T = 20.0
pytestmark = pytest.mark.timeout(60)
RLX = [sys.executable, "-m", "rlx.cli"]


def run(capsys, *arguments):
    """Return the exit code and what was printed."""
    code = main(list(map(str, arguments)))
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def test_ps_without_a_runtime_says_so(toy, capsys):
    assert run(capsys, "ps") == (0, "No runtime of yours is running.\n", "")
    assert run(capsys, "ps", "--json") == (0, "[]\n", "")
    code, _, error = run(capsys, "why", "a")
    assert code == 1 and error.startswith("rlx: error: no runtime of yours is running here")


def test_ps_shows_every_runtime_and_actor(toy, capsys):
    first, second = toy(**{"env/0": "spin", "b": "idle"}), toy(c="idle")
    code, text, _ = run(capsys, "ps")
    head, columns, env, b, blank, head2, _, c = text.splitlines()
    assert code == 0 and blank == ""
    assert head.startswith(f"driver {first.driver.pid}, sleeping: python") and head2.endswith(f"({second.folder})")
    assert " ".join(columns.split()) == "actor status pid running pending restarts cpu memory process resources"
    assert env.split()[:4] == ["env/0", "alive", str(first.pids["env/0"]), "spin()"] and env.endswith("cpu 1")
    assert b.split()[:6] == ["b", "alive", str(first.pids["b"]), "-", "0", "0"]
    assert c.startswith("c ")
    assert len(run(capsys, "ps", "--runtime", second.folder)[1].splitlines()) == 3


def test_ps_has_a_stable_json_shape(toy, capsys):
    there = toy(a="spin")
    ((runtime),) = json.loads(run(capsys, "ps", "--json")[1])
    assert list(runtime) == ["folder", "driver", "alive", "process", "command", "started", "actors"]
    (actor,) = runtime["actors"]
    assert list(actor) == [
        "name", "status", "pid", "process", "running", "pending", "done", "restarts", "cpu_percent", "memory_bytes",
        "memory_kind", "resources", "waiting", "breakpoint", "error", "log", "serial",
    ]  # fmt: skip
    assert (actor["name"], actor["pid"], actor["running"][0]["method"]) == ("a", there.pids["a"], "spin")
    assert actor["log"] == str(there.folder / "logs" / "a.log")
    assert json.loads(run(capsys, "top", "--json")[1])[0]["driver"] == there.driver.pid
    assert run(capsys, "top", "--once")[1].splitlines()[2].startswith("a  ")


def test_everything_works_while_the_driver_is_stopped(toy, capsys, tmp_path):
    there = toy(a="print_and_nap")
    until(lambda: "line 29" in there.log("a"))
    os.kill(there.driver.pid, signal.SIGSTOP)
    until(lambda: "stopped (SIGSTOP)" in run(capsys, "ps")[1])
    assert "has run print_and_nap() for" in run(capsys, "why", "a")[1]
    assert "in nap\n" in run(capsys, "stack", "a")[1]
    assert run(capsys, "logs", "a", "-n", "2") == (0, "line 28\nline 29\n", "")
    assert run(capsys, "trace", "-o", tmp_path / "t.json")[0] == 0


def test_why_has_a_json_form(toy, capsys):
    toy(a="idle").update("a", status="pending", waiting="waits for gpu 1, held by b", pid=0, sent=0)
    found = json.loads(run(capsys, "why", "a", "--json")[1])
    assert (found["waiting"], found["text"]) == (
        "waits for gpu 1, held by b",
        "a is pending: it waits for gpu 1, held by b.",
    )


def test_an_unknown_actor_is_wrong_input(toy, capsys):
    toy(**{"env/0": "idle"})
    for command in (["why"], ["stack"], ["debug"]):
        code, _, error = run(capsys, *command, "env/1")
        assert code == 2 and error == "rlx: error: no actor is named 'env/1'; there is env/0.\n"


def test_stack_shows_equal_stacks_once(toy, capsys):
    toy(a="nap", b="nap", c="spin")
    until(lambda: run(capsys, "stack")[1].startswith("a, b:\n") and "in spin" in run(capsys, "stack", "c")[1])
    groups = json.loads(run(capsys, "stack", "--all", "--json")[1])
    assert [group["actors"] for group in groups] == [["a", "b"], ["c"]]
    assert "in nap" in groups[0]["stack"]


def test_logs_of_dead_and_of_silent_actors(toy, capsys):
    there = toy(a="print_and_nap", silent="idle")
    until(lambda: "line 29" in there.log("a"))
    there.update("a", status="dead", error="killed")
    assert run(capsys, "logs", "a", "-n", "1") == (0, "line 29\n", "")
    assert run(capsys, "logs", "silent") == (0, "", "rlx: silent has printed nothing\n")
    found = json.loads(run(capsys, "logs", "a", "-n", "2", "--json")[1])
    assert found == {"actor": "a", "file": str(there.folder / "logs" / "a.log"), "lines": ["line 28", "line 29"]}
    code, _, error = run(capsys, "logs", "b")
    assert code == 2 and "b.log; there is a, silent." in error


def test_logs_of_a_finished_run(tmp_path, capsys):
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "env.0.log").write_text("one\ntwo\n")
    assert run(capsys, "logs", "--run", tmp_path, "env/0", "-n", "1") == (0, "two\n", "")
    assert run(capsys, "logs", "--run", tmp_path, "env/0", "--follow") == (0, "one\ntwo\n", "")
    code, _, error = run(capsys, "logs", "--run", tmp_path, "env/7")
    assert code == 2 and "there is env.0." in error
    assert run(capsys, "logs", "--run", tmp_path / "logs", "env/0")[0] == 2


def test_logs_are_followed_until_the_actor_ends(toy):
    there = toy(a="print_slowly")
    command = [*RLX, "logs", "a", "-n", "1", "--follow"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as follower:
        seen = [follower.stdout.readline() for _ in range(4)]
        os.kill(there.pids["a"], signal.SIGKILL)
        there.update("a", status="dead")
        seen += follower.stdout.read().splitlines(keepends=True)
        assert follower.wait(T) == 0
    first = int(seen[0].split()[1])
    assert seen == [f"line {number}\n" for number in range(first, first + len(seen))]
    assert there.log("a").endswith(seen[-1])


def test_a_trace_is_written(toy, capsys, tmp_path):
    toy(a="nap")
    file = tmp_path / "trace.json"
    assert run(capsys, "trace", "-o", file)[1] == f"2 calls in {file}: open it at https://ui.perfetto.dev\n"
    assert {event["name"] for event in json.loads(file.read_text())["traceEvents"]} >= {"process_name", "nap"}
    code, _, error = run(capsys, "trace", "-o", tmp_path / "none" / "trace.json")
    assert code == 2 and "cannot be written" in error


def test_an_actor_is_debugged_through_a_pipe(toy):
    there = toy(a="debugged")
    until(lambda: "rlx debug a\n" in there.log("a"))
    assert subprocess.run([*RLX, "ps"], capture_output=True, text=True).stdout.splitlines()[2].split()[1] == "debugging"
    done = subprocess.run(
        [*RLX, "debug", "a"], input="p total\nn\np step\nq\n", capture_output=True, text=True, timeout=T
    )
    assert done.returncode == 0 and "(Pdb) 1\n" in done.stdout and "(Pdb) 0\n" in done.stdout
    until(lambda: there.log("a").endswith("BdbQuit has ended debugged\nserves on\n"))
    late = subprocess.run([*RLX, "debug", "a"], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=T)
    assert late.returncode == 1 and "no breakpoint waits in this actor" in late.stderr


def interrupted(process):
    """Press Ctrl-C until the process ends: readline overlooks one that comes just as it shows its prompt."""
    for _ in range(20):
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.wait(1.0)
    return None


@contextlib.contextmanager
def terminal(*arguments):
    """Run a command on a terminal of its own; yield the process and a function that reads until a text comes."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [*RLX, *arguments], stdin=theirs, stdout=theirs, stderr=theirs, env=os.environ | {"TERM": "xterm"}
    )
    os.close(theirs)
    seen = b""

    def read_until(text: bytes) -> bytes:
        nonlocal seen
        deadline = time.monotonic() + T
        while text not in seen:
            assert select.select([ours], [], [], max(0.0, deadline - time.monotonic()))[0], seen
            seen += os.read(ours, 65536)
        found, seen = seen, b""
        return found

    try:
        yield process, ours, read_until
    finally:
        process.kill()
        process.wait()
        os.close(ours)


def test_an_actor_is_debugged_on_a_terminal(toy):
    there = toy(a="debugged")
    with terminal("debug", "a") as (process, keyboard, read_until):
        read_until(b"(Pdb) ")
        os.write(keyboard, b"p 41 + total\n")
        assert b"42" in read_until(b"(Pdb) ")
        assert interrupted(process) == 130
    until(lambda: there.log("a").count("rlx debug a\n") == 2)  # it went on, to the next one


def test_top_is_drawn_again_in_place_until_it_is_interrupted(toy):
    there = toy(a="nap")
    with terminal("top") as (process, _, read_until):
        read_until(b"nap() ")
        there.update("a", status="restarting")
        read_until(b"restarting")
        process.send_signal(signal.SIGINT)
        assert process.wait(T) == 130


def test_asking_for_help_loads_nothing_heavy():
    code = "import sys; sys.argv[1:] = ['--help']\nfrom rlx.cli import main\ntry: main()\nexcept SystemExit: pass\n"
    code += "print([name for name in ('numpy', 'torch', 'rich', 'rlx.actors') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=T)
    assert done.stdout.splitlines()[-1] == "[]"
