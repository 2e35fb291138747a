"""Bad input of runs on text, through the command line: exit code 2 and one sentence that says what to do."""

import json
import re
import shutil
import sys
from pathlib import Path

import pytest

import rlx
from rlx.cli import main
from rlx.errors import CheckpointError, ConfigError, DataError
from rlx.rollout.token_runners import TokenRunners
from rlx.text.tokenizers import character_tokenizer

PAIR = {"prompt": "1+2=", "chosen": "3", "rejected": "4"}


@pytest.fixture(autouse=True)
def at_home(tmp_path, monkeypatch):
    """A working directory; what a command changes in this process is put back."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))


@pytest.fixture
def fails(tiny_text, capsys):
    """Train with changes, and check exit code and sentence, and that what was refused has no run folder."""

    def check(algorithm, message, *changes, code=2):
        made = tiny_text(algorithm, stop={"iterations": 1})
        if isinstance(made.settings.data.source, list):
            Path("pairs.jsonl").write_text(json.dumps(PAIR) + "\n")
            made.data("pairs.jsonl")
        Path("config.yaml").write_text(made.to_yaml())
        settings = [word for change in changes for word in ("--set", change)]
        capsys.readouterr()
        assert main(["train", "config.yaml", "--run-dir", "run", *settings]) == code
        error = capsys.readouterr().err
        said = error[error.index("rlx: error: ") :]
        assert re.search(message, said), said
        assert "Traceback" not in said
        assert not list(Path().glob("run/checkpoints/*"))

    return check


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folders of a model: whole, without weights, without tokenizer, of unknown type, with a small vocabulary."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from rlx.envs.addition import tokenizer

    home = tmp_path_factory.mktemp("models")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    for name, vocabulary in (("whole", 13), ("small", 9), ("no_weights", 13), ("no_eos", 13)):
        config = LlamaConfig(**sizes, num_key_value_heads=2, max_position_embeddings=32, vocab_size=vocabulary)
        config.bos_token_id = config.eos_token_id = config.pad_token_id = None
        LlamaForCausalLM(config).save_pretrained(home / name)
        words = tokenizer()
        if name == "no_eos":
            words.eos_token = None
        words.save_pretrained(home / name)
    (home / "no_weights/model.safetensors").unlink()
    (home / "torn").mkdir()
    for file in (home / "whole").iterdir():
        (home / "torn" / file.name).write_bytes(file.read_bytes())
    (home / "torn/model.safetensors").write_bytes((home / "whole/model.safetensors").read_bytes()[:2000])
    (home / "strange").mkdir()
    (home / "strange/config.json").write_text('{"model_type": "lama"}')
    for file in (home / "whole").glob("tokenizer*"):
        (home / "strange" / file.name).write_bytes(file.read_bytes())
    (home / "empty").mkdir()
    return home


# Models and tokenizers -------------------------------------------------------------------------------------------

MODELS = {
    "absent": ("nowhere/model/at/all", "there is no folder .*nowhere/model/at/all"),
    "empty": ("empty", "no tokenizer can be loaded from the folder|holds no config.json"),
    "without weights": ("no_weights", "no_weights cannot be loaded as a causal language model: .*model.safetensors"),
    "torn": ("torn", "torn cannot be loaded as a causal language model: "),
    "of an unknown type": ("strange", "strange cannot be loaded as a causal language model: .*lama"),
    "without EOS": ("no_eos", "has no EOS token"),
    "with too few embeddings": ("small", "has 13 tokens and the model 9 embeddings"),
}


@pytest.mark.parametrize("folder, message", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("algorithm", ["grpo", "sft"])
def test_models_that_cannot_be_used(folder, message, algorithm, folders, fails):
    path = folder if "/" in folder else folders / folder
    fails(algorithm, message, f"model={{path: {path}}}")


def test_a_tokenizer_of_other_ids_than_a_model_has_learned_is_refused(folders, fails):
    character_tokenizer("+=9876543210").save_pretrained("other")
    message = r"has the id 1 for '\+', and in the tokenizer of \S*whole it is 11, so that model would read another text"
    fails("sft", message, f"model={{path: {folders / 'whole'}, tokenizer: other}}")
    shutil.copytree(folders / "whole", "reference")
    character_tokenizer("abcdefghijkl").save_pretrained("reference")
    fails("dpo", "the id 1 for '0', and in the tokenizer of reference that is 'a'", "model.reference_path=reference")


CONFIGS = {
    "unknown type": ("{model_type: lama}", "model_type 'lama' .* no causal language model. Did you mean 'llama'"),
    "unknown size": ("{model_type: llama, hiden_size: 8}", "'hiden_size' is no setting of a llama model. Did you mean"),
    "sizes that do not fit": (
        "{model_type: llama, hidden_size: 30, num_attention_heads: 4, num_hidden_layers: 1}",
        "no llama model can be made from this config|language model",
    ),
    "small vocabulary": (
        "{model_type: llama, hidden_size: 32, num_attention_heads: 2, num_hidden_layers: 1, vocab_size: 9}",
        "has 13 tokens and the model 9 embeddings",
    ),
}


@pytest.mark.parametrize("config, message", CONFIGS.values(), ids=CONFIGS)
def test_configurations_that_make_no_model(config, message, fails):
    fails("grpo", message, f"model={{config: {config}, tokenizer: rlx.envs.addition:tokenizer}}")


# Lengths ---------------------------------------------------------------------------------------------------------


def test_what_is_longer_than_the_context_is_refused_before_anything_is_made(fails):
    Path("long.jsonl").write_text('{"prompt": "1+2="}\n{"prompt": "%s="}\n' % ("1" * 40))
    fails("grpo", r"long\.jsonl:2", "prompts={source: long.jsonl}")
    Path("long.jsonl").write_text(
        '{"prompt": "1=", "completion": "2"}\n{"prompt": "1=", "completion": "%s"}\n' % ("1" * 40)
    )
    fails("sft", r"long\.jsonl:2", "data={source: long.jsonl}")
    Path("long.jsonl").write_text(json.dumps(PAIR | {"rejected": "1" * 40}) + "\n")
    fails("dpo", r"long\.jsonl:1", "data={source: long.jsonl}")
    fails("sft", "data.max_tokens=33 is more than the model's context of 32 tokens allows", "data.max_tokens=33")
    fails(
        "grpo", "prompts.max_prompt_tokens=32 is more than the .* set it to 31 or less", "prompts.max_prompt_tokens=32"
    )


# Data ------------------------------------------------------------------------------------------------------------

FILES = {
    "torn": ('{"prompt": "1+2="}\n{"prompt": "1+', r"rows\.jsonl:2"),
    "empty": ("", r"rows\.jsonl"),
    "without prompt": (
        '{"prompt": "1+2="}\n{"question": "1+2="}\n',
        r'rows\.jsonl:2 has neither "prompt" nor "messages"',
    ),
    "an empty prompt": ('{"prompt": ""}\n', r"rows\.jsonl:1 is empty"),
    "of other characters": ('{"prompt": "1+2="}\n{"prompt": "one"}\n', r"rows\.jsonl:2 has characters .* no token for"),
    "no text": ('{"prompt": 3}\n', r"rows\.jsonl:1"),
}


@pytest.mark.parametrize("text, message", FILES.values(), ids=FILES)
def test_files_of_prompts_that_cannot_be_used(text, message, fails):
    Path("rows.jsonl").write_text(text)
    fails("grpo", message, "prompts={source: rows.jsonl}")


def test_rows_of_another_kind_are_named(fails):
    Path("rows.jsonl").write_text('{"prompt": "1+2="}\n')
    fails("sft", r"rows\.jsonl:1", "data={source: rows.jsonl}")
    fails("dpo", r"rows\.jsonl:1", "data={source: rows.jsonl}")
    fails("reward_model", r"rows\.jsonl:1", "data={source: rows.jsonl}")
    fails("grpo", "absent.jsonl", "prompts={source: absent.jsonl}")


# Settings --------------------------------------------------------------------------------------------------------

SETTINGS = {
    "no reward": ("grpo", "reward.function, reward.model and environment.env are not set", "reward={}"),
    "no prompts": ("grpo", "prompts.source is not set", "prompts={}"),
    "no data": ("sft", "data.source is not set", "data={}"),
    "no such reward": ("grpo", "reward.function is .*rewrd", "reward.function=rlx.envs.addition:rewrd"),
    "no such judge": ("grpo", "reward.model=runs/judge is no folder", "reward={model: runs/judge}"),
    "a judge to come": (
        "grpo",
        "rlx train reward_model --run-dir runs/reward_model",
        "reward={model: runs/reward_model}",
    ),
    "no model": ("grpo", "give one of them", "model={}"),
    "nobody to share with": ("sft", "num_learners is 1; set it to 2", "learners={num_learners: 1, sharding: full}"),
    "two places for an optimizer": (
        *("sft", "learners.sharding=full shares it out; set one"),
        "learners={num_learners: 2, sharding: full, optimizer_offload: true}",
    ),
    "layers in shares": (
        *("sft", "compiles whole layers, and learners.sharding=full"),
        "learners={num_learners: 2, sharding: full, compile: true}",
    ),
    "a stop without a token": (
        "grpo",
        "generation.stop='zz' has characters .* no token for: 'z'",
        "generation.stop=[zz]",
    ),
    "data of another algorithm": (
        "grpo",
        "data.source=x.jsonl is not read .* learns from prompts.s",
        "data.source=x.jsonl",
    ),
    "prompts of another algorithm": (
        "sft",
        "prompts.source=x.jsonl is not read .* from data.s",
        "prompts.source=x.jsonl",
    ),
    "a source without an ending": ("grpo", 'prompts.source: "gsm8k" has no ending', "prompts.source=gsm8k"),
    "examples to evaluate on that are none": (
        *("sft", r"evaluation.source: rlx.envs.guess:rows\(\)\[0\] has none of"),
        "evaluation={source: 'rlx.envs.guess:rows', interval: 1000}",
    ),
    "a run that is to come": (
        *("grpo", "no run runs/sft yet; train it first: rlx train sft --run-dir runs/sft"),
        "model={path: runs/sft}",
    ),
    "a run in a folder of runs": (
        "grpo",
        "rlx train sft_docstrings --run-dir runs/docs",
        "model={path: runs/docstrings/sft}",
    ),
    "a tokenizer that is nowhere": ("grpo", "no folder gpt2, no such tokenizer was downloaded", "model.tokenizer=gpt2"),
    "less memory than it takes": (
        "grpo",
        "need 13 MB on a device with 1 MB to take, by",
        "learners.max_memory_gb=1e-3",
    ),
    "an environment that is none": (
        "grpo",
        "of type str, and must be a class",
        "environment.env=rlx.envs.addition:ALPHABET",
    ),
    "no such setting": ("grpo", "Did you mean training.clip_range", "training.clip_rnge=0.1"),
    "a law that is cut": ("grpo", "completions drawn from the policy itself", "generation.top_k=3"),
    "a stop of two tokens": ("grpo", "generation.stop: '12' is 2 tokens long", "generation.stop=['12']"),
    "a target without a start": ("rlhf_ppo", "kl_target=1.0 cannot be reached", "training={kl_coef: 0, kl_target: 1}"),
    "k1 in a loss": ("rlhf_ppo", "has no gradient in the loss", "training={kl_in: loss}"),
    "nothing to evaluate on": ("grpo", "evaluation.interval=2 has no rows", "evaluation.interval=2"),
}


@pytest.mark.parametrize("algorithm, message, change", SETTINGS.values(), ids=SETTINGS)
def test_settings_that_make_no_sense(algorithm, message, change, fails):
    fails(algorithm, message, change)


# Reward models ---------------------------------------------------------------------------------------------------


@pytest.fixture
def judge(tiny_text):
    """Train a reward model of so long a context into the folder `judge`."""

    def train(context, **model):
        made = tiny_text("reward_model", model=model, stop={"iterations": 1})
        made.model(config={**made.settings.model.config, "max_position_embeddings": context})
        with made.data([PAIR, PAIR | {"prompt": "2+1="}], rows_per_iteration=2).build(run_dir="judge") as algorithm:
            algorithm.fit()

    return train


TOO_SHORT = (
    r"reward.model=judge has a context of {} tokens, and a prompt with its completion can have {}; set "
    r"prompts.max_prompt_tokens and generation.max_new_tokens to {} or less together, or take a reward model with a "
    r"longer context\."
)


def test_a_reward_model_of_too_short_a_context_is_refused_before_anything_is_generated(judge, fails, monkeypatch):
    """A prompt is 6 tokens long, as 37+58=, and a completion at most 5."""
    judge(10)

    def never(*arguments):
        raise AssertionError("it generates")

    with monkeypatch.context() as patch:
        patch.setattr(TokenRunners, "generate", never)
        for processes in (0, 1):
            change = f"reward={{model: judge, num_actors: {processes}}}"
            fails("grpo", TOO_SHORT.format(10, 11, 10), change)
    train = ["train", "config.yaml", "--set", "reward={model: judge}", "--run-dir"]
    assert main([*train, "shorter", "--set", "generation.max_new_tokens=4"]) == 0


def test_a_reward_model_that_reads_as_much_as_the_policy_can_write_is_long_enough(judge, tiny_text):
    """The policy's context of 32 tokens ends a completion before max_new_tokens do."""
    judge(32)
    made = tiny_text("grpo", reward={"function": None, "model": "judge"}, generation={"max_new_tokens": 500})
    with made.build() as algorithm:
        algorithm.train()
        assert algorithm.rollout.completions.length.max() == 26


