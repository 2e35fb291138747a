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
    sizes = [0, 1, 100, wire.JOIN_BYTES - 1, wire.JOIN_BYTES, wire.WINDOW_BYTES, wire.WINDOW_BYTES + 7]
    for call_id in range(count):
        body = rng.randbytes(rng.choice(sizes))
        buffers = [rng.randbytes(rng.choice([0, 5, 20_000, 400_000])) for _ in range(rng.choice([0, 0, 0, 1, 3]))]
        yield wire.CALL, call_id, rng.choice(["", "añ€", "m" * 300]), (body, buffers)


def assert_same(frame, want):
    kind, call_id, text, (body, buffers) = want
    assert (frame.kind, frame.call_id, frame.text) == (kind, call_id, text)
    assert bytes(frame.message[0]) == body and [bytes(b) for b in frame.message[1]] == buffers


@pytest.mark.parametrize("seed", range(4))
def test_frames_come_out_whole_however_the_stream_is_cut(seed):
    rng = random.Random(seed)
    wanted = list(frames_of(rng, 20))
    stream = b"".join(bytes(part) for frame in wanted for part in wire.encode(*frame))
    ours, theirs = socket.socketpair()
    with ours, theirs:
        reader, got, at = FrameReader(theirs), [], 0
        theirs.setblocking(False)
        while at < len(stream):
            at += ours.send(stream[at : at + rng.choice([1, 3, 31, 5000, 100_000])])
            try:
                while True:
                    got += reader.read() or []
            except BlockingIOError:
                pass
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
        assert [frame.call_id for frame in reader.read() or []] == [1]
        assert reader.read() is None


@pytest.mark.parametrize("bad", [b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n", b"rx\x02" + bytes(60)])
def test_what_is_no_frame_of_ours_is_refused_before_any_memory_is_taken(bad):
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.send(bad)
        with pytest.raises(ActorError, match="a frame begins with"):
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
            while (frames := reader.read()) is not None:
                got.extend(frames)

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
