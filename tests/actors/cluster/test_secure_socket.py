"""A connection with TLS is a socket to the wire's classes: whole frames, no stall, no byte lost by an interrupt."""

import contextlib
import random
import select
import signal
import socket
import struct
import sys
import threading

import numpy as np
import pytest

from rlx.actors.cluster import secure_socket
from rlx.actors.cluster.handshake import Role, connect
from rlx.actors.cluster.secure_socket import SecureSocket
from rlx.actors.engines import wire
from rlx.actors.engines.wire import FrameReader, Outbox

PATIENCE_S = 20.0
SIZES = [0, 1, 40, 16_383, 16_384, 16_385, wire.WINDOW_BYTES, wire.WINDOW_BYTES + 1, 3_000_000]


def wait(sock, events):
    """Wait until poll() says so, which is all that a link knows."""
    poll = select.poll()
    poll.register(sock.fileno(), events)
    assert poll.poll(PATIENCE_S * 1e3), "nothing came"


def write(sock, messages):
    outbox = Outbox(sock)
    for number, (body, buffers) in enumerate(messages):
        outbox.add(wire.encode(wire.CALL, number, "añ€", (body, buffers)))
        while not outbox.flush():
            wait(sock, select.POLLOUT)


def read_frames(sock, count=None):
    """Return the next `count` frames, or all until the end; sleeps in poll() only where nothing is pending."""
    reader, got, more = FrameReader(sock), [], True
    while more and (count is None or len(got) < count):
        if not sock.pending():
            wait(sock, select.POLLIN)
        with contextlib.suppress(BlockingIOError):
            more = reader.read()
        got += reader.frames[:]
        reader.frames.clear()
    return got


def assert_same(frames, messages):
    assert len(frames) == len(messages)
    for number, (frame, (body, buffers)) in enumerate(zip(frames, messages, strict=True)):
        got_body, got_buffers = frame.open(None)
        assert (frame.call_id, frame.text, bytes(got_body)) == (number, "añ€", body)
        assert [bytes(b) for b in got_buffers] == [bytes(b) for b in buffers]


def messages_of(seed, largest=3_000_000):
    rng = random.Random(seed)
    plain = [(rng.randbytes(size), []) for size in SIZES]
    with_buffers = [(b"p", [rng.randbytes(size) for size in rng.sample(SIZES, 4)]) for _ in range(3)]
    return [*plain, *with_buffers, (b"p", [np.frombuffer(rng.randbytes(largest), np.uint8).data])]


def in_threads(*functions):
    """Run functions at once; the first error of any is raised."""
    errors = []

    def guarded(function):
        try:
            function()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(function,), daemon=True) for function in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(3 * PATIENCE_S)
    if errors:
        raise errors[0]
    assert not any(thread.is_alive() for thread in threads), "a thread hangs"


@pytest.mark.parametrize("tls", [True, False])
def test_frames_of_0_bytes_to_50_megabytes_travel_both_ways_at_once(open_door, key, closing, tls):
    door = open_door()
    ours = closing(connect(door.address, key, Role.NODE, tls=tls))
    theirs, _, _ = door.next()
    assert ours.cipher == theirs.cipher and (ours.cipher == "none") is not tls
    forth, back = messages_of(1, 50 * 2**20), messages_of(2)
    got = {}
    in_threads(
        lambda: write(ours, forth),
        lambda: write(theirs, back),
        lambda: got.update(forth=read_frames(theirs, len(forth))),
        lambda: got.update(back=read_frames(ours, len(back))),
    )
    assert_same(got["forth"], forth)
    assert_same(got["back"], back)


def test_a_reader_of_small_views_never_waits_in_poll_for_what_has_been_decrypted(tls_pair):
    ours, theirs = tls_pair()
    data = random.Random(0).randbytes(150_000)
    sent = 0
    while sent < len(data):
        sent += ours.send(data[sent:])
    ours.shutdown(socket.SHUT_WR)
    got, view = bytearray(), memoryview(bytearray(777))
    while True:
        if not theirs.pending():
            wait(theirs, select.POLLIN)
        with contextlib.suppress(BlockingIOError):
            count = theirs.recv_into(view)
            if count == 0:
                break
            got += view[:count]
    assert bytes(got) == data
    assert theirs.pending() == 0


