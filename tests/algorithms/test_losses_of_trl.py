"""The losses of GRPO, PPO on text, DPO and reward models, called as a learner calls them, against TRL's own numbers.

tests/functional/test_trl_goldens.py compares the pure functions and says how the files were made. Here the algorithms
compose them: what the settings choose, how `weigh` and `loss` fit together, in microbatches that share the weights of
their minibatch. A stub policy evaluates to the goldens' tensors, in float64; agreement is to 1e-6.
"""

import json
import math
from pathlib import Path

import pytest
import torch

from rlx.algorithms.dpo import DPO, DPOTraining
from rlx.algorithms.grpo import GRPO, GRPOTraining
from rlx.algorithms.reward_model import RewardModelTrainer, RewardModelTraining
from rlx.algorithms.rlhf_ppo import RLHFPPO, RLHFPPOTraining
from rlx.trajectory import Batch

FOLDER = Path(__file__).parents[1] / "goldens"
TRL_113 = json.loads((FOLDER / "trl_1.13.json").read_text())
TRL_110 = json.loads((FOLDER / "trl_1.10.json").read_text())
SETS = range(3)
LONGEST = 12
"""The max_completion_length of TRL's cases."""


class Stub:
    """Evaluates a minibatch to the columns that the batch itself brings."""

    def evaluate(self, minibatch, *, entropy=True):
        new_value = minibatch.tensors.get("new_value", minibatch.new_logp)
        return minibatch.new_logp, torch.zeros_like(minibatch.new_logp), new_value


class Judge:
    """Evaluates pairs to the scores that the batch brings."""

    def evaluate(self, minibatch):
        return minibatch.score


def tensors(columns):
    """Return lists as tensors; floats as float64, bit for bit what was written."""
    made = {name: torch.tensor(column, dtype=torch.float64) for name, column in columns.items()}
    integers = {"mask": torch.bool, "length": torch.int64}
    return {name: column.to(integers.get(name, torch.float64)) for name, column in made.items()}


def summed_loss(algorithm, policy, batch, training, coefficients=None, weight=None):
    """Return the loss of a minibatch in two microbatches, and the stats; the weights are those of all of it."""
    weight = algorithm.weigh(batch.mask, training, LONGEST) if weight is None else weight
    parts = Batch(**batch.tensors, weight=weight.double()).split(3)
    losses, stats = zip(*(algorithm.loss(policy, part, coefficients or {}, training) for part in parts), strict=True)
    return torch.stack(losses).sum(), {name: sum(one[name] for one in stats) for name in stats[0]}


def assert_agrees(value, golden, scale=1.0):
    expected = torch.tensor(golden, dtype=torch.float64) * scale
    torch.testing.assert_close(value.detach(), expected, rtol=0, atol=1e-6)


# GRPO and its kin ------------------------------------------------------------------------------------------------

AGGREGATIONS = {
    "grpo": "sequence_mean",
    "bnpo": "token_mean",
    "dapo": "token_mean",
    "cispo": "token_mean",
    "dr_grpo": "constant",
}
CASES = {name: case["settings"] for name, case in TRL_113["grpo"][0]["cases"].items()}
DUAL_CLIP = {name for name, settings in CASES.items() if "delta" in settings}
"""No algorithm has a dual clip as yet: a setting of the pure function only."""


def test_every_case_of_trl_but_the_dual_clip_is_a_setting_of_grpo():
    assert {"dual_clip", "dual_clip_asymmetric"} == DUAL_CLIP
    assert {settings["loss_type"] for settings in CASES.values()} == AGGREGATIONS.keys()
    assert {settings.get("max_completion_length", LONGEST) for settings in CASES.values()} == {LONGEST}


def grpo_training(settings):
    """Return TRL's settings as GRPO's: training section and clip range."""
    low, high = settings.get("epsilon_low", 0.2), settings.get("epsilon_high", 0.2)
    is_cispo = settings["loss_type"] == "cispo"
    training = GRPOTraining(
        aggregation=AGGREGATIONS[settings["loss_type"]],
        objective="cispo" if is_cispo else "clip",
        ratio=settings.get("importance_sampling_level", "token"),
        clip_range_high=None if is_cispo or high == low else high,
        max_ratio=high if is_cispo else 5.0,
        kl_coef=settings.get("beta", 0.0),
    )
    return training, {"clip_range": low}


