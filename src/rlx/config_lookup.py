"""What a name in a config refers to: an algorithm's module, a shipped config file, an environment.

Looks names up and makes nothing. `subject` is the first half of the sentence to raise when a look-up fails:
'environment.id is "CartPol-v1" (ppo.yaml:3)'.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import re
import sys
import zlib
from collections.abc import Callable, Iterable
from difflib import SequenceMatcher
from pathlib import Path
from types import ModuleType
from typing import Any

from rlx.errors import ConfigError


def list_algorithms() -> list[tuple[str, str]]:
    """Return the name and the first docstring line of every shipped algorithm, without importing any."""
    files = sorted(path for path in _shipped("rlx.algorithms").glob("*.py") if not path.stem.startswith("_"))
    return [(path.stem, _first_line(ast.get_docstring(ast.parse(path.read_text())))) for path in files]


def list_configs() -> list[tuple[str, str]]:
    """Return the name and the first comment line of every shipped config."""
    return [(path.stem, _first_line(path.read_text()).lstrip("# ")) for path in sorted(_config_folder().glob("*.yaml"))]


def find_config(path_or_name: str | Path) -> Path:
    """Return the YAML file at a path, else the shipped config of that name (ppo, ppo.yaml or configs/ppo.yaml)."""
    path = Path(path_or_name).expanduser()
    if path.is_file():
        return path
    name = path.stem if path.suffix in (".yaml", ".yml") else path.name
    shipped = _config_folder() / f"{name}.yaml"
    if path.parent in (Path(), Path("configs")) and shipped.is_file():
        return shipped
    names = [name for name, _ in list_configs()]
    raise ConfigError(
        f'there is no config "{path_or_name}": it is neither a file nor one of the shipped ones '
        f"({_listed(names)}).{did_you_mean(name, names)}"
    )


def command_of_run(run: Path) -> str:
    """Return the command that trains what shipped configs expect in a folder such as runs/sft; "" for other folders."""
    if "runs" not in run.parts[:-1]:
        return ""
    shipped = [name for name, _ in list_configs()]
    name = next((name for name in (f"{run.name}_{run.parent.name}", run.name) if name in shipped), None)
    return "" if name is None else f"rlx train {name} --run-dir {run}"


def config_class(name: str, folder: Path, base: type, subject: str) -> type:
    """Return the one subclass of `base` that an algorithm's module defines.

    The name is a shipped algorithm, a dotted module, or the path of a .py file, relative to `folder`.
    """
    if name.endswith(".py") or "/" in name:
        module = _load_file((folder / Path(name).expanduser()).resolve(), subject)
    elif "." in name or name == "__main__":
        module = _import(name, subject)
    else:
        shipped = [shipped for shipped, _ in list_algorithms()]
        if name not in shipped:
            raise ConfigError(
                f"{subject}; the shipped ones are {_listed(shipped)}, and your own is written as pkg.module or "
                f"./file.py.{did_you_mean(name, shipped)}"
            )
        module = importlib.import_module(f"rlx.algorithms.{name}")
    classes = {value for value in vars(module).values() if isinstance(value, type) and issubclass(value, base)}
    own = sorted((one for one in classes if one.__module__ == module.__name__), key=lambda one: one.__name__)
    if len(own) != 1:
        found = ", ".join(one.__name__ for one in own) or "none"
        raise ConfigError(
            f"{subject}; its module must define exactly one {base.__name__} subclass and defines {found}."
        )
    return own[0]


def reference(config: type) -> str:
    """Return the `algorithm:` name under which `config_class` finds this class again."""
    module = config.__module__
    if module.startswith(_FILE_PREFIX):
        return str(sys.modules[module].__file__)
    return module.removeprefix("rlx.algorithms.")


def check_environment(id: str | Callable[..., Any] | None, subject: str) -> None:
    """Raise ConfigError where no environment can be made from `id`: unknown, or its package is not installed."""
    if id is None:
        raise ConfigError(
            "environment.id is not set; give a gymnasium id such as CartPole-v1, an import path pkg.module:Name, "
            "or in Python a class or a factory."
        )
    if callable(id):
        return
    module, colon, name = id.rpartition(":")
    if "<" in name:
        raise ConfigError(
            f"{subject}; a local class or function cannot be found again by its name: move it to the top level of a "
            "module, or pass it in Python."
        )
    if colon and all(part.isidentifier() for part in name.split(".")):
        _check_import_path(module, name, subject)
        return
    if colon:  # gymnasium's own spelling: importing the module registers the id
        _import(module, subject)
    _check_gymnasium_id(name, subject)


def check_network(custom: str | Callable[..., Any] | None, subject: str) -> None:
    """Raise ConfigError where a user's network cannot be found."""
    if custom is None or callable(custom):
        return
    module, _, name = custom.rpartition(":")
    if not all(part.isidentifier() for part in (*module.split("."), *name.split("."))):
        raise ConfigError(f"{subject}; write pkg.module:Class, of a class at the top level of a module.")
    _check_import_path(module, name, subject)


def check_callable(path: str, subject: str) -> None:
    """Raise ConfigError where the function of an import path pkg.module:name cannot be found."""
    module, _, name = path.rpartition(":")
    if not all(part.isidentifier() for part in (*module.split("."), *name.split("."))):
        raise ConfigError(f"{subject}; write pkg.module:name, of a function at the top level of a module.")
    _check_import_path(module, name, subject)


