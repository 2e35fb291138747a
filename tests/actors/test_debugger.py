"""breakpoint() in an actor, debugged from another process."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time

import pytest

from rlx.actors import debugger
from rlx.actors.timesheet import Timesheet, read_calls
from rlx.errors import ActorError, ConfigError

T = 20.0
STOPS_AT_THE_CALL = sys.version_info >= (3, 13)
"""Where pdb begins: at breakpoint() itself, before 3.13 at the line behind it."""
pytestmark = pytest.mark.timeout(60)

ACTOR = """
import asyncio, sys
from pathlib import Path
from rlx.actors.debugger import install_breakpoint
from rlx.actors.timesheet import Timesheet

__name__ = "rlx.actors.engines.toy"  # as the modules are named that call methods

def serve(method):
    running = sheet.begin(method.__name__)
    try:
        answer = asyncio.run(method()) if asyncio.iscoroutinefunction(method) else method()
        print("answer", answer, flush=True)
    except BaseException as error:
        print("error", type(error).__name__, flush=True)
    sheet.end(running)

folder = Path(sys.argv[1])
sheet = Timesheet(folder, 1, "env/0", lanes=2)
install_breakpoint(sheet)
sys.path.append(str(folder))
import user_code
for name in sys.argv[2:]:
    serve(getattr(user_code, name))
"""

METHODS = """\
import asyncio

def count():
    total = 0
    for step in range(3):
        breakpoint()
        total += step
    return total

def once():
    value = 7
    breakpoint()
    return value

def last():
    breakpoint()

def helped():
    value = once()
    return value + 1

async def waits():
    breakpoint()
    await asyncio.sleep(0.01)
    value = 8
    return value
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "user_code.py").write_text(METHODS)
    return tmp_path


@pytest.fixture
def actor(folder):
    """Start an actor process that runs the methods named, one after another."""
    with contextlib.ExitStack() as processes:

        def start(*methods, **env):
            process = subprocess.Popen(
                [sys.executable, "-c", ACTOR, str(folder), *methods],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                env={name: text for name, text in os.environ.items() if name != "PYTHONBREAKPOINT"} | env,
            )
            processes.enter_context(process)
            processes.callback(process.kill)
            return process

        yield start


