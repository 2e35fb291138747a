"""The plan of an update: its numbers by hand, and what it advises where memory is short."""

from typing import Any

import pytest
import torch
from torch import nn

from rlx.errors import ConfigError
from rlx.generation.request import Request, Sampling
from rlx.learner.memory_plan import memory_plan
from rlx.learner.sizes import Cost, Generators, NetSize, TrunkSize, UpdateSize
from rlx.nets.language_model import load_language_model
from rlx.nets.transformer import TransformerPolicy
from rlx.rollout.token_runner import TokenRunner
from rlx.text_building import plan_memory
from rlx.text_settings import TextSettings

MB = 1e6
TRUNK = TrunkSize(layers=4, hidden=100, keys=50, inner=300)
SMALL = NetSize(learned=1_000_000, frozen=0, largest=200_000, vocabulary=1000, trunks=(TRUNK,))
UPDATE = UpdateSize(sequences=64, longest=50, minibatch_sequences=16, max_tokens_per_microbatch=400)


def test_the_parts_by_hand():
    """float32 weights, gradient, two moments: 4 MB each; the largest gradient once more: 0.8 MB.

    A layer keeps of a token 8 * 100 + 4 * 50 + 4 * 300 = 2200 numbers: 4 layers, 400 tokens, 4 bytes: 14.08 MB; the
    ends of the network 3 * 100 * 400 * 4 = 0.48 MB. The head: two buffers of 400 x 1000 numbers, and one that is
    kept: 4.8 MB.
    """
    plan = memory_plan(SMALL, UPDATE, available=1e9, num_learners=1)
    assert plan.bytes == pytest.approx(
        {
            "weights": 4 * MB, "frozen weights": 0, "gradient": 4.8 * MB, "Adam": 8 * MB,
            "activations": 14.56 * MB, "head": 4.8 * MB,
        }
    )  # fmt: skip
    assert plan.total == pytest.approx(36.16 * MB)


def test_checkpointing_keeps_the_inputs_of_layers_and_one_layer():
    """4 layers * 100 + 2200 + 300 numbers of 400 tokens, 4 bytes each."""
    plan = memory_plan(SMALL, UPDATE._replace(activation_checkpointing=True), available=1e9, num_learners=1)
    assert plan.bytes["activations"] == pytest.approx((400 + 2200 + 300) * 400 * 4)


def test_an_adapter_has_small_moments_and_large_frozen_weights():
    net = SMALL._replace(learned=10_000, frozen=1_000_000, frozen_bytes=2)
    plan = memory_plan(net, UPDATE, available=1e9, num_learners=1)
    assert plan.bytes["frozen weights"] == 2 * MB and plan.bytes["Adam"] == 80_000


def test_a_row_longer_than_a_microbatch_counts_in_full():
    plan = memory_plan(SMALL, UPDATE._replace(longest=800), available=1e9, num_learners=1)
    assert plan.bytes["activations"] == pytest.approx(2 * 14.56 * MB)


def test_the_text_says_what_an_update_does():
    text = str(memory_plan(SMALL, UPDATE, available=1e9, num_learners=2, num_devices=2))
    assert "64 sequences in 4 minibatches of 16" in text
    assert "2 learners" in text and "8 sequences a minibatch each" in text
    assert "at most 400 tokens" in text and "1 microbatch of 8 rows at the longest" in text
    assert "36 MB of 1000 MB" in text and "activations 15 MB" in text


def test_learners_on_one_device_share_its_memory():
    one = memory_plan(SMALL, UPDATE, available=50e6, num_learners=1)
    assert one.total < 50e6
    with pytest.raises(ConfigError, match=r"2 learners need 72 MB .* 50 MB"):
        memory_plan(SMALL, UPDATE, available=50e6, num_learners=2)
    memory_plan(SMALL, UPDATE, available=50e6, num_learners=2, num_devices=2)


def test_too_little_memory_is_refused_with_the_microbatch_that_would_fit():
    """At 100 tokens activations and head are a quarter: 16.8 + 3.64 + 1.2 = 21.64 MB; 50 is the longest row."""
    with pytest.raises(ConfigError) as error:
        memory_plan(SMALL, UPDATE, available=21.7e6, num_learners=1)
    message = str(error.value)
    assert "activations 15 MB" in message
    assert "learners.max_tokens_per_microbatch=101" in message


