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
    "cluster": ("cluster", {}),
    "ray": ("ray", {}),
}
RAY = pytest.param("ray", marks=[pytest.mark.slow, pytest.mark.skipif(not find_spec("ray"), reason="needs rlx[ray]")])
ALL = ["inline", "strict", "local", "cluster", RAY]
PROCESSES = ["local", "cluster", RAY]

_opened = weakref.WeakKeyDictionary()
"""By runtime: the engine and its options."""


@contextlib.contextmanager
def opened(name):
    """Give a runtime on the engine of that name; a cluster has two daemons, which end with it."""
    engine, options = ENGINES[name]
    with contextlib.ExitStack() as endings:
        if engine == "cluster":
            key = ClusterKey.create(Path(endings.enter_context(tempfile.TemporaryDirectory())) / "cluster.key")
            head = Daemon(key, "a")
            endings.callback(head.close)
            endings.callback(Daemon(key, "b", head.address).close)
            options = {"address": head.address, "token_file": key.path}
        runtime = endings.enter_context(actors.runtime(engine, **options))
        _opened[runtime] = engine, options
        yield runtime


def another(runtime, **more):
    """Return one more runtime on the engine of that one."""
    engine, options = _opened[runtime]
    return actors.runtime(engine, **options, **more)
