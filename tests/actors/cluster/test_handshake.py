"""Who knows the token gets in, whatever others do at the door; nobody else learns anything, and nothing is parsed."""

import contextlib
import logging
import os
import pickle
import random
import resource
import select
import socket
import ssl
import struct
import threading

import cloudpickle
import pytest

from rlx.actors.cluster import handshake, protocol
from rlx.actors.cluster.certificates import Authority
from rlx.actors.cluster.credentials import ClusterKey
from rlx.actors.cluster.handshake import Reason, Role, connect
from rlx.actors.cluster.protocol import FRAME, MAGIC, VERSION, Verdict
from rlx.actors.cluster.secure_socket import SecureSocket
from rlx.actors.engines import wire
from rlx.errors import ActorError, HandshakeError

PATIENCE_S = 20.0
ON_ANOTHER_ADDRESS = ("127.0.0.2", 0)


def reach(address, source=None):
    """Return a plain TCP connection."""
    sock = socket.create_connection(address, PATIENCE_S, source_address=source)
    sock.settimeout(PATIENCE_S)
    return sock


def receive(sock, count):
    """Return `count` bytes, fewer at the end."""
    data = b""
    with contextlib.suppress(ConnectionError):
        while len(data) < count and (more := sock.recv(count - len(data))):
            data += more
    return data


def frame(sock):
    """Return magic, version, code and data of a frame."""
    return FRAME.unpack(receive(sock, FRAME.size))


def hello(role=Role.NODE, version=VERSION, nonce=b"n" * 32, magic=MAGIC):
    return FRAME.pack(magic, version, role, nonce)


def refusal(address, key, reason, **options):
    """Return the sentence with which connect refuses."""
    with pytest.raises(HandshakeError) as caught:
        connect(address, key, Role.NODE, **options).close()
    assert caught.value.reason == reason, caught.value
    assert str(caught.value).endswith((".", "machine.", "both."))
    return str(caught.value)


def let_in(door, key, closing, **options):
    """Connect and have the door admit it; return both ends."""
    ours = closing(connect(door.address, key, Role.DRIVER, **options))
    theirs, role, _ = door.next()
    assert role is Role.DRIVER
    return ours, theirs


@pytest.fixture
def server(closing):
    """Return a function that starts a server: `answer(sock)` for each connection, in a thread."""

    def start(answer):
        listener = closing(socket.create_server(("127.0.0.1", 0)))

        def serve():
            with contextlib.suppress(OSError):
                while True:
                    sock = closing(listener.accept()[0])
                    sock.settimeout(PATIENCE_S)
                    threading.Thread(target=guarded, args=(sock,), daemon=True).start()

        def guarded(sock):
            with contextlib.suppress(OSError), sock:
                answer(sock)

        threading.Thread(target=serve, daemon=True).start()
        return listener.getsockname()

    return start


