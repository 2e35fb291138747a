"""Models in bfloat16: computed with as they are, learned in float32, and resumed to the bit."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from rlx.functional.aggregation import token_mean
from rlx.learner.learner import Learner
from rlx.learner.memory_plan import memory_plan
from rlx.learner.sizes import NetSize, UpdateSize
from rlx.nets.language_model import load_language_model
from rlx.nets.transformer import TransformerPolicy
from rlx.trajectory import Batch

LLAMA = {"model_type": "llama", "vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
LLAMA |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
QWEN3 = LLAMA | {"model_type": "qwen3", "head_dim": 16}
OPTIONS: dict[str, Any] = {"weigh": token_mean, "max_tokens_per_microbatch": 40, "weight_decay": 0.1}
UPDATE: dict[str, Any] = {"epochs": 1, "minibatch_sequences": 8, "lr": 3e-3}


def build(dtype: str = "bfloat16", config: Mapping[str, Any] = LLAMA, **options: Any) -> TransformerPolicy:
    value = {"value": "shared"} if "lora" not in options else {}
    model = load_language_model(config=config, dtype=dtype, seed=1, lora=options.pop("lora", None))
    return TransformerPolicy(model, **value, **options)


def loss(policy: Any, minibatch: Batch, coefficients: Mapping[str, Any]) -> tuple[torch.Tensor, dict]:
    new_logp, _, value = policy.evaluate(minibatch)
    total = (0.1 * (value - 1).square() - new_logp) * minibatch.weight
    return total.sum(), {"nll": (-new_logp * minibatch.weight).sum().detach()}


def rows(count: int = 16, width: int = 12) -> Batch:
    """Return rows that count up, from different beginnings: a next token can be learned."""
    generator = torch.Generator().manual_seed(0)
    tokens = (torch.randint(0, 40, (count, 1), generator=generator) + torch.arange(width + 1)) % 40
    length = torch.randint(4, width + 1, (count,), generator=generator)
    mask = torch.arange(width) < length[:, None]
    return Batch(obs=tokens[:, :-1], action=tokens[:, 1:], length=length, mask=mask)


def test_it_learns_as_float32_does():
    """30 updates of two steps; bfloat16 has 8 bits, so losses agree to some percent of what there was to learn."""
    torch.set_num_threads(1)
    losses = {}
    for dtype in ("float32", "bfloat16"):
        learner = Learner(partial(build, dtype), loss, **OPTIONS)
        losses[dtype] = [learner.update(rows(), seed=number, **UPDATE)["nll"] for number in range(30)]
    begin, end = losses["float32"][0], losses["float32"][-1]
    assert end < 0.5 * begin
    difference = np.abs(np.subtract(*losses.values()))
    assert 0 < difference.max() < 0.05 * begin


def test_steps_too_small_for_bfloat16_add_up():
    """Beside 1 its neighbours are 1/256 below and 1/128 above: a step of 0.001 is none, and five of them are one."""
    learner = Learner(build, loss, **OPTIONS | {"weight_decay": 0.0})
    norm: Any = learner.policy.trunk.decoder.norm.weight  # type: ignore[union-attr]
    place = learner.flat.names.index("model.model.norm.weight")
    master = learner.flat.views(learner.flat.data)[place]
    assert norm.dtype == torch.bfloat16 and master.dtype == torch.float32 and torch.all(norm == 1)
    options = UPDATE | {"lr": 1e-3, "minibatch_sequences": 16, "seed": 0}
    learner.update(rows(), **options)
    assert torch.all(norm == 1) and master.sub(1).abs().median() > 5e-4
    for _ in range(5):
        learner.update(rows(), **options)
    assert (norm != 1).float().mean() > 0.5
    assert torch.equal(norm, master.to(torch.bfloat16))


def test_gradients_of_many_microbatches_are_added_in_float32():
    """A sum in bfloat16 stands still at 256 times what is added: half of 512 equal parts would be lost."""
    one = rows(1)
    learner = Learner(build, loss, **OPTIONS | {"max_tokens_per_microbatch": 1})
    batches = [one, one.take(torch.zeros(512, dtype=torch.int64))]
    weighed = [Batch(**batch.tensors, weight=learner.weigh(batch.mask)) for batch in batches]
    single, many = (learner.gradient(batch, {})[0].clone() for batch in weighed)
    assert single.dtype == torch.float32
    torch.testing.assert_close(many, single, rtol=0.03, atol=1e-5)


def test_a_run_goes_on_to_the_bit_from_what_is_finer_than_its_parameters():
    straight, first, resumed = (Learner(build, loss, **OPTIONS) for _ in range(3))
    for number in range(4):
        straight.update(rows(), seed=number, **UPDATE)
    for number in range(2):
        first.update(rows(), seed=number, **UPDATE)
    state = first.get_state()
    weights = state["policy"]["model.model.layers.0.mlp.up_proj.weight"]
    rounded = torch.from_numpy(weights).to(torch.bfloat16).float().numpy()
    assert weights.dtype == np.float32 and (weights != rounded).mean() > 0.9
    resumed.set_state(state)
    for number in range(2, 4):
        resumed.update(rows(), seed=number, **UPDATE)
    assert resumed.weights().tobytes() == straight.weights().tobytes()
    for ours, expected in zip(resumed.flat.parameters, straight.flat.parameters, strict=True):
        assert torch.equal(ours, expected)


def test_a_value_head_and_an_adapter_stay_in_float32():
    with_value = Learner(build, loss, **OPTIONS)
    policy: Any = with_value.policy
    assert policy.value_head.weight.dtype == torch.float32
    assert policy.value_head.weight.data_ptr() == with_value.flat.views(with_value.flat.data)[-2].data_ptr()
    adapter = Learner(partial(build, lora={"r": 2}), loss, **OPTIONS)
    assert {parameter.dtype for parameter in adapter.flat.parameters} == {torch.float32}
    before = adapter.weights()
    adapter.update(rows(), seed=0, **UPDATE)
    assert (adapter.weights() != before).any()


@pytest.mark.parametrize("config", [LLAMA, QWEN3], ids=["llama", "qwen3"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_plan_says_what_there_is(dtype, config):
    """Weights, moments and gradient to the byte; what is kept of a token within a tenth of what autograd keeps."""
    learner = Learner(partial(build, dtype, config), loss, **OPTIONS)
    batch = learner._own(rows(40))
    minibatch = Batch(**batch.tensors, weight=learner.weigh(batch.mask))
    gradient, _ = learner.gradient(minibatch, {})
    update = UpdateSize(40, 12, 40, int(batch.length.sum()))
    net = NetSize.of(learner.policy)
    plan = memory_plan(net, update, available=1e9, num_learners=1).bytes
    held = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in learner.flat.parameters}
    assert set(held) <= {learner.flat.data.data_ptr(), *(copy.values.data_ptr() for copy in learner.flat._copies)}
    storages = held | {learner.flat.data.data_ptr(): learner.flat.data.untyped_storage()}
    assert plan["weights"] == sum(storage.nbytes() for storage in storages.values())
    assert plan["Adam"] == learner.adam.mean.nbytes + learner.adam.square.nbytes
    assert plan["gradient"] == gradient.nbytes + net.largest * (4 if dtype == "float32" else 6)
    assert all(p.grad is None for p in learner.flat.parameters if p.dtype == torch.bfloat16), "but for the sum"
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in storages:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    policy: Any = TransformerPolicy(learner.policy.model, layout="packed")  # type: ignore[arg-type]
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        policy.evaluate(minibatch)[0].sum()
    head = 4 * int(batch.length.sum()) * (40 + 4)
    assert sum(kept.values()) - head == pytest.approx(plan["activations"], rel=0.1)
