"""What an import path pkg.module:name in a config refers to: a source, a tokenizer, a reward function."""

from __future__ import annotations

import pkgutil
from typing import Any

from rlx.errors import ConfigError


def is_import_path(text: str) -> bool:
    """Return whether a text is an import path, rather than a file or the name of a model."""
    module, colon, name = text.rpartition(":")
    return bool(colon) and all(part.isidentifier() for part in (*module.split("."), *name.split(".")))


def import_function(path: str, what: str) -> Any:
    """Return the function or class at an import path; ConfigError says that `what`, "the source" say, is not there."""
    if not is_import_path(path):
        raise ConfigError(f'{what} "{path}" is no import path; write pkg.module:function.')
    try:
        found = pkgutil.resolve_name(path)
    except ModuleNotFoundError as error:
        if not f"{path.rpartition(':')[0]}.".startswith(f"{error.name}."):
            raise  # the module is there, and something that it imports is not
        raise ConfigError(f'{what} "{path}": there is no module {error.name} on the Python path.') from error
    except AttributeError as error:
        raise ConfigError(f'{what} "{path}": {error}.') from error
    if not callable(found):
        raise ConfigError(f'{what} "{path}" is of type {type(found).__name__}; it must be a function.')
    return found
