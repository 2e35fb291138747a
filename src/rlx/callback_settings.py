"""The section `callbacks`, which holds a user's own classes and what they are made with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from pydantic import BeforeValidator, PlainSerializer, WithJsonSchema, model_validator

from rlx.section import Allowed, Section, plain, spelled


@dataclass(frozen=True)
class CallbackSpec:
    """A callback's class, or its import path pkg.module:Name, and what it is made with."""

    make: str | Callable[..., Any]
    kwargs: dict[str, Any]

    @classmethod
    def parse(cls, value: Any) -> CallbackSpec:
        """Return what a class, an import path or a {class, kwargs} mapping stands for; else ValueError."""
        if isinstance(value, CallbackSpec):
            return value
        make, kwargs = value, {}
        if isinstance(value, dict) and value.keys() <= {"class", "kwargs"}:
            make, kwargs = value.get("class"), value.get("kwargs") or {}
        if not (isinstance(make, str) or callable(make)) or not isinstance(kwargs, dict):
            raise ValueError(
                "each must be a class, an import path pkg.module:Name, or a mapping {class: ..., kwargs: {...}}"
            )
        return cls(make, plain(kwargs))

    def written(self) -> str | dict[str, Any]:
        """Return the form that YAML holds."""
        name = spelled(self.make) or ""
        return {"class": name, "kwargs": self.kwargs} if self.kwargs else name


def _to_specs(value: Any) -> tuple[CallbackSpec, ...]:
    """Return the specs of a list, or of a single one."""
    return tuple(map(CallbackSpec.parse, value if isinstance(value, list | tuple) else [value]))


_SPEC_SCHEMA: dict[str, Any] = {
    "anyOf": [
        {"type": "string"},
        {
            "type": "object",
            "properties": {"class": {"type": "string"}, "kwargs": {"type": "object"}},
            "required": ["class"],
            "additionalProperties": False,
        },
    ]
}


class CallbacksSection(Section):
    """Code of your own that runs at the points of a run: see docs/callbacks.md.

    In YAML the list may stand alone: `callbacks: [my_module:MyCallback]`.
    """

    positional: ClassVar[str | None] = "classes"

    classes: Annotated[
        tuple[Any, ...],
        BeforeValidator(_to_specs),
        Allowed("a list of subclasses of rlx.Callback, or of their import paths pkg.module:Name"),
        PlainSerializer(lambda specs: [spec.written() for spec in specs]),
        WithJsonSchema({"type": "array", "items": _SPEC_SCHEMA}),
    ] = ()
    """Subclasses of rlx.Callback by import path, pkg.module:Name, or in Python themselves, called in this order; with
    arguments as {class: pkg.module:Name, kwargs: {...}}."""

    @model_validator(mode="before")
    @classmethod
    def _read_list(cls, value: Any) -> Any:
        return {"classes": value} if isinstance(value, list | str) else value

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: Any, handler: Any) -> dict[str, Any]:
        return {"anyOf": [{"type": "array", "items": _SPEC_SCHEMA}, handler(schema)]}
