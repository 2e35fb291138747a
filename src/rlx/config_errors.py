"""What is said of settings that do not fit: for each wrong key a sentence with its value, place and what is allowed."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any, TypeGuard

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from rlx.config_document import Written
from rlx.config_lookup import did_you_mean
from rlx.section import Section, allowed


def sentences(
    error: ValidationError, tree: type[Section], values: Mapping[str, Any], written: Mapping[str, Written], owner: str
) -> Iterator[str]:
    """Yield one sentence per wrong key: the key, the value as written, where, and what is allowed."""
    done = set()
    for detail in error.errors(include_url=False):
        key, section, field = _locate(tree, detail["loc"])
        if key in done:
            continue
        done.add(key)
        shown = written.get(key) or Written(in_python(_value_at(values, key)))
        reason = detail.get("ctx", {}).get("error")
        if field is None:
            yield _unknown(key, section, tree, shown.location, owner)
        elif is_section(field.annotation):
            yield f"{key}: {reason}." if reason else f"{key} is {shown}; it must be a mapping of its settings."
        else:
            yield f"{key} is {shown}; {reason or f'it must be {allowed(field)}'}."


def _locate(tree: type[Section], location: tuple[int | str, ...]) -> tuple[str, type[Section], FieldInfo | None]:
    """Return the key that pydantic's location lies in, the section that holds it, and its field (None: unknown)."""
    section, path = tree, []
    for part in map(str, location):
        path.append(part)
        field = section.model_fields.get(part)
        if field is None or not is_section(field.annotation) or len(path) == len(location):
            return ".".join(path), section, field
        section = field.annotation
    raise AssertionError(f"pydantic reported an error without a location in {tree.__name__}")


def _value_at(values: Any, key: str) -> Any:
    for part in key.split("."):
        values = values.get(part) if isinstance(values, Mapping) else getattr(values, part, None)
    return values


def _unknown(key: str, section: type[Section], tree: type[Section], location: str, owner: str) -> str:
    parent, _, name = key.rpartition(".")
    known = list(_keys(tree))
    namesakes = [other for other in known if _leaf(other) == name]
    own = [f"{parent}.{sibling}" if parent else sibling for sibling in section.model_fields]
    hint = (
        did_you_mean(name, namesakes, count=3, key=_leaf)
        or did_you_mean(name, own, key=_leaf)
        or did_you_mean(name, known, key=_leaf)
        or f" {'It has' if parent else 'The sections are'} {', '.join(map(_leaf, own))}."
    )
    return f"{key} is not a {f'setting of {owner}' if parent else 'section'}{location}.{hint}"


def _keys(tree: type[Section], prefix: str = "") -> Iterator[str]:
    """Yield the dotted key of every setting."""
    for name, field in tree.model_fields.items():
        if is_section(field.annotation):
            yield from _keys(field.annotation, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def is_section(annotation: Any) -> TypeGuard[type[Section]]:
    """Return whether the type of a field is a section."""
    return isinstance(annotation, type) and issubclass(annotation, Section)


def _leaf(key: str) -> str:
    return key.rpartition(".")[2]


def in_python(value: Any) -> str:
    """Return a value as it is written in Python, text in double quotes."""
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)
