"""What a driver and its actors leave on disk about themselves, read from other processes."""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import timeit
from pathlib import Path

import pytest

from rlx.actors import processes, timesheet
from rlx.actors.board import KEPT_ENDED, Board, RuntimeFolder, list_runtimes, read_board, read_info
from rlx.actors.timesheet import Timesheet, read_calls
from rlx.errors import ActorError


@pytest.fixture(autouse=True)
def temporary(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    return tmp_path


@pytest.fixture
def folder():
    created = RuntimeFolder.create()
    yield created
    created.remove()


@pytest.fixture
def board(folder):
    made = Board(folder.path)
    yield made
    made.close()


@pytest.fixture
def child():
    """Start Python code in a process of its own."""
    with contextlib.ExitStack() as processes:

        def start(code: str, *arguments: object, **options):
            command = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
            process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, **options)
            processes.enter_context(process)
            processes.callback(process.kill)
            return process

        yield start


def test_a_runtime_folder_is_private_and_goes_away(temporary):
    folder = RuntimeFolder.create()
    assert folder.path == temporary / f"rlx-{os.getuid()}" / f"{os.getpid()}-0"
    assert folder.path.stat().st_mode & 0o777 == folder.path.parent.stat().st_mode & 0o777 == 0o700
    second = RuntimeFolder.create(temporary / "run" / "logs")
    assert second.path.name == f"{os.getpid()}-1"
    assert (folder.logs, second.logs) == (folder.path / "logs", temporary / "run" / "logs")
    assert [(info.folder, info.driver, info.alive, info.logs) for info in list_runtimes()] == [
        (folder.path, os.getpid(), True, folder.logs),
        (second.path, os.getpid(), True, second.logs),
    ]
    assert list_runtimes()[0].command[0] == sys.executable
    folder.remove()
    second.remove()
    assert list_runtimes() == [] and second.logs.is_dir()


@pytest.mark.parametrize("fault", ["open to others", "a link"])
def test_a_folder_that_somebody_else_may_have_prepared_is_refused(temporary, fault):
    home = temporary / f"rlx-{os.getuid()}"
    if fault == "a link":
        (temporary / "elsewhere").mkdir(mode=0o700)
        home.symlink_to(temporary / "elsewhere")
    else:
        home.mkdir()
        home.chmod(0o755)
    with pytest.raises(ActorError, match=r"nobody else can enter, and is not .*set TMPDIR"):
        RuntimeFolder.create()


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a folder away")
def test_a_folder_of_another_user_is_refused(temporary):
    home = temporary / f"rlx-{os.getuid()}"
    home.mkdir(mode=0o700)
    os.chown(home, 12345, -1)
    with pytest.raises(ActorError, match="owner 12345"):
        RuntimeFolder.create()
    with pytest.raises(ActorError, match="owner 12345"):
        list_runtimes()


def test_the_folders_of_dead_drivers_go_when_the_next_runtime_comes(child):
    code = """
        import os, signal
        from rlx.actors.board import RuntimeFolder
        RuntimeFolder.create()
        os.kill(os.getpid(), signal.SIGKILL)
    """
    driver = child(code)
    driver.wait(20)
    (left,) = list_runtimes()
    assert (left.driver, left.alive) == (driver.pid, False)
    mine = RuntimeFolder.create()
    assert [info.folder for info in list_runtimes()] == [mine.path]


def test_a_process_that_got_a_dead_drivers_id_is_not_that_driver(folder):
    info = json.loads((folder.path / "info.json").read_text())
    (folder.path / "info.json").write_text(json.dumps(info | {"start_ticks": info["start_ticks"] - 1}))
    assert [one.alive for one in list_runtimes()] == [False]


def test_a_driver_of_another_container_is_left_alone(folder):
    info = json.loads((folder.path / "info.json").read_text())
    (folder.path / "info.json").write_text(json.dumps(info | {"pid_namespace": "pid:[1]", "start_ticks": 0}))
    other = RuntimeFolder.create()
    assert [one.folder for one in list_runtimes()] == [folder.path, other.path]
    other.remove()


def test_a_folder_that_is_none_of_ours_is_no_runtime(temporary):
    assert read_info(temporary) is None
    (temporary / "info.json").write_text("{}")
    assert read_info(temporary) is None


def test_an_actor_is_seen_with_all_that_is_known_of_it(folder, board):
    slot = board.add("env/0", "cpu 1", status="pending")
    slot.update(waiting="gpu 1 of 1 is held by learner/0")
    (before,) = read_board(folder.path)
    assert (before.name, before.status, before.pid, before.resources) == ("env/0", "pending", None, "cpu 1")
    assert before.waiting == "gpu 1 of 1 is held by learner/0"
    slot.update(status="alive", pid=4711, restarts=2, waiting="")
    for _ in range(3):
        slot.sent()
    slot.update(status="dead", error="was killed by SIGKILL")
    (entry,) = read_board(folder.path)
    assert (entry.status, entry.pid, entry.restarts, entry.sent, entry.waiting, entry.error) == (
        "dead", 4711, 2, 3, "", "was killed by SIGKILL",
    )  # fmt: skip


