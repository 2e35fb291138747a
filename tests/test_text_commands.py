"""What a user does with a run on text from the command line: export it, talk to it, look at its curves."""

import io
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from rlx.cli import main


@pytest.fixture(scope="module")
def finished(tiny_text, tmp_path_factory):
    """A run of SFT that has ended."""
    folder = tmp_path_factory.mktemp("runs") / "sft"
    with tiny_text("sft", stop={"iterations": 2}).build(folder) as algorithm:
        algorithm.fit()
    return folder


@pytest.fixture
def rlx(finished, tmp_path, monkeypatch, capsys):
    """Run a command beside a copy of that run, `sft`; return its exit code, what it printed, and its errors."""
    shutil.copytree(finished, tmp_path / "sft")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))

    def run(*arguments):
        capsys.readouterr()
        code = main(list(arguments))
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return code, out, err

    return run


# Exports ---------------------------------------------------------------------------------------------------------

FILES = ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]


def names(folder):
    return sorted(path.name for path in Path(folder).iterdir())


def test_a_model_is_exported_to_a_new_or_an_empty_folder_only(rlx, monkeypatch):
    Path("file").write_text("mine")
    Path("full").mkdir()
    Path("full/mine").write_text("mine")
    for taken, why in (("file", "is a file"), ("full", "is not empty"), (".", "is not empty")):
        code, out, err = rlx("export", "sft", "-o", taken)
        assert (code, out) == (2, "")
        assert err == f"rlx: error: {taken} {why}; a model is exported to a new or an empty folder: give another one.\n"
    assert names(".") == ["file", "full", "sft"] and names("full") == ["mine"]

    assert rlx("export", "sft", "-o", "deep/new") == (0, "deep/new\n", "")
    assert names("deep/new") == FILES and names("deep") == ["new"]
    assert rlx("export", "sft", "-o", "deep/new")[0] == 2  # what was exported is not overwritten
    Path("empty").mkdir(mode=0o700)
    monkeypatch.chdir("empty")  # which stays the folder that the shell is in
    assert rlx("export", "../sft", "-o", ".")[0] == 0
    assert names(".") == names("../empty") == FILES


@pytest.mark.parametrize("folder", ["/proc/nowhere", "/dev/full/x", "sft/config.yaml/x"])
def test_a_folder_that_cannot_be_written_costs_one_sentence(folder, rlx):
    code, _, err = rlx("export", "sft", "-o", folder)
    assert code == 2
    assert re.fullmatch(
        f"rlx: error: no model can be written to {folder}: .*; give another folder, or make room.\n", err
    )


def test_an_export_that_fails_half_way_leaves_what_was_there(rlx, monkeypatch):
    def fails(model, tokenizer, folder):
        (Path(folder) / "config.json").write_text("half")
        raise OSError(28, "No space left on device")

    before = names("sft"), (Path("sft/model") / "model.safetensors").read_bytes()
    monkeypatch.setattr("rlx.text_models.export_language_model", fails)
    Path("empty").mkdir()
    for arguments in (["-o", "new"], ["-o", "empty"], []):
        code, _, err = rlx("export", "sft", *arguments)
        assert code == 2 and "No space left on device" in err
    assert names(".") == ["empty", "sft"] and not names("empty")
    assert (names("sft"), (Path("sft/model") / "model.safetensors").read_bytes()) == before


def test_a_run_has_a_place_for_its_model_and_a_checkpoint_none(rlx):
    Path("sft/model/left_over").write_text("of an older export")
    before = set(names("sft"))
    holder = "import sys\nfrom pathlib import Path\nfrom rlx.checkpoint import unfinished\n"
    holder += "with unfinished(Path('sft/model')):\n    print(flush=True)\n    sys.stdin.read()\n"
    with subprocess.Popen(
        [sys.executable, "-c", holder], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        other.stdout.readline()
        (theirs,) = set(names("sft")) - before
        assert rlx("export", "sft") == (0, "sft/model\n", "")
        assert set(names("sft")) == {*before, theirs}  # another export is at work
        other.kill()
    assert set(names("sft")) == {*before, theirs}
    assert rlx("export", "sft") == (0, "sft/model\n", "")
    assert set(names("sft")) == before
    assert names("sft/model") == FILES
    code, _, err = rlx("export", "sft/checkpoints/iter_000002")
    assert code == 2 and "say with -o where this one goes" in err
    assert "model" not in names("sft/checkpoints/iter_000002")
    assert rlx("export", "sft/checkpoints/iter_000002", "-o", "of_it")[0] == 0


# Chats -----------------------------------------------------------------------------------------------------------


def test_a_chat_goes_on_after_an_empty_line_and_one_that_cannot_be_read(rlx, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("12+\n\nhello\n3+\n"))
    code, out, err = rlx("chat", "sft", "--max-new-tokens", "3")
    assert code == 0
    assert len(out.splitlines()) == 2  # one for each line that it could read
    assert err == "rlx: error: the prompt has characters that the tokenizer has no token for: 'e', 'h', 'l', 'o'.\n"


# What is shown ---------------------------------------------------------------------------------------------------


def test_the_end_of_supervised_training_says_what_was_learned(rlx, tiny_text):
    rows = {"source": "rlx.envs.addition:rows", "kwargs": {"split": "sft", "seed": 5}, "num_rows": 8}
    Path("config.yaml").write_text(tiny_text("sft", evaluation=rows | {"interval": 1}).to_yaml())
    code, out, _ = rlx("train", "config.yaml", "--run-dir", "run", "--set", "stop.iterations=2")
    lines = out.splitlines()
    assert code == 0 and re.fullmatch(r"learned  loss \d\.\d\d, eval loss \d\.\d\d", lines[1])
    assert lines[4:6] == ["next     rlx eval run", "         rlx plot run"]
    assert rlx("plot", "run") == (0, "run/curve.png\n", "")


def test_only_what_can_be_done_is_suggested(rlx):
    _, out, _ = rlx("train", "--resume", "sft", "--set", "stop.iterations=3")
    assert "next     rlx plot sft" in out and "rlx eval" not in out  # there are no rows to evaluate it on
    assert rlx("plot", "sft") == (0, "sft/curve.png\n", "")
