"""Rows of tokens: one batch, microbatches, packed rows and two learners make one loss and gradient."""

from collections.abc import Mapping
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from rlx import actors
from rlx.checkpoint import load_checkpoint, save_checkpoint
from rlx.learner.learner import Learner
from rlx.learner.learner_group import LearnerGroup
from rlx.learner.microbatches import blank, microbatches
from rlx.nets.language_model import load_language_model
from rlx.nets.ragged import parts_by_length
from rlx.nets.reward_model import RewardModel
from rlx.nets.transformer import TransformerPolicy
from rlx.trajectory import Batch

UPDATE: dict[str, Any] = {"epochs": 2, "minibatch_sequences": 5, "lr": 1e-3, "seed": 3}
COLUMNS = ("logp", "advantage", "return_", "value")


def build(config: Mapping[str, Any], *, double: bool = True, lora: Any = None, **options: Any) -> TransformerPolicy:
    model = load_language_model(config=config, seed=1, lora=lora)
    policy = TransformerPolicy(model, temperature=0.7, value="shared", **options)
    return policy.double() if double else policy


def loss(policy: Any, minibatch: Batch, coefficients: Any) -> tuple[torch.Tensor, dict]:
    """PPO's loss, written out, with stats of everything that comes with a batch."""
    new_logp, entropy, value = policy.evaluate(minibatch)
    ratio = (new_logp - minibatch.logp).exp()
    surrogate = torch.minimum(ratio * minibatch.advantage, ratio.clamp(0.8, 1.2) * minibatch.advantage)
    error = (value - minibatch.return_) ** 2 + 0.1 * (value - minibatch.value) ** 2
    total = ((0.5 * error - surrogate - 0.01 * entropy) * minibatch.weight).sum()
    stats = {"kl": minibatch.logp - new_logp, "entropy": entropy, "ratio": ratio, "error": error}
    return total, {name: (stat.detach() * minibatch.weight).sum() for name, stat in stats.items()}


def by_sequence(mask: torch.Tensor) -> torch.Tensor:
    """Weigh every sequence alike, whatever its length."""
    per_row = mask / mask.sum(-1, keepdim=True).clamp(min=1)
    return per_row / mask.any(-1).sum().clamp(min=1)


def make_rows(count: int = 12, seed: int = 0, dtype: torch.dtype = torch.float64) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    length = torch.randint(2, 12, (count,), generator=generator)
    length[0] = 11
    tokens = torch.randint(0, 40, (count, 12), generator=generator)
    tokens[4:8, :3] = tokens[3:4, :3]  # the samples of one prompt
    tokens[8:, :2] = tokens[3:4, :2]  # and those of another, which begins like it
    prompt = torch.randint(0, 2, (count, 1), generator=generator)
    prompt[3:8], prompt[8:] = 2, 1
    mask = (torch.arange(11) < length[:, None]) & (torch.arange(11) >= prompt)
    columns = {name: torch.randn(count, 11, generator=generator, dtype=dtype) * mask for name in COLUMNS}
    columns["logp"] = columns["logp"] * 0.3 - 3.7 * mask
    return Batch(obs=tokens[:, :-1], action=tokens[:, 1:], mask=mask, length=length, **columns)


LAYOUTS: dict[str, tuple[dict, int | None]] = {
    "one padded batch": ({"layout": "padded"}, None),
    "sorted": ({"layout": "padded"}, 30),
    "packed": ({"layout": "packed"}, 30),
    "one packed batch": ({"layout": "packed"}, 10_000),
    "shared beginnings": ({"layout": "shared"}, 60),
    "one batch of shared beginnings": ({"layout": "shared"}, 10_000),
    "as it pays": ({"layout": "auto"}, 200),
    "single rows": ({"layout": "padded"}, 1),
    "checkpointed": ({"layout": "padded", "activation_checkpointing": True}, 30),
}


def without_time(stats: dict[str, float]) -> dict[str, float]:
    return {name: stat for name, stat in stats.items() if name != "busy_s"}


