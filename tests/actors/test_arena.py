"""Shared memory between real processes: placed once, lent, read in place, given back."""

import ctypes
import gc
import logging
import mmap
import os
import pickle
import signal
import sys
import threading
import time
import traceback
import unittest.mock
from pathlib import Path

import numpy as np
import pytest
import torch

from rlx.actors.engines import arena as arena_module
from rlx.actors.engines import pickling, shared_memory
from rlx.actors.engines.arena import Arena, capacity_for
from rlx.actors.engines.leases import (
    LEASES,
    LEDGER_BYTES,
    Borrower,
    Lender,
    actor_ends,
    driver_ends,
    driver_memory,
    link_memory,
)
from rlx.actors.engines.shared_memory import SharedMemory
from rlx.errors import ActorError, ObjectMemoryFull
from tests.polling import until

pytestmark = [pytest.mark.timeout(60), pytest.mark.filterwarnings("ignore:The given .* is not writable")]
MIB = 1 << 20
T = 20.0  # a deadline, not a delay


@pytest.fixture(params=[False, True], ids=["memfd", "posix"])
def memory(request):
    with_memory = SharedMemory.create(1 << 30, posix=request.param)
    yield with_memory
    with_memory.close()


def pair(memory, limit_bytes=256 * MIB, **options):
    """Return an arena, the lender to one holder and that holder's borrower, all in this process."""
    arena = Arena(memory, limit_bytes, **options)
    ledger = np.zeros(LEDGER_BYTES, np.uint8)
    return arena, Lender(arena, ledger, "holder"), Borrower(memory.map(), ledger)


def received(arena, lender, borrower, value):
    """Return `value` as the holder gets it."""
    body, buffers = pickling.dumps(value, "value")
    block = arena.place(buffers)
    lease = lender.lend(block)
    return pickle.loads(body, buffers=borrower.borrow(lease, block.spans))


def resident_bytes(memory):
    return os.fstat(memory.fd).st_blocks * 512


def fork(run):
    """Run `run(read, say)` in a forked process; return its pid, a pipe to it, and a pipe from it."""
    to_child, from_parent = os.pipe()
    to_parent, from_child = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.close(from_parent)
            os.close(to_parent)
            run(lambda: os.read(to_child, 1), lambda data=b".": os.write(from_child, data))
            code = 0
        except BaseException:
            traceback.print_exc(file=sys.__stderr__)
        finally:
            os._exit(code)
    os.close(to_child)
    os.close(from_child)
    return pid, from_parent, to_parent


