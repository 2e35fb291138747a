"""A deadline for calls into environments, at the price of two stores a call.

Whoever makes a call says so in `Watchdog.call`. A thread looks at it ten times per deadline and sends the main thread
a signal when it has seen one and the same call for all of it; the signal's handler raises EnvTimeout inside the call.

Why it never hits other code: a call is a tuple made for it alone, compared by identity, and the handler runs in the
main thread, between two of its bytecodes. If the call that was late is still the one in `Watchdog.call`, that thread
is between the two stores around it, within their `try`; a call that ended meanwhile is no longer there, and the
signal passes without effect, whenever it comes. The store that ends a call is the first thing of a `finally`, and
CPython looks for signals after calls, at backward jumps and at the start of functions only, so none comes in between.

What cannot be interrupted: calls in other threads (Python's handlers run in the main one), native code until it
returns to Python, and an environment that catches EnvTimeout, which gets it again after another deadline.
"""

from __future__ import annotations

import signal
import sys
import threading
import weakref
from collections.abc import Callable
from typing import Any, TypeVar

from rlx.errors import EnvError

T = TypeVar("T")

LOOKS = 10
"""How often the thread has to see the same call. Looks and not seconds: a stopped process does not age its calls."""

INTERRUPT = getattr(signal, "SIGRTMAX", signal.SIGUSR2)
"""A signal that no program is known to use; macOS has no such ones."""

Call = tuple[str, int]


class EnvTimeout(EnvError, TimeoutError):
    """An environment's step or reset took longer than its deadline."""


class Watchdog:
    """Raises EnvTimeout in calls that run for longer than `timeout_s` (None: in none)."""

    def __init__(self, timeout_s: float | None, setting: str = "fault_tolerance.env_step_timeout_s") -> None:
        """`setting`: what the deadline is set by, to be told."""
        self.timeout_s, self.setting = timeout_s, setting
        self.call: Call | None = None
        """What runs: a new tuple (name of the method, index of the environment); None while nothing does."""
        self.can_interrupt = False
        self._thread: threading.Thread | None = None

    def watch(self) -> None:
        """Watch the calls that this thread makes from now on, if they can be interrupted."""
        self.can_interrupt = threading.current_thread() is threading.main_thread()
        if not self.can_interrupt or self.timeout_s is None or self._thread is not None:
            return
        # For good: by default this signal ends the process, and a late one may still be on its way.
        signal.signal(INTERRUPT, _interrupt)
        stop = threading.Event()
        weakref.finalize(self, stop.set)
        arguments = weakref.ref(self), self.timeout_s / LOOKS, stop
        self._thread = threading.Thread(target=_look, args=arguments, name="rlx-env-watchdog", daemon=True)
        self._thread.start()

    def run(self, method: str, index: int, function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        """Return function(*args, **kwargs), watched; a hot loop does the same by itself."""
        try:
            self.call = (method, index)
            return function(*args, **kwargs)
        finally:
            self.call = None


_late: tuple[Watchdog, Call] | None = None


def _look(reference: weakref.ref[Watchdog], interval_s: float, stop: threading.Event) -> None:
    global _late
    seen: Call | None = None
    looks = 0
    while not stop.wait(interval_s) and (watchdog := reference()) is not None:
        call = watchdog.call
        looks = looks + 1 if call is seen and call is not None and watchdog.can_interrupt else 0
        seen = call
        if call is not None and looks == LOOKS:
            looks = 0
            _late = (watchdog, call)
            signal.pthread_kill(threading.main_thread().ident or 0, INTERRUPT)
        del watchdog


def _interrupt(signum: int, frame: Any) -> None:
    global _late
    late, _late = _late, None
    if late is None or sys.gettrace() is not None:  # who debugs an environment is not to be hurried
        return
    watchdog, call = late
    if watchdog.call is call:
        raise EnvTimeout(
            f"{call[0]}() of an environment took longer than {watchdog.setting}={watchdog.timeout_s:g} and was "
            "interrupted; raise that, or set it to null for no deadline."
        )
