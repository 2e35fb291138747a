"""Sharded learners: what each holds, rows for few of them, bfloat16, and the death of one."""

import os
import signal
import time
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed.tensor import DTensor

from rlx import actors
from rlx.functional.aggregation import token_mean
from rlx.learner.learner import Learner
from rlx.learner.learner_group import LearnerGroup, LearnersLost
from rlx.nets.language_model import load_language_model
from rlx.nets.transformer import TransformerPolicy, decoder_layers
from rlx.trajectory import Batch
from tests.learner.conftest import have_meet

LLAMA = {"model_type": "llama", "vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
LLAMA |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
OPTIONS: dict[str, Any] = {"weigh": token_mean, "max_tokens_per_microbatch": 20, "weight_decay": 0.1, "adam_eps": 1e-3}
UPDATE: dict[str, Any] = {"epochs": 2, "minibatch_sequences": 3, "lr": 1e-3, "seed": 1}


def build(dtype: str = "float32", tied: bool = False) -> TransformerPolicy:
    """Return a policy with a value net and a reference, all of one kind."""
    config = LLAMA | {"tie_word_embeddings": tied}
    policy, value, reference = (load_language_model(config=config, dtype=dtype, seed=seed) for seed in range(3))
    return TransformerPolicy(policy, value="separate", value_model=value, reference=reference)


def loss(policy: Any, minibatch: Batch, coefficients: Mapping[str, Any]) -> tuple[torch.Tensor, dict]:
    new_logp, entropy, value = policy.evaluate(minibatch)
    total = ((value - 1).square() - new_logp) * minibatch.weight
    return total.sum(), {"entropy": (entropy * minibatch.weight).sum().detach()}


def rows(count: int = 7, width: int = 12) -> Batch:
    generator = torch.Generator().manual_seed(count)
    length = torch.randint(1, width + 1, (count,), generator=generator)
    obs, action = (torch.randint(0, 40, (count, width), generator=generator) for _ in range(2))
    return Batch(obs=obs, action=action, length=length, mask=torch.arange(width) < length[:, None])


@pytest.fixture(scope="module")
def runtime():
    with actors.runtime(
        "local", preload=("numpy", "torch", "rlx.learner.sharded", "transformers.models.llama.modeling_llama")
    ) as rt:
        yield rt


@pytest.fixture
def joined(runtime):
    """Start so many sharded learners that tell what they hold, and have them meet."""
    from rlx.learner.sharded import ShardedLearner

    class Telling(ShardedLearner):
        whole = 0

        def join(self, *args: Any) -> None:
            super().join(*args)
            for layer in decoder_layers(self.policy):
                layer.register_forward_pre_hook(self.count)  # after that of FSDP2, which gathers

        def count(self, *_: Any) -> None:
            found = [p.numel() for p in self.policy.parameters() if not isinstance(p, DTensor)]
            self.whole = max(self.whole, sum(found))

        def held(self) -> dict[str, int]:
            adam: Any = self.adam
            parameters: Any = list(self.policy.parameters())
            kept = [tensor for moments in adam._moments() for tensor in moments]
            gradients = [p.grad.to_local() for p in self.flat.parameters if p.grad is not None]
            return {
                "whole": self.whole,
                "parameters": sum(p.to_local().numel() for p in parameters),
                "moments": sum(tensor.numel() for tensor in kept),
                "gradients": sum(gradient.numel() for gradient in gradients),
                "float32": sum(p.dtype == torch.float32 for p in parameters if p.requires_grad),
            }

    started = []

    def start(count: int, make: Any = build, **options: Any) -> list[Any]:
        ranks = [runtime.spawn(Telling, make, loss, **OPTIONS, **options) for _ in range(count)]
        started.extend(ranks)
        have_meet(ranks)
        return ranks

    yield start
    for actor in started:
        runtime.kill(actor)


@pytest.mark.slow
@pytest.mark.parametrize(("count", "tied"), [(2, False), (3, True)])
def test_each_holds_a_share_of_parameters_gradients_and_moments_and_nothing_twice(count, tied, joined, runtime):
    make = partial(build, tied=tied)
    ranks = joined(count, make)
    one, group = Learner(make, loss, **OPTIONS), runtime.group(ranks)
    for number in range(2):
        batch = rows(7 + number)
        expected = one.update(batch, **UPDATE)
        for stats in group.update.call(batch, **UPDATE).values(60.0):
            for name in ("loss", "grad_norm", "entropy", "gradient_steps"):
                assert stats[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-6), name
    weights, *others = group.weights.call().values(60.0)
    np.testing.assert_allclose(weights, one.weights(), rtol=0, atol=2e-6)
    assert [len(other) for other in others] == [0] * (count - 1)

    parameters = sum(p.numel() for p in one.policy.parameters())
    layer, embedding, norm = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48 + 2 * 32, 40 * 32, 32
    learned = len(one.weights())
    held = group.held.call().values(10.0)
    for name, whole in (("parameters", parameters), ("gradients", learned), ("moments", 2 * learned)):
        shares = [each[name] for each in held]
        assert sum(shares) == whole
        assert max(shares) < whole / count * 1.1
    assert {each["whole"] for each in held} == {layer + 2 * ((1 if tied else 2) * embedding + norm)}


@pytest.mark.slow
def test_fewer_rows_than_learners_are_evaluated_and_learned_from(runtime):
    options = {**OPTIONS, "device": "cpu"}
    one = LearnerGroup(build, loss, **options)
    two = LearnerGroup(build, loss, num_learners=2, runtime=lambda: runtime, sharded=True, **options)
    for count in (1, 5):
        names = ("logp", "entropy", "value", "ref_logp")
        found, expected = (group.evaluate(rows(count), *names).tensors for group in (two, one))
        for name in names:
            torch.testing.assert_close(found[name], expected[name], rtol=0, atol=1e-5)
        expected_loss = one.measure(Batch(**rows(count).tensors))["loss"]
        assert two.measure(Batch(**rows(count).tensors))["loss"] == pytest.approx(expected_loss, rel=1e-5)
        for group in (one, two):
            group.update(rows(count), **UPDATE)
    np.testing.assert_allclose(two.weights(), one.weights(), rtol=0, atol=2e-6)
    state = two.get_state()
    two.update(rows(3), **UPDATE)
    weights = two.weights()
    for group in (two, one):
        group.set_state(state)
        group.update(rows(3), **UPDATE)
    assert two.weights().tobytes() == weights.tobytes()
    np.testing.assert_allclose(one.weights(), weights, rtol=0, atol=2e-6)
    two.close()


@pytest.mark.slow
def test_the_death_of_one_is_told_at_once_and_the_next_ones_go_on_from_a_state(runtime):
    restart = actors.Restart(max=1, per_s=60.0, backoff_s=0.01)
    group = LearnerGroup(
        *(build, loss), num_learners=2, runtime=lambda: runtime, sharded=True, restart=restart, device="cpu", **OPTIONS
    )
    group.update(rows(), **UPDATE)
    state = group.get_state()
    group.update(rows(5), **UPDATE)
    weights = group.weights()
    os.kill(runtime.state()["learner/1"].pid, signal.SIGKILL)
    started = time.monotonic()
    with pytest.raises(LearnersLost):
        group.update(rows(5), **UPDATE)
    with pytest.raises(LearnersLost):
        group.weights()
    assert time.monotonic() - started < 30
    group.set_state(state)
    group.update(rows(5), **UPDATE)
    assert group.weights().tobytes() == weights.tobytes()
    group.close()


@pytest.mark.slow
def test_a_model_in_bfloat16_is_kept_in_float32_and_computed_as_it_was_made(joined, runtime):
    """Steps of 1e-6 are lost in a bfloat16 of 0.02, whose neighbours are 1e-4 apart."""
    make = partial(build, dtype="bfloat16")
    group = runtime.group(joined(2, make))
    before = group.weights.call().values(60.0)[0]
    stats = [group.update.call(rows(), **UPDATE | {"lr": 1e-6}).values(60.0)[0] for _ in range(2)]
    after = group.weights.call().values(60.0)[0]
    one = Learner(make, loss, **OPTIONS)
    expected = one.update(rows(), **UPDATE | {"lr": 1e-6})
    in_float32 = Learner(build, loss, **OPTIONS).update(rows(), **UPDATE | {"lr": 1e-6})
    assert len(before) == len(one.weights()) and before.dtype == np.float32
    assert (after != before).mean() > 0.9 and np.abs(after - before).max() < 1e-4
    assert stats[0]["loss"] == pytest.approx(expected["loss"], rel=0.02)
    assert abs(stats[0]["loss"] - in_float32["loss"]) > 1e-5
    held = group.held.call().values(10.0)[0]
    assert held["float32"] == sum(p.requires_grad for p in one.policy.parameters())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no GPU")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_on_gpus_as_many_as_there_are_learn_what_one_does(dtype, joined, runtime):
    make = partial(build, dtype=dtype)
    group = runtime.group(joined(torch.cuda.device_count(), make, device="cuda"))
    one = Learner(make, loss, device="cuda", **OPTIONS)
    expected = one.update(rows(), **UPDATE)
    stats = group.update.call(rows(), **UPDATE).values(60.0)[0]
    tolerance = 1e-4 if dtype == "float32" else 0.05
    for name in ("loss", "grad_norm"):
        assert stats[name] == pytest.approx(expected[name], rel=tolerance), name
    weights = group.weights.call().values(60.0)[0]
    np.testing.assert_allclose(weights, one.weights(), rtol=0, atol=2e-5 if dtype == "float32" else 0.02)