def test_a_restart_counts_the_waiting_calls_only(folder, board):
    slot = board.add("env/0")
    for _ in range(5):
        slot.sent()
    slot.update(status="restarting", restarts=1, sent=2)
    slot.sent()
    assert read_board(folder.path)[0].sent == 3


def test_long_texts_are_cut_between_characters(folder, board):
    board.add("é" * 200).update(error="x" + "€" * 1000)
    (entry,) = read_board(folder.path)
    assert entry.name == "é" * 63  # 128 bytes less one hold 63 characters of two
    assert set(entry.error) == {"x", "€"} and "\ufffd" not in entry.error


def test_a_text_that_is_half_written_is_still_read(folder, board):
    board.add("name")
    file = folder.path / "board"
    data = bytearray(file.read_bytes())
    start = data.index(b"name\0")
    data[start : start + 4] = b"n\xff\xfee"
    file.write_bytes(data)
    assert read_board(folder.path)[0].name == "n\ufffd\ufffde"


def test_the_board_grows_and_every_actor_stays_in_its_place(folder, board):
    slots = [board.add(f"actor/{number}") for number in range(100)]
    for number, slot in enumerate(slots):
        slot.update(pid=1000 + number)
    assert [(entry.name, entry.pid) for entry in read_board(folder.path)] == [
        (f"actor/{number}", 1000 + number) for number in range(100)
    ]
    assert (folder.path / "board").stat().st_size == 128 * 2048


def test_the_slot_and_files_of_the_actor_that_ended_longest_ago_are_used_again(folder, board):
    slots = [board.add(f"actor/{number}") for number in range(KEPT_ENDED)]
    for slot in slots[1:] + slots[:1]:
        (folder.path / f"{slot.serial}.calls").touch()
        slot.update(status="dead")
    board.add("new")
    left = [entry.name for entry in read_board(folder.path)]
    assert left == ["actor/0", *(f"actor/{number}" for number in range(2, KEPT_ENDED)), "new"]
    assert {file.name for file in folder.path.glob("*.calls")} == {
        f"{slot.serial}.calls" for slot in slots if slot is not slots[1]
    }
    slots[1].update(error="late news of an actor that has no slot any more")
    slots[1].sent()
    assert read_board(folder.path)[-1].error == "" and read_board(folder.path)[-1].sent == 0


def test_a_closed_board_frees_its_descriptors_and_can_still_be_written_to(folder):
    before = os.listdir("/proc/self/fd")
    board = Board(folder.path)
    slots = [board.add(str(number)) for number in range(20)]
    assert len(os.listdir("/proc/self/fd")) > len(before)
    board.close()
    assert os.listdir("/proc/self/fd") == before
    slots[0].sent()
    slots[19].update(status="dead", error="closed")


def test_a_board_of_another_version_is_refused(folder):
    (folder.path / "board").write_bytes(b"rlxboard9" + bytes(4096))
    with pytest.raises(ActorError, match="written by another version of rlx"):
        read_board(folder.path)
    assert read_board(folder.path / "nothing") == []


def test_calls_are_seen_from_outside_while_they_run_and_after(folder, child):
    code = """
        import sys
        from pathlib import Path
        from rlx.actors.timesheet import Timesheet
        sheet = Timesheet(Path(sys.argv[1]), 1, "env/0", lanes=2)
        sheet.end(sheet.begin("reset"))
        sheet.end(sheet.begin("fails"), ok=False)
        sheet.begin("sample")
        sheet.begin("evaluate")
        print("ready", flush=True)
        sys.stdin.read()
    """
    before = time.monotonic()
    actor = child(code, folder.path, stdin=subprocess.PIPE)
    assert actor.stdout.readline() == "ready\n"
    calls = read_calls(folder.path, 1, ended=True)
    actor.communicate("")
    assert (calls.pid, calls.done, calls.breakpoint) == (actor.pid, 2, None)
    assert [span.method for span in calls.running] == ["sample", "evaluate"]
    assert [(span.method, span.ok) for span in calls.ended] == [("reset", True), ("fails", False)]
    times = [time for span in calls.ended for time in (span.start, span.end)] + [calls.running[0].start]
    assert times == sorted(times) and before < times[0] and times[-1] < time.monotonic()


def test_no_sheet_means_no_calls(folder):
    assert read_calls(folder.path, 1) is None
    timesheet.sheet_file(folder.path, 1).write_bytes(b"torn")
    assert read_calls(folder.path, 1) is None


def test_the_ring_keeps_the_latest_calls(folder):
    sheet = Timesheet(folder.path, 1, "a")
    for number in range(timesheet.RING + 10):
        sheet.end(sheet.begin(f"call{number}"))
    calls = read_calls(folder.path, 1, ended=True)
    assert calls.done == timesheet.RING + 10
    assert [span.method for span in calls.ended] == [f"call{number}" for number in range(10, timesheet.RING + 10)]


