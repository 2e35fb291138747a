"""Where models live and what they take there: by hand, and beside what real runs hold."""

from typing import Any

import pytest

from rlx.cli import main
from rlx.learner.sizes import Cost
from rlx.nets.language_model import export_language_model, load_language_model
from rlx.reward_models import load_reward_model
from rlx.text_models import build_tokenizer
from rlx.text_placement import model_places

SIZES = {"max_position_embeddings": 32, "vocab_size": 13}
GPT2 = {"model_type": "gpt2", "n_embd": 8, "n_layer": 2, "n_head": 2} | SIZES
QWEN3 = {"model_type": "qwen3", "hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 3} | SIZES
QWEN3 |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 6}


def places(made) -> list[Any]:
    """Return (model, process, device, cost, remark) by row."""
    return [tuple(place) for place in model_places(made.settings, type(made).algorithm_class)]


def export(folder, config, made):
    export_language_model(load_language_model(config=config), build_tokenizer(made.settings.model), folder)
    return str(folder)


def size(model) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def test_a_model_too_large_for_this_machine_is_measured_by_hand(tiny_text):
    """Llama 2 70B: 80 layers, 8192 wide, 8 of 64 heads for keys and values, 28672 inside, here of 13 tokens."""
    config = {"model_type": "llama", "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80}
    config |= {"num_attention_heads": 64, "num_key_value_heads": 8}
    made = tiny_text("sft", model={"config": config, "dtype": "bfloat16"})
    attention, inner, norms = 2 * 8192 * 8192 + 2 * 8192 * 1024, 3 * 8192 * 28672, 2 * 8192
    numbers = 80 * (attention + inner + norms) + 8192 + 2 * 13 * 8192
    assert places(made) == [("policy", "driver", "cpu", Cost(numbers, 6 * numbers, 4 * numbers, 8 * numbers), "")]


def test_of_a_model_that_is_shared_out_each_learner_has_its_share(tiny_text):
    whole, shared = (
        tiny_text("dpo", learners={"num_learners": 3, "sharding": sharding}) for sharding in ("none", "full")
    )
    for (*which, cost, _), (*of_share, share, _) in zip(places(whole), places(shared), strict=True):
        assert which == of_share and which[1:] == ["learner/0..2", "cpu"]
        assert share == (cost.parameters, *(-(-size // 3) for size in cost[1:]))


def test_an_optimizer_in_host_memory_has_a_row_of_its_own(tiny_text):
    """11,168 numbers, 2 bytes each to compute with, and a gradient of 4; on the CPU there is but one memory."""
    made = tiny_text("sft", model={"dtype": "bfloat16"}, learners={"device": "cuda", "optimizer_offload": True})
    on_gpu, on_host = Cost(11_168, 22_336, 44_672), Cost(11_168, 67_008, 44_672, 89_344)
    assert places(made) == [
        ("policy", "driver", "cuda", on_gpu, ""),
        ("policy", "driver", "cpu", on_host, "its optimizer, in host memory"),
    ]
    made.learners(device="cpu")
    assert places(made) == [("policy", "driver", "cpu", Cost(11_168, 67_008, 44_672, 89_344), "")]


@pytest.mark.parametrize("lora_rank", [0, 2])
def test_models_of_four_architectures_cost_what_the_run_s_own_tensors_take(lora_rank, tiny_text, tmp_path):
    """A Llama that learns, GPT-2 as its value model, Qwen3 as its reference, and a reward model of another GPT-2."""
    rewards = tiny_text("reward_model", model={"config": GPT2 | {"n_embd": 12}}, stop={"iterations": 1})
    with rewards.build(run_dir=tmp_path / "rewards") as one:
        one.fit()
    made = tiny_text("rlhf_ppo", reward={"model": str(tmp_path / "rewards")}, training={"kl_coef": 0.1})
    paths = {"value_path": export(tmp_path / "value", GPT2, made)}
    paths |= {"reference_path": export(tmp_path / "reference", QWEN3, made)}
    made.model(lora_rank=lora_rank, **paths)
    rows = places(made)
    with made.build() as algorithm:
        learner = algorithm.learners._local
        policy = learner.policy
        learned, frozen = learner.flat.data, [p for p in policy.parameters() if not p.requires_grad]
        costs = [cost for model, _, _, cost, _ in rows if cost is not None and model != "reward model"]
        assert sum(cost.weights for cost in costs) == learned.nbytes + sum(p.nbytes for p in frozen)
        assert sum(cost.gradient for cost in costs) == learned.nbytes
        assert sum(cost.optimizer for cost in costs) == learner.adam.mean.nbytes + learner.adam.square.nbytes
        by_model = {(model, place): cost for model, place, _, cost, remark in rows if "generates" not in remark}
        assert by_model["policy", "driver"].parameters == size(policy.model)
        assert by_model["value model", "driver"].parameters == size(policy.value_model) + 8 + 1
        assert (policy.reference is None) == (by_model["reference", "driver"] is None) == bool(lora_rank)
        if not lora_rank:
            assert by_model["reference", "driver"] == (size(policy.reference), 4 * size(policy.reference), 0, 0)
    loaded, _ = load_reward_model(tmp_path / "rewards")
    assert rows[-1] == ("reward model", "driver", "cpu", Cost(size(loaded), 4 * size(loaded)), "")


def test_processes_have_copies_and_what_is_shared_costs_nothing(tiny_text):
    """11,168 numbers in the Llama, and 33 in the head on its trunk."""
    made = tiny_text("rlhf_ppo", model={"value": "shared"}, training={"kl_coef": 0.0}).learners(device="cpu")
    head = ("value model", "driver", "cpu", Cost(33, 132, 132, 264), "a head on the policy's trunk")
    policy = Cost(11_168, 44_672, 44_672, 89_344)
    assert places(made) == [
        ("policy", "driver", "cpu", policy, ""),
        head,
        ("policy", "driver", "cpu", None, "generates with the learner's own weights"),
    ]
    made.learners(num_learners=3, device="cuda")
    assert places(made) == [
        ("policy", "learner/0..2", "cuda", policy, ""),
        ("value model", "learner/0..2", "cuda", *head[3:]),
        ("policy", "driver", "cuda", Cost(11_168, 44_672), "generates"),
    ]
    made.token_runners(num_token_runners=1, device="cpu").reward(model="nowhere", num_actors=2)
    assert places(made)[2:] == [
        ("policy", "token_runner/0", "cpu", Cost(11_168, 44_672), "generates"),
        ("reward model", "reward_model/0..1", "cuda", None,
         "unknown: reward.model=nowhere is no folder; give a run of algorithm: reward_model."),
    ]  # fmt: skip


def test_an_adapter_is_all_that_is_learned_and_its_reference_is_the_model_beneath(tiny_text):
    """Rank 2 on q, k, v, o of 32 x 32 and gate, up, down of 32 x 64: 4 * 2 * 64 + 3 * 2 * 96 = 1088 numbers."""
    made = tiny_text("dpo", model={"lora_rank": 2, "dtype": "bfloat16"})
    assert places(made) == [
        ("policy", "driver", "cpu", Cost(12_256, 2 * 11_168 + 4 * 1088, 4 * 1088, 8 * 1088), ""),
        ("reference", "driver", "cpu", None, "the policy without its adapter"),
    ]


def test_supervised_training_has_nobody_who_generates_unless_it_is_evaluated_so(tiny_text):
    made = tiny_text("sft")
    assert [row[0] for row in places(made)] == ["policy"]
    made.evaluation(source="rlx.envs.addition:rows").reward("rlx.envs.addition:random_reward")
    assert [row[4] for row in places(made)] == ["", "generates with the learner's own weights"]


def test_config_show_prints_an_aligned_table(tiny_text, tmp_path, capsys):
    made = tiny_text("grpo", training={"kl_coef": 0.1}, token_runners={"num_token_runners": 2})
    (tmp_path / "config.yaml").write_text(made.to_yaml())
    assert main(["config", "show", str(tmp_path / "config.yaml")]) == 0
    assert capsys.readouterr().out.splitlines()[-5:] == [
        "# where each model lives, and what it takes in each of the processes that are named",
        "#   model      process            device  parameters  weights  gradient  optimizer",
        "#   policy     driver             cpu         11,168    45 kB     45 kB      89 kB",
        "#   reference  driver             cpu         11,168    45 kB         -          -",
        "#   policy     token_runner/0..1  cpu         11,168    45 kB         -          -  generates",
    ]
