"""The engines that promise the same, for the tests of it. A new one joins by a line in ENGINES."""

import contextlib
import tempfile
import weakref
from importlib.util import find_spec
from pathlib import Path

import pytest

from rlx import actors
from rlx.actors.cluster.credentials import ClusterKey
from tests.actors.cluster.conftest import Daemon

ENGINES = {
    "inline": ("inline", {}),
    "strict": ("inline", {"strict": True}),
    "local": ("local", {}),
    "cluster": ("cluster", {"apart": True}),
    "home": ("cluster", {"apart": False}),
    "ray": ("ray", {}),
}
RAY = pytest.param("ray", marks=[pytest.mark.slow, pytest.mark.skipif(not find_spec("ray"), reason="needs rlx[ray]")])
HOME = pytest.param("home", marks=pytest.mark.slow)
ALL = ["inline", "strict", "local", "cluster", HOME, RAY]
PROCESSES = ["local", "cluster", HOME, RAY]

_opened = weakref.WeakKeyDictionary()
"""By runtime: the engine and its options."""


@contextlib.contextmanager
def opened(name, preload=("numpy",)):
    """Give a runtime on the engine of that name; a cluster has two daemons, which end with it.

    As machines of their own they are reached by links; at "home", on the driver's, it starts the actors itself.
    preload: what many of the actors need; each machine imports it once, or else each of these actors.
    """
    engine, options = ENGINES[name]
    with contextlib.ExitStack() as endings:
        if engine == "cluster":
            key = ClusterKey.create(Path(endings.enter_context(tempfile.TemporaryDirectory())) / "cluster.key")
            head = Daemon(key, "a", **options)
            endings.callback(head.close)
            endings.callback(Daemon(key, "b", head.address, **options).close)
            options = {"address": head.address, "token_file": key.path}
        preloads = {"preload": preload} if engine in ("local", "cluster") else {}
        runtime = endings.enter_context(actors.runtime(engine, **options, **preloads))
        _opened[runtime] = engine, options
        yield runtime


def another(runtime, **more):
    """Return one more runtime on the engine of that one, for few actors."""
    engine, options = _opened[runtime]
    preloads = {"preload": ("numpy",)} if engine in ("local", "cluster") else {}
    return actors.runtime(engine, **options, **preloads, **more)
