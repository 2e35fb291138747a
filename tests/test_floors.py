"""The house has floors: a module imports lower floors and its own folder, never upwards or sideways."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = {
    "rlx": ROOT / "src" / "rlx",
    "rlx.algorithms": ROOT / "algorithms",
    "rlx.envs": ROOT / "envs",
    "rlx.configs": ROOT / "configs",
}
FLOOR = {
    **dict.fromkeys(["errors", "hub", "out_of_memory", "trajectory"], 0),
    "functional": 1,
    **dict.fromkeys(["nets", "text"], 2),
    "actors": 3,
    "generation": 3,
    **dict.fromkeys(["rollout", "learner"], 4),
    **dict.fromkeys(["algorithms", "envs", "configs"], 6),
    **dict.fromkeys(["", "cli"], 7),  # "" is rlx/__init__.py, the public names
}
ENGINE_FLOOR = 5
"""Of every other module that stands directly in src/rlx: settings, config, checkpoint, algorithm ..."""
SINGLE_FILES = (0, ENGINE_FLOOR, 7)
"""Floors whose modules stand side by side in src/rlx and may import each other."""
OF_REINFORCEMENT_LEARNING = re.compile(
    r"reward|polic(y|ies)|rollout|trajector|env(ironment)?[ _]?runner|episode|gymnasium|advantage", re.IGNORECASE
)


def modules() -> dict[str, Path]:
    """Return every module of the package: dotted name -> file."""
    found = {}
    for package, folder in FOLDERS.items():
        for file in folder.rglob("*.py"):
            parts = file.relative_to(folder).with_suffix("").parts
            found[".".join([package, *(part for part in parts if part != "__init__")])] = file
    return found


MODULES = modules()


def house(module: str) -> str:
    """Return the part of the house that a module is in: rlx.nets.flat -> nets, rlx -> ""."""
    return module.split(".")[1] if "." in module else ""


def floor(module: str) -> int:
    return FLOOR.get(house(module), ENGINE_FLOOR)


def imports(module: str) -> Iterator[str]:
    """Yield the absolute name of everything that a module imports, wherever in the file."""
    package = module if MODULES[module].name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package.split(".")[: len(package.split(".")) + 1 - node.level]) if node.level else ""
            source = ".".join(part for part in (base, node.module) if part)
            for alias in node.names:
                full = f"{source}.{alias.name}"
                yield full if full in MODULES else source


@pytest.mark.parametrize("module", sorted(MODULES))
def test_a_module_imports_only_lower_floors_and_its_own_folder(module):
    own_folder = house(module) if floor(module) != ENGINE_FLOOR else None
    for imported in imports(module):
        if imported.split(".")[0] != "rlx":
            assert imported.split(".")[0] not in ("algorithms", "envs", "configs"), (
                f"{module} imports {imported}, a second copy of rlx.{imported}"
            )
            continue
        same_place = house(imported) == own_folder or floor(imported) == floor(module) in SINGLE_FILES
        assert floor(imported) < floor(module) or same_place, (
            f"{module} (floor {floor(module)}) imports {imported} (floor {floor(imported)})"
        )


def actor_modules() -> list[str]:
    return sorted(module for module in MODULES if house(module) == "actors")


@pytest.mark.parametrize("module", actor_modules())
def test_the_actor_core_imports_nothing_of_rlx_but_errors(module):
    ours = {imported for imported in imports(module) if imported.split(".")[0] == "rlx"}
    assert {house(imported) for imported in ours} <= {"actors", "errors"}


@pytest.mark.parametrize("module", actor_modules())
def test_the_actor_core_knows_nothing_of_reinforcement_learning(module):
    for number, line in enumerate(MODULES[module].read_text().splitlines(), 1):
        assert not OF_REINFORCEMENT_LEARNING.search(line), f"{MODULES[module].name}:{number}: {line.strip()}"


def test_every_module_stands_on_a_known_floor():
    folders = {house(module) for module, file in MODULES.items() if file.parent != FOLDERS["rlx"]}
    assert folders <= FLOOR.keys(), f"give {folders - FLOOR.keys()} a floor in this table and in the design"
