"""Every loss against TRL's own numbers: value and gradient on random ragged tensors in float64, to 1e-6.

tests/goldens/make_trl_goldens.py made the files, and says how. Each test composes the pure functions as an algorithm
does, with weights from the mask and one weighted sum. Where rlx differs from TRL on purpose, the test states the
mapping between the two.
"""

import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rlx.functional.advantages import token_gae
from rlx.functional.aggregation import pair_weight, sequence_mean, sequence_sum, token_mean
from rlx.functional.groups import group_advantage
from rlx.functional.kl import k1, k3
from rlx.functional.losses import cispo, clipped_squared_error, clipped_surrogate, sequence_ratio
from rlx.functional.masking import standardize, weighted_sum
from rlx.functional.preference import dpo, ipo, pairwise_loss, sequence_logp

FOLDER = Path(__file__).parents[1] / "goldens"
TRL_113 = json.loads((FOLDER / "trl_1.13.json").read_text())
TRL_110 = json.loads((FOLDER / "trl_1.10.json").read_text())
SETS = range(3)


def tensors(columns: dict[str, list]) -> dict[str, Tensor]:
    """Return lists as tensors; floats as float64, bit for bit what was written."""
    as_32 = {name: torch.tensor(column) for name, column in columns.items()}
    return {
        name: torch.tensor(columns[name], dtype=torch.float64) if t.is_floating_point() else t
        for name, t in as_32.items()
    }


def assert_agrees(value: Tensor, golden: Any, scale: float = 1.0) -> None:
    expected = torch.tensor(golden, dtype=torch.float64) * scale
    torch.testing.assert_close(value.detach().double(), expected, rtol=0, atol=1e-6)


def grpo_loss(t: dict[str, Tensor], new_logp: Tensor, settings: dict[str, Any]) -> Tensor:
    mask, logp = t["mask"], t["logp"]
    advantage = t["advantage"][:, None].expand(mask.shape)
    if settings.get("importance_sampling_level") == "sequence":
        ratio = sequence_ratio(new_logp, logp, mask)
    else:
        ratio = (new_logp - logp).exp()
    low, high = settings.get("epsilon_low", 0.2), settings.get("epsilon_high", 0.2)
    if settings["loss_type"] == "cispo":
        loss = cispo(new_logp, ratio, advantage, max_ratio=high)  # TRL's epsilon_high is here the bound itself
    else:
        # TRL's delta bounds the ratio from above on both sides; above 1 + epsilon_high that is the dual clip.
        loss = clipped_surrogate(ratio, advantage, low, high, dual_clip=settings.get("delta"))
    if settings.get("beta"):
        loss = loss + settings["beta"] * k3(new_logp, t["ref_logp"])
    weigh = {
        "grpo": sequence_mean,
        "bnpo": token_mean,
        "dapo": token_mean,
        "cispo": token_mean,
        "dr_grpo": partial(sequence_sum, length=settings.get("max_completion_length", 1)),
    }[settings["loss_type"]]
    return weighted_sum(loss, weigh(mask).double())


@pytest.mark.parametrize("number", SETS)
@pytest.mark.parametrize("name", list(TRL_113["grpo"][0]["cases"]))
def test_grpo_and_its_relatives(name, number):
    golden = TRL_113["grpo"][number]
    t, case = tensors(golden["inputs"]), golden["cases"][name]
    new_logp = t["new_logp"].clone().requires_grad_()
    loss = grpo_loss(t, new_logp, case["settings"])
    loss.backward()
    # Where it averages over sequences TRL counts those without a token as well, which rlx does not.
    sequences, counted = len(t["mask"]), int(t["mask"].any(1).sum())
    scale = sequences / counted if case["settings"]["loss_type"] in ("grpo", "dr_grpo") else 1.0
    assert_agrees(loss, case["loss"], scale)
    assert_agrees(new_logp.grad, case["by_new_logp"], scale)


def test_the_goldens_reach_every_branch():
    """A case in which no ratio left its range would prove nothing: each setting changes loss and gradient somewhere."""
    sets = [golden["cases"] for golden in TRL_113["grpo"]]
    for one, other in (("grpo", "asymmetric"), ("bnpo", "dual_clip"), ("bnpo", "dapo"), ("grpo", "gspo")):
        assert any(abs(cases[one]["loss"] - cases[other]["loss"]) > 1e-3 for cases in sets)
        assert any(cases[one]["by_new_logp"] != cases[other]["by_new_logp"] for cases in sets)
    assert [all(any(row) for row in golden["inputs"]["mask"]) for golden in TRL_113["grpo"]] == [True, True, False]


