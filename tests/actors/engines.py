"""The engines that promise the same, for the tests of it. A new one joins by a line here."""

from importlib.util import find_spec

import pytest

ENGINES = {
    "inline": ("inline", {}),
    "strict": ("inline", {"strict": True}),
    "local": ("local", {}),
    "ray": ("ray", {}),
}
RAY = pytest.param("ray", marks=[pytest.mark.slow, pytest.mark.skipif(not find_spec("ray"), reason="needs rlx[ray]")])
ALL = ["inline", "strict", "local", RAY]
PROCESSES = ["local", RAY]
