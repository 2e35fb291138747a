"""What ships, and what an import costs."""

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SETUPTOOLS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]

LOADED = "import json, sys, {module}; print(json.dumps(sorted({{name.split('.')[0] for name in sys.modules}})))"


def folder_of(package: str) -> Path:
    """Return the folder that pyproject.toml gives a package, by its nearest ancestor in package-dir."""
    inside: list[str] = []
    while package not in SETUPTOOLS["package-dir"]:
        package, _, name = package.rpartition(".")
        inside.insert(0, name)
    return ROOT.joinpath(SETUPTOOLS["package-dir"][package], *inside)


def test_every_folder_with_python_files_is_in_the_package_list_and_no_other():
    roots = [ROOT / folder for folder in SETUPTOOLS["package-dir"].values()]
    holding_code = {file.parent for root in roots for file in root.rglob("*.py")}
    assert holding_code == {folder_of(package) for package in SETUPTOOLS["packages"]}


def test_every_package_has_an_init_file():
    assert all((folder_of(package) / "__init__.py").is_file() for package in SETUPTOOLS["packages"])


@pytest.mark.parametrize("module", ["rlx", "rlx.cli"])
def test_importing_is_quick_because_nothing_heavy_is_loaded(module):
    done = subprocess.run(
        [sys.executable, "-c", LOADED.format(module=module)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    heavy = {"torch", "transformers", "gymnasium", "matplotlib", "ray", "grpc", "mujoco", "tensorboard"}
    assert not heavy & set(json.loads(done.stdout))
