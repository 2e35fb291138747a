"""The engines that promise the same, for the tests of it. A new one joins by a line in ENGINES."""

import atexit
import functools
import tempfile
import weakref
from importlib.util import find_spec
from pathlib import Path

import pytest

from rlx import actors
from rlx.actors.cluster.credentials import ClusterKey
from tests.actors.cluster.conftest import Daemon


@functools.cache
def a_cluster():
    """Return the options of a runtime on two daemons, which end with this process."""
    folder = tempfile.TemporaryDirectory()
    key = ClusterKey.create(Path(folder.name) / "cluster.key")
    head = Daemon(key, "a")
    second = Daemon(key, "b", head.address)
    for ending in (folder.cleanup, head.end, second.end):  # the last one first
        atexit.register(ending)
    return {"address": head.address, "token_file": key.path}


ENGINES = {
    "inline": ("inline", dict),
    "strict": ("inline", lambda: {"strict": True}),
    "local": ("local", dict),
    "cluster": ("cluster", a_cluster),
    "ray": ("ray", dict),
}
RAY = pytest.param("ray", marks=[pytest.mark.slow, pytest.mark.skipif(not find_spec("ray"), reason="needs rlx[ray]")])
ALL = ["inline", "strict", "local", "cluster", RAY]
PROCESSES = ["local", "cluster", RAY]

_names = weakref.WeakKeyDictionary()


def opened(name, **options):
    """Return a runtime on the engine of that name."""
    engine, fixed = ENGINES[name]
    runtime = actors.runtime(engine, **fixed(), **options)
    _names[runtime] = name
    return runtime


def another(runtime, **options):
    """Return one more on the engine of that runtime."""
    return opened(_names[runtime], **options)
