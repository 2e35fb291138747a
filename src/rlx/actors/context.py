"""What code can ask about the call that it runs in."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from typing import NamedTuple


class Context(NamedTuple):
    """The running call, from inside."""

    actor: str
    """The name of the actor."""
    cancelled: Callable[[], bool]
    """Whether the caller has taken the call back: a long method may look now and then, and return early."""


current_call: ContextVar[Context | None] = ContextVar("rlx_current_call", default=None)


def current() -> Context | None:
    """Return the call that this code runs in, None outside of actors."""
    return current_call.get()