def check_callbacks(specs: Iterable[Any]) -> None:
    """Raise ConfigError where a callback cannot be found by its import path."""
    for spec in specs:
        if not isinstance(spec.make, str):
            continue
        module, colon, name = spec.make.rpartition(":")
        subject = f'callbacks.classes names "{spec.make}"'
        if not colon or not all(part.isidentifier() for part in name.split(".")):
            raise ConfigError(
                f"{subject}; write pkg.module:Name, a class at the top level of a module. A local class can only be "
                "passed in Python."
            )
        _check_import_path(module, name, subject)


def did_you_mean(word: str, candidates: Iterable[str], count: int = 1, key: Callable[[str], str] = str) -> str:
    """Return " Did you mean X?" with the nearest candidates, or nothing; `key` gives the part to compare."""

    def likeness(candidate: str) -> float:
        mine, other = word.lower(), key(candidate).lower()
        # The head counts as well as the whole, so that clp finds clip_range and cartpole finds CartPole-v1.
        return max(SequenceMatcher(None, mine, text).ratio() for text in (other, other[: len(mine) + 1]))

    ranked = sorted(((likeness(one), one) for one in candidates), reverse=True)[:count]
    *others, last = [one for score, one in ranked if score >= 0.6] or [""]
    return f" Did you mean {', '.join(others)}{' or ' if others else ''}{last}?" if last else ""


_FILE_PREFIX = "rlx_file_"

# Where an environment's code lives -> the package it needs, and the command that installs it.
_PACKAGES = {
    "gymnasium.envs.mujoco": ("mujoco", "pip install 'rlx[mujoco]'"),
    "gymnasium.envs.box2d": ("Box2D", "pip install 'gymnasium[box2d]'"),
    "gymnasium.envs.phys2d": ("jax", "pip install 'gymnasium[jax]'"),
    "gymnasium.envs.tabular": ("jax", "pip install 'gymnasium[jax]'"),
    "ale_py": ("ale_py", "pip install 'rlx[atari]'"),
}
_ATARI = re.compile(r"ALE/|.*(NoFrameskip|Deterministic)-v[04]$")


def _check_gymnasium_id(id: str, subject: str) -> None:
    from gymnasium.envs.registration import registry

    has_atari = importlib.util.find_spec("ale_py") is not None
    if id not in registry and has_atari:
        importlib.import_module("ale_py")  # registers its ids
    if id not in registry and not has_atari and _ATARI.match(id):
        raise ConfigError(f"{subject}; it needs ale_py, which is not installed: pip install 'rlx[atari]'.")
    # What gymnasium dropped stays registered, with a function that raises in place of the class.
    alive = [name for name, spec in registry.items() if not getattr(spec.entry_point, "__name__", "").startswith("_")]
    if id not in alive:
        near = [name for name in alive if ("/" in name) == ("/" in id)]  # a thousand ids of games are like anything
        raise ConfigError(f"{subject}; gymnasium has no such environment.{did_you_mean(id, near, count=3)}")
    for prefix, (package, cure) in _PACKAGES.items():
        if str(registry[id].entry_point).startswith(prefix) and importlib.util.find_spec(package) is None:
            raise ConfigError(f"{subject}; it needs {package}, which is not installed: {cure}.")


def _check_import_path(module_name: str, name: str, subject: str) -> None:
    found: Any = _import(module_name, subject)
    for part in name.split("."):
        if not hasattr(found, part):
            cure = " put it into a module, where it can be found again." if module_name == "__main__" else ""
            near = did_you_mean(part, [one for one in dir(found) if not one.startswith("_")])
            raise ConfigError(f"{subject}; {module_name} has no {name}{';' if cure else '.'}{cure or near}")
        found = getattr(found, part)
    if not callable(found):
        raise ConfigError(f"{subject}; it is of type {type(found).__name__}, and must be a class or a factory.")


def _import(name: str, subject: str) -> ModuleType:
    if not all(part.isidentifier() for part in name.split(".")):
        raise ConfigError(f'{subject}; "{name}" is not the name of a module.')
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if not f"{name}.".startswith(f"{error.name}."):
            raise  # the module is there, and something that it imports is not
        raise ConfigError(f"{subject}; there is no module {error.name} on the Python path.") from error


def _load_file(path: Path, subject: str) -> ModuleType:
    """Return the module in a .py file, under a name that depends on its path only."""
    import cloudpickle

    if not path.is_file():
        raise ConfigError(f"{subject}; there is no file {path}.")
    name = f"{_FILE_PREFIX}{path.stem}_{zlib.crc32(str(path).encode()):08x}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"{subject}; {path} is not a Python file.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # before it runs: pydantic and dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    cloudpickle.register_pickle_by_value(module)  # other processes cannot import this name
    return module


def _shipped(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    assert spec is not None and spec.submodule_search_locations, f"rlx is installed without {package}"
    return Path(spec.submodule_search_locations[0])


def _config_folder() -> Path:
    return _shipped("rlx.configs")


def _first_line(text: str | None) -> str:
    return (text or "").strip().partition("\n")[0]


def _listed(names: list[str]) -> str:
    return ", ".join(names) or "none"
