"""Section: what a group of settings is, how strict about types, and what a field accepts, in words."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, ClassVar, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator
from pydantic.fields import FieldInfo

from rlx.schedule import Schedule


def _tidy_schedules(schema: dict[str, Any]) -> None:
    """Give a Schedule's default and bounds the JSON schema form, which pydantic does for its own types only."""
    keywords = {"gt": "exclusiveMinimum", "ge": "minimum", "lt": "exclusiveMaximum", "le": "maximum"}
    for entry in schema.get("properties", {}).values():
        for name in keywords.keys() & entry.keys():
            entry[keywords[name]] = entry.pop(name)
        match entry.get("default"):
            case {"end": end, "env_steps": 0}:
                entry["default"] = end


class Section(BaseModel):
    """One group of settings: frozen, and strict about types ("3" is not 3, True is not 1, but 1 is a fine float)."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        validate_default=True,
        use_attribute_docstrings=True,
        json_schema_extra=_tidy_schedules,
    )
    positional: ClassVar[str | None] = None
    """The field that the builder method also takes as its first positional argument."""

    @field_validator("*", mode="before")
    @classmethod
    def _read_yaml_type(cls, value: Any, info: ValidationInfo) -> Any:
        """YAML has no tuples, people write 1e6 for a million steps, and a sweep hands over numpy scalars."""
        types = [_bare(one) for one in _alternatives(cls.model_fields[str(info.field_name)].annotation)]
        if hasattr(value, "item") and getattr(value, "shape", None) == ():
            value = value.item()
        if isinstance(value, list) and any(get_origin(one) is tuple for one in types):
            return tuple(value)
        if isinstance(value, float) and value.is_integer() and int in types and float not in types:
            return int(value)
        return value


def spelled(environment: str | Callable[..., Any] | None) -> str | None:
    """Return an environment as YAML holds it: the string itself, or the `module:qualname` of a class or factory."""
    if environment is None or isinstance(environment, str):
        return environment
    return f"{environment.__module__}:{getattr(environment, '__qualname__', f'<{type(environment).__name__}>')}"


def plain(value: Any) -> Any:
    """Return a copy in the types that YAML gives back, so that Python and YAML mean the same; else ValueError."""
    if hasattr(value, "item") and getattr(value, "shape", None) == ():
        value = value.item()  # a numpy scalar
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {key: plain(item) for key, item in value.items()}
    if value is None or type(value) in (bool, int, float, str):
        return value
    raise ValueError(
        f"it may hold only plain data (numbers, strings, true/false, null, lists, mappings), not {value!r}"
    )


@dataclass(frozen=True)
class Allowed:
    """What a field accepts, in words, where its type alone does not say it."""

    text: str


def allowed(field: FieldInfo) -> str:
    """Return what a field accepts, in words: "an integer >= 0 or null"."""
    for constraint in field.metadata:
        if isinstance(constraint, Allowed):
            return constraint.text
    return " or ".join(_in_words(one, field.metadata) for one in _alternatives(field.annotation))


def _in_words(annotation: Any, constraints: list[Any]) -> str:
    if get_origin(annotation) is Annotated:
        return _in_words(_bare(annotation), list(get_args(annotation)[1:]))
    if get_origin(annotation) is Literal:
        values = [str(value) for value in get_args(annotation)]
        return "one of " + ", ".join(values) if len(values) > 1 else values[0]
    if get_origin(annotation) is tuple:
        return f"a list with each item {_in_words(get_args(annotation)[0], [])}"
    if annotation in (int, float, Schedule):
        noun = "an integer" if annotation is int else "a number"
        tail = " or {start, end, env_steps}" if annotation is Schedule else ""
        return " ".join([noun, " and ".join(_bounds(constraints))]).strip() + tail
    words = {bool: "true or false", str: "a string", NoneType: "null", dict: "a mapping whose keys are strings"}
    return words.get(get_origin(annotation) or annotation, f"a {getattr(annotation, '__name__', annotation)}")


def _bounds(constraints: list[Any]) -> Iterator[str]:
    signs = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
    for one in constraints:
        if isinstance(one, FieldInfo):
            yield from _bounds(one.metadata)
        yield from (f"{sign} {getattr(one, name)}" for name, sign in signs.items() if hasattr(one, name))


def _bare(annotation: Any) -> Any:
    """Return a type without what `Annotated` adds to it."""
    return get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation


def _alternatives(annotation: Any) -> tuple[Any, ...]:
    """Return the members of a union, or the one type."""
    return get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
