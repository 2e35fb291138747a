"""Where rows come from: JSONL, JSON and Parquet files, lists, `datasets` objects, functions. A row is a dict.

Every row knows its place, "prompts.jsonl:17" for line 17 of a file and "prompts.parquet[16]" for row 16 of what has no
lines, so that whatever is wrong with it, here or later, is named so that a reader finds it.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, overload

from rlx.errors import ConfigError, DataError, MissingExtra, RlxError
from rlx.text.import_path import import_function, is_import_path

Row = Mapping[str, Any]
Source = str | Path | Sequence[Row] | Callable[..., Any] | Any

OBJECT = re.compile(r"<\w+ of \d+ rows>")
"""What `object_name` returns."""
SHOWN_CHARACTERS = 80
LONGEST_TOKEN = 8


class Rows(Sequence[Row]):
    """The rows of one source, each with its place."""

    def __init__(self, rows: Any, name: str, lines: Sequence[int] | None = None) -> None:
        self.rows, self.name, self.lines = rows, name, lines

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Row]: ...
    def __getitem__(self, index: int | slice) -> Row | Sequence[Row]:
        """Return a row, a dict; DataError where it is none."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        row = self.rows[index]
        if not isinstance(row, Mapping):
            raise DataError(f"{self.place(index)} is {_kind(row)}; a row is an object with keys such as prompt.")
        return row

    def place(self, index: int) -> str:
        """Return where a row stands: file:line, or name[index]."""
        index = range(len(self))[index]
        return f"{self.name}[{index}]" if self.lines is None else f"{self.name}:{self.lines[index]}"

    def value(self, index: int, key: str) -> Any:
        """Return a row's value; DataError names the row and the keys that it has."""
        row = self[index]
        if key not in row:
            raise DataError(f'{self.place(index)} has no "{key}"; its keys are {_quoted(row)}.')
        return row[key]

    def text(self, index: int, key: str) -> str:
        """Return a row's value, which has to be a text."""
        value = self.value(index, key)
        if not isinstance(value, str):
            raise DataError(f'"{key}" in {self.place(index)} is {_kind(value)}; it must be a text.')
        return value


def read_rows(source: Source, kwargs: Mapping[str, Any] | None = None) -> Rows:
    """Return the rows of a source, at least one.

    source: the path of a .jsonl, .json (a list of objects) or .parquet file (needs rlx[parquet]); an import path
        pkg.module:function; or in Python a list of dicts, an object with a length and an index (a `datasets.Dataset`),
        or a function. A function is called with `kwargs` and returns any of these, or yields dicts.
    ConfigError where there is no such source, DataError where it is empty, torn or no rows: with file and line.
    """
    if isinstance(source, Rows):
        rows = source
    elif isinstance(source, Path) or (isinstance(source, str) and not is_import_path(source)):
        rows = _read_file(Path(source).expanduser())
    elif isinstance(source, str):
        rows = _call(import_function(source, "the source"), source, kwargs or {})
    elif callable(source) and not hasattr(source, "__getitem__"):
        rows = _call(source, f"{source.__module__}:{getattr(source, '__qualname__', source)}", kwargs or {})
    else:
        rows = _indexed(source, type(source).__name__)
    if not len(rows):
        raise DataError(f"{rows.name} holds no rows; at least one is needed.")
    return rows


@contextlib.contextmanager
def named(setting: str) -> Iterator[None]:
    """Have what is wrong with a source, or with a row of it, begin with the name of its setting."""
    try:
        yield
    except (ConfigError, DataError) as error:
        raise type(error)(f"{setting}: {error}") from error.__cause__


def object_name(source: Sequence[Any]) -> str:
    """Return what a saved configuration says of rows that were passed in Python."""
    return f"<{type(source).__name__} of {len(source)} rows>"


def _read_file(path: Path) -> Rows:
    if OBJECT.fullmatch(str(path)):
        raise ConfigError(
            f"the rows of this run were passed in Python as an object, {path}, which no file holds. Build it in Python "
            "with the same rows and call restore(RUN); or take them from a file or a pkg.module:function."
        )
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        ending = f'ends in "{path.suffix}"' if path.suffix else "has no ending of a file"
        raise ConfigError(
            f'"{path}" {ending}, and rlx reads {", ".join(_READERS)}; or give an import path pkg.module:function of a '
            "function that returns rows, or in Python a list or a datasets.Dataset."
        )
    if path.is_dir():
        raise ConfigError(f'"{path}" is a folder; give one of its files.')
    if not path.exists():
        raise ConfigError(f'there is no file "{path}" (in {Path.cwd()}).')
    if path.stat().st_size == 0:
        raise DataError(f"{path} is empty, 0 bytes; at least one row is needed.")
    try:
        return reader(path)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}.") from error


