"""Builds the wheel, installs it into a fresh environment outside the checkout, and trains from there.

Run by `make wheel-test`. What only the checkout provides would be missing here.
"""

import os
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    """Build, install, train, resume, evaluate; the first failure ends the check."""
    with tempfile.TemporaryDirectory(prefix="rlx-wheel-") as folder:
        outside = Path(folder)
        run(sys.executable, "-m", "build", "--wheel", "--outdir", folder, str(ROOT), cwd=outside)
        (wheel,) = outside.glob("*.whl")
        venv.create(outside / "env", with_pip=True)
        python, rlx = outside / "env/bin/python", outside / "env/bin/rlx"
        run(python, "-m", "pip", "install", "--quiet", "--constraint", ROOT / "constraints.txt", wheel, cwd=outside)
        run(rlx, "list", cwd=outside)
        run(rlx, "train", "ppo", "--run-dir", "run", "--set", "stop.iterations=3", cwd=outside)
        run(rlx, "train", "--resume", "run", "--set", "stop.iterations=5", cwd=outside)
        run(rlx, "train", "ppo", "--set", "env_runners.num_env_runners=2", "--set", "stop.iterations=2", cwd=outside)
        run(rlx, "plot", "run", "-o", "curve.png", cwd=outside)
        run(rlx, "eval", "run", "--episodes", "2", cwd=outside)
    print("the wheel installs and trains outside the checkout")


def run(*command: object, cwd: Path) -> None:
    """Run a command that must succeed, without a path into the checkout."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    print("$", *command, flush=True)
    subprocess.run([str(part) for part in command], cwd=cwd, env=environment, check=True, timeout=900)


if __name__ == "__main__":
    main()
