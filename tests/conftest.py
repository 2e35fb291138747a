"""Fixtures for tests of more than one folder."""

import contextlib
import gc
import importlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.polling import until

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell starts its background jobs so, and what they start; Ctrl-C is tested here.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish() -> None:
    """Have gc.collect(), which many tests call, skip what was there before: with torch's modules it takes 0.1 s."""
    gc.collect()
    gc.freeze()


TOY_RUNTIME = Path(__file__).parent / "toy_runtime.py"
TEXT_DRIVER = Path(__file__).parent / "text_driver.py"


@dataclass
class Toy:
    """A running toy_runtime.py."""

    driver: subprocess.Popen[str]
    folder: Path
    pids: dict[str, int]

    def update(self, actor: str, **update: Any) -> None:
        """Have the driver tell something about an actor."""
        assert self.driver.stdin is not None and self.driver.stdout is not None
        print(json.dumps({"actor": actor, "update": update}), file=self.driver.stdin, flush=True)
        assert self.driver.stdout.readline() == "ok\n"

    def log(self, actor: str) -> str:
        return (self.folder / "logs" / f"{actor}.log").read_text()


@pytest.fixture
def gate(tmp_path):
    """A path an actor can wait on, and the function that lets one of those who wait go on."""
    path = str(tmp_path / "gate")
    os.mkfifo(path)

    def open_gate():
        with open(path, "w") as fifo:
            fifo.write("open")

    return path, open_gate


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 256 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "none", folder], capture_output=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip("needs the right to mount a file system of its own")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.fixture
def memory_group():
    """A control group in which processes may have 400 MiB together."""
    version_2 = Path("/sys/fs/cgroup/cgroup.controllers").exists()
    root = Path("/sys/fs/cgroup") if version_2 else Path("/sys/fs/cgroup/memory")
    group = root / f"rlx-test-{uuid.uuid4().hex[:8]}"
    try:
        group.mkdir()
        (group / ("memory.max" if version_2 else "memory.limit_in_bytes")).write_text(str(400 * 2**20))
    except OSError as error:
        with contextlib.suppress(OSError):
            group.rmdir()
        pytest.skip(f"needs the right to make a control group with a memory limit ({error})")
    yield group
    until(lambda: not (group / "cgroup.procs").read_text())
    group.rmdir()


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """Start drivers with actors: toy(name=method, ...); their folders are in a temporary directory of this test."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.delenv("PYTHONBREAKPOINT", raising=False)
    with contextlib.ExitStack() as drivers:

        def start(**methods: str) -> Toy:
            driver = subprocess.Popen(
                [sys.executable, str(TOY_RUNTIME), json.dumps(methods)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            drivers.callback(_end, driver)
            assert driver.stdout is not None
            found = json.loads(driver.stdout.readline())
            drivers.callback(_kill, found["pids"].values())
            return Toy(driver, Path(found["folder"]), found["pids"])

        yield start


def _end(driver: subprocess.Popen[str]) -> None:
    with contextlib.suppress(ProcessLookupError):
        driver.send_signal(signal.SIGCONT)
    driver.communicate(timeout=20)


def _kill(pids: Any) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


_SMALL = {
    "vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64, "bos_token_id": 2, "eos_token_id": 1, "pad_token_id": None,
}  # fmt: skip
_GROUPED = _SMALL | {"num_key_value_heads": 2}
_WIDE = _GROUPED | {"head_dim": 8}
LANGUAGE_MODELS = {
    "gpt2": {"model_type": "gpt2", "vocab_size": 40, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    | {"bos_token_id": 1, "eos_token_id": 1},
    "llama": _GROUPED | {"model_type": "llama"},
    "qwen2": _GROUPED
    | {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    "qwen3": _WIDE | {"model_type": "qwen3"},
    "gemma": _WIDE | {"model_type": "gemma"},
    "gemma2": _WIDE | {"model_type": "gemma2", "sliding_window": 4, "final_logit_softcapping": 2.0},
    "gemma3_text": _WIDE | {"model_type": "gemma3_text", "sliding_window": 4},
    "mistral": _GROUPED | {"model_type": "mistral", "sliding_window": 4},
    "phi": _SMALL | {"model_type": "phi"},
    "phi3": _GROUPED | {"model_type": "phi3"},
}
"""Small configurations of the usual families; several attend within a window of four tokens in some layers."""


@pytest.fixture
def language_model_configs() -> dict[str, dict[str, Any]]:
    """Configurations by family; from here on arithmetic has one thread, as two would mostly wait for each other."""
    import torch

    torch.set_num_threads(1)
    return LANGUAGE_MODELS


# Runs on text ----------------------------------------------------------------------------------------------------

LLAMA = {
    "model_type": "llama",
    **{"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1},
    **{"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 32},
}
TEXT_CONFIGS = {
    "sft": "SFTConfig",
    "dpo": "DPOConfig",
    "reward_model": "RewardModelConfig",
    "grpo": "GRPOConfig",
    "rlhf_ppo": "RLHFPPOConfig",
}


@pytest.fixture(scope="session")
def tiny_text():
    """Make the config of the smallest run of an algorithm on additions: tiny_text("grpo", training={"lr": 0.1}).

    Rewards are random ones that depend on every character of a batch: no completion changes unnoticed.
    """
    return tiny_text_config


def tiny_text_config(algorithm: str, **sections: dict[str, Any]) -> Any:
    from rlx.envs import addition

    made = getattr(importlib.import_module(f"rlx.algorithms.{algorithm}"), TEXT_CONFIGS[algorithm])()
    made.model(config=LLAMA, tokenizer="rlx.envs.addition:tokenizer").learners(torch_threads=1)
    made.training(lr=3e-3).generation(max_new_tokens=5).reporting(progress="none")
    if algorithm == "sft":
        made.data("rlx.envs.addition:rows", kwargs={"split": "sft", "limit": 40}, rows_per_iteration=16)
    elif algorithm in ("dpo", "reward_model"):
        rows = addition.rows("sft", limit=40)
        pairs = [
            {"prompt": row["prompt"], "chosen": row["answer"], "rejected": row["answer"][::-1] + "1"} for row in rows
        ]
        made.data(pairs, rows_per_iteration=16)
    else:
        made.prompts("rlx.envs.addition:rows", kwargs={"split": "rl", "limit": 20}, prompts_per_iteration=6)
        made.prompts(samples_per_prompt=4).reward("rlx.envs.addition:random_reward")
        made.training(minibatch_sequences=8)
    for section, settings in sections.items():
        getattr(made, section)(**settings)
    return made


@pytest.fixture(scope="module")
def shared_processes():
    """Have runs of a file's tests take turns with runtimes, which import once for all; each ends its actors there.

    A run that begins while another one lasts has a runtime of its own. Logs of actors are not in the run folder.
    """
    from rlx import actors
    from rlx.building import LazyRuntime

    free = {}
    with contextlib.ExitStack() as stack:

        class Shared(LazyRuntime):
            taken = None

            def __call__(self):
                preload = (*self._options.get("preload", ()), "rlx.rollout.env_runner")
                if self._engine == "local" and self._runtime is None and free.get(preload, True):
                    runtime = free.get(preload) or stack.enter_context(actors.runtime("local", preload=preload))
                    free[preload] = None
                    self.taken, self._runtime = preload, runtime
                return super().__call__()

            def close(self):
                if self.taken is not None and self._runtime is not None:
                    for name, state in self._runtime.state().items():
                        if state.status not in ("dead", "failed"):
                            self._runtime.kill(self._runtime.lookup(name))
                    free[self.taken], self._runtime, self.taken = self._runtime, None, None
                super().close()

        patch = stack.enter_context(pytest.MonkeyPatch.context())
        patch.setattr("rlx.trainable.LazyRuntime", Shared)
        yield


@pytest.fixture(scope="module")
def text_driver():
    """Run `rlx` in a process of its own: text_driver(folder, ["train", ...], strike) -> exit code."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [sys.executable, str(TEXT_DRIVER)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as driver:
        assert driver.stdin is not None and driver.stdout is not None

        def run(folder: Path, arguments: list[str], strike: tuple[str, str, int] | None = None) -> int:
            line = json.dumps({"folder": str(folder), "arguments": arguments, "strike": strike})
            print(line, file=driver.stdin, flush=True)
            return int(driver.stdout.readline())  # type: ignore[union-attr]

        yield run
        driver.stdin.close()