@pytest.fixture
def client(folder):
    """Debug the actor as `rlx debug` does, with the given lines for stdin; return what is printed."""

    def run(*lines):
        code = (
            "import sys; from pathlib import Path; from rlx.actors.debugger import debug; debug(Path(sys.argv[1]), 1)"
        )
        done = subprocess.run(
            [sys.executable, "-c", code, str(folder)],
            input="".join(f"{line}\n" for line in lines),
            capture_output=True,
            text=True,
            timeout=T,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def waits(process):
    """Return the line that says that a breakpoint waits."""
    line = process.stdout.readline()
    assert line.startswith("breakpoint in "), line + process.stdout.read()
    return line


def test_a_breakpoint_says_where_it_is_and_how_to_get_there(actor, folder, client):
    process = actor("once")
    line = waits(process)
    assert re.fullmatch(r"breakpoint in env/0\.once \(.*/user_code\.py:12\): rlx debug env/0\n", line)
    assert read_calls(folder, 1).breakpoint == line[line.index("(") + 1 : line.index(")")]
    assert (folder / "1.debug").stat().st_mode & 0o777 == 0o600
    shown = client("p value", "c")
    assert "once()" in shown and "(Pdb) 7\n" in shown
    assert process.communicate(timeout=T)[0] == "answer 7\n"
    assert read_calls(folder, 1).breakpoint is None and not (folder / "1.debug").exists()


def test_going_on_comes_to_the_next_breakpoint(actor, client):
    process = actor("count")
    for step in range(3):
        waits(process)
        assert f"(Pdb) {step}\n" in client("p step", "c")
    assert process.communicate(timeout=T)[0] == "answer 3\n"


def test_what_is_changed_in_the_debugger_holds(actor, client):
    process = actor("once")
    waits(process)
    client("!value = 11", "c")
    assert process.communicate(timeout=T)[0] == "answer 11\n"


def test_quitting_ends_the_method_and_not_the_actor(actor, client):
    process = actor("count", "once")
    waits(process)
    client("q")
    assert process.stdout.readline() == "error BdbQuit\n"
    waits(process)
    client("c")
    assert process.communicate(timeout=T)[0] == "answer 7\n"


@pytest.mark.parametrize("method", ["once", "last", "helped"])
def test_stepping_ends_with_the_method(actor, client, method):
    process = actor(method)
    waits(process)
    shown = client(*["n"] * 20)
    assert "--Return--" in shown and "serve" not in shown and "toy" not in shown
    assert (
        process.communicate(timeout=T)[0]
        == {"once": "answer 7\n", "last": "answer None\n", "helped": "answer 8\n"}[method]
    )


def test_stepping_passes_an_await(actor, client):
    process = actor("waits")
    waits(process)
    assert "(Pdb) 8\n" in client(*["n"] * (3 if STOPS_AT_THE_CALL else 2), "p value", "n")
    assert process.communicate(timeout=T)[0] == "answer 8\n"


def test_breakpoints_set_in_the_debugger_keep_the_session(actor, client):
    process = actor("count")
    waits(process)
    # Line 7 is total += step, line 6 the breakpoint() that the session comes by again in each round.
    more = ["c"] * 3 if STOPS_AT_THE_CALL else []  # twice a round
    commands = "b 7", "p 100 + step", "c", "p 200 + step", "p count()", "c", "p 300 + step", *more, "clear 1", "c"
    shown = client(*commands)
    assert "Breakpoint 1 at " in shown and "bdb.py" not in shown
    steps = ["100", "200", "3", "301"] if STOPS_AT_THE_CALL else ["100", "201", "3", "302"]
    assert [line[6:] for line in shown.splitlines() if line[6:].isdigit()] == steps
    assert process.communicate(timeout=T)[0] == "answer 3\n"


def test_a_client_that_vanishes_lets_the_actor_go_on(actor, folder, client):
    process = actor("once", "once")
    waits(process)
    client("p value")  # and then its stdin ends
    assert process.stdout.readline() == "answer 7\n"
    waits(process)
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(folder / "1.debug"))
        connection.recv(1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    assert process.communicate(timeout=T)[0] == "answer 7\n"


def test_a_client_that_is_killed_lets_the_actor_go_on(actor, folder):
    process = actor("once")
    waits(process)
    code = "import sys; from pathlib import Path; from rlx.actors.debugger import debug; debug(Path(sys.argv[1]), 1)"
    with subprocess.Popen(
        [sys.executable, "-c", code, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as terminal:
        assert terminal.stdout.readline().endswith(f"user_code.py({12 if STOPS_AT_THE_CALL else 13})once()\n")
        terminal.send_signal(signal.SIGKILL)
    assert process.communicate(timeout=T)[0] == "answer 7\n"


def test_an_actor_goes_on_if_nobody_comes(actor):
    process = actor("once", RLX_DEBUG_WAIT_S="0.1")
    waits(process)
    warning, answer = process.communicate(timeout=T)[0].splitlines()
    assert re.fullmatch(r"warning: nobody has come to the breakpoint at .*:\d+ for 0.1 s; env/0 goes on", warning)
    assert answer == "answer 7"


def test_a_wait_that_is_no_number_is_refused(actor, monkeypatch, folder):
    assert actor("once", "once", RLX_DEBUG_WAIT_S="soon").communicate(timeout=T)[0] == "error ConfigError\n" * 2
    monkeypatch.setenv("RLX_DEBUG_WAIT_S", "soon")
    with pytest.raises(ConfigError, match="RLX_DEBUG_WAIT_S=soon is no number of seconds"):
        debugger._wait_s()


def test_the_users_choice_of_debugger_is_kept(actor):
    assert actor("once", PYTHONBREAKPOINT="0").communicate(timeout=T)[0] == "answer 7\n"


def test_without_a_breakpoint_there_is_nothing_to_debug(folder):
    with pytest.raises(ActorError, match=r"no breakpoint waits in this actor; call breakpoint\(\)"):
        debugger.debug(folder, 1)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
def test_another_user_is_turned_away(actor, folder, client):
    process = actor("once")
    waits(process)
    for part, mode in ((folder / "1.debug", 0o666), (folder, 0o711)):
        part.chmod(mode)
    code = "import os, socket; os.setuid(12345); c = socket.socket(1); c.connect('1.debug'); print(c.recv(1))"
    # It starts inside the folder, so that no folder above has to be opened to strangers.
    stranger = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, timeout=T)
    assert stranger.stdout == b"b''\n", stranger.stderr
    assert "(Pdb) 7\n" in client("p value", "c")


def test_a_long_folder_name_is_no_obstacle(tmp_path):
    folder = tmp_path / ("x" * 150)
    folder.mkdir()
    sheet = Timesheet(folder, 1, "a")
    os.environ["RLX_DEBUG_WAIT_S"] = "0.01"
    try:
        before = time.monotonic()
        debugger._Breakpoint(sheet)()
        assert time.monotonic() - before < 5
    finally:
        del os.environ["RLX_DEBUG_WAIT_S"]
    assert [file.name for file in folder.iterdir()] == ["1.calls"]
