"""Large copies by two threads: one core alone does not use what the memory can move.

The caller and a helper thread take pieces from one list until none is left, so that a helper which gets no core delays
the caller by the one piece that it holds, at most.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections import deque
from collections.abc import Sequence
from queue import SimpleQueue

import numpy as np

from rlx.actors import machine
from rlx.actors.engines.pickling import Buffer

ALONE_BYTES = 4 << 20  # less is copied before another thread has woken up
PIECE_BYTES = 1 << 20
CROWDED_S = 0.002  # ten times a piece's copy: other threads run Python code, and every piece waits for its turn
LOOK_S = 1.0  # an interrupt may have come before the helper's start


class Copier:
    """Copies for one owner, with a helper thread from the first large copy on; it ends with this object."""

    def __init__(self) -> None:
        self._asked: SimpleQueue[_Copy | None] = SimpleQueue()
        self._lock = threading.Lock()
        self._helper: threading.Thread | None = None
        self._end = weakref.finalize(self, self._asked.put, None)
        self._end.atexit = False

    def copy(self, data: np.ndarray, copies: Sequence[tuple[int, Buffer]], owner: object) -> None:
        """Copy each flat buffer to its offset in `data`, uint8 [n]; `owner` of that place is kept until the end."""
        if sum(len(buffer) for _, buffer in copies) < ALONE_BYTES:
            view = data.data
            for start, buffer in copies:
                view[start : start + len(buffer)] = buffer
            return
        work = _Copy(data, copies, owner)
        helper = self._ask_for_help(work)
        work.go_on()
        while helper is not None and not work.is_left_alone.wait(LOOK_S) and helper.is_alive():
            pass

    def close(self) -> None:
        """End the helper; closing twice is fine."""
        with self._lock:
            self._end()

    def _ask_for_help(self, work: _Copy) -> threading.Thread | None:
        """Return who helps, if anybody."""
        with self._lock:  # what is asked for before the end is answered
            if self._helper is None and self._end.alive and machine.cpu_count() > 1:
                self._helper = threading.Thread(target=_help, args=(self._asked,), name="rlx-copy", daemon=True)
                self._helper.start()
            if self._helper is None or not self._end.alive:
                return None
            self._asked.put(work)
            return self._helper


def _help(asked: SimpleQueue[_Copy | None]) -> None:
    while (work := asked.get()) is not None:
        work.go_on()
        work.is_left_alone.set()
        del work  # it keeps memory


class _Copy:
    """What two threads copy together."""

    def __init__(self, data: np.ndarray, copies: Sequence[tuple[int, Buffer]], owner: object) -> None:
        self._pieces: deque[tuple[np.ndarray, np.ndarray]] = deque()
        for start, buffer in copies:
            source, target = np.frombuffer(buffer, np.uint8), data[start : start + len(buffer)]
            for at in range(0, len(source), PIECE_BYTES):
                self._pieces.append((target[at : at + PIECE_BYTES], source[at : at + PIECE_BYTES]))
        self._owner = owner  # an interrupted caller lets go of it while the helper still writes
        self.is_left_alone = threading.Event()
        """Set once the helper has no piece and will take none."""

    def go_on(self) -> None:
        """Copy pieces until none is left."""
        copy = np.copyto  # lets other threads run meanwhile
        while self._pieces:
            try:
                target, source = self._pieces.popleft()
            except IndexError:  # the other thread was faster
                return
            began = time.monotonic()
            copy(target, source)
            if time.monotonic() - began > CROWDED_S:
                copy = _copy_unshared


def _copy_unshared(target: np.ndarray, source: np.ndarray) -> None:
    target.data[:] = source.data
