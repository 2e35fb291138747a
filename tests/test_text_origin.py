"""A run on text owns the models that it began with: what becomes of the folders that they came from does not matter."""

import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest

from rlx.cli import main
from rlx.errors import ConfigError, RlxError
from rlx.fitting import iterate
from rlx.metrics import read_metrics
from rlx.text_inference import load_text_policy
from rlx.text_origin import told_by_source
from rlx.text_sections import RewardSection, TextModelSection
from rlx.text_settings import TextSettings

ADAPTER = {"lora_rank": 4, "lora_targets": ["q_proj", "v_proj"]}
EVALUATED = {"source": "rlx.envs.addition:rows", "kwargs": {"split": "eval"}, "num_rows": 4}
FROM_SOURCE = {"config": {}, "tokenizer": None, "path": "source"}

BEGUN = {
    "reference": ("grpo", {}, {"kl_coef": 0.1}),
    "adapter": ("grpo", ADAPTER, {"kl_coef": 0.1}),
    "value model": ("rlhf_ppo", {"value_path": "source"}, {"kl_coef": 0.0}),
}


@pytest.fixture(autouse=True)
def source(tiny_text, tmp_path, monkeypatch):
    """The run `source` of one iteration, and what trains it further."""
    monkeypatch.chdir(tmp_path)
    made = tiny_text("sft", stop={"iterations": 1})
    with made.build("source") as run:
        run.fit()

    def further():
        with made.copy().stop(iterations=2).build("source", restore="source") as again:
            again.fit()

    return further


def begin(tiny_text, name, **sections):
    algorithm, model, training = BEGUN[name]
    made = tiny_text(algorithm, stop={"iterations": 1}, model=FROM_SOURCE | model, training=training, **sections)
    return made.evaluation(**EVALUATED)


def rows(run):
    return [
        {key: value for key, value in row.items() if "time/" not in key and key != "env_steps_per_s"}
        for row in read_metrics(Path(run) / "metrics.jsonl")
    ]


@pytest.mark.parametrize("name", BEGUN)
def test_a_run_goes_on_as_if_its_source_had_not_been_trained_further(name, tiny_text, source, capsys):
    made = begin(tiny_text, name)
    with made.copy().stop(iterations=2).build("whole") as whole:
        whole.fit()
    with made.copy().build("run") as run:
        run.fit()
        said = load_text_policy("run").generate("1+2=", n=8)
    source()
    assert load_text_policy("run").generate("1+2=", n=8) == said
    assert main(["train", "--resume", "run", "--set", "stop.iterations=2"]) == 0, capsys.readouterr().err
    assert rows("run") == rows("whole")
    shutil.rmtree("source")
    for run in ("run", "run/checkpoints/iter_000002"):
        assert main(["eval", run]) == 0, capsys.readouterr().err
    assert main(["train", "--resume", "run", "--set", "stop.iterations=3"]) == 0, capsys.readouterr().err


@pytest.mark.slow
def test_an_algorithm_that_was_built_beside_other_models_is_built_anew(tiny_text, source):
    made = begin(tiny_text, "adapter").token_runners(num_token_runners=1, torch_threads=1)
    with made.copy().build("run") as run:
        run.fit()
        expected = run.evaluate()
    source()
    with made.copy().build() as other:
        other.restore("run")
        assert other.evaluate() == expected
        assert other.train()["iteration"] == 2


def test_an_algorithm_that_cannot_be_built_anew_is_closed(tiny_text, source):
    made = begin(tiny_text, "adapter")
    with made.copy().build("run") as run:
        run.fit()
    source()
    Path("run/origin/path/config.json").write_text("torn")
    with made.copy().build() as other:
        with pytest.raises(ConfigError, match="run/origin/path"):
            other.restore("run")
        with pytest.raises(RlxError, match="this algorithm was closed, and its processes with it"):
            other.train()


def test_a_new_run_that_goes_on_from_another_keeps_what_that_began_with(tiny_text, source):
    made = begin(tiny_text, "reference")
    with made.copy().build("run") as run:
        run.fit()
    source()
    with made.copy().stop(iterations=2).build("fork", restore="run") as fork:
        fork.fit()
    shutil.rmtree("run")
    shutil.rmtree("source")
    assert main(["train", "--resume", "fork", "--set", "stop.iterations=3"]) == 0


@pytest.mark.slow
def test_a_learner_that_is_started_again_reads_the_model_that_the_run_began_with(tiny_text, source):
    with begin(tiny_text, "reference").stop(iterations=2).learners(num_learners=1).build("run") as run:
        run.saves.open()
        iterate(run)
        source()
        os.kill(run._runtime().state()["learner/0"].pid, signal.SIGKILL)
        run.fit()
    assert read_metrics(Path("run/metrics.jsonl"))[-1]["learner_restarts"] == 1