@pytest.mark.parametrize(
    ("family", "weigh"),
    [("llama", None), ("gpt2", by_sequence), pytest.param("qwen2", by_sequence, marks=pytest.mark.slow)],
)
def test_every_layout_makes_one_gradient_and_one_loss(language_model_configs, family, weigh):
    """In float64; the weights of a minibatch are made before it is cut, in float32, the same for all.

    The norms of Llama and Qwen are float32 whatever the model is, and so are the gradients that go through them: where
    several rows meet in a shared beginning their sum is rounded instead of each.
    """
    config, reference = language_model_configs[family], None
    for name, (options, max_tokens) in LAYOUTS.items():
        weighing = {} if weigh is None else {"weigh": weigh}
        learner = Learner(partial(build, config, **options), loss, max_tokens_per_microbatch=max_tokens, **weighing)
        rows = learner._own(make_rows())
        minibatch = Batch(**rows.tensors, weight=learner.weigh(rows.mask))
        gradient, stats = learner.gradient(minibatch, {})
        results = [gradient.clone(), *(stats[key] for key in sorted(stats))]
        reference = reference or results
        for ours, expected in zip(results, reference, strict=True):
            tolerance = 1e-7 if policy_shares(learner.policy, minibatch) and family != "gpt2" else 1e-12
            torch.testing.assert_close(ours, expected, rtol=tolerance, atol=tolerance, msg=name)


def policy_shares(policy: Any, rows: Batch) -> bool:
    return bool(policy._rows(rows).groups)


def test_the_rows_of_these_tests_share_beginnings(language_model_configs):
    """Rows 3 to 7 and 8 to 11 that are long enough to act."""
    rows = make_rows()
    policy = build(language_model_configs["llama"], layout="shared")
    groups = policy._rows(rows).groups
    assert sorted(len(group) for group in groups)[-2:] == [4, 5]


