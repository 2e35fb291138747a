"""Frames that are none: cut short, flipped, grown, of another version, or noise. The link ends, and nothing else."""

import contextlib
import os
import pickle
import random
import resource
import signal
import socket
import sys
import time

import cloudpickle
import numpy as np
import psutil
import pytest

from rlx.actors.engines import wire
from rlx.actors.engines.arena import Arena
from rlx.actors.engines.leases import actor_ends, driver_ends, driver_memory, link_memory
from rlx.actors.engines.shared_memory import SharedMemory
from rlx.errors import ActorDied, ActorError
from tests.polling import until

cloudpickle.register_pickle_by_value(sys.modules[__name__])

T = 20.0
SEED = 20_260
MEMORY_BYTES = 64 * 2**20


class Poison:
    """Who unpickles it is found out."""

    def __reduce__(self):
        return exec, ("import sys; sys.rlx_poisoned = True",)


def valid_frames(rng):
    """Frames of every shape as they are on the wire: small and large, with buffers inside and in shared memory."""
    poison = pickle.dumps(Poison(), protocol=5)
    frames = []
    for kind in (*range(7), *range(10, 17)):
        for buffers, places in (
            ((), None),
            ([b"b" * 20_000, b""], None),
            ([b"s" * 300, b"t" * 70], [(300, 0, 0), (70, 320, 0)]),
            ([b"i" * 400, b"s" * 99], [None, (99, 4096, 5)]),
        ):
            for body in (poison, poison + bytes(rng.randrange(2_000))):
                text = rng.choice(["", "method", "8 stream", '{"env": {}}', "é" * 40])
                parts = wire.encode(kind, rng.randrange(2**40), text, (body, buffers), places)
                frames.append(b"".join(map(bytes, parts)))
    return frames


def cut(rng, data):
    return data[: rng.randrange(len(data))]


def flip(rng, data):
    damaged = bytearray(data)
    for _ in range(rng.choice([1, 1, 1, 2, 8])):
        damaged[rng.randrange(min(len(damaged), rng.choice([28, 28, 80, len(damaged)])))] ^= 1 << rng.randrange(8)
    return bytes(damaged)


def grow(rng, data):
    """One of the header's sizes becomes another number, a huge one as a rule."""
    magic, kind, text, buffers, call_id, body = wire.HEADER.unpack_from(data)
    number = rng.choice([0, 1, 2**16, 2**20, 2**20 + 1, 2**26, 2**31, 2**32 - 1])
    long = rng.choice([0, 1, 2**30, 2**36, 2**40, 2**40 + 1, 2**63, 2**64 - 1])
    field = rng.randrange(3)
    sizes = (number if field == 0 else text, number if field == 1 else buffers, long if field == 2 else body)
    return wire.HEADER.pack(magic, kind, sizes[0], sizes[1], call_id, sizes[2]) + data[wire.HEADER.size :]


def replace_version(rng, data):
    return data[:2] + bytes([rng.choice([0, 1, 3, 255])]) + data[3:]


def make_noise(rng, data):
    return rng.randbytes(rng.choice([1, 27, 28, 29, 300, 5000]))


def move(rng, data):
    """A frame whose buffers lie somewhere else: sizes, offsets and leases at random."""
    count = rng.randrange(1, 5)
    numbers = [0, 1, 4095, 2**20, 2**40, 2**63, 2**64 - 1]
    places = b"".join(
        wire.PLACE.pack(rng.choice(numbers), rng.choice(numbers), rng.choice([0, 1, 6, 4096, 4097, 2**32 - 1]))
        for _ in range(count)
    )
    head = wire.HEADER.pack(wire.MAGIC, wire.REPLY | rng.choice([0, wire.SHARED_BODY]), 0, count, 1, 4)
    return head + places + b"body"


DAMAGES = [cut, flip, flip, grow, replace_version, make_noise, move]


@pytest.fixture
def borrower():
    """A real one, with lease 0 and lease 5 lent."""
    limit = 2**20
    memory, link = driver_memory(limit), link_memory(limit)
    reader = SharedMemory(memory.reader_fd())
    lender, _ = driver_ends(Arena(memory, limit), link, "the fuzzer")
    own, _, borrower = actor_ends(SharedMemory(os.dup(link.fd)), reader, limit)
    block = lender._arena.place([b"s" * 8192])
    for _ in range(6):
        lender.lend(block)
    yield borrower
    for one in (memory, link, reader, own._memory):
        one.close()


