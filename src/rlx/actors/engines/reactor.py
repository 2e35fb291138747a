"""One thread that waits for many descriptors. What it calls must never block, so it always drains every link."""

from __future__ import annotations

import collections
import os
import select
import threading
import time
from collections.abc import Callable

from rlx.actors.monitor import logger

RUSH_S = 0.0005
READ, WRITE = 1, 4  # EPOLLIN and EPOLLOUT, which `select` has on Linux only


class Reactor:
    """Calls handlers: of a descriptor when it can be read or written, of a deadline when it has passed."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._epoll.register(self._wake, READ)
        self._handlers: dict[int, Callable[[int], object]] = {}
        self._deadlines: dict[object, tuple[float, Callable[[], object]]] = {}
        self._soon: set[Callable[[], object]] = set()
        self._rushing = False  # it comes round by itself
        self._posted: collections.deque[Callable[[], object]] = collections.deque()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="rlx-actor-reader", daemon=True)
        self._thread.start()

    @property
    def ident(self) -> int | None:
        """The thread's number."""
        return self._thread.ident

    def register(self, fd: int, handler: Callable[[int], object]) -> None:
        """Call `handler(events)` whenever fd can be read."""
        self._handlers[fd] = handler
        self._epoll.register(fd, READ)

    def watch(self, fd: int, events: int) -> None:
        """Change what is waited for on a registered fd."""
        self._epoll.modify(fd, events)

    def unregister(self, fd: int) -> None:
        """Forget fd. Only from the reactor's own thread, else its number may be somebody else's already."""
        self._epoll.unregister(fd)
        del self._handlers[fd]

    def post(self, handler: Callable[[], object]) -> None:
        """Call `handler()` soon. Takes no lock, so it may be called anywhere, in a finalizer too."""
        if not self._stopping:
            self._posted.append(handler)
            os.eventfd_write(self._wake, 1)

    def soon(self, handler: Callable[[], object]) -> None:
        """Call `handler()` within about RUSH_S; many of these cost one wake-up."""
        self._soon.add(handler)
        if not self._rushing:
            self._rushing = True
            os.eventfd_write(self._wake, 1)

    def set_deadline(self, key: object, in_s: float, handler: Callable[[], object]) -> None:
        """Call `handler()` after in_s seconds; a later call with the same key replaces it."""
        self._deadlines[key] = (time.monotonic() + in_s, handler)
        if threading.get_ident() != self._thread.ident:  # else it looks before it waits
            os.eventfd_write(self._wake, 1)

    def clear_deadline(self, key: object) -> None:
        """Forget the deadline."""
        self._deadlines.pop(key, None)

    def close(self, timeout_s: float) -> None:
        """End the thread and free its descriptors; closing twice is fine."""
        self._stopping = True
        if self._thread.is_alive():
            os.eventfd_write(self._wake, 1)
            self._thread.join(timeout_s)
        if self._thread.is_alive():
            logger.error("the reader thread of the actor runtime did not end within %g s", timeout_s)
            return
        self._epoll.close()
        wake, self._wake = self._wake, -1
        if wake >= 0:
            os.close(wake)

    def _run(self) -> None:
        while not self._stopping:
            for fd, events in self._epoll.poll(self._patience_s()):
                if fd == self._wake:
                    os.eventfd_read(self._wake)
                elif handler := self._handlers.get(fd):  # an earlier handler of this round may have closed it
                    _guarded(handler, events)
            self._do_posted()
            if self._rushing:
                self._hurry()
            now = time.monotonic()
            for key, (deadline, handler) in list(self._deadlines.items()):
                if deadline <= now:
                    self._deadlines.pop(key, None)
                    _guarded(handler)
        self._do_posted()  # just before the end

    def _do_posted(self) -> None:
        for _ in range(len(self._posted)):
            _guarded(self._posted.popleft())

    def _hurry(self) -> None:
        """Do what is wanted soon; when nothing was, fall asleep again."""
        if not self._soon:
            self._rushing = False
        soon, self._soon = self._soon, set()  # after the line above: who comes in between wakes us, or is in here
        for handler in soon:
            _guarded(handler)

    def _patience_s(self) -> float | None:
        if self._rushing:
            return RUSH_S
        if not self._deadlines:
            return None
        nearest = min(deadline for deadline, _ in list(self._deadlines.values()))
        return max(0.0, nearest - time.monotonic())


def _guarded(handler: Callable[..., object], *args: int) -> None:
    """A bug in one link's handler must not silence the others."""
    try:
        handler(*args)
    except Exception:
        logger.exception("a handler of the actor runtime's reader thread failed")
