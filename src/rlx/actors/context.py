"""What code can ask about the call that it runs in."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from functools import partial
from typing import NamedTuple


class Context(NamedTuple):
    """The running call, from inside."""

    actor: str
    """The name of the actor."""
    cancelled: Callable[[], bool]
    """Whether the caller has taken the call back: a long method may look now and then, and return early."""


current_call: ContextVar[tuple[str, Callable[[int], bool], int] | None] = ContextVar("rlx_current_call", default=None)
"""The actor's name, what tells of a call id whether it was taken back, and the id: every call sets it, few ask."""


def current() -> Context | None:
    """Return the call that this code runs in, None outside of actors."""
    running = current_call.get()
    if running is None:
        return None
    actor, is_cancelled, call_id = running
    return Context(actor, partial(is_cancelled, call_id))
