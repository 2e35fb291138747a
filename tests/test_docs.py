"""The documents say what is there: the README's tree, the generated pages, the commands, the links."""

import fnmatch
import importlib.util
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from rlx import cli

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = [README, ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
IGNORED = [line.strip("/") for line in (ROOT / ".gitignore").read_text().split()]
FULLY_LISTED = ("src/rlx", "algorithms", "configs")


def blocks(page: Path, language: str) -> list[str]:
    """Return the fenced blocks of a page in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


def tree() -> list[tuple[str, str]]:
    """Return (path, phrase) of every line of the README's tree; two spaces of indentation are one folder."""
    entries, folders = [], []
    for line in README.read_text().split("<!-- tree")[1].split("```")[1].strip("\n").splitlines():
        name, _, phrase = line.strip().partition(" ")
        depth = (len(line) - len(line.lstrip())) // 2
        folders[depth:] = [name.rstrip("/")]
        entries.append(("/".join(folders), phrase.strip()))
    return entries


def is_part_of_the_project(path: Path) -> bool:
    return not any(fnmatch.fnmatch(part, pattern) for part in path.relative_to(ROOT).parts for pattern in IGNORED)


def generator():
    """Return docs/generate.py as a module."""
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_readme_tree_names_every_top_level_folder():
    there = {path.name for path in ROOT.iterdir() if path.is_dir() and not path.name.startswith(".")}
    there = {name for name in there if is_part_of_the_project(ROOT / name)}
    assert there <= {path.split("/")[0] for path, _ in tree()}


@pytest.mark.parametrize("folder", FULLY_LISTED)
def test_the_readme_tree_names_every_file_of(folder):
    there = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and path.name != "__init__.py" and is_part_of_the_project(path)
    }
    listed = {path for path, _ in tree() if path.startswith(f"{folder}/") and not (ROOT / path).is_dir()}
    assert listed == there


def test_the_readme_tree_names_nothing_twice_and_nothing_that_is_not_there():
    paths = [path for path, _ in tree()]
    assert len(paths) == len(set(paths))
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_the_readme_tree_has_a_phrase_for_every_line():
    assert [path for path, phrase in tree() if not phrase] == []


@pytest.mark.parametrize("name", ["metrics.md", "configuration.md", "text_configuration.md", "rayjob.yaml"])
def test_a_generated_page_is_what_the_code_says(name):
    assert (ROOT / "docs" / name).read_text() == generator().pages()[name], "run: python docs/generate.py"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_in_a_page_can_be_typed(page):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for line in "".join(blocks(page, "bash")).splitlines():
        program, *words = shlex.split(line, comments=True) or [""]
        if program.removeprefix(".venv/bin/") == "rlx":
            cli._parser().parse_args(words)
        elif program == "make":
            assert set(words) <= targets, line


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_to_a_file_leads_to_one(page):
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text())]
    assert [link for link in links if "://" not in link and link and not (page.parent / link).exists()] == []


@pytest.mark.slow
def test_the_python_of_the_readme_runs(tmp_path):
    for block in blocks(README, "python"):
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", block], cwd=tmp_path, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr
