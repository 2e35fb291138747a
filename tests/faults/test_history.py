"""Calls with ids under random kills, and the proof from the actors' own logs: at most once, in order, all answers true.

Jepsen's idea: the actor appends (id, incarnation) to a file before it answers, and a checker that knows nothing of the
engine compares the files with what the callers were told.
"""

import contextlib
import os
import random
import signal
import sys
import threading
import time
import zlib
from collections import Counter

import cloudpickle
import numpy as np
import pytest

from rlx.actors import Restart
from rlx.errors import ActorDied

cloudpickle.register_pickle_by_value(sys.modules[__name__])
T = 30.0
OFTEN = Restart(max=10_000, per_s=3600.0, backoff_s=0.001, max_backoff_s=0.001)


class Ledger:
    """Notes every call that it runs before it answers."""

    def __init__(self, path):
        self.file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def write(self, identity, payload):
        os.write(self.file, f"{identity} {os.getpid()} {len(payload)}\n".encode())
        return identity, os.getpid()


def kill(pid, number):
    """Return whether there was such a process; it may be between two incarnations."""
    with contextlib.suppress(ProcessLookupError):
        if pid is not None:
            os.kill(pid, number)
            return True
    return False


def check(log, told):
    """Return what is wrong with a history: `log` lists (id, incarnation) as run, `told` maps ids to answer or error.

    An id is "caller:number"; a caller's numbers rise in the order of its calls.
    """
    wrong = [f"{identity} ran {count} times" for identity, count in Counter(i for i, _ in log).items() if count > 1]
    latest: dict[str, int] = {}
    for identity, _ in log:
        caller, _, number = identity.partition(":")
        if int(number) <= latest.get(caller, -1):
            wrong.append(f"{identity} ran after {caller}:{latest[caller]}")
        latest[caller] = int(number)
    ran = dict(log)
    for identity, answer in told.items():
        if not isinstance(answer, BaseException) and answer != (identity, ran.get(identity)):
            wrong.append(f"{identity} was answered {answer} and ran in {ran.get(identity)}")
    wrong += [f"{identity} ran and was never called" for identity in ran.keys() - told.keys()]
    return wrong


@pytest.mark.parametrize(
    ("log", "told", "words"),
    [
        ([("a:0", 1), ("a:1", 2)], {"a:0": ("a:0", 1), "a:1": ActorDied()}, []),
        ([("a:0", 1), ("b:0", 1), ("a:0", 2)], {"a:0": ("a:0", 2), "b:0": ("b:0", 1)}, ["a:0 ran 2", "a:0 ran after"]),
        ([("a:1", 1), ("a:0", 1)], {"a:0": ActorDied(), "a:1": ActorDied()}, ["a:0 ran after a:1"]),
        ([], {"a:0": ("a:0", 1)}, ["a:0 was answered"]),
        ([("a:0", 1)], {"a:0": ("a:0", 2)}, ["a:0 was answered"]),
        ([("a:0", 1)], {}, ["a:0 ran and was never called"]),
    ],
)
def test_the_checker_finds_what_it_is_for(log, told, words):
    found = check(log, told)
    assert len(found) == len(words) and all(map(str.startswith, found, words)), found


@pytest.mark.parametrize(
    ("seed", "kills"), [(1, 12), (2, 12), *(pytest.param(seed, 200, marks=pytest.mark.slow) for seed in (3, 4))]
)
def test_no_call_runs_twice_or_out_of_order_and_every_answer_is_true(rt, tmp_path, seed, kills):
    paths = [str(tmp_path / f"log{n}") for n in range(3)]
    for path in paths:  # on a very busy machine one may be killed each time before its first call
        open(path, "a").close()
    ledgers = [rt.spawn(Ledger, path, restart=OFTEN) for path in paths]
    told = [{} for _ in ledgers]
    done = threading.Event()

    def caller(name):
        rng = random.Random(f"{seed}{name}")
        numbers, open_calls = [0] * len(ledgers), []
        while not done.is_set():
            chosen = rng.randrange(len(ledgers))
            identity, payload = f"{name}:{numbers[chosen]}", bytes(rng.choice([0, 0, 10, 20_000, 200_000]))
            numbers[chosen] += 1
            open_calls.append((chosen, identity, ledgers[chosen].write.call(identity, payload)))
            if len(open_calls) >= rng.choice([1, 4, 40]):
                for index, one, future in open_calls:
                    told[index][one] = future.exception(T) or future.result()
                open_calls = []
        for index, one, future in open_calls:
            told[index][one] = future.exception(T) or future.result()

    def killer():
        rng, landed = random.Random(seed), 0
        while landed < kills and not done.wait(rng.uniform(0.0, 0.06)):
            state = rt.state()[rng.choice(ledgers).name]
            landed += kill(state.pid, rng.choice([signal.SIGKILL, signal.SIGTERM, signal.SIGSEGV]))

    threads = [threading.Thread(target=caller, args=(name,)) for name in "abcd"]
    for thread in threads:
        thread.start()
    try:
        killer()
    finally:
        done.set()
    for thread in threads:
        thread.join(T)
    assert not any(thread.is_alive() for thread in threads)
    errors = [answer for answers in told for answer in answers.values() if isinstance(answer, BaseException)]
    assert all(isinstance(error, ActorDied) for error in errors) and len(errors) > kills // 4
    assert sum(ledger.incarnation for ledger in ledgers) > kills // 2
    for path, answers in zip(paths, told, strict=True):
        with open(path) as file:
            lines = [line.split() for line in file]
        assert check([(identity, int(pid)) for identity, pid, _ in lines], answers) == []


class Reader:
    """Looks at a channel as fast as it can and keeps what is wrong with what it saw."""

    def __init__(self, channel):
        self.channel, self.seen = channel, 0

    def look(self, times):
        kept = []
        for _ in range(times):
            published = self.channel.latest()
            version, array, checksum = published.value
            assert zlib.crc32(array) == checksum, "a torn version"
            assert version == published.version >= self.seen, "an older version"
            self.seen = version
            kept = [*kept[-2:], array]
        return self.seen, os.getpid()


def test_restarts_during_broadcasts_show_nobody_half_a_version(rt):
    channel, rng = rt.channel("weights"), np.random.default_rng(0)
    channel.publish((1, np.zeros(1), zlib.crc32(np.zeros(1))))
    readers = [rt.spawn(Reader, channel, restart=OFTEN) for _ in range(3)]
    dice, version, pids = random.Random(0), 1, set()
    begin = time.monotonic()
    while version < 300:
        futures = [reader.look.call(20) for reader in readers]
        if dice.random() < 0.25:
            kill(rt.state()[dice.choice(readers).name].pid, signal.SIGKILL)
        for _ in range(5):
            version += 1
            array = rng.integers(0, 255, dice.choice([10, 10_000, 400_000]), np.uint8)
            assert channel.publish((version, array, zlib.crc32(array))) == version
        for future in futures:
            error = future.exception(T)
            assert error is None or isinstance(error, ActorDied), error
            pids |= {future.result()[1]} if error is None else set()
    assert time.monotonic() - begin < T and len(pids) > 5
    assert [reader.look.call(1).result(T)[0] for reader in readers] == [version] * 3
    assert len(channel.readers()) == 3
