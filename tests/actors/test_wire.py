"""Frames survive any cutting of the stream, and an interrupt at any point of a write."""

import random
import signal
import socket
import sys
import threading

import pytest

from rlx.actors.engines import wire
from rlx.actors.engines.wire import FrameReader, Outbox
from rlx.errors import ActorError


def frames_of(rng, count):
    sizes = [0, 1, 100, 65_536, wire.WINDOW_BYTES, wire.WINDOW_BYTES + 7]
    for call_id in range(count):
        body = rng.randbytes(rng.choice(sizes))
        buffers = [rng.randbytes(rng.choice([0, 5, 20_000, 400_000])) for _ in range(rng.choice([0, 0, 0, 1, 3]))]
        body = body or b"p" * bool(buffers)  # a pickle is never empty; a body that is goes last among the buffers
        yield wire.CALL, call_id, rng.choice(["", "añ€", "m" * 300]), (body, buffers)


def assert_same(frame, want):
    kind, call_id, text, (body, buffers) = want
    assert (frame.kind, frame.call_id, frame.text) == (kind, call_id, text)
    got = frame.open(None)
    assert bytes(got[0]) == body and [bytes(b) for b in got[1]] == buffers


@pytest.mark.parametrize("seed", range(4))
def test_frames_come_out_whole_however_the_stream_is_cut(seed):
    rng = random.Random(seed)
    wanted = list(frames_of(rng, 20))
    stream = b"".join(bytes(part) for frame in wanted for part in wire.encode(*frame))
    ours, theirs = socket.socketpair()
    with ours, theirs:
        reader, at = FrameReader(theirs), 0
        theirs.setblocking(False)
        while at < len(stream):
            at += ours.send(stream[at : at + rng.choice([1, 3, 31, 5000, 100_000])])
            try:
                while True:
                    reader.read()
            except BlockingIOError:
                pass
        got = reader.frames
    assert len(got) == len(wanted)
    for frame, want in zip(got, wanted, strict=True):
        assert_same(frame, want)


def test_the_end_of_the_stream_is_none_and_a_torn_frame_is_not_given_out():
    ours, theirs = socket.socketpair()
    with theirs:
        ours.send(bytes(wire.encode(wire.CALL, 1, "add", (b"whole", ()))[0]))
        ours.send(bytes(wire.encode(wire.CALL, 2, "add", (b"torn", ()))[0])[:-1])
        ours.close()
        reader = FrameReader(theirs)
        assert reader.read()
        assert not reader.read()
        assert [frame.call_id for frame in reader.frames] == [1]


@pytest.mark.parametrize("bad", [b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n", b"rx\x01" + bytes(60)])
def test_what_is_no_frame_of_ours_is_refused_before_any_memory_is_taken(bad):
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.send(bad)
        with pytest.raises(ActorError, match="a frame begins with"):
            FrameReader(theirs).read()


def test_a_buffer_in_shared_memory_is_told_by_its_place_and_borrowed_once_for_its_lease():
    ours, theirs = socket.socketpair()
    shared, asked = memoryview(b"0123456789"), []

    def borrow(lease, spans):
        asked.append((lease, list(spans)))
        return [shared[offset : offset + size] for offset, size in spans]

    with ours, theirs:
        buffers = [b"45", b"inline", b"9", b"01"]
        for part in wire.encode(wire.REPLY, 7, "", (b"body", buffers), [(2, 4, 0), None, (1, 9, 0), (2, 0, 3)]):
            ours.sendall(part)
        reader = FrameReader(theirs)
        while not reader.frames:
            assert reader.read()
    body, views = reader.frames[0].open(borrow)
    assert bytes(body) == b"body" and [bytes(view) for view in views] == buffers
    assert reader.frames[0].open(borrow)[1] is views
    assert asked == [(0, [(4, 2), (9, 1)]), (3, [(0, 2)])]


@pytest.mark.parametrize(("field", "value"), [("text", 2**31), ("buffers", 2**31), ("body", 2**60), ("buffer", 2**60)])
def test_a_frame_that_claims_too_much_is_refused_before_any_memory_is_taken(field, value):
    sizes = {"text": 0, "buffers": 0, "body": 0} | ({field: value} if field != "buffer" else {"buffers": 1})
    header = wire.HEADER.pack(wire.MAGIC, wire.CALL, sizes["text"], sizes["buffers"], 1, sizes["body"])
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.send(header + (wire.PLACE.pack(value, 0, 0) if field == "buffer" else b""))
        with pytest.raises(ActorError, match=r"a frame (claims|needs)"):
            FrameReader(theirs).read()


class Interrupted(Exception):
    pass


def test_interrupts_while_writing_leave_the_stream_in_step(monkeypatch):
    """A timer raises in the writing thread about once per write, in sendmsg or between any two instructions."""
    # One that strikes inside a finalizer cannot be raised, and would strike again in pytest's report of it.
    monkeypatch.setattr(sys, "unraisablehook", lambda _: None)
    ours, theirs = socket.socketpair()
    rng = random.Random(0)
    wanted = [(wire.CALL, n, "m", (b"x", [rng.randbytes(300_000)])) for n in range(150)]
    got, armed = [], False

    def read_all():
        reader = FrameReader(theirs)
        with theirs:  # closed also on an error, so that a torn stream fails the test and does not hang it
            while reader.read():
                got.extend(reader.frames)
                reader.frames.clear()

    def interrupt(*_):
        if armed:
            raise Interrupted

    before = signal.signal(signal.SIGALRM, interrupt)
    thread = threading.Thread(target=read_all)
    thread.start()
    interrupts = 0
    with ours:
        outbox = Outbox(ours)
        signal.setitimer(signal.ITIMER_REAL, 0.0003, 0.0003)
        for frame in wanted:
            outbox.add(wire.encode(*frame))
            try:
                armed = True
                outbox.flush()
                armed = False
            except Interrupted:
                armed = False
                interrupts += 1
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        assert outbox.flush()
        ours.shutdown(socket.SHUT_WR)
        thread.join(20)
    assert interrupts > 5
    assert [frame.call_id for frame in got] == list(range(150))
    for frame, want in zip(got, wanted, strict=True):
        assert_same(frame, want)


def test_interrupts_while_reading_lose_and_double_nothing(monkeypatch):
    """A timer raises in the reading thread, in recv_into or between any two instructions."""
    monkeypatch.setattr(sys, "unraisablehook", lambda _: None)
    ours, theirs = socket.socketpair()
    rng = random.Random(1)
    wanted = list(frames_of(rng, 300))
    armed = False

    def write_all():
        with ours:
            for frame in wanted:
                for part in wire.encode(*frame):
                    ours.sendall(part)

    def interrupt(*_):
        if armed:
            raise Interrupted

    before = signal.signal(signal.SIGALRM, interrupt)
    thread = threading.Thread(target=write_all)
    thread.start()
    reader, got, interrupts, more = FrameReader(theirs), [], 0, True
    with theirs:
        signal.setitimer(signal.ITIMER_REAL, 0.0002, 0.0002)
        while more:
            try:
                armed = True
                more = reader.read()
                armed = False
            except Interrupted:
                armed = False
                interrupts += 1
            got += reader.frames[:]
            reader.frames.clear()
        signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)
    thread.join(20)
    assert interrupts > 5
    assert len(got) == len(wanted)
    for frame, want in zip(got, wanted, strict=True):
        assert_same(frame, want)