def test_where_no_microbatch_fits_other_cures_are_named():
    with pytest.raises(ConfigError) as error:
        memory_plan(SMALL, UPDATE, available=10e6, num_learners=1)
    message = str(error.value)
    assert "max_tokens_per_microbatch=" not in message
    assert "model.lora" in message and "fewer learners" not in message


def test_a_value_net_of_another_architecture_keeps_activations_of_its_own():
    """2 layers of 8 * 10 + 4 * 10 + 4 * 20 = 200 numbers and 3 * 10 at the ends, of 400 tokens, 4 bytes each."""
    net = SMALL._replace(trunks=(TRUNK, TrunkSize(layers=2, hidden=10, keys=10, inner=20)))
    plan = memory_plan(net, UPDATE, available=1e9, num_learners=1)
    assert plan.bytes["activations"] == pytest.approx(14.56 * MB + 430 * 400 * 4)


def test_what_is_learned_costs_float32_and_its_copy_and_the_rest_what_it_is():
    learned, frozen = nn.Parameter(torch.zeros(3, dtype=torch.bfloat16)), nn.Parameter(torch.zeros(5).bfloat16())
    frozen.requires_grad_(False)
    assert Cost.of([learned, frozen], learns=True) == (8, 3 * (4 + 2) + 5 * 2, 3 * 4, 3 * 8)
    assert Cost.of([learned, frozen], learns=True, shares=2) == (8, (3 * 4 + 5 * 2) / 2, 3 * 4 / 2, 3 * 8 / 2)
    assert Cost.of([learned, frozen]) == (8, 8 * 2, 0, 0)


def test_a_model_that_is_shared_out_costs_its_share_and_what_is_gathered():
    """Of 3 layers of size a, and embedding, norm and head of size b: b, two layers, the gradients of b and of a layer,
    and the larger of these once more while it is summed.
    """
    config = {"model_type": "llama", "vocab_size": 40, "hidden_size": 32, "intermediate_size": 48}
    config |= {"num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 4}
    policy = TransformerPolicy(load_language_model(config=config))
    a, b = 4 * 32 * 32 + 3 * 32 * 48 + 2 * 32, 2 * 40 * 32 + 32
    net = NetSize.of(policy, shares=2)
    assert (net.learned, net.shares, net.gathered) == (3 * a + b, 2, 4 * (b + 2 * a + b + a + max(a, b)))
    whole, plan = (memory_plan(one, UPDATE, available=1e9, num_learners=2) for one in (NetSize.of(policy), net))
    for name, size in {"weights": 4, "gradient": 4, "Adam": 8}.items():
        assert plan.bytes[name] == size * (3 * a + b) / 2
    assert plan.bytes["gathered layers"] == net.gathered and "gathered layers" not in whole.bytes
    with pytest.raises(ConfigError, match=r"set learners\.sharding=full"):
        memory_plan(NetSize.of(policy), UPDATE, available=1e5, num_learners=2)
    with pytest.raises(ConfigError, match=r"^(?!.*sharding)"):
        memory_plan(net, UPDATE, available=1e5, num_learners=2)


# Generators -------------------------------------------------------------------------------------------------------


def test_keys_and_values_by_hand():
    """20 slots of 50 tokens, rounded up to 64, in 4 layers of 2 * 50 numbers of 2 bytes; exact: one slot more."""
    generators = Generators(slots=20, longest=50, number_bytes=2)
    plan = memory_plan(SMALL, UPDATE, available=1e9, num_learners=1, generators=generators)
    assert plan.generator_bytes == {"weights": 0, "keys and values": 20 * 64 * 4 * 100 * 2}
    assert "memory a generator: 1 MB (keys and values 1 MB; 20 slots of 50 tokens)" in str(plan)
    exact = memory_plan(SMALL, UPDATE, available=1e9, num_learners=1, generators=generators._replace(exact=True))
    assert exact.generator_bytes["keys and values"] == 21 * 64 * 4 * 100 * 2


@pytest.mark.parametrize(("exact", "lora"), [(False, None), (True, None), (False, {"r": 2})])
def test_the_figure_is_that_of_the_generator_s_own_tensors(exact, lora):
    """A Llama in bfloat16 whose 6 heads share 2 keys, of a head size of its own; learned, or beneath an adapter."""
    config = {"model_type": "llama", "hidden_size": 24, "intermediate_size": 16, "vocab_size": 13, "head_dim": 6}
    config |= {"num_hidden_layers": 3, "num_attention_heads": 6, "num_key_value_heads": 2}
    model = load_language_model(config=config, dtype="bfloat16", lora=lora)
    made = TextSettings.model_validate(
        {"prompts": {"prompts_per_iteration": 3, "samples_per_prompt": 2}, "generation": {"exact": exact}}
    )
    plan = plan_memory(made, TransformerPolicy(model), 6, 19, generates=True)
    runner = TokenRunner(lambda: model, exact=exact)
    runner.generate([Request([3, 4 + index], 2, 17, index) for index in range(3)], Sampling())
    slots: Any = runner._generator._ready_slots("generate")
    held = [tensor for layer in slots._cache.slot_layers for tensor in (layer.keys, layer.values)]
    assert plan.generator_bytes["keys and values"] == sum(tensor.nbytes for tensor in held)
    assert {tensor.dtype for tensor in held} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("max_slots", "evaluation", "runners", "slots"),
    [
        (256, {}, 0, 10),
        (256, {}, 2, 6),
        (4, {}, 0, 4),
        (256, {"source": "x", "num_rows": 9, "samples_per_prompt": 3}, 0, 27),
    ],
)
def test_there_are_no_more_slots_than_samples_to_fill_them(max_slots, evaluation, runners, slots):
    """5 prompts with 2 samples; of two runners one gets 3 of the prompts. An evaluation may ask for more."""
    made = TextSettings.model_validate(
        {
            "prompts": {"prompts_per_iteration": 5, "samples_per_prompt": 2},
            "generation": {"max_slots": max_slots},
            "evaluation": evaluation,
            "token_runners": {"num_token_runners": runners},
        }
    )
    model = load_language_model(config={"model_type": "gpt2", "vocab_size": 13, "n_embd": 8, "n_layer": 1, "n_head": 2})
    plan = plan_memory(made, TransformerPolicy(model), 10, 16, generates=True)
    assert plan.generator_bytes["keys and values"] == slots * 16 * 2 * 8 * 4
    assert f"{slots} slots of 16 tokens" in plan.memory
    copy = sum(parameter.numel() for parameter in model.parameters()) * 4
    assert plan.generator_bytes["weights"] == (copy if runners else 0)


