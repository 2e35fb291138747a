"""Calls into functions of a user that must not hold up a run: after the deadline they are left behind.

The function runs in a thread of its own, made for this one call. When the deadline passes the caller goes on at once,
and `_LeftBehind` is raised in the thread, so that a loop in Python ends soon. Native code that does not return (a
socket without a timeout, a matcher that backtracks for ever) goes on until it does; the thread is a daemon, so the
process ends without it.

Why a thread and not a signal, as for environments (`rlx.rollout.deadline`): a signal reaches the main thread only and
interrupts nothing before native code returns to Python, while a reward often waits for just that; and who calls it need
not be a main thread. What this costs: `signal.alarm` does not work in such a function, so give it no deadline then.
"""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Callable
from typing import Any


class DeadlinePassed(TimeoutError):
    """The function did not return in time, and was left behind."""


class _LeftBehind(BaseException):
    """Raised in a thread that nobody waits for any more; no `except Exception` stops it."""


def call_within(timeout_s: float | None, function: Callable[..., Any], *args: Any) -> Any:
    """Return function(*args), or raise what it raises; DeadlinePassed after `timeout_s` (None: it may take for ever).

    Without a deadline it runs in the caller's own thread.
    """
    if timeout_s is None:
        return function(*args)
    call = _Call(function, args)
    try:
        call.ended.wait(timeout_s)
    finally:  # Ctrl-C leaves it behind as well
        call.leave()
    if not call.has_outcome:
        raise DeadlinePassed(f"took longer than {timeout_s:g} s")
    if call.error is not None:
        raise call.error
    return call.value


class _Call:
    """One call in a thread of its own."""

    def __init__(self, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
        self.ended = threading.Event()
        self.has_outcome = False
        self.value: Any = None
        self.error: BaseException | None = None
        self._is_left = False
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, args=(function, args), name="rlx-time-limit", daemon=True)
        self._thread.start()

    def leave(self) -> None:
        """Wait no longer: what has not returned gets `_LeftBehind`."""
        with self._lock:
            if not self.has_outcome:
                self._is_left = True
                identity = ctypes.c_ulong(self._thread.ident or 0)
                ctypes.pythonapi.PyThreadState_SetAsyncExc(identity, ctypes.py_object(_LeftBehind))

    def _run(self, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
        try:
            try:
                outcome = function(*args), None
            except _LeftBehind:
                raise
            except BaseException as error:  # SystemExit too: a reward does not end the run in silence
                outcome = None, error
            with self._lock:
                if not self._is_left:
                    self.value, self.error = outcome
                    self.has_outcome = True
            while self._is_left:  # the exception is on its way; it must not come when nothing here catches it
                time.sleep(0.001)
        except _LeftBehind:
            pass
        finally:
            self.ended.set()