def test_nothing_is_pending_where_less_than_a_record_has_arrived(tls_pair, tcp_pair, key):
    """A record in two halves: between them there is nothing to read, and poll() announces the second half."""
    relay, theirs_raw = tcp_pair()
    ours_raw, far = tcp_pair()
    ours, theirs = SecureSocket(ours_raw, key.client_context()), SecureSocket(theirs_raw, key.server_context(), True)
    for sock in (relay, far):
        sock.setblocking(False)
    waits = [1, 1]
    while any(waits):
        waits = [ours.negotiate(), theirs.negotiate()]
        for a, b in ((relay, far), (far, relay)):
            with contextlib.suppress(BlockingIOError):
                b.sendall(a.recv(65_536))
    ours.send(b"x" * 1000)
    wait(far, select.POLLIN)
    record = far.recv(65_536)
    view = memoryview(bytearray(2000))
    relay.sendall(record[:500])
    wait(theirs, select.POLLIN)
    with pytest.raises(BlockingIOError):
        theirs.recv_into(view)
    assert theirs.pending() == 0
    relay.sendall(record[500:])
    wait(theirs, select.POLLIN)
    assert theirs.recv_into(view, 300) == 300
    assert theirs.pending() == 700
    assert theirs.recv_into(view) == 700


def test_a_write_that_was_refused_is_repeated_from_other_memory_and_with_more_behind_it(tls_pair):
    ours, theirs = tls_pair()
    data = random.Random(0).randbytes(30 * 2**20)
    sent = 0
    with pytest.raises(BlockingIOError):
        while True:
            sent += ours.send(data[sent : sent + 500_000])
    assert sent < len(data)
    got = bytearray()

    def write_rest():
        nonlocal sent
        while sent < len(data):
            try:
                rest = bytes(data[sent:])  # elsewhere, and longer
                sent += ours.sendmsg([rest[:3], rest[3:200_000], rest[200_000:]])
            except BlockingIOError:
                wait(ours, select.POLLOUT)
        ours.shutdown(socket.SHUT_WR)

    def read_all():
        view = memoryview(bytearray(1_000_000))
        while True:
            if not theirs.pending():
                wait(theirs, select.POLLIN)
            with contextlib.suppress(BlockingIOError):
                count = theirs.recv_into(view)
                if count == 0:
                    return
                got.extend(view[:count])

    in_threads(write_rest, read_all)
    assert bytes(got) == data


def test_a_send_takes_a_bounded_part_of_what_is_given(tls_pair):
    ours, _ = tls_pair()
    large = np.zeros(2**31 + 5, np.uint8).data  # no page of it is touched but the first ones
    assert ours.send(large) == secure_socket.CHUNK_BYTES
    assert ours.sendmsg([b"head", large]) == secure_socket.CHUNK_BYTES
    assert ours.sendmsg([b"head", b"", b"tail"]) == 8
    assert ours.send(b"") == 0


def test_the_end_of_the_stream_is_zero_again_and_again_and_a_reset_is_a_connection_error(tls_pair):
    view = memoryview(bytearray(10))
    ours, theirs = tls_pair()
    ours.send(b"last")
    ours.close()
    wait(theirs, select.POLLIN)
    assert [theirs.recv_into(view) for _ in range(3)] == [4, 0, 0]
    ours, theirs = tls_pair()
    ours._sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    ours.close()
    wait(theirs, select.POLLIN)
    with pytest.raises(ConnectionError):
        theirs.recv_into(view)
    with pytest.raises(ConnectionError):
        theirs.send(b"x")