def test_generators_on_the_learners_device_take_their_part_of_it():
    """36.16 MB of a learner and 64 * 4 * 100 * 4 = 0.1024 MB for each of 20 slots; 37.2 MB is room for 10."""
    generators = Generators(slots=20, longest=50)
    memory_plan(SMALL, UPDATE, available=38.3e6, num_learners=1, generators=generators)
    with pytest.raises(ConfigError, match=r"the learner and the generator need 38 MB .* 37 MB") as error:
        memory_plan(SMALL, UPDATE, available=37.2e6, num_learners=1, generators=generators)
    assert "of a generator keys and values 2 MB" in str(error.value)
    assert "generation.max_slots=10" in str(error.value)
    memory_plan(SMALL, UPDATE, available=37.2e6, num_learners=1, generators=generators._replace(slots=10))


def test_generators_on_a_device_of_their_own_are_measured_by_that():
    """Two with 5 MB of weights and 2.048 MB for 20 slots; 3.3 MB beside the weights are room for 16 slots each."""
    generators = Generators(slots=20, longest=50, count=2, weights=5_000_000, available=15.2e6)
    plan = memory_plan(SMALL, UPDATE, available=36.2e6, num_learners=1, generators=generators)
    assert "memory a learner: 36 MB of 36 MB" in plan.memory
    assert "memory a generator: 7 MB of 8 MB (weights 5 MB, keys and values 2 MB" in plan.memory
    with pytest.raises(
        ConfigError,
        match=r"2 generators need 14 MB .* 13 MB to take, by .* free .*weights 5 MB",
    ) as error:
        memory_plan(SMALL, UPDATE, available=36.2e6, num_learners=1, generators=generators._replace(available=13.3e6))
    assert "generation.max_slots=16" in str(error.value) and "num_token_runners" in str(error.value)
