"""A clock that jumps ends no wait: deadlines are on the monotonic clock."""

import ast
import sys
import time
from pathlib import Path

import cloudpickle
import pytest

import rlx.actors

cloudpickle.register_pickle_by_value(sys.modules[__name__])

WALL = {"time", "time_ns", "localtime", "gmtime", "now", "utcnow", "today"}
ALLOWED = {("board.py", '"started": time.time()')}
"""What is shown to people, and nothing waits for."""
AGES = {"ray_data.py"}
"""Files that tell how old versions are by the clocks of several machines; nothing waits in them."""


def wall_clock_calls(source):
    """Return the lines that ask for the time of day."""
    tree, lines = ast.parse(source), source.splitlines()
    names = {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module in ("time", "datetime")
        for alias in node.names
    }
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in WALL and isinstance(node.value, ast.Name):
            is_clock = node.value.id in {"time", "datetime", "date"} | names
        else:
            is_clock = isinstance(node, ast.Name) and node.id in WALL & names
        if is_clock:
            found.append(lines[node.lineno - 1].strip().rstrip(","))
    return found


def test_no_deadline_of_the_actor_core_is_on_the_wall_clock():
    folder = Path(rlx.actors.__file__).parent
    files = [file for file in folder.rglob("*.py") if file.name not in AGES]
    found = {(file.name, line) for file in files for line in wall_clock_calls(file.read_text())}
    assert found == ALLOWED


@pytest.mark.parametrize(
    ("source", "count"),
    [
        ("import time\ntime.time()", 1),
        ("from time import time\ntime()", 1),
        ("import time\ntime.monotonic()", 0),
        ("from datetime import datetime\ndatetime.now()", 1),
    ],
)
def test_the_search_finds_what_it_is_for(source, count):
    assert len(wall_clock_calls(source)) == count


def test_a_jump_of_the_clock_ends_no_wait(rt, monkeypatch):
    """Every caller in this process sees a clock that runs to the year 2100, and then back."""
    actor = rt.spawn(Sleeper)
    jumps = iter([4.1e9, 0.0] * 100_000)
    monkeypatch.setattr(time, "time", lambda: next(jumps))
    assert [actor.nap.call(0.2).result(10) for _ in range(2)] == ["rested", "rested"]


class Sleeper:
    def nap(self, seconds):
        from time import sleep

        sleep(seconds)
        return "rested"
