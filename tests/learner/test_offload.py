"""An optimizer in host memory makes the steps that it would make on the device, to the bit."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import pytest
import torch

from rlx.learner import adam
from rlx.learner.adam import FlatAdam
from rlx.learner.learner import Learner
from rlx.learner.memory_plan import memory_plan
from rlx.learner.sizes import Cost, NetSize, UpdateSize
from rlx.nets.language_model import load_language_model
from rlx.nets.transformer import TransformerPolicy
from rlx.trajectory import Batch

LLAMA = {"model_type": "llama", "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
LLAMA |= {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64}
UPDATE: dict[str, Any] = {"epochs": 2, "minibatch_sequences": 4, "lr": 3e-3, "value_lr": 1e-2}
UPDATE_SIZE = UpdateSize(sequences=8, longest=9, minibatch_sequences=8, max_tokens_per_microbatch=40)


def build(dtype: str) -> TransformerPolicy:
    return TransformerPolicy(load_language_model(config=LLAMA, dtype=dtype, seed=1), value="shared")


def loss(policy: Any, minibatch: Batch, coefficients: Mapping[str, Any]) -> tuple[torch.Tensor, dict]:
    new_logp, _, value = policy.evaluate(minibatch)
    return (((value - 1).square() - new_logp) * minibatch.weight).sum(), {}


def rows() -> Batch:
    generator = torch.Generator().manual_seed(0)
    obs, action = (torch.randint(0, 40, (8, 9), generator=generator) for _ in range(2))
    return Batch(obs=obs, action=action, length=torch.full((8,), 9), mask=torch.ones(8, 9, dtype=torch.bool))


def learner(dtype: str, offloads: bool, **options: Any) -> Learner:
    options = {"max_tokens_per_microbatch": 40, "weight_decay": 0.1, "optimizer_offload": offloads} | options
    return Learner(partial(build, dtype), loss, **options)


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_steps_and_states_are_those_without_it(dtype, large, monkeypatch):
    """Either goes on from the other's state; with torch's fused step, too."""
    monkeypatch.setattr(adam, "LARGE", 0 if large else 10**9)
    plain, offloaded = (learner(dtype, offloads) for offloads in (False, True))
    held = {p.untyped_storage().data_ptr() for p in offloaded.flat.parameters}
    assert offloaded.flat.data.data_ptr() not in held, "what is computed with is apart, as it is on a GPU"
    for number in range(3):
        stats = [one.update(rows(), seed=number, **UPDATE) for one in (plain, offloaded)]
        assert stats[0]["loss"] == stats[1]["loss"] and stats[0]["grad_norm"] == stats[1]["grad_norm"]
    assert plain.weights().tobytes() == offloaded.weights().tobytes()
    states = [one.get_state() for one in (plain, offloaded)]
    plain.set_state(states[1])
    offloaded.set_state(states[0])
    for one in (plain, offloaded):
        one.update(rows(), seed=9, **UPDATE)
    assert plain.weights().tobytes() == offloaded.weights().tobytes()
    for ours, expected in zip(offloaded.flat.parameters, plain.flat.parameters, strict=True):
        assert torch.equal(ours, expected)


def test_a_gradient_from_elsewhere_is_brought_to_the_buffer(monkeypatch):
    """A device that this machine lacks is played by one whose copy is counted."""
    one, other = (FlatAdam(torch.ones(5), 1e-5) for _ in range(2))
    brought = []
    monkeypatch.setattr(other, "_bring", lambda gradient: brought.append(1) or torch.arange(5.0))
    other.step(torch.empty(5, device="meta"), 0.1)
    one.step(torch.arange(5.0), 0.1)
    assert brought and torch.equal(one.data, other.data)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_plan_moves_weights_and_moments_to_the_host(dtype):
    """On a GPU 4 or 2 bytes a number of the language model, and 4 of the head; on the CPU all is in one memory."""
    policy = build(dtype)
    model, head = sum(p.numel() for p in policy.model.parameters()), 17
    each, count = (4 if dtype == "float32" else 2), model + head
    on_gpu = NetSize.of(policy, offloads=True, has_host=True)
    plan = memory_plan(on_gpu, UPDATE_SIZE, available=1e9, num_learners=1)
    assert plan.bytes["weights"] == each * model + 4 * head and plan.bytes["Adam"] == 0
    staged = 2 * model if dtype == "bfloat16" else 0
    assert on_gpu.host == Cost(count, 4 * count + staged, 4 * count, 8 * count)
    assert "host memory a learner: " in plan.memory
    here = memory_plan(NetSize.of(policy, offloads=True), UPDATE_SIZE, available=1e9, num_learners=1)
    one = learner(dtype, True)
    held = one.flat.data.nbytes + sum(copy.values.nbytes for copy in one.flat._copies)
    assert here.bytes["weights"] == held == 4 * count + each * model + 4 * head
    assert here.bytes["Adam"] == one.adam.mean.nbytes + one.adam.square.nbytes and "host" not in here.memory


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no GPU")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_on_a_gpu_steps_on_the_host_and_on_the_device_are_near(dtype, monkeypatch):
    monkeypatch.setattr(adam, "LARGE", 0)
    plain, offloaded = (learner(dtype, offloads, device="cuda") for offloads in (False, True))
    assert offloaded.flat.data.is_pinned() and offloaded.adam.mean.device.type == "cpu"
    for number in range(3):
        for one in (plain, offloaded):
            one.update(rows(), seed=number, **UPDATE)
    torch.testing.assert_close(
        torch.from_numpy(plain.weights()), torch.from_numpy(offloaded.weights()), rtol=0, atol=1e-2
    )
    for parameter in offloaded.flat.parameters:
        assert parameter.device.type == "cuda"
