"""Checkpoints: what goes in comes out, a crash loses nothing, and damage is named."""

import json
import math
import os
import resource
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from rlx.checkpoint import (
    checkpoint_name,
    list_checkpoints,
    load_checkpoint,
    load_newest,
    newest_whole,
    prune,
    save_checkpoint,
)
from rlx.errors import CheckpointError

STATE = {"iteration": 7, "learner": {"weights": np.arange(5, dtype=np.float32)}}


def save_iterations(folder: Path, *iterations: int) -> list[Path]:
    return [save_checkpoint(folder / checkpoint_name(i), {**STATE, "iteration": i}) for i in iterations]


def assert_same(loaded, saved) -> None:
    """Equal in structure, types, dtypes, shapes and bits; a tuple comes back as a list."""
    if isinstance(saved, np.ndarray):
        assert isinstance(loaded, np.ndarray)
        assert loaded.dtype == saved.dtype and loaded.shape == saved.shape
        assert loaded.tobytes() == saved.tobytes()
    elif isinstance(saved, dict):
        assert list(loaded) == list(saved)
        for key in saved:
            assert_same(loaded[key], saved[key])
    elif isinstance(saved, list | tuple):
        assert type(loaded) is list and len(loaded) == len(saved)
        for one, other in zip(loaded, saved, strict=True):
            assert_same(one, other)
    else:
        assert type(loaded) is type(saved) and loaded == saved


@pytest.mark.parametrize(
    "value",
    [
        np.array(3.5),
        np.array(7, dtype=np.int64),
        np.array(True),
        np.array([True, False]),
        np.zeros((0, 4), np.float32),
        np.arange(6, dtype=np.uint8).reshape(2, 3),
        np.arange(12.0).reshape(3, 4).T,
        np.arange(12.0)[::2],
        np.array([math.nan, math.inf, -0.0], np.float32),
        np.arange(3, dtype=">f4").astype("=f4"),
        [np.zeros(2), {"deep": [np.ones(1), "text"]}, []],
        (1, 2.5, "three"),
        {},
        None,
        True,
        2**200,
        -(2**63),
        0.1,
        math.inf,
        "ünïcödé \n \x00",
    ],
    ids=repr,
)
def test_a_value_survives_the_round_trip(tmp_path, value):
    loaded = load_checkpoint(save_checkpoint(tmp_path / "c", {"a": {"b": value}, "after": 1}))
    assert_same(loaded, {"a": {"b": value}, "after": 1})


def test_numpy_scalars_come_back_as_plain_numbers(tmp_path):
    state = {"f": np.float32(0.5), "i": np.int64(3), "b": np.bool_(True)}
    loaded = load_checkpoint(save_checkpoint(tmp_path / "c", state))
    assert loaded == {"f": 0.5, "i": 3, "b": True} and type(loaded["b"]) is bool


def test_a_random_generator_continues_from_its_saved_state(tmp_path):
    rng = np.random.default_rng(5)
    rng.random(3)
    state = dict(rng.bit_generator.state)
    expected = rng.random(4)
    again = np.random.default_rng()
    again.bit_generator.state = load_checkpoint(save_checkpoint(tmp_path / "c", state))
    assert np.array_equal(again.random(4), expected)


def test_arrays_at_paths_that_read_alike_are_kept_apart(tmp_path):
    state = {"a/b": np.array([1]), "a": {"b": np.array([2])}}
    assert_same(load_checkpoint(save_checkpoint(tmp_path / "c", state)), state)


@pytest.mark.parametrize(
    "value", [{1: "one"}, object, {3, 4}, b"bytes", 1j, {"$tensor": "a"}, np.array(["text"])], ids=repr
)
def test_what_a_checkpoint_cannot_hold_is_refused_and_nothing_is_written(tmp_path, value):
    with pytest.raises(TypeError, match=r"a checkpoint cannot hold .* at /learner/value"):
        save_checkpoint(tmp_path / "c", {"learner": {"value": value}})
    assert not list(tmp_path.iterdir())


def test_loaded_arrays_may_be_written_to(tmp_path):
    loaded = load_checkpoint(save_checkpoint(tmp_path / "c", STATE))
    loaded["learner"]["weights"] += 1


