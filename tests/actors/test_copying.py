"""Copies by two threads: every byte, whatever the sizes; a helper that ends; and no memory kept afterwards."""

import gc
import threading
import weakref

import numpy as np
import pytest

from rlx.actors.engines import copying

MIB = 1 << 20


class Owner:
    pass


def sources(sizes: list[int]) -> list[bytes]:
    rng = np.random.default_rng(0)
    return [rng.bytes(size) for size in sizes]


def copied(buffers: list[bytes], gap: int = 64) -> tuple[np.ndarray, list[tuple[int, bytes]]]:
    copies, end = [], gap
    for buffer in buffers:
        copies.append((end, buffer))
        end += len(buffer) + gap
    data = np.full(end, 0xAB, np.uint8)
    copying.Copier().copy(data, copies, Owner())
    return data, copies


@pytest.mark.parametrize(
    "sizes",
    [[], [0], [1, 0, 7], [4 * MIB - 1], [4 * MIB], [5 * MIB + 3, 1, 0, 3 * MIB - 1], [MIB // 8] * 100],
)
def test_every_byte_arrives_and_none_beside(sizes):
    data, copies = copied(sources(sizes))
    expected = np.full(len(data), 0xAB, np.uint8)
    for start, buffer in copies:
        expected[start : start + len(buffer)] = np.frombuffer(buffer, np.uint8)
    assert np.array_equal(data, expected)


def test_a_crowded_interpreter_and_a_single_core_copy_the_same(monkeypatch):
    monkeypatch.setattr(copying, "CROWDED_S", -1.0)  # from the second piece on
    buffers = sources([9 * MIB + 5])
    data, copies = copied(buffers)
    assert data[copies[0][0] : -64].tobytes() == buffers[0]
    monkeypatch.setattr(copying.machine, "cpu_count", lambda: 1.0)
    data, copies = copied(buffers)
    assert data[copies[0][0] : -64].tobytes() == buffers[0]


def helpers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "rlx-copy"]


def test_the_helper_ends_with_its_copier_and_copies_go_on_without_it():
    before = helpers()
    copier = copying.Copier()
    buffer = bytes(range(256)) * (MIB // 32)
    data = np.zeros(len(buffer), np.uint8)
    copier.copy(data, [(0, buffer)], Owner())
    (helper,) = set(helpers()) - set(before)
    copier.close()
    copier.close()
    helper.join(10)
    assert not helper.is_alive()
    data[:] = 0
    copier.copy(data, [(0, buffer)], Owner())
    assert data.tobytes() == buffer
    forgotten = copying.Copier()
    forgotten.copy(data, [(0, buffer)], Owner())
    (helper,) = set(helpers()) - set(before)
    del forgotten
    helper.join(10)
    assert not helper.is_alive()


def test_nothing_is_kept_once_all_is_written():
    copier, owner = copying.Copier(), Owner()
    gone = weakref.ref(owner)
    copier.copy(np.zeros(8 * MIB, np.uint8), [(0, bytes(8 * MIB))], owner)
    del owner
    copier.copy(np.zeros(8 * MIB, np.uint8), [(0, bytes(8 * MIB))], Owner())  # the helper has let go of the first
    gc.collect()
    assert gone() is None
