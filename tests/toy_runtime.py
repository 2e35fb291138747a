"""A driver and its actors, for tests that look at them from outside: the parts of a runtime without its engine.

python toy_runtime.py '{"env/0": "spin", ...}' starts a driver with an actor for each name, which runs that method for
ever. It prints one line {"folder", "pids"} once they run. A line {"actor", "update"} on its stdin changes what the
driver tells about an actor, and is answered with "ok"; the end of stdin ends everything.
"""

import ctypes
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from rlx.actors.board import Board, RuntimeFolder
from rlx.actors.debugger import install_breakpoint
from rlx.actors.logs import LogFolder
from rlx.actors.stacks import install_stack_dumps
from rlx.actors.timesheet import Timesheet


class Actor:
    def spin(self):
        while True:
            pass

    def nap(self):
        time.sleep(1000)

    def print_and_nap(self):
        for number in range(30):
            print("line", number, flush=True)
        self.nap()

    def print_slowly(self):
        for number in range(1000):
            print("line", number, flush=True)
            time.sleep(0.05)

    def hold_the_gil(self):
        ctypes.PyDLL(None).sleep(1000)

    def in_threads(self):
        threading.Thread(target=self.nap, daemon=True).start()
        self.spin()

    def debugged(self):
        total = 1
        for step in range(3):
            breakpoint()
            total += step
        print("went on with", total, flush=True)
        return total


def actor(folder: str, serial: str, name: str, method: str, ready: str) -> None:
    sheet = Timesheet(Path(folder), int(serial), name, lanes=2)
    if method != "deaf":
        install_stack_dumps(sheet)
    install_breakpoint(sheet)
    sheet.end(sheet.begin("__init__"))
    running = None if method in ("idle", "deaf") else sheet.begin(method)
    os.write(int(ready), b"x")
    if running is not None:
        ok = False
        try:
            getattr(Actor(), method)()
            ok = True
        except BaseException as error:
            print(f"{type(error).__name__} has ended {method}", flush=True)
        sheet.end(running, ok)
        print("serves on", flush=True)
    while True:
        signal.pause()


def driver(methods: dict[str, str]) -> None:
    folder = RuntimeFolder.create()
    board, logs = Board(folder.path), LogFolder(folder.logs)
    slots, children = {}, {}
    for name, method in methods.items():
        slot = slots[name] = board.add(name, "cpu 1")
        log, (read, write) = logs.open(name), os.pipe()
        command = [sys.executable, __file__, str(folder.path), str(slot.serial), name, method, str(write)]
        children[name] = subprocess.Popen(command, stdout=log, stderr=log, pass_fds=[write])
        os.close(write)
        os.close(log)
        for _ in range(1 if method in ("idle", "deaf") else 2):  # the first is __init__
            slot.sent()
        slot.update(status="alive", pid=children[name].pid)
        assert os.read(read, 1) == b"x"
        os.close(read)
    try:
        print(
            json.dumps({"folder": str(folder.path), "pids": {name: one.pid for name, one in children.items()}}),
            flush=True,
        )
        for line in sys.stdin:
            order = json.loads(line)
            slots[order["actor"]].update(**order["update"])
            print("ok", flush=True)
    finally:
        for child in children.values():
            child.kill()
            child.wait()
        board.close()
        folder.remove()


if __name__ == "__main__":
    if len(sys.argv) == 2:
        driver(json.loads(sys.argv[1]))
    else:
        actor(*sys.argv[1:])
