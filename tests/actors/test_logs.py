"""The output of actors: kept in files, shown as it comes, never a flood."""

import os
import select
import subprocess
import sys
import time

import pytest

from rlx.actors import logs
from rlx.actors.logs import Damper, LogFolder, LogFollower, tail

T = 20.0


class Screen:
    """What was shown, and a clock that is set by hand."""

    def __init__(self, folder):
        self.text = ""
        self.time = 100.0
        self.damper = Damper(folder, self.show, now=lambda: self.time)

    def show(self, text):
        self.text += text

    def take(self):
        text, self.text = self.text, ""
        return text.splitlines()


@pytest.fixture
def folder(tmp_path):
    return LogFolder(tmp_path)


@pytest.fixture
def screen(folder):
    return Screen(folder)


@pytest.fixture(params=["inotify", "polling"])
def follower(request, folder, screen, monkeypatch):
    if request.param == "polling":
        monkeypatch.setattr(logs._Inotify, "open", lambda _: None)
        monkeypatch.setattr(logs, "POLL_S", 0.02)
    screen.damper = Damper(folder, screen.show)
    made = LogFollower(folder, screen.damper)
    yield made
    made.close()


class Loop:
    """An epoll loop with one deadline, as the engine has it."""

    def __init__(self, follower, wish):
        self.follower, self.deadline, self.rounds = follower, None, 0
        self.epoll = select.epoll()
        if follower.fileno() is not None:
            self.epoll.register(follower.fileno(), select.EPOLLIN)
        self.ask(wish)

    def ask(self, wish):
        if wish is not None:
            self.deadline = time.monotonic() + wish

    def run(self, until, limit_s=T):
        end = time.monotonic() + limit_s
        while not until() and time.monotonic() < end:
            nearest = min(end, self.deadline or end)
            ready = self.epoll.poll(max(0.0, nearest - time.monotonic()))
            self.rounds += 1
            if ready:
                self.ask(self.follower.on_readable())
            if self.deadline is not None and time.monotonic() >= self.deadline:
                self.deadline = None
                self.ask(self.follower.tick())
        return until()


def printer(folder, name, code, **options):
    fd = folder.open(name)
    process = subprocess.Popen([sys.executable, "-c", code], stdout=fd, stderr=fd, **options)
    os.close(fd)
    return process


def test_output_is_kept_through_a_kill(folder):
    process = printer(
        folder,
        "env/3",
        "import os, signal; os.write(1, b'out\\n'); os.write(2, b'err\\nlast'); os.kill(os.getpid(), 9)",
    )
    assert process.wait(T) == -9
    assert folder.file("env/3") == folder.path / "env.3.log"
    assert folder.file("env/3").stat().st_mode & 0o777 == 0o600
    assert folder.tail("env/3") == ["out", "err", "last"]
    assert folder.tail("env/3", lines=2) == ["err", "last"] and folder.tail("env/3", lines=0) == []


def test_a_restarted_actor_appends_and_its_tail_is_its_own(folder):
    printer(folder, "a", "print('first life')").wait(T)
    printer(folder, "a", "print('second life')").wait(T)
    assert folder.file("a").read_text() == "first life\nsecond life\n"
    assert folder.tail("a") == ["second life"]
    assert LogFolder(folder.path).tail("a") == ["first life", "second life"]


def test_a_tail_reads_only_the_end_of_a_long_file(tmp_path):
    file = tmp_path / "x.log"
    file.write_bytes(b"".join(b"%09d\n" % number for number in range(100_000)))
    assert tail(file, 2) == ["000099998", "000099999"]
    assert tail(file, 5, max_bytes=20) == ["000099998", "000099999"]
    assert tail(tmp_path / "none.log") == []


def test_a_line_reads_as_on_a_terminal():
    assert logs.text(b" 10%\r 50%\r100%\r") == "100%"
    assert logs.text(b"\xff\xfe") == "\ufffd\ufffd"