def test_the_space_of_a_ring_is_taken_at_once_so_that_a_full_disk_cannot_end_the_actor_later(folder):
    Timesheet(folder.path, 1, "a").begin("first")
    found = timesheet.sheet_file(folder.path, 1).stat()
    assert found.st_size > timesheet.RING * 64 and found.st_blocks * 512 >= found.st_size


def test_calls_beyond_the_lanes_are_counted(folder):
    sheet = Timesheet(folder.path, 1, "a", lanes=2)
    running = [sheet.begin(f"m{number}") for number in range(5)]
    assert [span.method for span in sheet.running()] == ["m0", "m1", "m4"]
    for one in running:
        sheet.end(one)
    assert sheet.running() == [] and read_calls(folder.path, 1).done == 5
    sheet.begin("a")
    sheet.begin("b")
    assert [span.method for span in sheet.running()] == ["a", "b"]


def test_calls_of_many_threads_are_all_counted(folder):
    sheet = Timesheet(folder.path, 1, "a", lanes=4)

    def work():
        for _ in range(2000):
            sheet.end(sheet.begin("m"))
        sheet.skip()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert read_calls(folder.path, 1).done == 4 * 2001


def test_a_restarted_actor_begins_a_new_sheet_and_keeps_the_trace(folder):
    first = Timesheet(folder.path, 1, "a")
    first.end(first.begin("before"))
    first.begin("interrupted")
    first.debugging("x.py:3")
    second = Timesheet(folder.path, 1, "a")
    calls = read_calls(folder.path, 1, ended=True)
    assert (calls.done, calls.running, calls.breakpoint) == (0, [], None)
    assert [span.method for span in calls.ended] == ["before"]
    second.debugging("y.py:7")
    assert read_calls(folder.path, 1).breakpoint == "y.py:7"
    second.debugging(None)
    assert read_calls(folder.path, 1).breakpoint is None


def test_long_method_names_are_cut(folder):
    sheet = Timesheet(folder.path, 1, "a")
    sheet.begin("m" * 50)
    assert read_calls(folder.path, 1).running[0].method == "m" * 40


def test_telling_costs_little(folder, board):
    """The promise is 1.3 us and 0.25 us; the factor of 4 is for a machine that does much else."""
    sheet, slot = Timesheet(folder.path, 1, "a"), board.add("a")
    call_s = min(timeit.repeat(lambda: sheet.end(sheet.begin("sample")), number=500, repeat=200)) / 500
    sent_s = min(timeit.repeat(slot.sent, number=500, repeat=200)) / 500
    assert call_s < 4 * 1.3e-6 and sent_s < 4 * 0.25e-6


def test_the_state_of_a_process_is_told(child):
    code = "import signal, sys; signal.signal(signal.SIGUSR2, signal.SIG_IGN); print('x', flush=True); sys.stdin.read()"
    process = child(code, stdin=subprocess.PIPE)
    process.stdout.readline()
    seen = processes.stat(process.pid)
    assert processes.is_running(process.pid, seen.start_ticks)
    assert not processes.is_running(process.pid, seen.start_ticks + 1)
    size, kind = processes.memory(process.pid)
    assert kind == "PSS" and 2**20 < size < 2**28
    assert not processes.handles(process.pid, 12) and processes.handles(process.pid, 2)
    process.communicate("")
    assert processes.stat(process.pid) is None and processes.memory(process.pid) is None
    assert not processes.is_running(process.pid, seen.start_ticks) and not processes.handles(process.pid, 2)


def test_a_name_with_brackets_does_not_confuse_the_state(tmp_path):
    binary = tmp_path / "a) R (b"
    binary.symlink_to("/bin/cat")
    process = subprocess.Popen([binary], stdin=subprocess.PIPE)
    deadline = time.monotonic() + 20
    while Path(f"/proc/{process.pid}/comm").read_text() != "a) R (b\n" and time.monotonic() < deadline:
        pass
    found = processes.stat(process.pid)
    process.communicate(b"")
    assert found.state in "RSD" and found.start_ticks > 1000


def test_cpu_use_is_measured_between_two_looks(child):
    process = child("while True: pass")
    meter = processes.CpuMeter([process.pid, os.getpid()])
    deadline = time.monotonic() + 20
    before, began = processes.stat(process.pid).cpu_ticks, time.monotonic()
    while processes.stat(process.pid).cpu_ticks < before + 20 and time.monotonic() < deadline:
        time.sleep(0.01)
    used = meter.percent([process.pid])
    ticks, passed_s = processes.stat(process.pid).cpu_ticks - before, time.monotonic() - began
    process.kill()
    process.wait()
    assert used[process.pid] == pytest.approx(100 * ticks / os.sysconf("SC_CLK_TCK") / passed_s, rel=0.25)
    assert meter.percent([process.pid]) == {}
