"""Where callbacks run, and who is told when an actor exits or a one-way call fails."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable
from typing import Any

logger = logging.getLogger("rlx.actors")


class EventThread:
    """Runs posted functions one after another in its own thread, so that a slow one never holds up replies."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[tuple[Callable[..., None], tuple[Any, ...]] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._closed = False

    def post(self, function: Callable[..., None], *args: Any) -> None:
        """Run `function(*args)` soon; what it raises is logged. Nothing runs after `close`."""
        with self._lock:
            if self._closed:
                return
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="rlx-actor-events", daemon=True)
                self._thread.start()
        self._queue.put((function, args))

    def close(self, timeout_s: float) -> None:
        """Finish what was posted and end the thread."""
        with self._lock:
            self._closed, thread = True, self._thread
        self._queue.put(None)
        if thread is not None and thread is not threading.current_thread():
            thread.join(timeout_s)
            if thread.is_alive():
                logger.warning("a monitor callback is still running %g s after close(); it is left behind.", timeout_s)

    def _run(self) -> None:
        while (event := self._queue.get()) is not None:
            function, args = event
            try:
                function(*args)
            except Exception:
                logger.exception("a callback of the actor runtime failed: %r", function)