def test_only_empty_logs_are_removed(folder):
    os.close(folder.open("silent"))
    printer(folder, "loud", "print(1)").wait(T)
    folder.close("silent")
    folder.close("loud")
    folder.close("never opened")
    assert [file.name for file in folder.path.iterdir()] == ["loud.log"]


def test_names_that_are_long_or_look_like_paths_stay_in_the_folder(folder):
    assert folder.file("../../etc/x") == folder.path / "......etc.x.log"
    long, longer = "é" * 200, "é" * 201
    assert folder.file(long) != folder.file(longer)
    for name in (long, "..", "/"):
        os.close(folder.open(name))
    assert len(list(folder.path.iterdir())) == 3


def test_lines_are_shown_as_they_come(folder, follower, screen):
    process = printer(folder, "env/0", "print('hello', flush=True); input(); print('again')", stdin=subprocess.PIPE)
    loop = Loop(follower, follower.follow("env/0"))
    assert loop.run(lambda: screen.text == "[env/0] hello\n"), screen.text
    process.communicate(b"\n")
    assert loop.run(lambda: screen.text == "[env/0] hello\n[env/0] again\n"), screen.text


def test_what_is_printed_before_the_watch_begins_is_shown_too(folder, follower, screen):
    printer(folder, "a", "print('early')").wait(T)
    follower.follow("a")
    follower.tick()
    assert screen.take() == ["[a] early"]


def test_an_actor_that_ends_is_shown_to_the_last_byte(folder, follower, screen):
    follower.follow("a")
    printer(folder, "a", "print('one'); print('no newline', end='')").wait(T)
    follower.follow("a")
    follower.finish("a")
    assert screen.take() == ["[a] one", "[a] no newline"]
    printer(folder, "a", "print('not followed')").wait(T)
    follower.tick()
    assert screen.take() == []


def test_unfinished_lines_wait_for_their_end(folder, follower, screen):
    fd = folder.open("a")
    follower.follow("a")
    os.write(fd, b"half ")
    follower.tick()
    assert screen.take() == []
    os.write(fd, b"and half\nrest")
    follower.tick()
    assert screen.take() == ["[a] half and half"]
    follower.close()
    assert screen.take() == ["[a] rest"]
    os.close(fd)


def test_an_emptied_file_is_read_on_from_its_new_end(folder, follower, screen):
    fd = folder.open("a")
    follower.follow("a")
    os.write(fd, b"before\n")
    follower.tick()
    os.truncate(folder.file("a"), 0)
    follower.tick()
    os.write(fd, b"after\n")
    follower.tick()
    assert screen.take() == ["[a] before", "[a] after"]
    folder.file("a").unlink()
    follower.tick()
    os.close(fd)


def test_more_than_can_be_read_is_left_out_and_told(folder, follower, screen):
    fd = folder.open("a")
    follower.follow("a")
    line = b"x" * 99 + b"\n"
    os.write(fd, line * 100_000)
    assert follower.tick() == logs.PACE_S
    follower.close()
    left_out = 10_000_000 - 2 * logs.READ_BYTES
    first, told, repeated = screen.take()
    assert first == f"[a] {'x' * 99}"
    assert told == f"[a] {left_out:,} more bytes within 1 s: {folder.file('a')}"
    assert repeated.startswith("[a] 5,241 more lines within 5 s like ")  # 5,242.88 were read, two of them in part
    os.close(fd)


def test_the_rest_of_an_ended_actor_is_read_in_whole(folder, follower, screen):
    fd = folder.open("a")
    follower.follow("a")
    os.write(fd, b"".join(b"%099d\n" % number for number in range(5000)))  # 500,000 bytes: two readings
    os.close(fd)
    follower.finish("a")
    follower.close()
    first, told = screen.take()
    assert first == f"[a] {'0' * 99}"
    assert told.startswith("[a] 4,999 more lines within 5 s like ")