class Terminal:
    """Where a user types, with a folder of their own and programs that stand first on PATH, for clusters."""

    def __init__(self, folder):
        self.home, self.bin = folder / "rlx", folder / "bin"
        self.bin.mkdir()
        path = f"{self.bin}:{os.environ['PATH']}"
        self.env = os.environ | {"RLX_HOME": str(self.home), "PATH": path, "PYTHONWARNINGS": "error"}

    def type(self, *words, code=0, **env):
        """Return what a command prints, stdout and stderr, when it ends as it should."""
        done = subprocess.run(
            [sys.executable, "-m", "rlx.cli", *words],
            **{"env": self.env | env, "text": True, "timeout": 60.0, "stdin": subprocess.DEVNULL},
            **{"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT},
        )
        assert done.returncode == code, done.stdout
        assert "Traceback" not in done.stdout
        return done.stdout

    def start_head(self, *words):
        """Start a head; return its address."""
        return re.search(r"at (\S+) \(pid", self.type("start", "--head", "--host", "127.0.0.1", *words))[1]

    def daemons(self):
        return {daemon["name"]: daemon for daemon in json.loads(self.type("status", "--json"))}

    def program(self, name, text):
        file = self.bin / name
        file.write_text(text)
        file.chmod(0o755)


@pytest.fixture(scope="session")
def terminals():
    """The class Terminal, for fixtures of their own."""
    return Terminal


@pytest.fixture
def terminal(tmp_path):
    terminal = Terminal(tmp_path)
    yield terminal
    terminal.type("stop", "--all")


@pytest.fixture
def key_file(tmp_path):
    """The file of a cluster's key."""
    from rlx.actors.cluster.credentials import ClusterKey

    return ClusterKey.create(tmp_path / "cluster.key").path