def test_a_checkpoint_replaces_one_of_the_same_name_and_leaves_nothing_else(tmp_path):
    for iteration in (1, 2):
        save_checkpoint(tmp_path / "c", {**STATE, "iteration": iteration})
    assert load_checkpoint(tmp_path / "c")["iteration"] == 2
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def test_a_folder_with_files_of_others_is_not_replaced(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(CheckpointError, match=r"thesis\.tex.* choose a path that does not exist yet"):
        save_checkpoint(tmp_path, STATE)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"
    with pytest.raises(CheckpointError, match=r"thesis\.tex: Not a directory"):
        save_checkpoint(tmp_path / "thesis.tex", STATE)
    (tmp_path / "empty").mkdir()
    save_checkpoint(tmp_path / "empty", STATE)


def test_a_crash_while_one_replaces_another_of_its_name_loses_neither(tmp_path, monkeypatch):
    """The old folder has stepped aside and the new one has not taken its place yet."""
    (folder,) = save_iterations(tmp_path, 5)
    rename = Path.rename

    def crash(self: Path, target: Path) -> Path:
        if target == folder:
            raise KeyboardInterrupt
        return rename(self, target)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Path, "rename", crash)
        save_iterations(tmp_path, 5)
    assert not folder.exists()
    path, state = load_newest(tmp_path)
    assert path == folder and state["iteration"] == 5
    assert load_checkpoint(folder)["iteration"] == 5
    save_iterations(tmp_path, 5, 6)
    prune(tmp_path, keep=1, also=set())
    assert sorted(path.name for path in tmp_path.iterdir()) == [checkpoint_name(6)]


SAVE_UNTIL_KILLED = """
import os, random, signal, sys, time
from pathlib import Path
import numpy as np
from rlx.checkpoint import checkpoint_name, load_newest, prune, save_checkpoint

folder, one_name = Path(sys.argv[1]), sys.argv[2] == "one_name"
random.seed(0)
iteration = 0
for kill in range(20):
    confirmed, confirm = os.pipe()
    child = os.fork()
    if child == 0:
        while True:
            iteration += 1
            state = {"iteration": iteration, "array": np.full(20_000, iteration), "list": [iteration] * 100}
            save_checkpoint(folder / checkpoint_name(0 if one_name else iteration), state)
            os.write(confirm, iteration.to_bytes(4, "big"))
            prune(folder, keep=3, also=set())
    os.close(confirm)
    os.read(confirmed, 4)  # it has begun to save
    time.sleep(random.uniform(0, 0.03))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    saved = os.read(confirmed, 65536)
    last = int.from_bytes(saved[-4:], "big") if saved else iteration
    path, state = load_newest(folder)
    iteration = state["iteration"]
    assert iteration >= last, (iteration, last)
    assert (state["array"] == iteration).all() and state["list"] == [iteration] * 100
    os.close(confirmed)
print("saved", iteration, "left", len(list(folder.iterdir())))
"""