def _read_jsonl(path: Path) -> Rows:
    rows, numbers, line = [], [], b""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                rows.append(_json(line, f"{path}:{number}", torn=not line.endswith(b"\n")))
                numbers.append(number)
    for row, number in zip(rows, numbers, strict=True):
        if not isinstance(row, dict):
            raise DataError(f"{path}:{number} is {_kind(row)}; every line must be an object in braces.")
    return Rows(rows, str(path), numbers)


def _read_json(path: Path) -> Rows:
    content = _json(path.read_bytes(), str(path), torn=True)
    if not isinstance(content, list):
        raise DataError(f"{path} is {_kind(content)}; it must be a list of objects. For one object a line use .jsonl.")
    return Rows(content, str(path))


def _json(data: bytes, place: str, torn: bool) -> Any:
    """Return what JSON says; `torn`: the file ends here, so that an error at its end means that the rest is missing."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{place} is not UTF-8: {error.reason} at byte {error.start}.") from error
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        # A string begins far before the end that it lacks; a number, a word or an escape just before it.
        written = text.rstrip()
        near_end = len(written) - error.pos < LONGEST_TOKEN and written[-1] not in "]}"
        at_end = error.msg.startswith("Unterminated string") or error.pos >= len(written) or near_end
        line = f"line {error.lineno}, " if "\n" in text.strip() else ""
        cure = "; the file seems to be cut off there" if torn and at_end else ""
        raise DataError(f"{place} is no JSON: {error.msg} ({line}column {error.colno}){cure}.") from error
    except RecursionError as error:
        raise DataError(f"{place} is nested too deeply to be read.") from error


def _read_parquet(path: Path) -> Rows:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise MissingExtra(f"{path} needs pyarrow, which is not installed: pip install 'rlx[parquet]'.") from error
    try:
        # One file and not a data set: a folder name such as split=train would become a column.
        return Rows(parquet.ParquetFile(path).read().to_pylist(), str(path))
    except (pyarrow.ArrowException, OSError) as error:
        if getattr(error, "errno", None) is not None:
            raise  # the system's, and not pyarrow's own
        raise DataError(f"{path} is no Parquet file, or a torn one: {' '.join(str(error).split())}") from error


_READERS: dict[str, Callable[[Path], Rows]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".parquet": _read_parquet,
}


def _call(function: Callable[..., Any], name: str, kwargs: Mapping[str, Any]) -> Rows:
    try:
        made = function(**kwargs)
        rows = list(made) if isinstance(made, Iterator) else made
    except RlxError:
        raise
    except Exception as error:
        inside = None if error.__traceback__ is None else error.__traceback__.tb_next
        if isinstance(error, TypeError) and inside is None:
            raise ConfigError(f"{name} cannot be called with {dict(kwargs)}: {error}.") from error
        raise DataError(f"{name}() raised {type(error).__name__}: {error}{_line_of(inside)}; correct it.") from error
    return _indexed(rows, f"{name}()")


def _line_of(inside: TracebackType | None) -> str:
    """Return where in the function that was called a traceback is, in words."""
    return "" if inside is None else f" (line {inside.tb_lineno} of {inside.tb_frame.f_code.co_filename})"


def _indexed(rows: Any, name: str) -> Rows:
    if isinstance(rows, Rows):
        return rows
    if isinstance(rows, Mapping):
        raise ConfigError(f"{name} is a mapping with the keys {_quoted(rows)}; pass one of its values.")
    if isinstance(rows, str | bytes) or not (hasattr(rows, "__len__") and hasattr(rows, "__getitem__")):
        what = f"{name} returned {_kind(rows)}" if name.endswith("()") else f"{_kind(rows)} is no source of rows"
        raise ConfigError(
            f"{what}; rows are a list of dicts or a data set with a length and an index, since they "
            "are shuffled by their number."
        )
    return Rows(rows, name)


def _kind(value: Any) -> str:
    """Return a value and its type, shortened: [1, 2] (list)."""
    if value is None:
        return "null"
    text = " ".join(repr(value).split())
    shown = text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}..."
    return f"{shown} ({type(value).__name__})"


def _quoted(keys: Iterable[Any]) -> str:
    return ", ".join(f'"{key}"' for key in keys) or "none"
