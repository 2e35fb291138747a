"""Channels between real processes: the newest version, complete, in place."""

import gc
import os
import pickle
import select
import signal
import sys
import time
import traceback
import zlib

import numpy as np
import pytest
import torch

from rlx.actors import channel as channel_module
from rlx.actors.channel import Channel, InlineChannel, Staleness
from rlx.actors.engines import pickling
from rlx.actors.engines import publisher as publisher_module
from rlx.actors.engines.arena import capacity_for
from rlx.actors.engines.channel_memory import CELLS
from rlx.actors.engines.shared_memory import SharedMemory
from rlx.errors import ActorError, ObjectMemoryFull

pytestmark = [pytest.mark.timeout(60), pytest.mark.filterwarnings("ignore:The given .* is not writable")]
MIB = 1 << 20
T = 20.0  # a deadline, not a delay


class Process:
    """A fork that runs `run(process)`; both sides can `say` a byte and `hear` one."""

    def __init__(self, run):
        to_child, from_parent = os.pipe()
        to_parent, from_child = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            code = 1
            try:
                os.close(from_parent)  # a parent that dies is heard as the end of the pipe
                os.close(to_parent)
                self._in, self._out = to_child, from_child
                run(self)
                code = 0
            except BaseException:
                traceback.print_exc(file=sys.__stderr__)
            finally:
                os._exit(code)
        os.close(to_child)
        os.close(from_child)
        self._in, self._out = to_parent, from_parent

    def say(self):
        os.write(self._out, b".")

    def hear(self):
        assert os.read(self._in, 1) == b".", "the other side has ended"

    def heard(self):
        return bool(select.select([self._in], [], [], 0)[0])

    def end(self):
        os.close(self._out)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def kill(self):
        os.kill(self.pid, signal.SIGKILL)
        assert self.end() == -signal.SIGKILL


def attach(channel, row=None):
    return Channel.attach(channel.name, os.dup(channel.fd), row)


def resident_bytes(channel):
    return os.fstat(channel.fd).st_blocks * 512


def arrays(version, count=4, size=20_000):
    """Return a value that shows by itself whether it is complete."""
    parts = [np.full(size, (version * 7 + i) % 251, np.uint8) for i in range(count)]
    return {"version": version, "parts": parts, "checksum": _checksum(parts)}


def _checksum(parts):
    checksum = 0
    for part in parts:
        checksum = zlib.crc32(part, checksum)
    return checksum


def check(published):
    value = published.value
    assert value["version"] == published.version
    assert value["parts"][0][0] == published.version * 7 % 251
    assert _checksum(value["parts"]) == value["checksum"]


def test_the_newest_version_wins_and_stays_the_same_object():
    channel = Channel.create("weights", 16 * MIB)
    assert channel.latest() is None
    assert channel.publish(arrays(1)) == 1
    assert channel.publish(arrays(2)) == 2
    second = channel.latest()
    check(second)
    assert channel.latest() is second
    assert channel.publish(arrays(70), version=70) == 70
    assert channel.publish(arrays(71)) == 71
    third = channel.latest()
    assert third is not second
    assert third.version == 71
    check(second)
    check(third)
    assert channel.publish({"a": 1}, version=5) == 5  # it is the order of publishing that counts
    assert channel.latest().value == {"a": 1}
    for wrong in (-1, 1 << 63):
        with pytest.raises(ValueError, match=f"version {wrong} is not within"):
            channel.publish(1, version=wrong)
    assert channel.latest().version == 5


def test_age_counts_from_the_publication():
    channel = Channel.create("weights", MIB)
    before = time.monotonic()
    channel.publish(1)
    after = time.monotonic()
    published = channel.latest()
    assert before <= published.published_at <= after
    assert 0 <= published.age_s() <= time.monotonic() - before


def test_arrays_are_read_only_views_and_tensors_arrive():
    channel = Channel.create("weights", 16 * MIB)
    channel.publish({"w": np.ones(50_000), "b": torch.arange(10_000), "small": np.arange(3)})
    value = channel.latest().value
    with pytest.raises(ValueError, match="read-only"):
        value["w"][0] = 2
    assert value["w"].sum() == 50_000
    assert value["b"].sum() == 49_995_000
    assert value["small"].tolist() == [0, 1, 2]


def test_what_cannot_be_pickled_is_named_and_changes_nothing():
    channel = Channel.create("weights", MIB)
    channel.publish("first")
    with pytest.raises(TypeError, match=r"the value of channel 'weights'\['lock'\] is a _thread.lock"):
        channel.publish({"lock": channel._reading})
    assert channel.latest().value == "first"


