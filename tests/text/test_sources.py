"""Rows from every kind of source, and what is said of a source that is none."""

import json
import re
import sys

import pyarrow
import pytest
from pyarrow import parquet

from rlx.errors import ConfigError, DataError, MissingExtra
from rlx.text.sources import object_name, read_rows

ROWS = [{"prompt": "a", "answer": 1}, {"prompt": "b", "answer": 2}]


class DataSet:
    """What a `datasets.Dataset` offers: a length and an index that gives a dict."""

    def __len__(self):
        return 2

    def __getitem__(self, index):
        return ROWS[index]


def made(prompt="a", count=2):
    return [{"prompt": prompt}] * count


def yielded():
    yield from ROWS


def failing():
    raise TypeError("of its own")


def failing_late():
    yield ROWS[0]
    raise TypeError("of its own")


@pytest.fixture
def this_module(monkeypatch):
    """The name by which this file can be imported."""
    monkeypatch.setitem(sys.modules, "my_rows", sys.modules[__name__])
    return "my_rows"


def written(folder, name, content):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def said(error, source, **kwargs):
    """Return the one sentence that is said of a source."""
    with pytest.raises(error) as raised:
        list(read_rows(source, **kwargs))
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_the_same_rows_come_from_every_kind_of_source(tmp_path, this_module):
    lines = "\n".join(map(json.dumps, ROWS))
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "rows.parquet")
    sources = [
        written(tmp_path, "rows.jsonl", lines + "\n"),
        written(tmp_path, "without_end.jsonl", lines),
        written(tmp_path, "with_mark.jsonl", "\ufeff" + lines.replace("\n", "\r\n\r\n")),
        written(tmp_path, "rows.json", json.dumps(ROWS, indent=1)),
        tmp_path / "rows.parquet",
        str(tmp_path / "rows.parquet"),
        ROWS,
        DataSet(),
        yielded,
        f"{this_module}:yielded",
        read_rows(ROWS),
    ]
    for source in sources:
        rows = read_rows(source)
        assert [rows[index] for index in range(len(rows))] == ROWS, source


def test_a_function_gets_its_arguments(this_module):
    assert list(read_rows(f"{this_module}:made", {"prompt": "x", "count": 3})) == [{"prompt": "x"}] * 3


def test_a_row_knows_its_place(tmp_path):
    lines = read_rows(written(tmp_path, "rows.jsonl", '{"a": 1}\n\n\n{"a": 2}\n'))
    assert [lines.place(0), lines.place(1)] == [f"{tmp_path}/rows.jsonl:1", f"{tmp_path}/rows.jsonl:4"]
    assert read_rows(written(tmp_path, "rows.json", '[{"a": 1}]')).place(0) == f"{tmp_path}/rows.json[0]"
    assert read_rows(ROWS).place(-1) == "list[1]"


def test_a_missing_key_names_the_row_and_the_keys_it_has(tmp_path):
    rows = read_rows(written(tmp_path, "rows.jsonl", '{"prompt": "a"}\n{"promt": "a", "answer": 1}\n'))
    with pytest.raises(DataError, match=r'rows\.jsonl:2 has no "prompt"; its keys are "promt", "answer"\.'):
        rows.text(1, "prompt")


def test_a_value_that_is_no_text_is_shown():
    with pytest.raises(DataError, match=r'"prompt" in list\[0\] is 3 \(int\); it must be a text'):
        read_rows([{"prompt": 3}]).text(0, "prompt")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"a": 1}\n{"a": 1,}\n{"a": 1}\n', "rows.jsonl:2 is no JSON: "),
        (
            '{"a": 1}\n{"a": "cut o',
            "rows.jsonl:2 is no JSON: Unterminated string starting at (column 7); the file seems to be cut off there.",
        ),
        (
            '{"a": 1}\n{"a": 1, "b"',
            "rows.jsonl:2 is no JSON: Expecting ':' delimiter (column 13); the file seems to be cut off there.",
        ),
        ('{"a": 1}\n\n[1, 2]\n', "rows.jsonl:3 is [1, 2] (list); every line must be an object"),
        (b'{"a": 1}\n{"a": "\xff"}\n', "rows.jsonl:2 is not UTF-8: invalid start byte at byte 7."),
        ('{"a": ' + "[" * 100_000 + "\n", "rows.jsonl:1 is "),
        ("", "rows.jsonl is empty, 0 bytes"),
        ("\n \n", "rows.jsonl holds no rows"),
    ],
)
def test_a_bad_line_is_named_by_file_and_number(tmp_path, content, message):
    assert said(DataError, written(tmp_path, "rows.jsonl", content)).startswith(f"{tmp_path}/{message}")


