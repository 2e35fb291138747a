"""Ctrl-C and SIGTERM during a run: the first ends it after the iteration, the second at once."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from queue import SimpleQueue
from typing import Any

log = logging.getLogger("rlx")

ANSWERS = {
    signal.SIGINT: "stopping after this iteration; press Ctrl-C again to stop at once",
    signal.SIGTERM: "SIGTERM: stopping after this iteration, with a checkpoint; a second one stops at once",
}


@contextmanager
def deferred_interrupt() -> Iterator[Callable[[], bool]]:
    """Yield a function that says whether Ctrl-C or a SIGTERM has come; the second one interrupts at once.

    SIGTERM is how job schedulers announce that they will kill. Signals reach only the main thread; elsewhere they
    stay as they are.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    pressed = False
    # A handler runs between two steps of whatever the main thread does, and that may be writing a line of a log: a
    # second line from within it would fail as a reentrant call. So a thread of its own writes, when it is its turn,
    # and the handler does no more than `SimpleQueue.put`, which may interrupt itself.
    answers: SimpleQueue[str | None] = SimpleQueue()
    writer = threading.Thread(target=_write, args=(answers,), name="rlx-interrupts", daemon=True)

    def on_interrupt(signum: int, frame: Any) -> None:
        nonlocal pressed
        if pressed:
            raise KeyboardInterrupt
        pressed = True
        answers.put(ANSWERS[signal.Signals(signum)])

    writer.start()
    previous = {number: signal.signal(number, on_interrupt) for number in ANSWERS}
    try:
        yield lambda: pressed
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        answers.put(None)
        writer.join(timeout=5)  # a full pipe behind stderr holds the line up, not the end of the run


def _write(answers: SimpleQueue[str | None]) -> None:
    while (answer := answers.get()) is not None:
        log.warning("%s", answer)