@pytest.mark.parametrize("case", ["another tokenizer", "longer prompts of an evaluation"])
def test_what_cannot_be_told_before_is_refused_as_it_is_scored(case, judge, tiny_text):
    made = tiny_text("grpo", reward={"function": None, "model": "judge"})
    if case == "another tokenizer":
        character_tokenizer("+=9876543210").save_pretrained("other")
        judge(7, tokenizer="other")
    else:
        judge(11)
        made.evaluation(source=[{"prompt": "1+1+1+1+1+1="}])
    with made.build() as algorithm:
        before = algorithm.learners.weights()
        with pytest.raises(ConfigError, match=TOO_SHORT.format(r"(7|11)", r"(\d+)", r"(7|11)")):
            algorithm.train() if case == "another tokenizer" else algorithm.evaluate()
        assert (algorithm.learners.weights() == before).all()


# Runs and checkpoints --------------------------------------------------------------------------------------------


@pytest.fixture
def trained(tiny_text):
    """Train one iteration into the folder `run`, without a word."""

    def train(algorithm, **sections):
        with tiny_text(algorithm, stop={"iterations": 1}, **sections).build(run_dir="run") as made:
            made.fit()
        return Path("run")

    return train


def refused(arguments, message, capsys):
    capsys.readouterr()
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert re.search(message, error), error
    assert "Traceback" not in error