@pytest.fixture
def few_descriptors():
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))) + 50, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.fixture
def many_descriptors():
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (before[1], before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def passing_on(target, seen=None):
    """Return what a relay does: it passes bytes on both ways and keeps those of who connects."""

    def answer(sock):
        with reach(target) as far:
            poll = select.poll()
            for end in (sock, far):
                poll.register(end, select.POLLIN)
            while True:
                for fd, _ in poll.poll():
                    source, sink = (sock, far) if fd == sock.fileno() else (far, sock)
                    data = source.recv(65_536)
                    if not data:
                        return
                    if seen is not None and source is sock:
                        seen.append(data)
                    sink.sendall(data)

    return answer


@pytest.mark.parametrize("tls", [None, True, False])
@pytest.mark.parametrize("role", list(Role))
def test_who_has_the_key_gets_in_with_its_role_and_address(open_door, key, closing, role, tls):
    door = open_door()
    ours = closing(connect(door.address, key, role, tls=tls))
    _, seen, address = door.next()
    assert seen is role and address == ours._sock.getsockname()
    assert (ours.cipher == "none") is not tls
    assert door.doorman.in_handshake == 0


def test_a_door_for_tls_only_is_entered_with_tls(open_door, key, closing):
    door = open_door(tls_only=True)
    assert "takes connections with TLS only" in refusal(door.address, key, Reason.TLS_NEEDED, tls=False)
    ours, _ = let_in(door, key, closing)
    assert ours.cipher.startswith("TLS_")


@pytest.mark.parametrize("tls", [None, True, False])
def test_another_token_is_refused(open_door, key, other_key, tls):
    door = open_door()
    sentence = refusal(door.address, other_key, Reason.WRONG_TOKEN, tls=tls)
    assert str(other_key.path) in sentence and "{}:{}".format(*door.address) in sentence
    assert door.admitted.empty()


@pytest.mark.parametrize("tls", [True, False])
def test_another_token_with_the_right_certificates_is_refused_by_its_proof(open_door, key, tls):
    door = open_door()
    spy = ClusterKey(key.path, bytes(32), key.certificate, key.private_key, key.authority)
    refusal(door.address, spy, Reason.WRONG_TOKEN, tls=tls)
    assert door.admitted.empty()


def test_the_right_token_with_another_authority_is_refused_by_tls(open_door, key, other_key):
    door = open_door()
    spy = ClusterKey(key.path, key.token, other_key.certificate, other_key.private_key, other_key.authority)
    refusal(door.address, spy, Reason.WRONG_TOKEN, tls=True)
    # One that believes the door, and shows a certificate of its own:
    spy = ClusterKey(key.path, key.token, other_key.certificate, other_key.private_key, key.authority)
    refusal(door.address, spy, Reason.WRONG_TOKEN, tls=True)
    assert door.admitted.empty()


def test_an_expired_certificate_is_said_to_be(open_door, tmp_path, monkeypatch):
    from rlx.actors.cluster import certificates

    monkeypatch.setattr(certificates, "CLOCK_TOLERANCE", certificates.datetime.timedelta(days=3))
    old = ClusterKey.create(tmp_path / "cluster.key", days=-1)
    door = open_door(old)
    assert "rlx certs --renew" in refusal(door.address, old, Reason.EXPIRED, tls=True)


def test_who_cannot_prove_the_token_sees_no_proof(open_door):
    door = open_door()
    with reach(door.address) as sock:
        sock.sendall(hello())
        assert frame(sock)[:3] == (MAGIC, VERSION, Verdict.GOOD)
        sock.sendall(FRAME.pack(MAGIC, VERSION, Role.NODE, b"m" * 32))
        assert frame(sock) == (MAGIC, VERSION, Verdict.WRONG_TOKEN, bytes(32))
        assert receive(sock, 1) == b""


def test_what_was_recorded_opens_no_second_connection(open_door, key):
    """From the same address and port, so that it is the door's nonce alone that makes the old proof worthless."""
    door = open_door()

    def attempt(source, proof):
        sock = socket.socket()
        with sock:
            sock.settimeout(PATIENCE_S)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # the port is free at once
            sock.bind(source)
            sock.connect(door.address)
            sock.sendall(hello())
            *_, nonce = frame(sock)
            channel = protocol.addresses(sock.getsockname(), sock.getpeername())
            proof = proof or protocol._mac(key, b"connects", Role.NODE, b"n" * 32, nonce, channel)
            sock.sendall(FRAME.pack(MAGIC, VERSION, Role.NODE, proof))
            return frame(sock)[2], proof, sock.getsockname()

    verdict, proof, source = attempt(("127.0.0.1", 0), None)
    assert verdict == Verdict.GOOD
    door.next()[0].close()
    assert attempt(source, proof)[0] == Verdict.WRONG_TOKEN
    assert door.admitted.empty()


def test_a_door_that_repeats_what_it_has_heard_is_not_believed(open_door, key, closing, server):
    """It has the true door's certificate and not the token, so that it is the nonce alone that gives it away."""
    door, recorded = open_door(), []

    def record(sock):
        with (
            key.server_context().wrap_socket(sock, server_side=True) as near,
            key.client_context().wrap_socket(reach(door.address)) as far,
        ):
            for _ in range(2):
                far.sendall(receive(near, FRAME.size))
                recorded.append(receive(far, FRAME.size))
                near.sendall(recorded[-1])

    def repeat(sock):
        with key.server_context().wrap_socket(sock, server_side=True) as near:
            for answer in recorded:
                receive(near, FRAME.size)
                near.sendall(answer)

    closing(connect(server(record), key, Role.NODE, tls=True))  # the certificate is right
    refusal(server(repeat), key, Reason.WRONG_TOKEN, tls=True)


def test_the_proof_of_who_connects_is_not_that_of_the_door(key, server):
    """A door that does not know the token sends back what it got."""

    def mirror(sock):
        first = receive(sock, FRAME.size)
        sock.sendall(FRAME.pack(MAGIC, VERSION, Verdict.GOOD, first[-32:]))
        sock.sendall(FRAME.pack(MAGIC, VERSION, Verdict.GOOD, receive(sock, FRAME.size)[-32:]))

    refusal(server(mirror), key, Reason.WRONG_TOKEN, tls=False)


def test_a_relay_without_tls_is_noticed_and_tls_goes_through_it(open_door, key, closing, server):
    """As through a tunnel of ssh: both ends are loopback addresses, and are not each other's."""
    door = open_door()
    relay = server(passing_on(door.address))
    refusal(relay, key, Reason.WRONG_TOKEN, tls=False)
    assert door.admitted.empty()
    ours = closing(connect(relay, key, Role.DRIVER))
    assert ours.cipher.startswith("TLS_") and door.next()[1] is Role.DRIVER


def test_a_man_in_the_middle_with_a_certificate_of_another_authority_sees_nothing(open_door, key, other_key, server):
    door, seen = open_door(), []

    def answer(sock):
        with other_key.server_context().wrap_socket(sock, server_side=True) as tls:
            seen.append(tls.recv(100))

    refusal(server(answer), key, Reason.WRONG_TOKEN, tls=True)
    assert not seen and door.admitted.empty()


def test_a_man_in_the_middle_with_another_certificate_of_the_cluster_is_refused_by_the_proof(
    tmp_path, open_door, server
):
    authority = Authority(1)
    true, stolen = (ClusterKey(tmp_path, b"t" * 32, *authority.issue(), authority.certificate) for _ in range(2))
    door, seen = open_door(true), []

    def answer(sock):
        with (
            stolen.server_context().wrap_socket(sock, server_side=True) as near,
            stolen.client_context().wrap_socket(reach(door.address)) as far,
        ):
            for source, sink in ((near, far), (far, near), (near, far), (far, near)):
                seen.append(receive(source, FRAME.size))
                sink.sendall(seen[-1])

    refusal(server(answer), true, Reason.WRONG_TOKEN, tls=True)
    assert [len(frame) for frame in seen] == [FRAME.size] * 4
    assert FRAME.unpack(seen[3])[2] == Verdict.WRONG_TOKEN
    assert door.admitted.empty()


def test_nobody_who_listens_is_said_so(key):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = listener.getsockname()
    assert "nobody listens at {}:{}".format(*address) in refusal(address, key, Reason.NOBODY_LISTENS)


def test_every_address_of_a_host_is_tried_within_the_deadline(open_door, key, closing, monkeypatch):
    door, (host, port) = open_door(), ("127.0.0.3", 1)
    silent = closing(socket.create_server((host, 0), backlog=0))
    fill = [closing(socket.socket()) for _ in range(4)]  # its backlog: who comes now gets no answer
    for sock in fill:
        sock.setblocking(False)
        sock.connect_ex(silent.getsockname())
    stream = (socket.AF_INET, socket.SOCK_STREAM, 6, "")
    places = [(*stream, (host, port)), (*stream, silent.getsockname()), (*stream, door.address)]
    monkeypatch.setattr(handshake.socket, "getaddrinfo", lambda *_, **__: places)
    closing(connect(("head", port), key, Role.NODE, timeout_s=2.0))
    assert door.next()[1] is Role.NODE
    monkeypatch.undo()
    assert "cannot be reached" in refusal(("." * 300, port), key, Reason.UNREACHABLE)


@pytest.mark.parametrize("tls", [None, True])
def test_another_kind_of_server_is_said_to_be_no_rlx_node(key, server, tls):
    address = server(lambda sock: (sock.recv(1), sock.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")))
    assert "is no rlx node" in refusal(address, key, Reason.NOT_RLX, tls=tls)


@pytest.mark.parametrize("tls", [None, True])
def test_a_server_that_hangs_up_is_said_to_have_closed(key, server, tls):
    assert "without a verdict" in refusal(server(lambda sock: None), key, Reason.CLOSED, tls=tls)


@pytest.mark.parametrize("tls", [None, True])
def test_a_server_that_says_nothing_is_given_up_at_the_deadline(key, tls):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        sentence = refusal(listener.getsockname(), key, Reason.TIMED_OUT, tls=tls, timeout_s=0.1)
    assert "within 0.1 s" in sentence


def test_another_version_is_said_on_both_ends(open_door, key, server):
    door = open_door()
    with reach(door.address) as sock:
        sock.sendall(hello(version=VERSION + 1))
        assert frame(sock) == (MAGIC, VERSION, Verdict.OTHER_VERSION, bytes(32))
        assert receive(sock, 1) == b""
    newer = server(lambda sock: (receive(sock, FRAME.size), sock.sendall(FRAME.pack(MAGIC, 9, 0, bytes(32)))))
    assert f"version 9 of the cluster's protocol and this process version {VERSION}" in refusal(
        newer, key, Reason.OTHER_VERSION
    )


def test_an_error_of_the_handshake_is_an_actors_error_and_a_connections_and_survives_a_pickle():
    error = pickle.loads(pickle.dumps(HandshakeError("no", Reason.CLOSED)))
    assert isinstance(error, ActorError) and isinstance(error, ConnectionError)
    assert (str(error), error.reason) == ("no", "closed")


@pytest.mark.parametrize("source", [ON_ANOTHER_ADDRESS, None])
def test_a_thousand_half_open_connections_keep_nobody_out(open_door, key, closing, source, many_descriptors):
    door = open_door(timeout_s=300.0)
    for index in range(1000):
        sock = closing(reach(door.address, source))
        sock.sendall([b"", hello()[:7], b"\x16\x03\x01"][index % 3])
    for tls in (False, True):
        let_in(door, key, closing, tls=tls)
    assert 0 < door.doorman.in_handshake <= handshake.MAX_IN_HANDSHAKE


def test_a_slow_one_keeps_its_place_while_another_address_floods(open_door, key, closing):
    door = open_door(timeout_s=300.0, max_in_handshake=20)
    slow = closing(reach(door.address))
    slow.sendall(hello())
    assert frame(slow)[2] == Verdict.GOOD
    flood = [closing(reach(door.address, ON_ANOTHER_ADDRESS)) for _ in range(100)]
    assert receive(flood[0], 1) == b""  # its own oldest had to go
    slow.sendall(FRAME.pack(MAGIC, VERSION, Role.NODE, bytes(32)))
    assert frame(slow)[2] == Verdict.WRONG_TOKEN


@pytest.mark.parametrize("beginning", [b"", b"\x16\x03\x01\x02\x00"])
def test_who_sends_a_byte_now_and_then_is_closed_at_the_deadline(open_door, key, closing, beginning):
    door = open_door(timeout_s=0.3)
    with reach(door.address) as slow:
        slow.sendall(beginning)
        poll = select.poll()
        poll.register(slow, select.POLLIN)
        with contextlib.suppress(ConnectionError):
            for byte in hello()[: FRAME.size - 1]:  # one is always missing
                slow.send(bytes([byte]))
                if poll.poll(100):
                    break
            else:
                pytest.fail("every byte has bought it more time")
        assert receive(slow, 1) == b""
    let_in(door, key, closing)


def test_random_bytes_open_nothing_and_break_nothing(open_door, key, closing):
    door, rng = open_door(max_failures=10**6), random.Random(0)
    beginnings = [b"", b"\x16", b"\x16\x03\x01", MAGIC, MAGIC + bytes([VERSION]), hello(), hello()[:20]]
    for index in range(400):
        with reach(door.address) as sock, contextlib.suppress(OSError):
            sock.sendall(beginnings[index % len(beginnings)] + rng.randbytes(rng.choice([0, 1, 35, 40, 500, 70_000])))
            if rng.random() < 0.5:
                sock.shutdown(socket.SHUT_WR)
            if index % 10 == 0:
                let_in(door, key, closing, tls=rng.random() < 0.5)
    let_in(door, key, closing)
    assert door.admitted.empty()


def test_a_tls_client_hello_that_is_damaged_anywhere_breaks_nothing(open_door, key, closing):
    door, rng = open_door(max_failures=10**6), random.Random(1)
    outgoing = ssl.MemoryBIO()
    client = key.client_context().wrap_bio(ssl.MemoryBIO(), outgoing)
    with contextlib.suppress(ssl.SSLWantReadError):
        client.do_handshake()
    good = outgoing.read()
    for _ in range(200):
        data = bytearray(good)
        for _ in range(rng.randint(1, 4)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        with reach(door.address) as sock, contextlib.suppress(ConnectionError):
            sock.sendall(data[: rng.randint(1, len(data))])
    let_in(door, key, closing, tls=True)
    assert door.admitted.empty()


def test_nothing_is_unpickled_and_no_frame_is_read_before_the_proof(open_door, key, closing, monkeypatch):
    touched = []

    def touch(*arguments, **options):
        touched.append(arguments)

    for module, name in ((pickle, "loads"), (pickle, "load"), (pickle, "Unpickler"), (cloudpickle, "loads")):
        monkeypatch.setattr(module, name, touch)
    monkeypatch.setattr(wire.FrameReader, "read", touch)

    class Evil:
        def __reduce__(self):
            return touched.append, (1,)

    evil = pickle.dumps(Evil())
    door = open_door()
    for prefix in (b"", hello()):
        with reach(door.address) as sock:
            sock.sendall(prefix + b"".join(wire.encode(wire.CALL, 1, "m", (evil, ()))) + evil)
            receive(sock, 1000)
    with key.client_context().wrap_socket(reach(door.address)) as sock:
        sock.sendall(b"".join(wire.encode(wire.CALL, 1, "m", (evil, ()))))
        receive(sock, 1000)
    let_in(door, key, closing)
    assert not touched


def fail(door, source):
    """Fail once, and wait until the door has counted it."""
    with reach(door.address, source) as sock:
        sock.sendall(b"GET / HTTP/1.1\r\n\r\n")
        assert receive(sock, 1) == b""


def test_an_address_that_fails_too_often_is_not_listened_to_and_others_are(open_door, key, closing, caplog):
    door = open_door(max_failures=5)
    for _ in range(5):
        fail(door, ON_ANOTHER_ADDRESS)
    with reach(door.address, ON_ANOTHER_ADDRESS) as sock:
        with contextlib.suppress(ConnectionError):
            sock.sendall(hello())
        assert receive(sock, 1) == b""
    let_in(door, key, closing)
    lines = [record.getMessage() for record in caplog.records]
    assert [line for line in lines if "127.0.0.2" in line] == [
        "a connection from 127.0.0.2 is refused: not rlx (it begins with b'GET / HTTP/1')",
        "connections from 127.0.0.2 are refused for a minute, after 5 failures",
    ]


def test_who_gets_in_is_forgiven(open_door, key, closing):
    door = open_door(max_failures=3)
    for _ in range(3):
        fail(door, None)
        fail(door, None)
        let_in(door, key, closing)


def test_failures_are_forgotten_after_their_minute(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(handshake.time, "monotonic", lambda: now[0])
    failures = handshake._Failures(2)
    failures.add("10.0.0.1", "x")
    failures.add("10.0.0.1", "x")
    assert failures.are_too_many("10.0.0.1") and not failures.are_too_many("10.0.0.2")
    now[0] += handshake.FAILURE_WINDOW_S
    assert not failures.are_too_many("10.0.0.1")
    for index in range(2 * handshake.MAX_ADDRESSES):
        failures.add(f"10.1.{index // 256}.{index % 256}", "x")
    assert len(failures._counts) == handshake.MAX_ADDRESSES


def test_hosts_of_one_ipv6_network_share_their_failures():
    assert handshake._group("2001:db8:1:2:3::4") == handshake._group("2001:db8:1:2::5") == "2001:0db8:0001:0002::/64"
    assert handshake._group("::ffff:10.0.0.1") == handshake._group("10.0.0.1") == "10.0.0.1"


def test_a_connection_that_nobody_takes_is_closed_and_the_door_stays_open(key, closing):
    listener = socket.create_server(("127.0.0.1", 0))
    address = listener.getsockname()

    def admit(*_):
        raise RuntimeError("not now")

    closing(handshake.Doorman(key, listener, admit))
    for _ in range(2):
        ours = closing(connect(address, key, Role.NODE))
        poll = select.poll()
        poll.register(ours.fileno(), select.POLLIN)
        assert poll.poll(PATIENCE_S * 1e3) and ours.recv_into(memoryview(bytearray(1))) == 0


def test_a_bug_that_somebody_finds_closes_the_door_for_nobody_else(open_door, key, closing, monkeypatch, caplog):
    door = open_door()

    def examine(*_):
        raise ValueError("found")
        yield

    with monkeypatch.context() as patch:
        patch.setattr(protocol, "_examine", examine)
        refusal(door.address, key, Reason.CLOSED, tls=False)
    let_in(door, key, closing)
    assert (
        "a connection of 127.0.0.1 has failed in an unknown way" in caplog.text and "ValueError: found" in caplog.text
    )


def test_without_descriptors_the_door_waits_and_opens_again(open_door, key, closing, few_descriptors):
    door, noticed = open_door(), threading.Event()

    class Listening(logging.Handler):
        def emit(self, record):
            if "takes no connections for now" in record.getMessage():
                noticed.set()

    listening = Listening()
    handshake.logger.addHandler(listening)
    sock, spare = closing(socket.socket()), []
    sock.settimeout(PATIENCE_S)
    try:
        with pytest.raises(OSError):
            while True:
                spare.append(os.dup(0))
        sock.connect(door.address)  # to accept it takes a descriptor
        sock.sendall(hello())
        assert noticed.wait(PATIENCE_S)
    finally:
        handshake.logger.removeHandler(listening)
        for descriptor in spare:
            os.close(descriptor)
    assert frame(sock)[2] == Verdict.GOOD
    let_in(door, key, closing)


def test_a_door_whose_thread_ends_before_it_is_woken_is_closed_all_the_same(key, monkeypatch):
    before, wake = len(os.listdir("/proc/self/fd")), os.eventfd_write
    listener = socket.create_server(("127.0.0.1", 0))
    address, door = listener.getsockname(), handshake.Doorman(key, listener, lambda *_: None)

    def wake_late(descriptor, value):
        reach(address).close()  # has the thread look round, and see that it is to end
        door._thread.join(PATIENCE_S)
        wake(descriptor, value)

    monkeypatch.setattr(os, "eventfd_write", wake_late)
    door.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_closed_door_lets_go_of_everything(open_door, key):
    threads = threading.active_count()
    door = open_door(timeout_s=300.0)
    with reach(door.address) as waiting:
        waiting.sendall(hello())
        frame(waiting)
        door.doorman.close()
        door.doorman.close()
        assert receive(waiting, 1) == b""
    refusal(door.address, key, Reason.NOBODY_LISTENS)
    assert threading.active_count() == threads


def test_what_was_sent_with_the_last_frame_of_the_handshake_is_pending(key, closing):
    """The door's side writes at once; its bytes may have come with the proof, and poll() is silent about them."""
    listener = socket.create_server(("127.0.0.1", 0))
    address = listener.getsockname()
    closing(handshake.Doorman(key, listener, lambda sock, *_: closing(sock).send(b"first words")))
    for _ in range(20):
        ours = closing(connect(address, key, Role.NODE, tls=True))
        poll = select.poll()
        poll.register(ours.fileno(), select.POLLIN)
        view, got = memoryview(bytearray(100)), 0
        while got < len(b"first words"):
            assert ours.pending() or poll.poll(PATIENCE_S * 1e3)
            with contextlib.suppress(BlockingIOError):
                got += ours.recv_into(view[got:])
        assert bytes(view[:got]) == b"first words"


def test_a_record_behind_the_handshakes_last_message_is_not_lost(tcp_pair, key):
    """A client's Finished and its first text come in one packet."""
    ours_raw, theirs_raw = tcp_pair()
    ours = SecureSocket(ours_raw, key.client_context())
    theirs = SecureSocket(theirs_raw, key.server_context(), True)
    while ours.negotiate():
        theirs.negotiate()
    ours.send(b"hello")
    assert theirs.negotiate() == 0
    assert theirs.pending() == 5
    view = memoryview(bytearray(10))
    assert theirs.recv_into(view) == 5 and bytes(view[:5]) == b"hello"