@pytest.mark.parametrize("naming", ["new_names", "one_name"])
def test_a_kill_at_any_moment_leaves_the_newest_saved_checkpoint_loadable(tmp_path, naming):
    """A child saves in a loop and is killed 20 times; the newest that loads is never older than one confirmed."""
    done = subprocess.run(
        [sys.executable, "-c", SAVE_UNTIL_KILLED, tmp_path, naming], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    save_iterations(tmp_path, 999_990, 999_991, 999_992)
    prune(tmp_path, keep=3, also=set())
    assert len(list(tmp_path.iterdir())) == 3, "what killed saves left behind is cleaned up"


@contextmanager
def files_limited_to(size_bytes: int):
    """Let no file grow beyond `size_bytes`, as a full disk would."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("same_name", [False, True])
def test_a_full_disk_is_an_error_that_names_the_checkpoint_and_the_previous_one_still_loads(tmp_path, same_name):
    save_iterations(tmp_path, 1)
    folder = tmp_path / checkpoint_name(1 if same_name else 2)
    with files_limited_to(10_000), pytest.raises(CheckpointError, match=f"{folder.name}: File too large"):
        save_checkpoint(folder, {"iteration": 2, "weights": np.zeros(100_000)})
    assert [path.name for path in tmp_path.iterdir()] == [checkpoint_name(1)]
    assert load_newest(tmp_path)[1]["iteration"] == 1


@pytest.mark.parametrize("file", ["state.json", "tensors.safetensors"])
@pytest.mark.parametrize("keep", [0, 0.5, 0.99])
def test_a_truncated_file_is_named(tmp_path, file, keep):
    (folder,) = save_iterations(tmp_path, 1)
    content = (folder / file).read_bytes()
    (folder / file).write_bytes(content[: int(keep * len(content))])
    with pytest.raises(CheckpointError, match=file):
        load_checkpoint(folder)


@pytest.mark.parametrize("file", ["state.json", "tensors.safetensors"])
def test_no_flipped_bit_goes_unnoticed(tmp_path, file):
    """Either the flip is reported with the file's name, or (in JSON's blank space) the state is what it was."""
    (folder,) = save_iterations(tmp_path, 1)
    saved, content = load_checkpoint(folder), (folder / file).read_bytes()
    for position in range(len(content)):
        flipped = bytearray(content)
        flipped[position] ^= 1 << position % 8
        (folder / file).write_bytes(flipped)
        try:
            assert_same(load_checkpoint(folder), saved)
        except CheckpointError as error:
            assert file in str(error)


@pytest.mark.parametrize("content", ["", "{}", "[]", "3", "\x93NUMPY", '{"format": 1, "state": {}}', '{"state": {}}'])
def test_a_foreign_state_file_is_named(tmp_path, content):
    (folder,) = save_iterations(tmp_path, 1)
    (folder / "state.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"state\.json is torn or foreign"):
        load_checkpoint(folder)


def test_another_format_says_which_and_what_to_do(tmp_path):
    (folder,) = save_iterations(tmp_path, 1)
    document = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps(document | {"format": 99}))
    with pytest.raises(CheckpointError, match="has format 99, this rlx reads format 1; load it with the rlx version"):
        load_checkpoint(folder)


@pytest.mark.parametrize("file", ["state.json", "tensors.safetensors"])
def test_a_missing_file_is_named(tmp_path, file):
    (folder,) = save_iterations(tmp_path, 1)
    (folder / file).unlink()
    with pytest.raises(CheckpointError, match=f"is no rlx checkpoint: it has no {file}"):
        load_checkpoint(folder)


def test_a_folder_that_is_not_there_is_no_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match="nowhere is no rlx checkpoint"):
        load_checkpoint(tmp_path / "nowhere")


def test_load_newest_passes_over_a_torn_one_and_says_so(tmp_path, caplog):
    *_, newest = save_iterations(tmp_path, 1, 2, 10)
    (newest / "tensors.safetensors").write_bytes(b"torn")
    path, state = load_newest(tmp_path)
    assert path.name == checkpoint_name(2) and state["iteration"] == 2
    assert "tensors.safetensors is torn" in caplog.text


def test_load_newest_without_one_that_loads_names_every_problem(tmp_path):
    with pytest.raises(CheckpointError, match="holds no checkpoint yet"):
        load_newest(tmp_path)
    for folder in save_iterations(tmp_path, 1, 2):
        (folder / "state.json").unlink()
    with pytest.raises(CheckpointError, match=r"(?s)iter_000002.*iter_000001"):
        load_newest(tmp_path)


def test_checkpoints_are_listed_by_iteration_beyond_six_digits(tmp_path):
    save_iterations(tmp_path, 1_000_000, 999_999, 20)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["iter_000020", "iter_999999", "iter_1000000"]


def test_the_newest_whole_one_is_found_without_its_arrays(tmp_path, monkeypatch):
    save_iterations(tmp_path, 1, 2, 3)
    for iteration, lost in ((3, 1), (2, 4096)):  # of the arrays, and with them their description
        file = tmp_path / checkpoint_name(iteration) / "tensors.safetensors"
        file.write_bytes(file.read_bytes()[:-lost])
    monkeypatch.setattr("rlx.checkpoint.load_checkpoint", lambda folder: pytest.fail(f"{folder} was read"))
    assert newest_whole(tmp_path) == (checkpoint_name(1), tmp_path / checkpoint_name(1))
    assert newest_whole(tmp_path / "nothing") is None


def test_prune_keeps_the_newest_and_those_named(tmp_path):
    save_iterations(tmp_path, 1, 2, 3, 4, 5)
    prune(tmp_path, keep=2, also={checkpoint_name(2)})
    assert [path.name for path in list_checkpoints(tmp_path)] == [checkpoint_name(i) for i in (2, 4, 5)]


def test_what_a_machine_that_nobody_can_ask_has_begun_is_left_for_a_day(tmp_path):
    begun = [tmp_path / f".iter_000001.{machine}-4026531836-7-99.tmp" for machine in ("young", "old")]
    for folder in begun:
        folder.mkdir()
    os.utime(begun[1], (1, 1))
    prune(tmp_path, keep=2, also=set())
    assert list(tmp_path.iterdir()) == begun[:1]


def test_prune_of_fewer_than_it_keeps_deletes_nothing(tmp_path):
    save_iterations(tmp_path, 1)
    prune(tmp_path, keep=3, also=set())
    assert len(list_checkpoints(tmp_path)) == 1
