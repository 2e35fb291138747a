"""A virtual environment for every peer, as their pins clash with each other."""

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

PACKAGES = {
    "sb3": [
        *("torch==2.13.0", "stable-baselines3==2.9.2", "gymnasium[classic-control,mujoco]==1.4.0", "mujoco==4.0.0"),
        *("ale-py==0.12.1", "opencv-python-headless==5.0.0.93"),
    ],
    # Ray pins gymnasium to 1.2.2.
    "rllib": ["torch==2.13.0", "ray[rllib]==2.60.0", "gymnasium[classic-control,mujoco]==1.2.2", "mujoco==4.0.0"],
    # Sample Factory needs a gymnasium below 1.0 and a numpy below 2.
    "sample_factory": [
        *("torch==2.13.0", "sample-factory==2.1.1", "gymnasium[classic-control]==0.29.1", "numpy==1.26.4"),
        "setuptools==80.9.0",  # whose pkg_resources it imports
    ],
    "rlox": ["torch==2.13.0", "rlox==1.2.0", "gymnasium[classic-control,mujoco]==1.4.0", "mujoco==4.0.0"],
    "trl": ["torch==2.13.0", "trl==1.16.0", "transformers==5.23.0", "datasets==5.2.0", "accelerate==1.15.0"],
}
INSTALL_TIMEOUT_S = 1800


def python_of(peer: str, folder: Path, given: Mapping[str, str]) -> str:
    """Return the interpreter that runs a peer: the given one, else that of its environment in `folder`, made if needed.

    rlx itself runs in the environment of this process.
    """
    if peer in given:
        return given[peer]
    if peer not in PACKAGES:
        return sys.executable
    home = folder.resolve() / peer
    python, pins, stamp = home / "bin" / "python", "\n".join(PACKAGES[peer]), home / "installed"
    if not stamp.exists() or stamp.read_text() != pins:
        print(f"installing {peer} into {home}", flush=True)
        for command in (
            [sys.executable, "-m", "venv", "--clear", str(home)],
            [str(python), "-m", "pip", "install", "--quiet", *PACKAGES[peer]],
        ):
            subprocess.run(command, check=True, timeout=INSTALL_TIMEOUT_S)
        stamp.write_text(pins)
    return str(python)
