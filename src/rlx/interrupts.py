"""Ctrl-C and SIGTERM during a run: the first ends it after the iteration, the second at once."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
    pressed = threading.Event()

    def on_interrupt(signum: int, frame: Any) -> None:
        if pressed.is_set():
            raise KeyboardInterrupt
        pressed.set()
        log.warning("%s", ANSWERS[signal.Signals(signum)])

    previous = {number: signal.signal(number, on_interrupt) for number in ANSWERS}
    try:
        yield pressed.is_set
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