def test_a_busy_printer_wakes_the_loop_at_its_pace_only(folder, screen):
    screen.damper = Damper(folder, screen.show)
    follower = LogFollower(folder, screen.damper)
    process = printer(folder, "a", "import os\nwhile True: os.write(1, b'line\\n')")
    loop = Loop(follower, follower.follow("a"))
    loop.run(lambda: False, limit_s=1.0)
    process.kill()
    process.wait(T)
    follower.close()
    assert 2 < loop.rounds <= 2 * (1.0 / logs.PACE_S) + 4
    assert folder.file("a").stat().st_size > 10_000


def test_a_repeated_line_is_counted_and_told_once(folder, screen):
    screen.damper.feed("env/0", ["lost frame 17", "other"])
    screen.damper.feed("env/1", ["lost frame 18"])
    screen.damper.feed("env/1", ["lost frame 19"])
    screen.damper.feed("env/2", ["lost frame 2000"])
    assert screen.take() == ["[env/0] lost frame 17", "[env/0] other"]
    assert screen.damper.flush() == 5.0
    screen.time += 5.0
    assert screen.damper.flush() is None
    assert screen.take() == [f"[env/1 and env/2] 3 more lines within 5 s like 'lost frame 17': {folder.path}"]
    screen.damper.feed("env/2", ["lost frame 3"])
    assert screen.take() == ["[env/2] lost frame 3"]


def test_repetitions_of_one_actor_name_its_file(folder, screen):
    screen.damper.feed("a", ["x"])
    screen.damper.feed("a", ["x"])
    screen.time += 6
    screen.damper.feed("a", ["x"])
    assert screen.take() == ["[a] x", f"[a] 1 more line within 5 s like 'x': {folder.path}/a.log", "[a] x"]


def test_many_actors_that_say_the_same_are_counted(folder, screen):
    for number in range(9):
        screen.damper.feed(f"env/{number}", ["warning"])
    screen.damper.flush(everything=True)
    assert screen.take()[1].startswith("[env/1 and 7 other actors] 8 more lines within 5 s like 'warning'")


def test_an_actor_shows_so_many_lines_a_second(folder, screen):
    words = ["a" * number for number in range(1, 51)]
    screen.damper.feed("loud", words)
    screen.damper.feed("other", ["b"])
    assert screen.take() == [f"[loud] {word}" for word in words[:20]] + ["[other] b"]
    screen.time += 0.4
    assert screen.damper.flush() == pytest.approx(0.6)
    assert screen.take() == []
    screen.time += 0.6
    screen.damper.flush()
    assert screen.take() == [f"[loud] 30 more lines within 1 s: {folder.file('loud')}"]
    screen.damper.feed("loud", words[30:32])
    assert screen.take() == [f"[loud] {word}" for word in words[30:32]]


def test_a_traceback_is_shown_whole_or_counted_whole(folder, screen):
    traceback = ["Traceback (most recent call last):", '  File "a.py", line 1, in f', '  File "a.py", line 2, in f']
    screen.damper.feed("a", [*traceback, "ValueError: 1"])
    screen.damper.feed("b", [*traceback, "KeyError: 2"])
    assert screen.take() == [*(f"[a] {line}" for line in traceback), "[a] ValueError: 1", "[b] KeyError: 2"]
    screen.damper.flush(everything=True)
    assert screen.take() == [
        f"[b] 3 more lines within 5 s like 'Traceback (most recent call last):': {folder.path}/b.log"
    ]


def test_the_default_screen_is_stderr_of_that_moment(folder, capsys):
    Damper(folder).feed("a", ["x"])
    assert capsys.readouterr().err == "[a] x\n"


def test_without_watches_left_the_follower_polls(folder, monkeypatch):
    monkeypatch.setattr(logs._libc, "inotify_init1", lambda _: -1)
    follower = LogFollower(folder)
    assert follower.fileno() is None and follower.follow("a") == logs.POLL_S == follower.tick()
    follower.close()


def test_closing_frees_the_descriptor(folder):
    before = os.listdir("/proc/self/fd")
    follower = LogFollower(folder)
    assert len(os.listdir("/proc/self/fd")) == len(before) + 1
    follower.close()
    assert os.listdir("/proc/self/fd") == before