@pytest.mark.parametrize("number", SETS)
@pytest.mark.parametrize("name", ["sigmoid_0.1", "sigmoid_0.5", "ipo_0.1", "ipo_0.5"])
def test_dpo_and_ipo(name, number):
    golden = TRL_113["preference"][number]
    t, case = tensors(golden["inputs"]), golden["cases"][name]
    leaf = t["logp"].clone().requires_grad_()
    mask, logp, ref_logp = (  # TRL stacks the chosen on the rejected; rlx has rows of pairs [P, 2, L]
        rows.unflatten(0, (2, -1)).transpose(0, 1) for rows in (t["mask"], leaf, t["ref_logp"])
    )
    kind, beta = name.split("_")
    per_token = kind == "ipo"  # TRL's IPO is of means over tokens
    chosen, rejected = sequence_logp(logp, mask, mean=per_token).unbind(1)
    ref_chosen, ref_rejected = sequence_logp(ref_logp, mask, mean=per_token).unbind(1)
    loss = (ipo if per_token else dpo)(chosen, rejected, ref_chosen, ref_rejected, float(beta))
    assert_agrees(loss, case["loss"])
    weighted_sum(loss, pair_weight(mask).double()).backward()
    assert_agrees(leaf.grad, case["by_logp"])


@pytest.mark.parametrize("number", SETS)
@pytest.mark.parametrize("name", ["reward", "reward_margin"])
def test_the_reward_models_loss(name, number):
    golden = TRL_113["preference"][number]
    t, case = tensors(golden["inputs"]), golden["cases"][name]
    score = t["score"].clone().requires_grad_()
    chosen, rejected = score.chunk(2)
    loss = pairwise_loss(chosen, rejected, t["margin"] if name == "reward_margin" else 0.0).mean()
    loss.backward()
    assert_agrees(loss, case["loss"])
    assert_agrees(score.grad, case["by_score"])


@pytest.mark.parametrize("number", SETS)
@pytest.mark.parametrize(
    ("name", "baseline", "scale"),
    [
        ("grpo_group", "mean", "group_std"),
        ("grpo_batch", "mean", "batch_std"),
        ("grpo_none", "mean", "none"),
        ("rloo", "leave_one_out", "none"),
    ],
)
def test_group_advantages(name, baseline, scale, number):
    golden = TRL_113["groups"][number]
    t = tensors(golden["inputs"])
    score = t["score"].masked_fill(~t["mask"], torch.nan)
    advantage = group_advantage(score, 4, baseline=baseline, scale=scale, mask_S=t["mask"])
    assert_agrees(advantage, golden["cases"][name]["advantage"])


@pytest.mark.parametrize("golden", TRL_110["ppo"], ids=lambda golden: golden["settings"]["kl_estimator"])
def test_ppo_with_gae_whitening_and_both_losses(golden):
    """TRL 1.10 on whole rows.

    TRL counts one position more for values, that after the last token, and puts the score there, where the row is not
    full; rlx has the score at the last token. With TRL's positions the functions agree. TRL whitens with the unbiased
    variance, rlx with the population's: a factor sqrt((n - 1) / n). TRL's value loss has a factor 1/2.
    """
    t, settings = tensors(golden["inputs"]), golden["settings"]
    rows, columns = t["value"].shape
    position, length = torch.arange(columns), t["length"][:, None]
    mask, value_mask = position < length, position < length + 1

    estimator = {"k1": k1, "k3": k3}[settings["kl_estimator"]]
    reward = (-settings["kl_coef"] * estimator(t["logp"], t["ref_logp"])).masked_fill(~mask, 0)
    reward[torch.arange(rows), t["length"].clamp(max=columns - 1)] += t["score"]
    assert_agrees(reward, golden["rewards"])

    raw_advantage, return_ = token_gae(reward, t["value"], value_mask, settings["gamma"], settings["lam"])
    assert_agrees(return_, golden["returns"])
    count = int(mask.sum())
    advantage = standardize(raw_advantage, mask) * math.sqrt((count - 1) / count)
    assert_agrees(advantage, golden["advantages"])

    new_logp, new_value = t["new_logp"].clone().requires_grad_(), t["new_value"].clone().requires_grad_()
    ratio = (new_logp - t["logp"]).exp()
    policy_loss = weighted_sum(clipped_surrogate(ratio, advantage, settings["cliprange"]), token_mean(mask).double())
    error = clipped_squared_error(new_value, return_, t["value"], settings["cliprange_value"])
    value_loss = weighted_sum(error, token_mean(value_mask).double())
    loss = policy_loss + 0.5 * settings["vf_coef"] * value_loss
    loss.backward()
    assert_agrees(policy_loss, golden["policy_loss"])
    assert_agrees(value_loss, golden["value_loss"], scale=2)
    assert_agrees(loss, golden["loss"])
    assert_agrees(new_logp.grad, golden["by_new_logp"])
    assert_agrees(new_value.grad, golden["by_new_value"])
