"""EnvChange: an attribute that was set, or a method that was called, in all environments of a run.

The newest change of a name stands for those before it. So the changes of a run, which are few, say how to bring a new
environment to where the others are: one that is built anew, one of a restarted runner, one of a resumed run.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from rlx.errors import EnvError


@dataclass(frozen=True)
class EnvChange:
    """What to do with every environment: "set" `name` to the one argument, or "call" it with all of them."""

    kind: Literal["set", "call"]
    name: str
    arguments: tuple[Any, ...]

    def __str__(self) -> str:
        values = ", ".join(map(repr, self.arguments))
        return f"{self.name}({values})" if self.kind == "call" else f"{self.name} = {values}"

    def apply(self, env: Any, where: str) -> None:
        """Change a scalar or vector environment, through its wrappers; EnvError, naming `where`, if it cannot be."""
        try:
            _apply_to_vector(self, env) if hasattr(env, "num_envs") else _apply_to_scalar(self, env)
        except EnvError:
            raise  # it took too long
        except Exception as error:
            reason = f"it has no {self.name}" if isinstance(error, _Missing) else f"that raised {error!r}"
            raise EnvError(f"{where} cannot be changed by {self}: {reason}.") from error


Changes = tuple[EnvChange, ...]
"""In the order of their making, at most one of a kind and name."""


def with_change(changes: Changes, change: EnvChange) -> Changes:
    """Return `changes` with one more, in the place of the one that it replaces."""
    return (*(one for one in changes if _key(one) != _key(change)), change)


def apply_changes(changes: Changes, already: Changes, env: Any, where: str) -> None:
    """Bring an environment that has had the changes `already` to `changes`; the others must be `covered` by these."""
    for change in changes:
        if change not in already:
            change.apply(env, where)


def covered(already: Changes, changes: Changes) -> bool:
    """Return whether an environment that has had the changes `already` can get to `changes`: none has to be undone."""
    return {_key(one) for one in already} <= {_key(one) for one in changes}


def changes_to_state(changes: Changes) -> list[list[Any]]:
    """Return changes as plain values."""
    return [[change.kind, change.name, list(change.arguments)] for change in changes]


def changes_from_state(state: Iterable[Any]) -> Changes:
    """Return the changes that `changes_to_state` described."""
    return tuple(EnvChange(kind, name, tuple(arguments)) for kind, name, arguments in state)


class _Missing(Exception):
    """The environment has no attribute or method of that name."""


def _key(change: EnvChange) -> tuple[str, str]:
    return change.kind, change.name


def _apply_to_scalar(change: EnvChange, env: Any) -> None:
    if not env.has_wrapper_attr(change.name):
        raise _Missing
    if change.kind == "call":
        env.get_wrapper_attr(change.name)(*change.arguments)
    else:
        env.set_wrapper_attr(change.name, *change.arguments)


def _apply_to_vector(change: EnvChange, env: Any) -> None:
    """Change the environments within, where there are any, else the vector environment itself."""
    inner = env.unwrapped
    if not hasattr(inner, "set_attr"):
        if not hasattr(inner, change.name):
            raise _Missing
        if change.kind == "call":
            getattr(inner, change.name)(*change.arguments)
        else:
            setattr(inner, change.name, *change.arguments)
        return
    if not all(inner.call("has_wrapper_attr", change.name)):
        raise _Missing
    if change.kind == "call":
        inner.call(change.name, *change.arguments)
    else:
        inner.set_attr(change.name, list(change.arguments) * inner.num_envs)