def feed(data, borrower):
    """Give the bytes to a reader as a link does; return the frames that it cut and what it refused."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2**20)
        ours.sendall(data)
        ours.close()
        reader, opened = wire.FrameReader(theirs), 0
        try:
            while reader.read():
                while reader.frames:
                    reader.frames.pop(0).open(borrower.borrow)
                    opened += 1
        except ActorError as error:
            return opened, str(error)
        return opened, None


@pytest.mark.parametrize(("seed", "cases"), [(SEED, 100_000), pytest.param(SEED + 1, 200_000, marks=pytest.mark.slow)])
def test_damaged_frames_end_in_an_error_or_in_nothing(borrower, seed, cases):
    rng = random.Random(seed)
    frames = valid_frames(rng)
    for frame in frames:
        with contextlib.suppress(ActorError):  # a lease is taken once
            feed(frame, borrower)
    counts = {"whole": 0, "refused": 0, "incomplete": 0}
    peak_before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number in range(cases):
        damaged = rng.choice(DAMAGES)(rng, rng.choice(frames))
        if number % 7 == 0:  # behind a good one
            damaged = frames[0] + damaged
        opened, refusal = feed(damaged, borrower)
        counts["refused" if refusal else "whole" if opened else "incomplete"] += 1
        assert refusal is None or refusal.endswith("close the link."), refusal
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert min(counts.values()) > 1_000, counts
    assert not hasattr(sys, "rlx_poisoned")
    assert (peak - peak_before) * 1024 < MEMORY_BYTES


def test_the_poison_would_be_noticed():
    pickle.loads(pickle.dumps(Poison()))
    del sys.rlx_poisoned  # type: ignore[attr-defined]


class Liar:
    """An actor that finds the socket of its link and writes there what it likes."""

    def pid(self):
        return os.getpid()

    def write_to_link(self, data, then="wait"):
        (link,) = [fd for fd in range(3, 64) if kind(fd) == (socket.AF_UNIX, socket.SOCK_STREAM)]
        with contextlib.suppress(OSError):
            os.write(link, data)
        if then == "return":
            return "after the lie"
        time.sleep(3600)

    def echo(self, value):
        return value


def kind(fd):
    try:
        with socket.socket(fileno=os.dup(fd)) as sock:
            return sock.family, sock.type
    except OSError:
        return None


def reply(call_id, kind=wire.REPLY, text="", body=b"", buffers=(), places=None):
    return b"".join(map(bytes, wire.encode(kind, call_id, text, (body, buffers), places)))


LIES = {
    "http": b"GET / HTTP/1.1\r\n\r\n" + bytes(40),
    "other version": b"rx\x01" + reply(2)[3:],
    "huge text": wire.HEADER.pack(wire.MAGIC, wire.REPLY, 2**32 - 1, 0, 2, 0),
    "huge body": wire.HEADER.pack(wire.MAGIC, wire.REPLY, 0, 0, 2, 2**63),
    "lease not lent": reply(2, body=b"x", buffers=[b"y" * 10], places=[(10, 0, 7)]),
    "span outside": reply(2, body=b"x", buffers=[b"y" * 10], places=[(2**50, 2**60, 7)]),
    "unknown kind": reply(2, kind=99),
    "item of no stream": reply(2, kind=wire.ITEM, text="0"),
    "item without a number": reply(2, kind=wire.ITEM, text="zero"),
    "call to the driver": reply(2, kind=wire.CALL, text="echo"),
    "text that is not utf-8": wire.HEADER.pack(wire.MAGIC, wire.REPLY, 2, 0, 2, 0) + b"\xff\xfe",
}


@pytest.mark.parametrize("who_reads", ["reactor", "caller"])
@pytest.mark.parametrize("lie", LIES)
def test_an_actor_that_sends_what_is_no_frame_is_ended_and_nobody_else_notices(rt, lie, who_reads):
    liar, honest = rt.spawn(Liar, name="liar"), rt.spawn(Liar)
    pid = liar.pid.call().result(T)  # call 1; the lie is about call 2
    future = liar.write_to_link.call(LIES[lie])
    if who_reads == "reactor":
        until(future.done)
    with pytest.raises(ActorDied, match=rf"liar \(pid {pid}\) sent what is no frame \(a frame .*close the link"):
        future.result(T)
    until(lambda: not psutil.pid_exists(pid))
    assert isinstance(liar.pid.call().exception(T), ActorDied)
    array = np.arange(100_000)
    assert np.array_equal(honest.echo.call(array).result(T), array)


def test_a_frame_cut_short_by_a_death_is_only_that_death(rt):
    liar = rt.spawn(Liar)
    pid = liar.pid.call().result(T)
    future = liar.write_to_link.call(reply(2, body=b"x" * 1000)[:500])
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(ActorDied, match="was killed by SIGKILL"):
        future.result(T)


def test_a_poisoned_answer_to_nobody_is_not_unpickled(rt):
    liar = rt.spawn(Liar)
    liar.ready(T)
    body = pickle.dumps(Poison(), protocol=5)
    assert liar.write_to_link.call(reply(77, body=body), then="return").result(T) == "after the lie"
    assert not hasattr(sys, "rlx_poisoned")