def test_every_prefix_of_a_file_either_ends_with_a_line_or_is_called_torn(tmp_path):
    content = b'{"prompt": "caf\xc3\xa9", "n": [1, 2.5]}\n' * 2
    for size in range(len(content) // 2 + 1, len(content) - 1):
        message = said(DataError, written(tmp_path, "rows.jsonl", content[:size]))
        assert "rows.jsonl:2 is" in message and ("cut off" in message or "UTF-8" in message), content[:size]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{}", "rows.json is {} (dict); it must be a list of objects. For one object a line use .jsonl."),
        ("[{}, 3]", "rows.json[1] is 3 (int); a row is an object"),
        ("[]", "rows.json holds no rows"),
        ('[{"a": 1}', "rows.json is no JSON: Expecting ',' delimiter (column 10); the file seems to be cut off there."),
        ('[\n{"a" 1}]', "rows.json is no JSON: Expecting ':' delimiter (line 2, column 6)."),
    ],
)
def test_a_json_file_that_holds_no_rows_is_refused(tmp_path, content, message):
    assert said(DataError, written(tmp_path, "rows.json", content)).startswith(f"{tmp_path}/{message}")


def test_a_torn_parquet_file_is_refused_whatever_is_left_of_it(tmp_path):
    parquet.write_table(pyarrow.Table.from_pylist(ROWS * 100), tmp_path / "whole.parquet")
    whole = (tmp_path / "whole.parquet").read_bytes()
    for size in [1, 4, 12, *range(20, len(whole), 97), len(whole) - 1]:
        message = said(DataError, written(tmp_path, "torn.parquet", whole[:size]))
        assert "torn.parquet is no Parquet file, or a torn one: " in message
    damaged = whole[:30] + bytes(len(whole) - 60) + whole[-30:]
    assert "torn.parquet is no Parquet" in said(DataError, written(tmp_path, "torn.parquet", damaged))


def test_parquet_without_pyarrow_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert said(MissingExtra, written(tmp_path, "rows.parquet", "x")).endswith("pip install 'rlx[parquet]'.")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("rows.csv", '"rows.csv" ends in ".csv", and rlx reads .jsonl, .json, .parquet; or give'),
        ("gsm8k", '"gsm8k" has no ending of a file, and rlx reads .jsonl, .json, .parquet; or give'),
        ("missing.jsonl", 'there is no file "missing.jsonl" (in /'),
        ("folder.jsonl", '"folder.jsonl" is a folder'),
        ("no_such_module:rows", 'the source "no_such_module:rows": there is no module no_such_module'),
        ("json:no_such_name", "the source \"json:no_such_name\": module 'json' has no attribute 'no_such_name'."),
        ("json:__name__", 'the source "json:__name__" is of type str; it must be a function.'),
        ({"train": ROWS, "test": ROWS}, 'dict is a mapping with the keys "train", "test"; pass one of its values.'),
        (object_name(ROWS), f"the rows of this run were passed in Python as an object, <list of {len(ROWS)} rows>,"),
        (7, "7 (int) is no source of rows; rows are a list of dicts or a data set"),
    ],
)
def test_what_is_no_source_is_refused(tmp_path, monkeypatch, source, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.jsonl").mkdir()
    assert said(ConfigError, source).startswith(message)


def test_a_function_called_wrongly_is_told_from_one_that_fails(this_module):
    assert "made cannot be called with {'size': 3}: made() got" in said(
        ConfigError, f"{this_module}:made", kwargs={"size": 3}
    )
    place = rf"\(line \d+ of {re.escape(__file__)}\); correct it"
    for function in (failing, failing_late):
        with pytest.raises(DataError, match=rf"{function.__name__}\(\) raised TypeError: of its own {place}") as raised:
            read_rows(function)
        assert raised.value.__cause__.__traceback__.tb_next.tb_frame.f_code.co_name == function.__name__
    assert said(DataError, f"{this_module}:made", kwargs={"count": 0}).startswith("my_rows:made() holds no rows")


def test_a_row_of_a_list_that_is_none_is_named():
    assert said(DataError, [{"a": 1}, "b"]).startswith("list[1] is 'b' (str); a row is an object")
