"""The plan of an update: its numbers by hand, and what it advises where memory is short."""

import pytest

from rlx.errors import ConfigError
from rlx.learner.memory_plan import NetSize, UpdateSize, memory_plan

MB = 1e6
SMALL = NetSize(learned=1_000_000, frozen=0, largest=200_000, layers=4, hidden=100, keys=50, inner=300, vocabulary=1000)
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