@pytest.mark.parametrize("number", SETS)
@pytest.mark.parametrize("name", sorted(CASES.keys() - DUAL_CLIP))
def test_grpo_and_its_kin(name, number):
    golden = TRL_113["grpo"][number]
    case, columns = golden["cases"][name], tensors(golden["inputs"])
    training, coefficients = grpo_training(case["settings"])
    leaf = columns["new_logp"].requires_grad_()
    columns["advantage"] = columns["advantage"][:, None].expand(leaf.shape)
    loss, stats = summed_loss(GRPO, Stub(), Batch(**columns), training, coefficients)
    loss.backward()
    # Where it averages over sequences TRL counts those without a token as well, which rlx does not.
    mask = columns["mask"]
    scale = len(mask) / int(mask.any(1).sum()) if training.aggregation in ("sequence_mean", "constant") else 1.0
    assert_agrees(loss, case["loss"], scale)
    assert_agrees(leaf.grad, case["by_new_logp"], scale)
    # Without its KL penalty a case is another one of TRL's, and that is what is told as policy_loss.
    plain = golden["cases"][name.removeprefix("kl_").replace("kl", "grpo")]
    if {**plain["settings"], "beta": 0} == {**case["settings"], "beta": 0}:
        assert_agrees(stats["policy_loss"], plain["loss"], scale)


# PPO -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", range(len(TRL_110["ppo"])))
def test_ppo(number):
    """Of the policy and of the values in turn, as TRL counts one value more in each row than rlx: that after the end.

    TRL's value loss has a factor 1/2.
    """
    golden = TRL_110["ppo"][number]
    columns, settings = tensors(golden["inputs"]), golden["settings"]
    columns |= tensors({"advantage": golden["advantages"], "return_": golden["returns"]})
    position = torch.arange(columns["logp"].shape[1])
    ends = columns["length"][:, None]
    batch = Batch(**columns | {"mask": position < ends})
    leaves = [batch.tensors[name].requires_grad_() for name in ("new_logp", "new_value")]
    training = RLHFPPOTraining(value_coef=settings["vf_coef"] / 2, value_clip=settings["cliprange_value"])
    both = {"clip_range": settings["cliprange"], "kl_coef": settings["kl_coef"]}
    without_value = training.model_copy(update={"value_coef": 0.0})
    of_policy, stats = summed_loss(RLHFPPO, Stub(), batch, without_value, both | {"policy_coef": 1.0})
    value_weight = RLHFPPO.weigh(position < ends + 1, training, LONGEST)
    of_value, value_stats = summed_loss(
        RLHFPPO, Stub(), batch, training, both | {"policy_coef": 0.0}, weight=value_weight
    )
    (of_policy + of_value).backward()
    assert_agrees(of_policy, golden["policy_loss"])
    assert_agrees(stats["policy_loss"], golden["policy_loss"])
    assert_agrees(value_stats["value_loss"], golden["value_loss"], scale=2)
    assert_agrees(of_policy + of_value, golden["loss"])
    assert_agrees(leaves[0].grad, golden["by_new_logp"])
    assert_agrees(leaves[1].grad, golden["by_new_value"])


# Preferences -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", SETS)
@pytest.mark.parametrize("name", ["sigmoid_0.1", "sigmoid_0.5", "ipo_0.1", "ipo_0.5"])
def test_dpo_and_ipo(name, number):
    golden = TRL_113["preference"][number]
    columns, case = tensors(golden["inputs"]), golden["cases"][name]
    leaf = columns["logp"].requires_grad_()
    named = {"mask": columns["mask"], "new_logp": leaf, "ref_logp": columns["ref_logp"]}
    batch = Batch(**{name: rows.unflatten(0, (2, -1)).transpose(0, 1) for name, rows in named.items()})
    kind, beta = name.split("_")
    training = DPOTraining(objective="ipo" if kind == "ipo" else "dpo", beta=float(beta))
    loss, stats = summed_loss(DPO, Stub(), batch, training)
    loss.backward()
    assert_agrees(loss, sum(case["loss"]) / len(case["loss"]))
    assert_agrees(leaf.grad, case["by_logp"])
    if kind == "sigmoid":  # a pair's loss is below log 2 where its margin is positive
        assert_agrees(stats["accuracy"], sum(one < math.log(2) for one in case["loss"]) / len(case["loss"]))


@pytest.mark.parametrize("number", SETS)
@pytest.mark.parametrize("name", ["reward", "reward_margin"])
def test_the_reward_model(name, number):
    golden = TRL_113["preference"][number]
    columns, case = tensors(golden["inputs"]), golden["cases"][name]
    leaf = columns["score"].requires_grad_()
    mask = columns["mask"].unflatten(0, (2, -1)).transpose(0, 1)
    batch = Batch(score=leaf.unflatten(0, (2, -1)).T, margin=columns["margin"], mask=mask)
    training = RewardModelTraining(use_margin=name == "reward_margin")
    loss, _ = summed_loss(RewardModelTrainer, Judge(), batch, training)
    loss.backward()
    assert_agrees(loss, case["loss"])
    assert_agrees(leaf.grad, case["by_score"])
