"""Something has run out: object memory, descriptors, the disk, the memory of one actor. Only the guilty call fails."""

import json
import os
import subprocess
import sys

import cloudpickle
import numpy as np
import pytest

from rlx import actors
from rlx.errors import ObjectMemoryFull

cloudpickle.register_pickle_by_value(sys.modules[__name__])
T = 20.0
MIB = 2**20


class Keeper:
    def keep(self, *arrays):
        self.kept = arrays
        return sum(map(len, arrays))

    def hog(self, limit, size):
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        return len(np.ones(size, np.uint8))

    def say(self, text):
        print(text, flush=True)
        return "said"


def test_when_the_object_memory_is_full_the_holders_are_named_and_only_that_call_fails():
    with actors.runtime("local", preload=("numpy",), object_memory=16 * MIB) as rt:
        rt._engine.memory.arena.wait_s = 0.2  # the default is 10 s
        greedy, modest, other = (rt.spawn(Keeper, name=name) for name in ("greedy", "modest", "other"))
        assert greedy.keep.call(np.zeros(10 * MIB, np.uint8)).result(T) == 10 * MIB
        assert modest.keep.call(np.zeros(4 * MIB, np.uint8)).result(T) == 4 * MIB
        with pytest.raises(ObjectMemoryFull, match=r"held, by greedy 10\.0 MiB, modest 4\.0 MiB; copy what is kept"):
            other.keep.call(np.zeros(6 * MIB, np.uint8))
        assert other.keep.call(np.zeros(MIB, np.uint8)).result(T) == MIB
        assert other.keep.call(np.zeros(50_000, np.uint8)).result(T) == 50_000
        greedy.keep.call().result(T)
        assert other.keep.call(np.zeros(6 * MIB, np.uint8)).result(T) == 6 * MIB
        rt.kill(modest)
        rt.kill(other)
        assert greedy.keep.call(np.zeros(15 * MIB, np.uint8)).result(T) == 15 * MIB


FEW_DESCRIPTORS = """
import json, os, resource, sys
from rlx import actors

class Actor:
    def pid(self): return os.getpid()

def open_descriptors():
    files = [os.path.realpath("/proc/self/fd/" + fd) for fd in os.listdir("/proc/self/fd")]
    return sum(not file.endswith("/board") for file in files)  # which grows to 64 ended actors

resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
with actors.runtime("local", preload=()) as rt:
    living, errors, counts = [], [], []
    while not errors:
        try:
            living.append(rt.spawn(Actor))
        except Exception as error:
            errors.append(error)
    for _ in range(10):
        counts.append(open_descriptors())
        try:
            living.append(rt.spawn(Actor))
        except Exception as error:
            errors.append(error)
    works = len({o.value for o in rt.group(living).pid.call().result(60)}) == len(living)
    for actor in living[:10]:
        rt.kill(actor)
    again = [rt.spawn(Actor) for _ in range(8)]
    works_again = len({o.value for o in rt.group(again + living[10:]).pid.call().result(60)}) == len(living) - 2
    states = [state.status for state in rt.state().values()]
    text = f"{type(errors[-1]).__name__}: {errors[-1]}"
print(json.dumps([len(living), counts, works, works_again, text, states.count("alive"), len(states)]))
"""


def test_without_descriptors_a_spawn_fails_and_the_others_go_on():
    ran = subprocess.run(
        [sys.executable, "-c", FEW_DESCRIPTORS], capture_output=True, text=True, timeout=60, check=False
    )
    assert ran.returncode == 0 and ran.stderr == "", ran.stderr
    count, levels, works, works_again, text, alive, known = json.loads(ran.stdout)
    assert count > 50 and works and works_again
    assert levels[0] == levels[-1], f"failed spawns leave descriptors: {levels}"
    assert "Too many open files" in text and text.startswith("ActorError") and "ulimit" in text
    assert alive == count - 2 and known == count + 8


def test_a_disk_that_is_full_of_logs_stops_no_actor(small_disk):
    with actors.runtime("local", preload=("numpy",), log_folder=small_disk) as rt:
        loud, quiet = rt.spawn(Keeper), rt.spawn(Keeper)
        error = loud.say.call("x" * MIB).exception(T)
        assert isinstance(error, OSError) and "No space left" in str(error)
        assert loud.keep.call().result(T) == 0 and quiet.keep.call().result(T) == 0
        rt.kill(loud)


FULL_TMP = """
import os, pathlib, sys
from rlx import actors
from rlx.errors import RlxError

class Actor:
    def pid(self): return os.getpid()

folder = pathlib.Path(os.environ["TMPDIR"])
def fill(name):
    with open(folder / name, "wb", buffering=0) as file:
        try:
            while file.write(bytes(4096)): pass
        except OSError: pass

with actors.runtime("local", preload=()) as rt:
    actor = rt.spawn(Actor)
    pid = actor.pid.call().result(30)
    fill("filler")
    made = []
    for _ in range(40):
        try:
            one = rt.spawn(Actor)
            made.append("made" if one.pid.call().result(30) else "?")
        except (RlxError, OSError) as error:
            made.append(type(error).__name__)
    assert made[0] == "made" and set(made) == {"made", "ActorError"}, made
    assert actor.pid.call().result(30) == pid
    os.unlink(folder / "filler")
    rt.spawn(Actor).pid.call().result(30)
fill("filler")
try:
    actors.runtime("local", preload=()).close()
except (RlxError, OSError) as error:
    print(type(error).__name__, error)
"""


def test_a_full_temporary_folder_is_an_error_and_no_bus_error(small_disk):
    ran = subprocess.run(
        [sys.executable, "-c", FULL_TMP],
        env=os.environ | {"TMPDIR": str(small_disk)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ran.returncode == 0, (ran.returncode, ran.stderr)
    assert "ActorError" in ran.stdout and "No space left" in ran.stdout


def test_an_actor_at_its_own_memory_limit_raises_and_lives(rt):
    hog, other = rt.spawn(Keeper), rt.spawn(Keeper)
    with pytest.raises(MemoryError):
        hog.hog.call(64 * 2**30, 128 * 2**30).result(T)
    assert hog.keep.call(np.zeros(MIB)).result(T) == MIB
    assert other.keep.call().result(T) == 0


OOM = """
import json, os, sys
import numpy as np
from rlx import actors
open(os.path.join(sys.argv[1], "cgroup.procs"), "w").write(str(os.getpid()))

class Hog:
    def pid(self): return os.getpid()
    def eat(self):
        self.kept = []
        while True:
            self.kept.append(np.ones(8 * 2**20, np.uint8))

with actors.runtime("local", preload=("numpy",), object_memory=2**24) as rt:
    hog, other = rt.spawn(Hog), rt.spawn(Hog)
    pid = other.pid.call().result(30)
    error = hog.eat.call().exception(30)
    print(json.dumps([type(error).__name__, str(error), other.pid.call().result(30) == pid]))
"""


def test_an_actor_that_the_kernel_kills_for_memory_is_said_to_have_lacked_memory(memory_group):
    ran = subprocess.run(
        [sys.executable, "-c", OOM, str(memory_group)], capture_output=True, text=True, timeout=60, check=False
    )
    assert ran.returncode == 0, ran.stderr
    kind, text, other_lives = json.loads(ran.stdout)
    assert (kind, other_lives) == ("ActorDied", True)
    assert "was killed by SIGKILL in eat(), cgroup oom_kill +1: memory ran out" in text