def reap(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_buffers_arrive_as_they_were_each_on_a_cache_line(memory):
    arena, lender, borrower = pair(memory)
    sent = [os.urandom(n) for n in (1, 63, 64, 65, 0, 5 * MIB + 1)]
    block = arena.place(sent)
    views = borrower.borrow(lender.lend(block), block.spans)
    assert [bytes(view) for view in views] == sent
    assert all(offset % 64 == 0 for offset, _ in block.spans)
    assert [offset - block.offset for offset, _ in block.spans] == [0, 64, 128, 192, 320, 320]


def test_a_block_is_at_most_an_eighth_larger_than_its_message():
    assert [capacity_for(n) for n in (0, 1, 4096, 4097, 65536, 65537)] == [4096, 4096, 4096, 8192, 65536, 73728]
    assert capacity_for(5 << 30) == 5 << 30
    assert capacity_for((1 << 33) + 1) == 9 << 30
    for size in (100_001, 1_000_003, 123_456_789, 7_777_777_777):
        assert size <= capacity_for(size) <= size * 1.125
        assert capacity_for(size) % mmap.PAGESIZE == 0


DERIVED = {
    "slice": lambda x: x[10:20],
    "step": lambda x: x[::7],
    "transpose": lambda x: x.reshape(100, -1).T,
    "view": lambda x: x.view(np.uint8),
    "frombuffer": lambda x: np.frombuffer(x, np.float32),
    "frombuffer of a frombuffer": lambda x: np.frombuffer(np.frombuffer(x, np.uint8), np.uint16),
    "memoryview": lambda x: memoryview(x),
    "slice of a memoryview": lambda x: memoryview(x)[5:10],
    "cast": lambda x: memoryview(x).cast("B")[8:16],
    "unpickled again": lambda x: _unpickled(x),
    "torch.from_numpy": lambda x: torch.from_numpy(x),
    "torch view": lambda x: torch.from_numpy(x).view(100, -1).t()[3],
    "torch.frombuffer": lambda x: torch.frombuffer(x, dtype=torch.float32)[5:],
    "numpy of torch": lambda x: torch.from_numpy(x)[4:].numpy(),
    "dlpack": lambda x: torch.from_dlpack(torch.from_numpy(x)),
    "nested": lambda x: {"a": [x[1:]]},
}


def _unpickled(x):
    body, buffers = pickling.dumps(x, "x")
    return pickle.loads(body, buffers=buffers)


@pytest.mark.parametrize("derive", DERIVED.values(), ids=DERIVED)
def test_a_lease_lasts_exactly_as_long_as_what_was_made_from_it(memory, derive):
    arena, lender, borrower = pair(memory)
    derived = derive(received(arena, lender, borrower, np.arange(10_000, dtype=np.float32)))
    gc.collect()
    assert arena.reclaim() > 0
    del derived
    gc.collect()
    assert arena.reclaim() == 0


def test_a_lease_ends_with_the_last_of_its_arrays(memory):
    arena, lender, borrower = pair(memory)
    arrays = received(arena, lender, borrower, [np.full(10_000, i) for i in range(3)])
    tensor = received(arena, lender, borrower, torch.arange(10_000))
    arrays.pop(0)
    kept = arrays.pop()
    arrays.clear()
    assert arena.reclaim() == capacity_for(240_000) + capacity_for(80_000)
    del tensor
    assert arena.reclaim() == capacity_for(240_000)
    assert kept.sum() == 20_000
    del kept
    assert arena.reclaim() == 0


def test_received_arrays_are_read_only(memory):
    arena, lender, borrower = pair(memory)
    array = received(arena, lender, borrower, np.zeros(10_000))
    with pytest.raises(ValueError, match="read-only"):
        array[0] = 1
    with pytest.raises(ValueError, match="WRITEABLE"):
        array.flags.writeable = True
    with pytest.raises(ValueError, match="WRITEABLE"):
        memory.map().flags.writeable = True


def test_a_readers_descriptor_cannot_be_mapped_for_writing(memory):
    reader = SharedMemory(memory.reader_fd())
    assert reader.map(0, MIB).sum(dtype=int) == 0
    with pytest.raises(PermissionError):
        reader.map(writable=True)
    with pytest.raises(ValueError, match="cannot be mapped"):
        reader.map(0, reader.size + 1)
    reader.close()


def test_the_size_of_a_memfd_is_sealed():
    memory = SharedMemory.create(MIB)
    for size in (0, 2 * MIB):
        with pytest.raises(PermissionError):
            os.ftruncate(memory.fd, size)


def test_mapping_and_memory_leave_no_descriptor_behind(memory):
    before = os.listdir("/proc/self/fd")
    other = SharedMemory.create(MIB)
    view = other.map(writable=True)
    view[:] = 7
    other.close()
    other.close()
    assert view.sum() == 7 * MIB
    assert os.listdir("/proc/self/fd") == before
    maps = len(Path("/proc/self/maps").read_text().splitlines())
    del view
    assert len(Path("/proc/self/maps").read_text().splitlines()) < maps


def test_a_freed_block_is_used_again_and_stays_warm(memory):
    arena, lender, borrower = pair(memory)
    offsets = set()
    for i in range(50):
        array = received(arena, lender, borrower, np.full(MIB, i, np.uint8))
        assert array.min() == array.max() == i
        offsets.add(array.__array_interface__["data"][0])
        del array
    assert len(offsets) == 1
    assert resident_bytes(memory) == MIB


def test_memory_beyond_what_is_retained_goes_back_to_the_system(memory):
    arena, lender, borrower = pair(memory, retain_bytes=8 * MIB)
    baseline = resident_bytes(memory)
    held = [received(arena, lender, borrower, np.ones(4 * MIB, np.uint8)) for _ in range(10)]
    assert resident_bytes(memory) - baseline == 40 * MIB
    held.clear()
    assert arena.reclaim() == 0
    assert resident_bytes(memory) - baseline == 8 * MIB
    # All gaps have grown together again: one block can have everything.
    assert received(arena, lender, borrower, np.ones(250 * MIB, np.uint8)).all()


def test_placing_gives_back_too(memory):
    arena, lender, borrower = pair(memory, retain_bytes=8 * MIB)
    held = [received(arena, lender, borrower, np.ones(4 * MIB, np.uint8)) for _ in range(10)]
    held.clear()
    arena.place([b"x"])
    assert resident_bytes(memory) == 8 * MIB + 4096


def test_the_block_that_was_read_last_is_the_next_one_though_an_older_one_is_warm(memory):
    arena, lender, borrower = pair(memory)
    both = [received(arena, lender, borrower, np.zeros(MIB, np.uint8)) for _ in range(2)]  # a burst takes two blocks
    both.clear()
    offsets = set()
    for _ in range(4):
        block = arena.place([bytes(MIB)])
        offsets.add(block.offset)
        del borrower.borrow(lender.lend(block), block.spans)[:], block
    assert len(offsets) == 1


@pytest.mark.parametrize("virtual_bytes", [1 << 30, 64 * MIB, 48 * MIB])
def test_warm_blocks_make_way_for_one_of_another_size(virtual_bytes):
    """They count towards the limit, and where addresses are short (48 MiB) they lie in the way."""
    memory = SharedMemory.create(virtual_bytes)
    arena, lender, borrower = pair(memory, limit_bytes=64 * MIB)
    held = [received(arena, lender, borrower, np.ones(4 * MIB, np.uint8)) for _ in range(12)]
    held[::2] = [None] * 6  # the second half closes the gaps that the first has left
    assert arena.reclaim() == 24 * MIB
    held.clear()
    assert arena.reclaim() == 0
    assert resident_bytes(memory) == 48 * MIB
    assert received(arena, lender, borrower, np.ones(48 * MIB, np.uint8)).all()
    assert resident_bytes(memory) <= 64 * MIB


def test_blocks_of_all_sizes_never_overlap_and_all_comes_back(memory):
    arena, lender, borrower = pair(memory, limit_bytes=64 * MIB, retain_bytes=2 * MIB)
    rng = np.random.default_rng(0)
    held = {}
    for i in range(400):
        size = int(rng.choice([20_000, 100_000, MIB, 3 * MIB])) + int(rng.integers(5_000))
        held[i] = received(arena, lender, borrower, np.full(size, i % 251, np.uint8))
        if len(held) > 12:
            del held[int(rng.choice(list(held)))]
        for number, array in held.items():
            assert array[0] == array[-1] == number % 251
    for number, array in held.items():
        assert (array == number % 251).all()
    held.clear()
    del array
    assert arena.reclaim() == 0
    assert resident_bytes(memory) <= 2 * MIB


def test_a_full_arena_names_who_holds_what(memory, caplog, monkeypatch):
    monkeypatch.setattr(arena_module, "WARN_AFTER_S", 0.05)
    arena, lender, borrower = pair(memory, limit_bytes=64 * MIB, wait_s=0.2)
    other = Lender(arena, np.zeros(LEDGER_BYTES, np.uint8), "replay")
    held = received(arena, lender, borrower, np.ones(40 * MIB, np.uint8))
    shared = arena.place([bytes(20 * MIB)])
    other.lend(shared)
    other.lend(shared)
    lender.lend(shared)
    own = arena.place([bytes(MIB)])
    assert arena.holders() == {"holder": 60 * MIB, "replay": 20 * MIB, "this process": MIB}
    with caplog.at_level(logging.WARNING, "rlx.actors"), pytest.raises(ObjectMemoryFull) as caught:
        arena.place([bytes(16 * MIB)])
    text = r"no room for a message of 16.0 MiB after .* of 64.0 MiB object memory 61.0 MiB are held, by holder 60.0 MiB"
    assert caught.match(text + ", replay 20.0 MiB, this process 1.0 MiB; copy")
    assert len(caplog.records) == 1
    arena.place([bytes(3 * MIB)])  # what fits is still placed
    del held, own, shared
    other.drop()
    assert arena.reclaim() == 20 * MIB


def test_a_message_larger_than_the_limit_fails_at_once_and_one_as_large_fits(memory):
    arena, _, _ = pair(memory, limit_bytes=10_000_000)
    before = time.monotonic()
    with pytest.raises(ObjectMemoryFull, match=r"9.5 MiB object memory"):
        arena.place([bytes(10_000_001)])
    assert time.monotonic() - before < 5
    assert arena.place([bytes(9_990_000)]).spans[0][1] == 9_990_000


@pytest.mark.parametrize("advice", [shared_memory.MADV_POPULATE_WRITE, 9999], ids=["populate", "by hand"])
def test_a_full_dev_shm_is_an_error_and_not_a_bus_error(monkeypatch, advice):
    monkeypatch.setattr(shared_memory, "MADV_POPULATE_WRITE", advice)

    def run(read, say):
        libc = ctypes.CDLL(None, use_errno=True)
        namespaces = 0x00020000 | (0x10000000 if os.getuid() else 0)  # CLONE_NEWNS, CLONE_NEWUSER
        private = 1 << 18 | 1 << 14
        if libc.unshare(namespaces) or libc.mount(b"none", b"/", None, private, None):
            say(b"-")
            return
        if libc.mount(b"tmpfs", b"/dev/shm", b"tmpfs", 0, b"size=8m"):
            say(b"-")
            return
        arena = Arena(SharedMemory.create(256 * MIB, posix=True), 256 * MIB)
        with pytest.raises(ObjectMemoryFull, match=f"no room for {16 * MIB} more bytes of shared memory"):
            arena.place([bytes(16 * MIB)])
        first = arena.place([bytes(5 * MIB)])
        with pytest.raises(ObjectMemoryFull):
            arena.place([bytes(5 * MIB)])
        assert arena.reclaim() == first.capacity
        say()

    pid, _, answer = fork(run)
    if os.read(answer, 1) == b"-":
        reap(pid)
        pytest.skip("this system lets nobody mount a small /dev/shm")
    assert reap(pid) == 0


@pytest.mark.parametrize("advice", [shared_memory.MADV_POPULATE_WRITE, 9999], ids=["populate", "by hand"])
def test_a_fresh_block_gets_all_its_pages_before_the_copy(memory, monkeypatch, advice):
    monkeypatch.setattr(shared_memory, "MADV_POPULATE_WRITE", advice)
    arena, _, _ = pair(memory)
    assert resident_bytes(memory) == 0
    block = arena.place([bytes(65 * MIB)])
    assert resident_bytes(memory) == block.capacity == 72 * MIB


def test_place_goes_on_when_another_process_lets_go(memory):
    arena, ledger_memory = Arena(memory, 64 * MIB, wait_s=T), SharedMemory.create(LEDGER_BYTES)
    ledger = ledger_memory.map(writable=True)
    lender = Lender(arena, ledger, "reader")
    block = arena.place([bytes([5]) * (60 * MIB)])
    lease, spans = lender.lend(block), block.spans
    del block

    def run(read, say):
        [view] = Borrower(memory.map(), ledger).borrow(lease, spans)
        array = np.frombuffer(view, np.uint8)
        say()
        read()
        assert array[0] == array[-1] == 5
        del array, view
        read()  # still there, but without the block

    pid, order, answer = fork(run)
    os.read(answer, 1)
    assert arena.holders() == {"reader": 60 * MIB}
    placed = []
    thread = threading.Thread(target=lambda: placed.append(arena.place([bytes(30 * MIB)])))
    thread.start()
    thread.join(0.1)
    assert not placed
    os.write(order, b".")
    thread.join(T)
    assert placed
    assert arena.holders() == {"this process": 30 * MIB}
    os.write(order, b".")
    assert reap(pid) == 0


def test_what_a_killed_process_had_comes_back_when_its_link_is_dropped(memory):
    arena, ledger_memory = Arena(memory, 64 * MIB), SharedMemory.create(LEDGER_BYTES)
    ledger = ledger_memory.map(writable=True)
    lender = Lender(arena, ledger, "reader")
    block = arena.place([bytes(8 * MIB)])
    lease, spans = lender.lend(block), block.spans
    del block

    def run(read, say):
        views = Borrower(memory.map(), ledger).borrow(lease, spans)
        say()
        read()
        del views

    pid, _, answer = fork(run)
    os.read(answer, 1)
    os.kill(pid, signal.SIGKILL)
    assert reap(pid) == -signal.SIGKILL
    assert arena.reclaim() == 8 * MIB
    lender.drop()
    lender.drop()
    assert arena.reclaim() == 0
    assert lender.lend(arena.place([b"x"])) is None


def test_a_view_outlives_the_process_that_owns_the_memory(memory):
    ledger = SharedMemory.create(LEDGER_BYTES).map(writable=True)

    def run(read, say):
        arena = Arena(memory, 64 * MIB)
        block = arena.place([bytes([9]) * MIB])
        assert Lender(arena, ledger, "reader").lend(block) == 0
        assert block.spans == [(0, MIB)]
        say()

    pid, _, answer = fork(run)
    os.read(answer, 1)
    [view] = Borrower(memory.map(), ledger).borrow(0, [(0, MIB)])
    assert reap(pid) == 0
    memory.close()
    assert bytes(view) == bytes([9]) * MIB


def test_a_fork_neither_places_nor_gives_back(memory):
    arena, lender, borrower = pair(memory)
    shared = SharedMemory.create(LEDGER_BYTES).map(writable=True)
    lender, borrower = Lender(arena, shared, "holder"), Borrower(memory.map(), shared)
    held = [received(arena, lender, borrower, np.ones(MIB, np.uint8))]
    block = arena.place([b"mine"])

    def run(read, say):
        assert held[0].all()
        held.clear()
        gc.collect()
        for forbidden in (lambda: arena.place([b"x"]), arena.reclaim, arena.holders, lambda: lender.lend(block)):
            with pytest.raises(ActorError, match="is a fork"):
                forbidden()

    assert reap(fork(run)[0]) == 0
    assert arena.reclaim() == MIB + block.capacity
    assert held[0].all()


def test_corrupt_frames_are_refused(memory):
    arena, lender, borrower = pair(memory)
    block = arena.place([bytes(20_000)])
    lease = lender.lend(block)
    size = memory.size
    for spans in ([(-1, 5)], [(0, -1)], [(0, size + 1)], [(size, 1)], [(1 << 63, 1)], [(0, 1), (0, 1 << 64)]):
        with pytest.raises(ActorError, match="close the link"):
            borrower.borrow(lease, spans)
    for wrong in (-1, lease + 1, LEASES, 1 << 40):
        with pytest.raises(ActorError, match=f"lease {wrong}, which is not lent"):
            borrower.borrow(wrong, block.spans)
    views = borrower.borrow(lease, block.spans)
    with pytest.raises(ActorError, match="not lent"):
        borrower.borrow(lease, block.spans)
    assert bytes(views[0]) == bytes(20_000)


def test_when_all_leases_are_out_the_caller_is_told_and_they_come_back(memory):
    arena, lender, borrower = pair(memory)
    block = arena.place([bytes(100)])
    leases = [lender.lend(block) for _ in range(LEASES)]
    assert leases == list(range(LEASES))
    assert lender.lend(block) is None
    views = [borrower.borrow(lease, block.spans) for lease in leases]
    assert lender.lend(block) is None
    del views[17]
    assert lender.lend(block) == 17
    lender.take_back(17)
    lender.take_back(17)
    lender.take_back(LEASES)
    assert lender.lend(block) == 17
    views.clear()
    assert lender.lend(block) in range(LEASES)


def test_a_frame_never_sent_gives_its_block_back(memory):
    arena, lender, _ = pair(memory)
    lease = lender.lend(arena.place([bytes(MIB)]))
    assert arena.reclaim() == MIB
    lender.take_back(lease)
    assert arena.reclaim() == 0


def test_the_owners_own_views_keep_the_block_and_are_lent_without_a_copy(memory):
    arena, lender, borrower = pair(memory)
    first, second = (arena.place([bytes([i]) * 20_000, bytes([i + 1]) * 30_000]) for i in (1, 5))
    assert arena.find(bytes(100)) is None
    arrays = [
        np.frombuffer(block.view()[start - block.offset :][:size], np.uint8)
        for block in (second, first)
        for start, size in block.spans
    ]
    assert [array[0] for array in arrays] == [5, 6, 1, 2]
    with pytest.raises(ValueError, match="read-only"):
        arrays[0][0] = 1
    del first
    _, [buffer] = pickling.dumps(torch.frombuffer(arrays[3][100:20_100], dtype=torch.uint8), "tensor")
    block, span = arena.find(buffer)
    assert span == (block.spans[1][0] + 100, 20_000)
    [view] = borrower.borrow(lender.lend(block), [span])
    assert bytes(view) == bytes([2]) * 20_000
    assert arena.find(memoryview(arrays[0])) == (second, second.spans[0])
    assert arena.find(bytes(100)) is None
    del arrays, block, second, buffer
    assert arena.reclaim() == capacity_for(50_048)  # lent
    del view
    assert arena.reclaim() == 0
    assert arena._viewed == {} and arena._viewed_offsets == []


def test_what_is_received_into_an_arena_is_shown_where_nobody_can_write(memory):
    arena, _, _ = pair(memory)
    [(hole, view), (empty, nothing)] = arena.room([20_000, 0])
    hole[:], block = bytes([7]) * 20_000, arena.place([bytes(20_000)])
    assert view.readonly and set(view) == {7} and len(empty) == 0
    for shown in (view, block.view()):
        address = torch.frombuffer(shown, dtype=torch.uint8).data_ptr()  # torch would write where it can
        lines = [line.split()[:2] for line in Path("/proc/self/maps").read_text().splitlines()]
        [access] = [one for span, one in lines if address in range(*(int(end, 16) for end in span.split("-")))]
        assert access == "r--s"
    assert arena.find(view[100:])[1] == (100, 19_900) and arena.find(hole) is None
    del view, shown, nothing
    assert arena.reclaim() == block.capacity


@pytest.mark.parametrize("module, line", [("bisect", "insort"), ("weakref", "ref")])
def test_an_interrupt_while_a_view_is_noted_does_no_harm(memory, monkeypatch, module, line):
    arena, _, _ = pair(memory)
    block, interrupt = arena.place([bytes(20_000)]), unittest.mock.Mock(side_effect=KeyboardInterrupt)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(getattr(arena_module, module), line, interrupt)
        block.view()
    view = block.view()
    assert arena.find(view) == (block, block.spans[0])
    del view, block
    assert arena.reclaim() == 0
    assert arena._viewed == {} and arena._viewed_offsets == []


def test_many_threads_place_lend_and_let_go(memory):
    arena, lender, borrower = pair(memory, limit_bytes=16 * MIB, wait_s=T)
    wrong = []

    def work(number):
        for i in range(150):
            size = 20_000 + 50_000 * ((number + i) % 5)
            array = received(arena, lender, borrower, np.full(size, (number * 31 + i) % 251, np.uint8))
            if not (array == (number * 31 + i) % 251).all():
                wrong.append((number, i))

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(T)
    assert not wrong
    assert arena.reclaim() == 0
    assert not lender.lent


def test_an_interrupt_while_waiting_changes_nothing(memory):
    arena, lender, borrower = pair(memory, limit_bytes=8 * MIB, wait_s=T)
    held = received(arena, lender, borrower, np.ones(6 * MIB, np.uint8))
    timer = threading.Timer(0.05, lambda: signal.raise_signal(signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        arena.place([bytes(4 * MIB)])
    timer.join()
    assert arena.reclaim() == 6 * MIB
    assert held.all()
    del held
    assert arena.place([bytes(8 * MIB)]).capacity == 8 * MIB


def test_blocks_and_offsets_beyond_four_gigabytes():
    memory = SharedMemory.create(24 << 30)
    arena = Arena(memory, 24 << 30)
    far = arena._take(5 << 30)  # never populated: no memory is used
    assert far is not None and far.capacity == 5 << 30
    ledger = np.zeros(LEDGER_BYTES, np.uint8)
    block = arena.place([bytes([3]) * 20_000])
    assert block.spans == [(5 << 30, 20_000)]
    [view] = Borrower(memory.map(), ledger).borrow(Lender(arena, ledger, "holder").lend(block), block.spans)
    assert bytes(view) == bytes([3]) * 20_000


@pytest.mark.slow
def test_a_message_of_more_than_four_gigabytes_arrives():
    memory = SharedMemory.create(12 << 30)
    arena, lender, borrower = pair(memory, limit_bytes=6 << 30)
    sent = np.zeros((4 << 30) + 5, np.uint8)
    sent[[0, 1 << 32, -1]] = 1, 2, 3
    array = received(arena, lender, borrower, sent)
    assert len(array) == (4 << 30) + 5
    assert (array[0], array[1 << 32], array[-1]) == (1, 2, 3)
    del array
    assert arena.reclaim() == 0
    assert resident_bytes(memory) == 0


def test_the_two_directions_of_a_link():
    """The driver's memory and the link's, mapped by two processes the way the engine does."""
    driver, link = driver_memory(32 * MIB), link_memory(32 * MIB)

    def run(read, say):
        arena, lender, borrower = actor_ends(SharedMemory(os.dup(link.fd)), SharedMemory(driver.reader_fd()), 32 * MIB)
        read()
        [view] = borrower.borrow(0, [(0, MIB)])
        block = arena.place([bytes(byte + 1 for byte in view[:50_000])])
        assert lender.lend(block) == 0
        assert block.spans == [(0, 50_000)]
        del view, block
        say()
        read()
        until(lambda: arena.reclaim() == 0)

    pid, order, answer = fork(run)
    arena = Arena(driver, 32 * MIB)
    lender, borrower = driver_ends(arena, link, "actor/0")
    assert lender.lend(arena.place([bytes([6]) * MIB])) == 0
    os.write(order, b".")
    os.read(answer, 1)
    [view] = borrower.borrow(0, [(0, 50_000)])
    assert bytes(view) == bytes([7]) * 50_000
    assert arena.reclaim() == 0
    del view
    os.write(order, b".")
    assert reap(pid) == 0