def test_a_version_stays_while_anything_of_it_lives_and_two_blocks_are_enough_else():
    channel = Channel.create("weights", 64 * MIB)
    for version in range(1, 30):
        channel.publish(np.full(MIB, version, np.uint8))
        assert channel.latest().value[0] == version
    two = resident_bytes(channel)
    assert two < 3 * MIB
    kept = channel.latest().value[5:10]
    derived = [torch.from_numpy(kept)[1:], np.frombuffer(memoryview(kept), np.uint8)]
    del kept
    for version in range(30, 130):
        channel.publish(np.full(MIB, version, np.uint8))
    assert derived[0].tolist() == [29] * 4
    assert derived[1].tolist() == [29] * 5
    assert resident_bytes(channel) < two + 1.2 * MIB
    derived.clear()
    gc.collect()
    assert not any(channel._memory.cells().flatten())


def test_a_reader_that_keeps_more_versions_than_it_has_cells_gets_copies():
    channel = Channel.create("weights", 64 * MIB)
    held = []
    for version in range(1, CELLS + 5):
        channel.publish(arrays(version))
        held.append(channel.latest())
    assert np.count_nonzero(channel._memory.cells()) == CELLS - 1
    for version in range(CELLS + 5, 60):
        channel.publish(arrays(version))
    for published in held:
        check(published)
    with pytest.raises(ValueError, match="read-only"):
        held[-1].value["parts"][0][0] = 1
    held.clear()
    assert not np.count_nonzero(channel._memory.cells())


def test_a_version_that_moves_on_between_claim_and_look_is_not_read(monkeypatch):
    """The publisher runs at the worst moment: the reader has read where the newest is, and has not yet claimed it."""
    channel = Channel.create("weights", 16 * MIB)
    channel.publish(arrays(1))
    versions = iter(range(2, 8))
    real = channel_module.fence

    def publish_between():
        for version in [next(versions, None) for _ in range(3)]:
            if version is not None:
                channel.publish(arrays(version))
        real()

    monkeypatch.setattr(channel_module, "fence", publish_between)
    published = channel.latest()
    check(published)
    assert published.version == 7
    del published
    assert not np.count_nonzero(channel._memory.cells())


def test_a_reader_without_a_version_does_not_wait_and_without_a_row_is_told():
    channel = Channel.create("weights", MIB)
    with pytest.raises(ActorError, match="attached to publish only"):
        attach(channel).latest()
    with pytest.raises(ActorError, match="only the process that created"):
        attach(channel).add_reader("x")
    with pytest.raises(ValueError, match="needs a name"):
        channel.add_reader("")
    assert attach(channel, channel.add_reader("x")).latest() is None


def test_rows_are_given_out_once_and_used_again():
    channel = Channel.create("weights", MIB, max_readers=3)
    assert [channel.add_reader(name) for name in ("a", "b", "ü" * 200)] == [0, 1, 2]
    with pytest.raises(ActorError, match="has 3 readers, its maximum"):
        channel.add_reader("d")
    channel.remove_reader(1)
    assert channel.add_reader("d") == 1
    assert list(channel.readers()) == ["a", "d", "ü" * 80]


def test_memory_that_holds_no_channel_is_refused():
    zeros = SharedMemory.create(MIB)
    with pytest.raises(ActorError, match="holds no channel"):
        Channel.attach("weights", os.dup(zeros.fd))


def test_a_corrupt_entry_is_an_error():
    channel = Channel.create("weights", MIB)
    channel.publish(arrays(1))
    data = channel._publisher._arena.data
    data[24] ^= 1
    with pytest.raises(ActorError, match="'weights' has no version at byte 0"):
        channel.latest()
    data[24] ^= 1
    check(channel.latest())


def test_staleness_by_hand():
    channel = Channel.create("weights", MIB)
    fast, slow = (attach(channel, channel.add_reader(name)) for name in ("fast", "slow"))
    assert channel.readers() == {"fast": Staleness(None, 0, None), "slow": Staleness(None, 0, None)}
    channel.publish("a", version=10)
    before = time.monotonic()
    assert slow.latest().version == 10
    for version in (20, 30, 40):
        channel.publish("a", version=version)
    assert fast.latest().version == 40
    readers = channel.readers()
    assert (readers["fast"].version, readers["fast"].versions_behind) == (40, 0)
    assert (readers["slow"].version, readers["slow"].versions_behind) == (10, 3)
    assert 0 <= readers["fast"].seconds <= readers["slow"].seconds <= time.monotonic() - before
    channel.add_reader("new")
    assert channel.readers()["new"] == Staleness(None, 4, None)


