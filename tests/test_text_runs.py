"""Whole runs on text: what they compute depends on settings and seed only, and their folders tell all of it."""

import json
import random
from pathlib import Path

import numpy as np
import pytest

from rlx.checkpoint import list_checkpoints, load_checkpoint
from rlx.metrics import read_metrics

LATE = {"stop": {"iterations": 8}, "checkpointing": {"interval": 3, "keep": 2}}
KL = {"kl_coef": 0.1, "lr": 3e-3}
ADAPTIVE = {"kl_coef": 0.2, "kl_target": 0.01, "kl_horizon": 48, "lr": 3e-3}
WATCHED = {"interval": 2, "source": "rlx.envs.addition:rows", "kwargs": {"split": "eval"}, "num_rows": 4}

GENERATING = ("rlx.generation.slots", "Slots.decode")
SCORING = ("rlx.envs.addition", "random_reward")
STEPPING = ("rlx.learner.adam", "FlatAdam.step")
ASKING = ("rlx.learner.learner", "Learner.evaluate")
LOGGING = ("rlx.metrics", "JsonlWriter.write")
SAVING = ("rlx.checkpoint", "_write_durably")
RENAMING = ("rlx.checkpoint", "_replace")

KILLED = {
    "sft": ("sft", {}, [(STEPPING, 5), (SAVING, 4)]),
    "dpo": ("dpo", {}, [(ASKING, 5), (STEPPING, 2), (RENAMING, 1)]),
    "grpo with kl": ("grpo", {"training": KL, "evaluation": WATCHED}, [(GENERATING, 13), (LOGGING, 17), (STEPPING, 7)]),
    "ppo with adaptive kl": ("rlhf_ppo", {"training": ADAPTIVE}, [(SCORING, 5), (SAVING, 3), (GENERATING, 7)]),
}


def rows(file: Path) -> list[dict]:
    """Return what a run computed, row by row: all but times."""
    watched = ("time/", "env_steps_per_s")
    return [{name: value for name, value in row.items() if not name.startswith(watched)} for row in read_metrics(file)]


def state(run: Path) -> dict:
    """Return the newest checkpoint as flat values, without times and limits."""
    flat = {}

    def walk(node, path):
        if isinstance(node, dict | list):
            for name, value in node.items() if isinstance(node, dict) else enumerate(node):
                walk(value, f"{path}/{name}")
        else:
            flat[path] = node

    walk(load_checkpoint(list_checkpoints(run / "checkpoints")[-1]), "")
    return {path: value for path, value in flat.items() if path != "/total_s" and not path.startswith("/config")}


def assert_same_run(first: Path, second: Path) -> None:
    for name in ("metrics.jsonl", "samples.jsonl"):
        assert (first / name).exists() == (second / name).exists()
        if (first / name).exists():
            assert rows(first / name) == rows(second / name)
    one, two = state(first), state(second)
    assert one.keys() == two.keys()
    for path in one:
        np.testing.assert_array_equal(one[path], two[path], err_msg=path)
    weights = "model/model.safetensors"
    assert (first / weights).read_bytes() == (second / weights).read_bytes()


def write(config, folder: Path) -> None:
    """Write config.yaml, with the rows of `data` in a file beside it."""
    source = config.settings.data.source
    if isinstance(source, list):
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in source))
        config.data("rows.jsonl")
    (folder / "config.yaml").write_text(config.to_yaml())


@pytest.mark.slow
@pytest.mark.parametrize("algorithm, sections, strikes", KILLED.values(), ids=KILLED)
def test_a_killed_run_goes_on_as_if_it_had_not_been(algorithm, sections, strikes, tiny_text, text_driver, tmp_path):
    """SIGKILL in the midst of generating, scoring, asking the reference, stepping, logging, saving; then resumed."""
    write(tiny_text(algorithm, **LATE, **sections), tmp_path)
    output = tmp_path / "output.txt"
    assert text_driver(tmp_path, ["train", "config.yaml", "--run-dir", "whole"]) == 0, output.read_text()
    arguments = ["config.yaml", "--run-dir", "killed"]
    for (module, name), number in strikes:
        code = text_driver(tmp_path, ["train", *arguments], (module, name, number))
        assert code == -9, (name, output.read_text())
        arguments = ["--resume", "killed"]
    assert text_driver(tmp_path, ["train", *arguments]) == 0, output.read_text()
    assert len(rows(tmp_path / "whole/metrics.jsonl")) == 8
    assert_same_run(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.slow
def test_a_run_killed_at_random_moments_goes_on_as_if_it_had_not_been(tiny_text, text_driver, tmp_path):
    """Wherever it is: the moments are the calls of what every part of a run calls."""
    write(tiny_text("rlhf_ppo", **LATE, training=ADAPTIVE), tmp_path)
    output = tmp_path / "output.txt"
    assert text_driver(tmp_path, ["train", "config.yaml", "--run-dir", "whole"]) == 0, output.read_text()
    moments = random.Random(5)
    arguments, codes = ["config.yaml", "--run-dir", "killed"], []
    while not codes or codes[-1] == -9:
        strike = ("rlx.trajectory", "Batch.__init__", moments.randrange(40, 160))
        codes.append(text_driver(tmp_path, ["train", *arguments], strike if len(codes) < 6 else None))
        arguments = ["--resume", "killed"] if (tmp_path / "killed/checkpoints/iter_000000").exists() else arguments
    assert codes[-1] == 0 and len(codes) >= 3, (codes, output.read_text())
    assert_same_run(tmp_path / "whole", tmp_path / "killed")
