"""Whole runs on text: what they compute depends on settings and seed only, and their folders tell all of it."""

import io
import json
import random
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from rlx.checkpoint import list_checkpoints, load_checkpoint, load_state
from rlx.cli import main
from rlx.envs import addition
from rlx.generation.generator import Generator
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
RENAMING = ("rlx.checkpoint", "replace_folder")

ADAPTER = {"lora_rank": 4, "lora_targets": ["q_proj", "v_proj"]}
PROCESSES = {"num_token_runners": 2, "torch_threads": 1}
MERGING = ("rlx.text_models", "export_language_model")
WAITING = ("rlx.rollout.runner_actors", "RunnerActors.gather")

KILLED = {
    "sft": ("sft", {}, [(STEPPING, 5), (SAVING, 4)]),
    "dpo": ("dpo", {}, [(ASKING, 5), (STEPPING, 2), (RENAMING, 1)]),
    "grpo with kl": ("grpo", {"training": KL, "evaluation": WATCHED}, [(GENERATING, 13), (LOGGING, 17), (STEPPING, 7)]),
    "ppo with adaptive kl": ("rlhf_ppo", {"training": ADAPTIVE}, [(SCORING, 5), (SAVING, 3), (GENERATING, 7)]),
    "grpo with an adapter": (
        "grpo",
        {"model": ADAPTER, "training": KL},
        [(STEPPING, 5), (SAVING, 3), (GENERATING, 13), (MERGING, 1)],
    ),
    "grpo with token runners": (
        "grpo",
        {"token_runners": PROCESSES, "training": KL},
        [(WAITING, 5), (STEPPING, 7)],
    ),
    "grpo in bfloat16": ("grpo", {"model": {"dtype": "bfloat16"}, "training": KL}, [(STEPPING, 5), (SAVING, 3)]),
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


@pytest.mark.parametrize("algorithm", ["grpo", "sft"])
def test_a_data_set_gives_the_run_that_a_file_of_its_rows_gives(algorithm, tiny_text, tmp_path):
    datasets = pytest.importorskip("datasets")
    lines = addition.rows("rl" if algorithm == "grpo" else "sft", limit=20)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    section = "prompts" if algorithm == "grpo" else "data"
    for name, source in (("data_set", datasets.Dataset.from_list(lines)), ("file", str(tmp_path / "rows.jsonl"))):
        made = tiny_text(algorithm, stop={"iterations": 3}, **{section: {"source": source, "kwargs": {}}})
        with made.build(run_dir=tmp_path / name) as run:
            run.fit()
    assert len(rows(tmp_path / "file/metrics.jsonl")) == 3
    assert_same_run(tmp_path / "data_set", tmp_path / "file")


# What can be done with a run -------------------------------------------------------------------------------------


@pytest.fixture
def says(monkeypatch, capsys, tmp_path):
    """Run a command that has to end with 0; return what it printed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))

    def run(*arguments):
        capsys.readouterr()
        assert main(list(arguments)) == 0
        return capsys.readouterr().out

    return run


@pytest.mark.slow
def test_every_command_serves_a_run_on_text(tiny_text, says, monkeypatch):
    from transformers import AutoModelForCausalLM

    made = tiny_text("grpo", training=KL, evaluation=WATCHED, stop={"iterations": 2})
    Path("config.yaml").write_text(made.to_yaml())
    assert "prompts_per_iteration: 6" in says("train", "config.yaml", "--dry-run")
    assert "llama" in says("config", "show", "config.yaml")
    assert says("train", "config.yaml", "--run-dir", "run").count("rlx eval run") == 1
    rows = read_metrics(Path("run/metrics.jsonl"))

    evaluated = dict(line.split() for line in says("eval", "run").splitlines())
    assert float(evaluated["episodes"]) == 4
    for name in ("episode_return_mean", "episode_length_mean"):
        assert float(evaluated[name]) == pytest.approx(rows[-1][f"evaluation/{name}"], rel=1e-4), name
    assert dict(line.split() for line in says("eval", "run", "--episodes", "2").splitlines())["episodes"] == "2"
    assert says("eval", "run", "--seed", "1") != says("eval", "run")
    assert len(read_metrics(Path("run/metrics.jsonl"))) == 2

    shown = says("samples", "run", "--tokens")
    kept = [row for row in read_metrics(Path("run/samples.jsonl")) if row["iteration"] == 2]
    assert len(kept) == 8
    assert shown.count("iteration 2  score") == 8 and shown.count(" reference ") == sum(
        len(row["logp"]) for row in kept
    )
    for row in kept:
        assert row["kl"] == pytest.approx(sum(row["logp"]) - sum(row["ref_logp"]), abs=1e-3)
    assert [json.loads(line) for line in says("samples", "run", "--json").splitlines()] == kept
    says("samples", "run", "-o", "all.jsonl")
    assert len(read_metrics(Path("all.jsonl"))) == 16

    completions = says("generate", "run", "--prompt", "37+58=", "-n", "3", "--temperature", "0").split()
    assert len(set(completions)) == 1 and re.fullmatch(r"37\+58=[0-9+=]{0,5}", completions[0])
    monkeypatch.setattr(sys, "stdin", io.StringIO("1+2=\n"))
    assert re.fullmatch(r"[0-9+=]{0,5}\n", says("chat", "run", "--temperature", "0"))
    assert says("plot", "run") == "run/curve.png\n" and Path("run/curve.png").stat().st_size > 1000
    assert "grpo" in says("list")

    assert says("export", "run", "-o", "out") == "out\n"
    first, second = (AutoModelForCausalLM.from_pretrained(path).state_dict() for path in ("out", "run/model"))
    assert all((first[name] == second[name]).all() for name in first)
    assert says("generate", "out", "--prompt", "37+58=", "--temperature", "0", "--max-new-tokens", "5").split() == [
        completions[0]
    ]
    made = tiny_text("rlhf_ppo", stop={"iterations": 1}, model={"config": {}, "tokenizer": None, "path": "run"})
    Path("next.yaml").write_text(made.to_yaml())
    says("train", "next.yaml", "--run-dir", "next")


def test_a_supervised_run_is_evaluated_by_its_loss(tiny_text, says):
    watched = {"interval": 1, "source": "rlx.envs.addition:rows", "kwargs": {"split": "sft", "seed": 5}, "num_rows": 20}
    Path("config.yaml").write_text(tiny_text("sft", evaluation=watched, stop={"iterations": 2}).to_yaml())
    says("train", "config.yaml", "--run-dir", "run")
    loss = read_metrics(Path("run/metrics.jsonl"))[-1]["evaluation/loss"]
    assert says("eval", "run").split() == ["loss", f"{loss:.5g}"]
    assert not Path("run/samples.jsonl").exists()


TURNS = (
    "{% for message in messages %}{{ '+' if message.role == 'user' else '=' }}{{ message.content }}{% endfor %}"
    "{% if add_generation_prompt %}={% endif %}"
)
"""A chat template in the characters of the addition: +question=answer, turn by turn."""


def test_a_chat_asks_what_the_template_makes_of_the_whole_conversation(tiny_text, says, monkeypatch):
    tokenizer = addition.tokenizer()
    tokenizer.chat_template = TURNS
    tokenizer.save_pretrained("talker")
    made = tiny_text("sft", model={"tokenizer": "talker"}, stop={"iterations": 1})
    Path("config.yaml").write_text(made.to_yaml())
    says("train", "config.yaml", "--run-dir", "run")
    asked = []
    generate = Generator.generate

    def watched(self, requests, *more):
        asked.extend("".join(["<eos>", *addition.ALPHABET][token] for token in request.prompt) for request in requests)
        return generate(self, requests, *more)

    monkeypatch.setattr(Generator, "generate", watched)
    monkeypatch.setattr(sys, "stdin", io.StringIO("12\n7\n30"))
    first, second, third = says("chat", "run", "--max-new-tokens", "4").splitlines()
    assert first and second and re.fullmatch("[0-9+=]{0,4}", third)
    assert asked == ["+12=", f"+12={first}+7=", f"+12={first}+7={second}+30="]


def test_samples_are_written_to_files_as_they_were_drawn(tiny_text, says):
    from pyarrow import parquet

    def no_ones(prompts, completions):
        return [float("nan") if "1" in text else len(text) for text in completions]

    made = tiny_text("grpo", training=KL, reporting={"samples_per_iteration": 24}, stop={"iterations": 2})
    drawn = []
    with made.reward(no_ones, on_error="mask").build(run_dir="run") as algorithm:
        sample = algorithm.rollouts.sample
        algorithm.rollouts.sample = lambda *arguments: drawn.append(sample(*arguments)) or drawn[-1]
        algorithm.fit()
    expected = []
    for iteration, rollout in enumerate(drawn, 1):
        completions = rollout.completions
        columns = completions.split(completions.tokens), completions.split(completions.logp)
        for prompt, text, tokens, logp in zip(rollout.prompts, rollout.texts, *columns, strict=True):
            expected.append(
                {
                    "iteration": iteration,
                    "prompt": prompt.text,
                    "completion": text,
                    "score": None if "1" in text else float(len(text)),
                    "truncated": 0 not in tokens,
                    "tokens": tokens.tolist(),
                    "logp": pytest.approx(logp.tolist(), abs=1e-5),
                }
            )
    assert 0 < sum(row["score"] is None for row in expected) < len(expected) == 48
    assert says("samples", "run", "-o", "all.jsonl") == "all.jsonl\n"
    lines = [json.loads(line) for line in Path("all.jsonl").read_text().splitlines()]
    assert [{name: row[name] for name in expected[0]} for row in lines] == expected
    assert says("samples", "run", "-o", "all.parquet") == "all.parquet\n"
    assert parquet.read_table("all.parquet").to_pylist() == [{"kl": None, "ref_logp": None, **row} for row in lines]
    assert all(("kl" in row) == (row["score"] is not None) for row in lines)


@pytest.mark.slow
def test_in_bfloat16_who_learns_and_who_generates_compute_with_the_same_numbers(tiny_text, tmp_path):
    """In the driver, which reads the learner's parameters, and in a process, which is sent them in float32."""
    for name, runners in (("driver", {}), ("process", PROCESSES | {"num_token_runners": 1})):
        made = tiny_text("grpo", model={"dtype": "bfloat16"}, token_runners=runners, stop={"iterations": 2})
        made.generation(exact=True)
        with made.build(run_dir=tmp_path / name) as algorithm:
            algorithm.fit()
    assert rows(tmp_path / "driver" / "samples.jsonl") == rows(tmp_path / "process" / "samples.jsonl")
    first, second = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("driver", "process"))
    assert {tensor.dtype for tensor in first.values()} == {torch.bfloat16}
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    saved = load_state(tmp_path / "driver")["learners"]["learner"]["policy"]["model.lm_head.weight"]
    assert torch.equal(torch.from_numpy(saved).to(torch.bfloat16), first["lm_head.weight"])