def test_a_run_whose_model_has_changed_since_is_refused(trained, folders, capsys):
    from transformers import AutoModelForCausalLM, LlamaConfig

    shutil.copytree(folders / "whole", "base")
    run = trained("sft", model={"config": {}, "tokenizer": None, "path": "base"})
    config = LlamaConfig.from_pretrained("base")
    config.intermediate_size = 48
    AutoModelForCausalLM.from_config(config).save_pretrained("base")
    shutil.rmtree(run / "origin")  # as of a run that began before there were copies
    expected = r"is of shape|another architecture"
    refused(["train", "--resume", str(run), "--set", "stop.iterations=2"], expected, capsys)
    refused(["generate", str(run), "--prompt", "1+2="], expected, capsys)
    refused(["export", str(run), "-o", "out"], expected, capsys)
    assert (run / "checkpoints/iter_000001/state.json").is_file()


def test_a_run_of_another_kind_is_refused(trained, capsys):
    run = str(trained("reward_model"))
    refused(["generate", run, "--prompt", "1+2="], "it scores texts and writes none", capsys)
    refused(["samples", run], "run is a run of reward_model and has kept no samples: runs that draw", capsys)
    refused(["samples", "nowhere"], "nowhere does not exist; give the folder", capsys)
    refused(["eval", run], "evaluation.source is not set", capsys)
    refused(["eval", run, "--video", "film.gif"], "no video of it", capsys)
    refused(["generate", "nowhere", "--prompt", "1"], "nowhere", capsys)
    refused(["eval", "nowhere"], "does not exist", capsys)


