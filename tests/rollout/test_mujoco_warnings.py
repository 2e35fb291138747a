import subprocess
import sys

import pytest

pytest.importorskip("mujoco")

CHILD = """
import logging, sys
logging.basicConfig(level=logging.WARNING, stream=sys.stdout, format="%(levelname)s %(message)s")
from rlx.rollout.vector import make_envs
envs = make_envs("HalfCheetah-v5", 2, vectorization="in_place")
envs.reset()
for env in envs.envs * 2:
    env.unwrapped.data.qvel[:] = 1e12
    env.step(env.action_space.sample())
"""


@pytest.mark.slow
def test_warnings_of_mujoco_are_logged_once_and_those_for_the_models_author_are_not_shown(tmp_path):
    """gymnasium's model is deprecated in parts, and an unstable simulation is worth a line, not four and a file."""
    result = subprocess.run([sys.executable, "-c", CHILD], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    (line,) = result.stdout.splitlines()
    assert line.startswith("WARNING MuJoCo: Nan, Inf or huge value in QVEL") and "deprecated" not in result.stderr
    assert list(tmp_path.iterdir()) == []