def test_updates_of_every_layout_end_at_the_same_weights(language_model_configs):
    """In float32, as training is."""
    make = partial(build, language_model_configs["llama"], double=False)
    weights, stats = [], []
    for options, max_tokens in LAYOUTS.values():
        learner = Learner(partial(make, **options), loss, max_tokens_per_microbatch=max_tokens, adam_eps=1e-3)
        stats.append(learner.update(make_rows(dtype=torch.float32), **UPDATE))
        weights.append(learner.weights())
    assert np.abs(weights[0] - make_weights(make)).max() > 1e-4
    for other, measured in zip(weights[1:], stats[1:], strict=True):
        np.testing.assert_allclose(other, weights[0], rtol=0, atol=2e-6)
        assert without_time(measured) == pytest.approx(without_time(stats[0]), rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("max_tokens", [None, 30, 1])
def test_what_is_measured_is_what_an_update_would_minimise_and_changes_nothing(language_model_configs, max_tokens):
    learner = Learner(partial(build, language_model_configs["llama"]), loss, max_tokens_per_microbatch=max_tokens)
    before = learner.weights()
    measured = learner.measure(make_rows())
    assert np.array_equal(learner.weights(), before)
    stats = learner.update(make_rows(), epochs=1, lr=0.0, seed=0)
    assert measured == pytest.approx({name: stats[name] for name in measured}, rel=1e-6)  # float32 sums
    assert {"loss", "kl", "entropy", "ratio", "error"} == measured.keys()


def make_weights(make: Any) -> np.ndarray:
    return Learner(make, loss).weights()


@pytest.mark.parametrize("layout", ["one padded batch", "sorted", "packed", "shared beginnings"])
def test_garbage_where_nothing_counts_changes_no_weight_and_no_stat_by_a_bit(language_model_configs, layout):
    options, max_tokens = LAYOUTS[layout]
    results = []
    for garbage in (None, float("nan"), 1e9, "random"):
        rows = make_rows(dtype=torch.float32)
        if garbage is not None:
            fill(rows, garbage)
        make = partial(build, language_model_configs["llama"], double=False, **options)
        learner = Learner(make, loss, max_tokens_per_microbatch=max_tokens)
        stats = learner.update(rows, **UPDATE)
        columns = learner.evaluate(rows, "logp", "entropy", "value")
        results.append((learner.weights(), without_time(stats), columns))
    for weights, stats, columns in results[1:]:
        assert np.array_equal(weights, results[0][0]) and stats == results[0][1]
        assert all(torch.equal(column, results[0][2].tensors[name]) for name, column in columns.tensors.items())


def fill(rows: Batch, garbage: float | str) -> None:
    """Write into every position that nothing may read; the mask is true beyond the end of rows, too."""
    generator = torch.Generator().manual_seed(1)
    outside = torch.arange(11) >= rows.length[:, None]
    for name in COLUMNS:
        noise = torch.randn(rows.mask.shape, generator=generator) * 100
        value = noise if garbage == "random" else torch.full(rows.mask.shape, float(garbage))
        rows.tensors[name] = torch.where(rows.mask, rows.tensors[name], value)
    rows.tensors["obs"] = torch.where(outside, torch.randint(-99, 99, outside.shape, generator=generator), rows.obs)
    actions = torch.randint(-(10**9), 10**9, outside.shape, generator=generator)
    rows.tensors["action"] = torch.where(rows.mask, rows.action, actions)
    rows.tensors["mask"] = rows.mask | outside


def test_microbatches_hold_every_row_once_trimmed_and_within_their_tokens():
    rows = make_rows(30)
    rows.tensors |= {"number": torch.arange(30)}
    seen = []
    policy = SimpleNamespace(parts=lambda batch, max_tokens: parts_by_length(batch.length, max_tokens))
    for index, part in microbatches(policy, rows, 40):
        longest = int(part.length.max())
        assert torch.equal(part.number, index) and part.obs.shape == part.logp.shape == (len(index), longest)
        assert len(index) * longest <= 40
        assert torch.equal(part.obs, rows.obs[index, :longest])
        seen += index.tolist()
    assert sorted(seen) == list(range(30))


def test_blanking_keeps_prompts_and_leaves_the_caller_s_batch_alone():
    rows = Batch(
        obs=torch.tensor([[5, 6, 7]]), action=torch.tensor([[6, 7, 8]]), length=torch.tensor([2]),
        mask=torch.tensor([[False, True, True]]), logp=torch.tensor([[1.0, 2.0, 3.0]]), score=torch.tensor([4.0]),
    )  # fmt: skip
    blanked = blank(rows)
    assert {name: tensor.tolist() for name, tensor in blanked.tensors.items()} == {
        "obs": [[5, 6, 0]], "action": [[0, 7, 0]], "length": [2], "mask": [[False, True, False]],
        "logp": [[0.0, 2.0, 0.0]], "score": [4.0],
    }  # fmt: skip
    assert rows.logp.tolist() == [[1.0, 2.0, 3.0]]


def test_the_ratio_of_a_first_minibatch_is_one(language_model_configs):
    """Old log-probabilities come from `evaluate`, in other microbatches than the loss makes."""
    seen = []

    def recording(policy, minibatch, coefficients):
        total, stats = loss(policy, minibatch, coefficients)
        ratio = (policy.evaluate(minibatch)[0] - minibatch.logp).exp()
        seen.append((ratio - 1).abs().max().item())
        return total, stats

    make = partial(build, language_model_configs["llama"], double=False)
    learner = Learner(make, recording, max_tokens_per_microbatch=30)
    rows = make_rows(dtype=torch.float32)
    rows.tensors["logp"] = learner.evaluate(rows, "logp").logp
    learner.update(rows, epochs=1, lr=0.0, seed=0)
    assert max(seen) < 1e-5


@pytest.fixture(scope="module")
def runtime():
    with actors.runtime("local") as rt:
        yield rt


@pytest.mark.slow
def test_two_learners_on_actors_make_the_steps_of_one_and_evaluate_in_order(language_model_configs, runtime):
    """In float64. 12 rows in minibatches of 5, 5, 2: shares of 3 and 2, and 1 and 1; evaluated as 6 and 6."""
    make = partial(build, language_model_configs["gpt2"])
    options: dict[str, Any] = {"device": "cpu", "max_tokens_per_microbatch": 30, "weigh": by_sequence, "adam_eps": 1e-3}
    one = LearnerGroup(make, loss, **options)
    two = LearnerGroup(make, loss, num_learners=2, runtime=lambda: runtime, **options)
    stats = [group.update(make_rows(), **UPDATE) for group in (one, two)]
    np.testing.assert_allclose(two.weights(), one.weights(), rtol=0, atol=1e-12)
    assert without_time(stats[1]) == pytest.approx(without_time(stats[0]), rel=1e-6)
    names = ("logp", "entropy", "value")
    expected, columns = (group.evaluate(make_rows(), *names) for group in (one, two))
    for name in names:
        torch.testing.assert_close(columns.tensors[name], expected.tensors[name], rtol=1e-9, atol=1e-9)
    single = make_rows(1)  # a learner without a row
    torch.testing.assert_close(two.evaluate(single, "logp").logp, one.evaluate(single, "logp").logp, rtol=0, atol=1e-9)
    again = [group.update(single, epochs=1, lr=1e-3, seed=0)["loss"] for group in (one, two)]
    assert again[1] == pytest.approx(again[0], rel=1e-6)
    two.close()


@pytest.mark.parametrize("lora", [None, {"r": 2}])
def test_a_learner_of_tokens_continues_bit_for_bit_from_a_checkpoint(language_model_configs, tmp_path, lora):
    make = partial(build, language_model_configs["llama"], double=False, lora=lora)
    options: dict[str, Any] = {"max_tokens_per_microbatch": 30, "weight_decay": 0.1, "adam_betas": (0.9, 0.95)}
    straight, first, resumed = (Learner(make, loss, **options) for _ in range(3))
    rows = make_rows(dtype=torch.float32)
    for learner in (straight, first):
        learner.update(rows, **UPDATE)
    resumed.set_state(load_checkpoint(save_checkpoint(tmp_path / "learner", first.get_state())))
    for learner in (straight, resumed):
        learner.update(rows, **UPDATE | {"seed": 4})
    assert np.array_equal(resumed.weights(), straight.weights())
    if lora is not None:  # the state is that of the adapter and the value head
        names = first.get_state()["policy"]
        assert all("lora_" in name or name.startswith("value_head") for name in names)
        assert first.weights().nbytes < 0.5 * make_weights(partial(make, lora=None)).nbytes


def test_weight_decay_shrinks_matrices_alone(language_model_configs):
    """A loss without gradient: Adam does not move, and a step takes lr * 0.1 of every matrix."""
    make = partial(build, language_model_configs["llama"], double=False)
    learner = Learner(make, lambda *_: (torch.zeros(()), {}), max_tokens_per_microbatch=30, weight_decay=0.1)
    before = [parameter.detach().clone() for parameter in learner.flat.parameters]
    learner.update(make_rows(dtype=torch.float32), epochs=1, lr=0.5, seed=0)
    for parameter, start in zip(learner.flat.parameters, before, strict=True):
        torch.testing.assert_close(parameter.detach(), start * (0.95 if start.ndim > 1 else 1.0))


def test_a_reward_model_is_learned_from_pairs_and_its_normalisation_is_kept(language_model_configs):
    def pairwise(model, minibatch, coefficients):
        chosen, rejected = model.evaluate(minibatch).unbind(1)
        weight = minibatch.weight
        total = (-torch.nn.functional.logsigmoid(chosen - rejected) * weight).sum()
        return total, {"accuracy": ((chosen > rejected) * weight).sum()}

    def weigh(mask):
        return torch.full((len(mask),), 1 / len(mask))

    make = lambda: RewardModel(load_language_model(config=language_model_configs["llama"], seed=1))  # noqa: E731
    rows = make_rows(24, dtype=torch.float32)
    pairs = Batch(**{name: rows.tensors[name].unflatten(0, (12, 2)) for name in ("obs", "action", "mask", "length")})
    weights = []
    for max_tokens in (40, 10_000):
        learner = Learner(make, pairwise, weigh=weigh, max_tokens_per_microbatch=max_tokens, adam_eps=1e-3)
        stats = learner.update(pairs, epochs=40, lr=1e-2, seed=0)
        weights.append(learner.weights())
    assert stats["accuracy"] > 0.8
    np.testing.assert_allclose(weights[0], weights[1], rtol=0, atol=1e-3)
    scores = learner.evaluate(pairs, "score").score
    assert scores.shape == (12, 2) and (scores[:, 0] > scores[:, 1]).float().mean() > 0.9
    learner.policy.normalize(scores.mean().item(), scores.std().item())
    other = Learner(make, pairwise, max_tokens_per_microbatch=40)
    other.set_state(learner.get_state())
    normalised = other.evaluate(pairs, "score").score
    assert normalised.mean().item() == pytest.approx(0, abs=1e-4) and normalised.std().item() == pytest.approx(
        1, abs=1e-3
    )