def test_a_model_that_scores_is_no_model_to_go_on_with(trained, fails, folders):
    trained("reward_model").rename("judge")
    said = "the run judge is of reward_model: a model that scores texts .* score with it by reward.model=judge"
    fails("grpo", said, "model={path: judge}")
    fails("rlhf_ppo", said, "model={value_path: judge, path: %s}" % (folders / "whole"))


def test_a_policy_of_text_is_loaded_elsewhere(trained):
    with pytest.raises(CheckpointError, match=r"run is a run of sft, on text; use rlx.text_inference.load_text_policy"):
        rlx.load_policy(trained("sft"))


def test_completions_that_the_context_cuts_are_told_of(tiny_text, caplog):
    with tiny_text("grpo", generation={"max_new_tokens": 26}).build():
        assert "model's context" not in caplog.text
    with tiny_text("grpo", generation={"max_new_tokens": 27}).build():
        assert (
            "behind a prompt of up to 6 tokens is more than the model's context of 32: completions are" in caplog.text
        )


def test_what_is_no_source_in_python_names_its_setting(tiny_text):
    for source in (5, [], "missing.jsonl"):
        with pytest.raises((ConfigError, DataError), match=r"^prompts.source: "):
            tiny_text("grpo").prompts(source, kwargs={}).build()


def test_a_run_that_has_not_exported_yet_is_no_model_to_go_on_with(trained, fails):
    run = trained("sft").rename("base")
    shutil.rmtree(run / "model")
    fails("grpo", "the run base has not exported a model yet; .* rlx export base", "model={path: base}")
    assert main(["export", "base"]) == 0
    Path("config.yaml").write_text(Path("config.yaml").read_text())
    assert main(["train", "config.yaml", "--run-dir", "next", "--set", "model={path: base}"]) == 0