def test_bytes_that_were_changed_on_the_way_end_the_connection(tls_pair):
    ours, theirs = tls_pair()
    ours._sock.send(b"\x17\x03\x03\x00\x20" + bytes(32))  # a record that nobody has encrypted
    wait(theirs, select.POLLIN)
    with pytest.raises(ConnectionError, match="TLS failed"):
        theirs.recv_into(memoryview(bytearray(100)))
    wait(ours, select.POLLIN)
    with pytest.raises(ConnectionError, match=r"TLS failed: .*ALERT"):  # and the other end is told
        ours.recv_into(memoryview(bytearray(100)))


def test_what_is_no_record_is_refused_before_it_is_waited_for(tls_pair):
    ours, theirs = tls_pair()
    ours.send(b"good")
    ours._sock.send(b"\x17\x03\x03\xff\xff")
    view, got = memoryview(bytearray(100)), 0
    with pytest.raises(ConnectionError, match="a record of TLS claims 65535 bytes"):
        while True:
            if not theirs.pending():
                wait(theirs, select.POLLIN)
            with contextlib.suppress(BlockingIOError):
                got += theirs.recv_into(view)
    assert got in (0, 4)  # by whether both came at once
    assert theirs.pending()


def test_every_error_of_the_kernel_is_a_connection_error(tls_pair):
    ours, _ = tls_pair()
    ours.close()
    with pytest.raises(ConnectionError):
        ours.send(b"x")
    with pytest.raises(ConnectionError):
        ours.recv_into(memoryview(bytearray(1)))


def test_small_frames_go_at_once_and_a_silent_machine_is_noticed(tls_pair):
    for end in tls_pair():
        assert end._sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        assert end._sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)


class Interrupted(Exception):
    pass


class Alarm:
    """A timer that raises in the main thread while it is armed, in C code's returns and between instructions."""

    def __init__(self, every_s):
        self.armed, self.count, self._every_s = False, 0, every_s

    def __enter__(self):
        self._before = signal.signal(signal.SIGALRM, self._ring)
        signal.setitimer(signal.ITIMER_REAL, self._every_s, self._every_s)
        return self

    def __exit__(self, *_):
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, self._before)

    def _ring(self, *_):
        if self.armed:
            raise Interrupted

    def interrupt(self, step):
        """Run a step, which may be cut short anywhere."""
        try:
            self.armed = True
            step()
            self.armed = False
        except Interrupted:
            self.count += 1
        finally:
            self.armed = False


def test_interrupts_while_writing_lose_and_double_nothing(tls_pair, monkeypatch):
    monkeypatch.setattr(sys, "unraisablehook", lambda _: None)
    ours, theirs = tls_pair()
    rng = random.Random(0)
    messages = [(b"x", [rng.randbytes(300_000)]) for _ in range(150)]
    got = []
    thread = threading.Thread(target=lambda: got.extend(read_frames(theirs)), daemon=True)
    thread.start()
    outbox = Outbox(ours)
    with Alarm(0.0003) as alarm:
        for number, message in enumerate(messages):
            outbox.add(wire.encode(wire.CALL, number, "añ€", message))
            alarm.interrupt(outbox.flush)
    while not outbox.flush():
        wait(ours, select.POLLOUT)
    ours.shutdown(socket.SHUT_WR)
    thread.join(PATIENCE_S)
    assert alarm.count > 5
    assert_same(got, messages)


def test_interrupts_while_reading_lose_and_double_nothing(tls_pair, monkeypatch):
    monkeypatch.setattr(sys, "unraisablehook", lambda _: None)
    ours, theirs = tls_pair()
    messages = [message for seed in range(10) for message in messages_of(seed)]

    def write_all():
        write(ours, messages)
        ours.shutdown(socket.SHUT_WR)

    thread = threading.Thread(target=write_all, daemon=True)
    thread.start()
    reader, got, more = FrameReader(theirs), [], True

    def read():
        nonlocal more
        more = reader.read()

    with Alarm(0.0002) as alarm:
        while more:
            if not theirs.pending() and not reader.unfinished:
                wait(theirs, select.POLLIN)
            with contextlib.suppress(BlockingIOError):
                alarm.interrupt(read)
            got += reader.frames[:]
            reader.frames.clear()
    thread.join(PATIENCE_S)
    assert alarm.count > 5
    assert_same(got, messages)
