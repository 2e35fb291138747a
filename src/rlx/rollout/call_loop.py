"""CallLoop: a thread that keeps runners at work and hears whoever answers first."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod

from rlx.actors import Err, Future
from rlx.actors.future import nothing
from rlx.rollout.runner_actors import Call, RunnerActors

PATIENCE_S = 1.0  # between two looks at whether the thread is still alive
STOP_TIMEOUT_S = 30.0


class CallLoop(ABC):
    """Asks and hears in a thread, which `_start` starts and `pause` ends; all other state is guarded by `_changed`.

    What a runner raises ends the thread, and `_raise_error` raises it in the caller's.
    """

    def __init__(self, actors: RunnerActors) -> None:
        self._actors = actors
        self._calls: list[Call] = []
        self._changed = threading.Condition()
        self._bell: Future[None] = Future("arrivals", "bell")
        self._thread: threading.Thread | None = None
        self._stopping = False
        self._error: BaseException | None = None

    @abstractmethod
    def _ask(self) -> None:
        """Append to `_calls` what may be asked for now; `_changed` is held."""

    @abstractmethod
    def _hear(self, call: Call) -> None:
        """Take over the answer of a call, which is in `_calls` no more; `_changed` is not held."""

    def _settle(self) -> None:  # noqa: B027 - most have nothing to do
        """Do what has to be done before each asking; `_changed` is not held."""

    def _give_up(self, calls: list[Call]) -> None:  # noqa: B027 - most have nothing to do
        """Note that these have failed; `_changed` is held."""

    def pause(self) -> None:
        """Ask the runners for nothing more until the next start; what has arrived, and what is asked for, stays."""
        with self._changed:
            thread, self._stopping = self._thread, True
            self._ring()
        if thread is not None:
            thread.join(STOP_TIMEOUT_S)
        self._thread = None

    def _start(self) -> None:
        if self._thread is None and self._error is None:
            self._stopping = False
            self._thread = threading.Thread(target=self._run, name="rlx-arrivals", daemon=True)
            self._thread.start()

    def _raise_error(self) -> None:
        if self._error is not None:
            error, self._error, self._thread = self._error, None, None
            raise error

    def _ring(self) -> None:
        """Wake the thread, wherever it waits."""
        bell, self._bell = self._bell, Future("arrivals", "bell")
        bell.settle(nothing)
        self._changed.notify_all()

    def _run(self) -> None:
        try:
            while True:
                self._settle()
                with self._changed:
                    if self._stopping:
                        return
                    bell = self._bell
                    self._ask()
                call = self._actors.first(self._calls, bell)
                if call is not None:
                    self._calls.remove(call)
                    if call.is_vain:
                        with self._changed:
                            self._give_up([call])
                    else:
                        self._hear(call)
        except BaseException as error:
            with self._changed:
                lost = [call for call in self._calls if isinstance(call.outcome, Err)]
                self._calls = [call for call in self._calls if call not in lost]
                self._give_up(lost)
                self._error = error
                self._changed.notify_all()