@pytest.mark.parametrize("size", [1_000, 300_000])
def test_readers_see_only_complete_versions_and_never_go_back(size):
    """A publisher at full speed in one process, four readers in others; they keep some versions for a while."""
    channel = Channel.create("weights", 64 * MIB)
    rows = [channel.add_reader(f"reader/{i}") for i in range(4)]

    def read(process, row):
        mine, held, last, seen = attach(channel, row), [], 0, 0
        end = time.monotonic() + 1.0
        while time.monotonic() < end or seen < 20 or last <= 100:
            published = mine.latest()
            if published is None:
                continue
            check(published)
            assert published.version >= last
            seen += published.version > last
            last = published.version
            held.append(published)
            if len(held) > 3:
                old = held.pop(0)
                check(old)
        process.say()
        process.hear()

    def publish(process):
        mine, version = attach(channel), 0
        while not process.heard():
            version = mine.publish(arrays(version + 1, size=size))
        assert version > 100
        assert mine._publisher._arena.holders()["this process"] < 3 * 4 * size * 1.2 + 100_000

    readers = [Process(lambda process, row=row: read(process, row)) for row in rows]
    publisher = Process(publish)
    for reader in readers:
        reader.hear()
    # Each of them can keep 7 versions, and holds no more than 4; two more are the publisher's.
    assert resident_bytes(channel) < (4 * 5 + 2) * 4 * size * 1.2 + 30 * 8192 + MIB
    for reader in readers:
        reader.say()
        assert reader.end() == 0
    publisher.say()
    assert publisher.end() == 0


def test_a_reader_killed_while_it_holds_gives_its_memory_back_when_removed():
    channel = Channel.create("weights", 20 * MIB)
    row = channel.add_reader("reader")
    channel.publish(np.full(5 * MIB, 1, np.uint8))

    def read(process):
        kept = []
        mine = attach(channel, row)
        for _ in range(2):
            kept.append(mine.latest())
            process.say()
            process.hear()

    reader = Process(read)
    reader.hear()
    channel.publish(np.full(5 * MIB, 2, np.uint8))
    reader.say()
    reader.hear()
    channel.publish(np.full(5 * MIB, 3, np.uint8))
    message = pickling.dumps(np.full(5 * MIB, 4, np.uint8), "the value")
    with pytest.raises(ObjectMemoryFull, match=r"held, by reader 11.0 MiB, this process 5.5 MiB") as caught:
        channel.publish_message(message, wait_s=0.1)
    assert "while publishing version 4 on channel 'weights'" in caught.value.__notes__[0]
    reader.kill()
    channel.remove_reader(row)
    assert channel.publish(np.full(5 * MIB, 6, np.uint8)) == 4
    assert channel.latest().value.min() == 6


def test_the_publisher_waits_for_a_reader_to_let_go():
    channel = Channel.create("weights", 12 * MIB)
    row = channel.add_reader("reader")
    channel.publish(bytes(10))
    channel.publish(np.full(5 * MIB, 1, np.uint8))

    def read(process):
        kept = attach(channel, row).latest()
        process.say()
        process.hear()
        del kept
        process.hear()

    reader = Process(read)
    reader.hear()
    channel.publish(np.full(5 * MIB, 2, np.uint8))
    assert channel._publisher._arena.holders()["reader"] > 5 * MIB
    reader.say()
    channel.publish(np.full(5 * MIB, 3, np.uint8))  # waits until it has
    assert channel.latest().value.max() == 3
    reader.say()
    assert reader.end() == 0


def test_old_views_of_a_slow_reader_stay_intact_while_a_hundred_versions_pass():
    channel = Channel.create("weights", 64 * MIB)
    row = channel.add_reader("slow")
    channel.publish(arrays(1))

    def read(process):
        first = attach(channel, row).latest()
        process.say()
        process.hear()
        check(first)
        assert first.version == 1

    reader = Process(read)
    reader.hear()
    channel.publish(arrays(2))  # the second block, and the pages of all rows
    before = resident_bytes(channel)
    for version in range(3, 102):
        channel.publish(arrays(version))
    assert resident_bytes(channel) == before + capacity_for(80_500)
    assert channel.readers()["slow"].versions_behind == 100
    reader.say()
    assert reader.end() == 0


