"""A config as text: YAML that remembers the line and the spelling of every key, and `--set key=value` on top of it."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

from rlx.errors import ConfigError


@dataclass(frozen=True)
class Written:
    """A value as its author wrote it, and where: `str()` gives `"fast" (ppo.yaml:9)`."""

    text: str
    place: str = ""

    def __str__(self) -> str:
        return f"{self.text}{self.location}"

    @property
    def location(self) -> str:
        """The place in brackets, or nothing where it was written in Python."""
        return f" ({self.place})" if self.place else ""


@dataclass
class Document:
    """The values of a config before they are checked, with what is already known to be wrong about its text."""

    values: dict[str, Any]
    written: dict[str, Written] = field(default_factory=dict)
    """By dotted key: training.lr."""
    problems: list[str] = field(default_factory=list)

    @classmethod
    def parse(cls, text: str, name: str = "") -> Document:
        """Return the document in a YAML text; `name` is the file that messages name."""
        values, node = _read(text, lambda line: _place(name, line))
        if values is None:
            return cls({})
        if not isinstance(values, dict) or not isinstance(node, yaml.MappingNode):
            raise ConfigError(f"{name or 'the config'} is {flow(values)}; it must be a mapping of sections.")
        document = cls(values)
        document._note(node, "", name, ancestors=())
        return document

    def override(self, assignment: str) -> None:
        """Apply one `key=value`, as `--set` gives it; what is wrong with it joins the problems."""
        key, equals, text = assignment.partition("=")
        if not equals or not key.strip():
            self.problems.append(f"--set {assignment} is no assignment; write --set KEY=VALUE, as in training.lr=1e-4.")
            return
        try:
            value, written = read_value(text, f"--set {key.strip()}", place="--set")
            self.values = with_value(self.values, key.strip(), value)
            self.written[key.strip()] = written
        except ConfigError as error:
            self.problems.append(str(error))

    def _note(self, mapping: yaml.MappingNode, prefix: str, name: str, ancestors: Sequence[yaml.Node]) -> None:
        """Write down text and line of every key below `mapping`, and which keys are given twice."""
        seen: dict[str, int] = {}
        for key_node, value_node in mapping.value:
            key, line = f"{prefix}{key_node.value}", key_node.start_mark.line + 1
            if key in seen:
                places = f"{_place(name, seen[key])} and {_place(name, line)}"
                self.problems.append(f"{key} is given twice ({places}); keep one.")
            seen[key] = line
            self.written[key] = Written(_spelling(value_node), _place(name, line))
            if isinstance(value_node, yaml.MappingNode) and value_node not in ancestors:
                self._note(value_node, f"{key}.", name, (*ancestors, value_node))


def read_value(text: str, name: str, place: str = "") -> tuple[Any, Written]:
    """Return the value that a piece of YAML holds ("1e-4" is a number), and how it was written."""
    value, node = _read(text, lambda line: name)
    return value, Written("empty" if node is None else _spelling(node), place)


def with_value(tree: Mapping[str, Any], key: str, value: Any) -> dict[str, Any]:
    """Return a copy of a tree of mappings in which the dotted `key` holds `value`."""
    *parents, name = key.split(".")
    branches = [tree]
    for depth, parent in enumerate(parents, start=1):
        branch = branches[-1].get(parent)
        if branch is not None and not isinstance(branch, Mapping):
            raise ConfigError(f"{key} cannot be set: {'.'.join(parents[:depth])} is {flow(branch)}, not a mapping.")
        branches.append(branch or {})
    for branch, part in zip(reversed(branches), (name, *reversed(parents)), strict=True):
        value = {**branch, part: value}
    return value


def flow(value: Any) -> str:
    """Return a value as YAML on one line, as far as it is plain data; else its repr."""
    try:
        return yaml.dump([value], Dumper=_Dumper, default_flow_style=True, width=float("inf"), allow_unicode=True)[1:-2]
    except yaml.representer.RepresenterError:
        return repr(value)


class _Loader(yaml.SafeLoader):
    """YAML 1.1 where 1e-4 is a number, as everywhere else."""


class _Dumper(yaml.SafeDumper):
    """Quotes what `_Loader` would take for a number."""


_EXPONENT = re.compile(r"[-+]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)[eE][-+]?\d+$")
# By itself "=" is YAML 1.1's sign for a default value, which nobody means.
_Loader.add_constructor("tag:yaml.org,2002:value", yaml.SafeLoader.construct_yaml_str)
for _one in (_Loader, _Dumper):
    _one.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT, list("-+.0123456789"))


def _read(text: str, place: Callable[[int], str]) -> tuple[Any, yaml.Node | None]:
    """Return the values in a YAML text, and the nodes that know its lines."""
    try:
        # Read twice: building values rewrites the nodes of `<<: *defaults`, and duplicate keys could not be told.
        return yaml.load(text, _Loader), yaml.compose(text, _Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        raise ConfigError(f"{place(line)}: this is not YAML: {error.problem or error.context}.") from error
    except (yaml.YAMLError, ValueError) as error:  # a control character; a date such as 2024-13-45
        raise ConfigError(f"{place(1)}: this is not YAML: {error}.") from error


def _spelling(node: yaml.Node) -> str:
    """Return a value as it was written: strings in double quotes, lists and mappings on one line."""
    if not isinstance(node, yaml.ScalarNode):
        return flow(_Loader("").construct_document(copy.deepcopy(node)))
    if node.tag == "tag:yaml.org,2002:str":
        return json.dumps(node.value, ensure_ascii=False)
    return node.value or "empty"


def _place(name: str, line: int) -> str:
    return f"{name}:{line}" if name else f"line {line}"