def test_a_run_from_before_there_were_copies_reads_what_its_settings_name(tiny_text):
    with begin(tiny_text, "reference").build("run") as run:
        run.fit()
        before = run.learners.weights()
    shutil.rmtree("run/origin")
    with begin(tiny_text, "reference").build("run", restore="run") as again:
        assert np.array_equal(again.learners.weights(), before)


def test_a_build_that_comes_to_nothing_leaves_no_copies(tiny_text):
    with begin(tiny_text, "reference").build("unused"):
        assert Path("unused/origin/path/model.safetensors").is_file()
    assert not Path("unused").exists()
    with pytest.raises(ConfigError, match="need 13 MB"):
        begin(tiny_text, "reference").learners(max_memory_gb=1e-6).build("refused")
    assert not Path("refused").exists()


def test_a_reward_model_that_is_trained_further_scores_as_it_did_when_the_run_began(tiny_text, tmp_path):
    judged = tiny_text("reward_model", stop={"iterations": 1})
    with judged.copy().build("judge") as run:
        run.fit()
    made = tiny_text("grpo", reward={"function": None, "model": "judge"})
    with made.copy().stop(iterations=2).build("whole") as whole:
        whole.fit()
    with made.copy().stop(iterations=1).build("run") as run:
        run.fit()
    with judged.stop(iterations=2).build("judge", restore="judge") as again:
        again.fit()
    shutil.rmtree("judge/checkpoints/iter_000001")  # a name of the same files as in the run
    assert main(["train", "--resume", "run", "--set", "stop.iterations=2"]) == 0
    assert rows("run") == rows("whole")
    shutil.rmtree("judge")
    assert main(["train", "--resume", "run", "--set", "stop.iterations=3"]) == 0


def test_a_folder_that_is_not_of_rlx_is_left_alone(tiny_text, source):
    Path("run/origin").mkdir(parents=True)
    Path("run/origin/thesis.txt").write_text("years of work")
    with pytest.raises(ConfigError, match="run/origin is in the way: rlx keeps the models that a run begins with"):
        begin(tiny_text, "reference").build("run")
    with pytest.raises(ConfigError, match="nowhere"):
        tiny_text("grpo", model=FROM_SOURCE | {"path": "nowhere"}).build("run")
    assert Path("run/origin/thesis.txt").read_text() == "years of work"


def test_of_two_that_are_built_for_one_folder_the_last_one_owns_it(tiny_text, source):
    first = begin(tiny_text, "reference").build("run")
    last = begin(tiny_text, "reference").build("run")
    first.close()
    with pytest.raises(ConfigError, match="nowhere"):
        tiny_text("grpo", model=FROM_SOURCE | {"path": "nowhere"}).build("run")
    with last:
        last.fit()
    assert Path("run/origin/path/config.json").is_file()
    one = begin(tiny_text, "reference").build("other")
    begin(tiny_text, "reference").build("other").close()
    with one, pytest.raises(ConfigError, match="is gone: another run was built for other and closed; build this one"):
        one.fit()


def test_a_tokenizer_and_a_torn_checkpoint_of_a_reward_model_are_dealt_with(tiny_text, source):
    shutil.copytree("source/model", "tok", ignore=lambda folder, names: [n for n in names if "token" not in n])
    judged = tiny_text("reward_model", stop={"iterations": 2}, checkpointing={"interval": 1})
    with judged.build("judge") as run:
        run.fit()
    newest = Path("judge/checkpoints/iter_000002/tensors.safetensors")
    newest.write_bytes(newest.read_bytes()[:-100])
    made = tiny_text("grpo", stop={"iterations": 1}, reward={"function": None, "model": "judge"})
    with made.model(**FROM_SOURCE | {"tokenizer": "tok"}).build("run") as run:
        run.fit()
    assert [folder.name for folder in Path("run/origin/reward_model/checkpoints").iterdir()] == ["iter_000001"]
    shutil.rmtree("tok")
    assert load_text_policy("run").generate("1+2=", n=1)


def test_an_error_names_what_a_copy_was_made_from():
    paths = {"path": "a", "reference_path": "b", "value_path": "c", "tokenizer": "d"}
    sections = {"model": TextModelSection(**paths), "reward": RewardSection(model="e")}
    made = TextSettings.model_construct(**sections)
    copies = made.model_copy(
        update={
            "model": made.model.model_copy(update={name: f"/run/origin/{name}" for name in paths}),
            "reward": made.reward.model_copy(update={"model": "/run/origin/reward_model"}),
        }
    )
    told = " ".join([*(f"/run/origin/{name}" for name in paths), "/run/origin/reward_model"])
    with pytest.raises(ConfigError, match=r"^a b c d e$"), told_by_source(made, copies):
        raise ConfigError(told)