def test_one_publisher_at_a_time_and_a_successor_of_one_that_died():
    channel = Channel.create("weights", 32 * MIB)
    row = channel.add_reader("reader")

    def publish(process):
        mine = attach(channel)
        mine.publish(arrays(40), version=40)
        process.say()
        process.hear()
        mine.publish(arrays(41))
        process.say()
        process.hear()

    publisher = Process(publish)
    publisher.hear()
    for other in (channel, attach(channel)):
        with pytest.raises(ActorError, match=f"'weights' is published by process {publisher.pid}; a channel has one"):
            other.publish(1)
    mine = attach(channel, row)
    kept = [mine.latest()]
    publisher.say()
    publisher.hear()
    kept.append(mine.latest())
    publisher.kill()
    check(mine.latest())
    assert channel.publish(arrays(42)) == 42
    with pytest.raises(ActorError, match=f"published by process {os.getpid()}"):
        attach(channel).publish(1)
    for version in range(43, 100):
        channel.publish(arrays(version))
    for published in kept:
        check(published)
    assert [published.version for published in kept] == [40, 41]
    assert mine.latest().version == 99
    del published
    kept.clear()
    assert channel._publisher._arena.reclaim() == capacity_for(80_500)
    assert channel.readers()["reader"].versions_behind == 0


def test_a_publisher_taken_for_dead_is_told():
    channel = Channel.create("weights", 32 * MIB)
    first, second = attach(channel), attach(channel)
    first.publish(1)
    channel.remove_publisher()
    with pytest.raises(ActorError, match="taken this publisher for dead"):
        first.publish(2)
    publisher_module._alive.pop(first._publisher._identity)
    assert second.publish(2) == 2
    with pytest.raises(ActorError, match="is published by process"):
        first.publish(3)


def test_a_fork_neither_reads_nor_publishes_and_lets_go_of_nothing():
    channel = Channel.create("weights", 32 * MIB)
    channel.publish(arrays(1))
    held = [channel.latest()]

    def run(process):
        check(held[0])
        held.clear()
        with pytest.raises(ActorError, match="a fork of it cannot read"):
            channel.latest()
        with pytest.raises(ActorError, match="is a fork"):
            channel.publish(1)

    assert Process(run).end() == 0
    assert np.count_nonzero(channel._memory.cells()) == 1


def test_an_interrupt_during_publish_leaves_the_channel_whole():
    """Ctrl-C at each line of publish in turn: what readers hold and what is newest stays, and publishing goes on."""
    channel = Channel.create("weights", 32 * MIB)
    channel.publish(arrays(1))
    code = channel._publisher.publish.__func__.__code__
    version, interrupted = 1, 0
    for line in sorted({line for _, _, line in code.co_lines() if line}):
        held = channel.latest()

        def interrupt(frame, event, _, line=line):
            if frame.f_code is not code:
                return None
            if event == "line" and frame.f_lineno == line:
                sys.settrace(None)
                raise KeyboardInterrupt
            return interrupt

        sys.settrace(interrupt)
        try:
            version = channel.publish(arrays(version + 1), version + 1)
        except KeyboardInterrupt:
            interrupted += 1
        finally:
            sys.settrace(None)
        after = channel.latest()
        version = after.version
        for _ in range(5):
            version = channel.publish(arrays(version + 1), version + 1)
            check(channel.latest())
            check(held)
            check(after)
    assert interrupted > 15
    del held, after
    assert channel._publisher._arena.reclaim() == capacity_for(80_500)


@pytest.mark.parametrize("strict", [False, True])
def test_the_inline_channel_is_the_same_without_memory(strict):
    channel = InlineChannel("weights", strict)
    assert channel.latest() is None
    assert channel.readers() == {"this process": Staleness(None, 0, None)}
    value = arrays(1)
    assert channel.publish(value) == 1
    first = channel.latest()
    check(first)
    assert channel.latest() is first
    assert (first.value is value) is not strict
    assert channel.publish(2, version=9) == 9
    assert channel.publish(3) == 10
    stale = channel.readers()["this process"]
    assert (stale.version, stale.versions_behind) == (1, 2)
    assert channel.latest().value == 3
    assert channel.readers()["this process"].versions_behind == 0
    with pytest.raises(ValueError, match="version -1"):
        channel.publish(1, version=-1)
    if strict:
        with pytest.raises(ValueError, match="read-only"):
            first.value["parts"][0][0] = 1
        with pytest.raises(TypeError, match="the value of channel 'weights'"):
            channel.publish(number for number in ())


def test_published_values_survive_the_channel():
    channel = Channel.create("weights", MIB)
    channel.publish(arrays(1))
    published = channel.latest()
    channel.close()
    del channel
    gc.collect()
    check(published)
    assert pickle.loads(pickle.dumps(published)).version == 1
