"""Runs whose learners hold shares of the model: stats, weights, checkpoints and exports are those of one learner."""

import os
import signal

import numpy as np
import pytest
import torch

from rlx.fitting import iterate
from rlx.metrics import read_metrics
from rlx.nets.flat import FlatParameters
from rlx.text_inference import load_text_policy

SHARDED = {"num_learners": 2, "sharding": "full"}
COMMON = {"adam_eps": 1e-3, "lr": 1e-3, "lr_warmup": 100, "weight_decay": 0.1, "max_grad_norm": 0.03}
LORA = {"lora_rank": 4, "lora_targets": ["q_proj", "v_proj"]}
LEFT_OUT = {"epochs": 2, "kl_coef": 0.1, "mask_truncated": True, "drop_flat_groups": True}
WARM_UP = {"value_lr": 3e-3, "value_warmup_iterations": 1, "kl_coef": 0.1}
RUNS = {
    "grpo": ("grpo", LEFT_OUT, {}, {}),
    "rlhf_ppo": ("rlhf_ppo", WARM_UP, {}, {}),
    "rlhf_ppo, a shared trunk": ("rlhf_ppo", {"kl_coef": 0.0}, {"value": "shared"}, {"activation_checkpointing": True}),
    "sft": ("sft", {"minibatch_sequences": 5}, {}, {"max_tokens_per_microbatch": 16}),
    "dpo, LoRA": ("dpo", {"minibatch_sequences": 5}, LORA, {}),
    "reward_model": ("reward_model", {"minibatch_sequences": 5}, {}, {}),
}


def computed(row):
    """What is computed: all but times, and the bytes of weights that move only where learners are processes."""
    return {
        name: value
        for name, value in row.items()
        if value is not None and not name.startswith(("time/", "env_steps_per_s", "learner_restarts", "sync_bytes"))
    }


@pytest.mark.slow
@pytest.mark.parametrize("run", RUNS)
def test_two_learners_with_a_share_each_learn_what_one_does(run, tiny_text):
    """16 rows by 5: the last minibatch has a row for one of them alone; in GRPO many tokens count for nothing."""
    algorithm, training, model, learners = RUNS[run]
    made = tiny_text(algorithm, training=COMMON | training, model=model, learners=learners)
    outcomes = []
    for where in ({}, SHARDED):
        with made.copy().learners(**where).build() as one:
            outcomes.append(([computed(one.train()) for _ in range(3)], one.learners.weights()))
    (rows, weights), (others, other_weights) = outcomes
    np.testing.assert_allclose(other_weights, weights, rtol=0, atol=2e-6)
    assert max(row["learner/grad_norm"] for row in rows) > 0.03
    for row, other in zip(rows, others, strict=True):
        assert row.keys() == other.keys()
        for name, value in row.items():
            assert other[name] == pytest.approx(value, rel=1e-4, abs=2e-6), name


@pytest.mark.slow
def test_a_run_goes_on_from_its_checkpoint_to_the_bit_and_others_read_its_model(tiny_text, tmp_path):
    made = tiny_text("rlhf_ppo", training=COMMON | WARM_UP, learners=SHARDED)
    with made.copy().build() as algorithm:
        for _ in range(2):
            algorithm.train()
        algorithm.save(tmp_path / "saved")
        saved = algorithm.learners.weights()
        expected, weights = computed(algorithm.train()), algorithm.learners.weights()
    with made.build() as again:
        again.restore(tmp_path / "saved")
        assert computed(again.train()) == expected
        assert again.learners.weights().tobytes() == weights.tobytes()
    read = FlatParameters(load_text_policy(tmp_path / "saved").model).numpy()
    assert read.tobytes() == saved[: len(read)].tobytes()


@pytest.mark.slow
def test_when_a_learner_dies_the_run_goes_back_to_its_checkpoint_and_exports_the_whole_model(tiny_text, tmp_path):
    from transformers import AutoModelForCausalLM

    made = tiny_text("sft", learners=SHARDED, stop={"iterations": 4}, checkpointing={"interval": 2})
    with made.copy().build(run_dir=tmp_path / "whole") as whole:
        whole.fit()
        weights = whole.learners.weights()
    with made.build(run_dir=tmp_path / "struck") as struck:
        struck.saves.open()
        for _ in range(3):
            iterate(struck)
        os.kill(struck._runtime().state()["learner/1"].pid, signal.SIGKILL)
        struck.fit()
    rows, others = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("whole", "struck"))
    assert [computed(row) for row in others] == [computed(row) for row in rows]
    assert others[-1]["learner_restarts"] == 1
    one, other = (tmp_path / name / "model/model.safetensors" for name in ("whole", "struck"))
    assert one.read_bytes() == other.read_bytes()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "whole/model")
    exported = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    assert exported.numpy().tobytes() == weights.tobytes()
