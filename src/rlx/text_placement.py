"""Where each model of a run on text lives and what it costs there, worked out from sizes, without weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn

from rlx.errors import RlxError
from rlx.learner.learner import VALUE_FUNCTION
from rlx.learner.learner_group import choose_device
from rlx.learner.memory_plan import in_words
from rlx.learner.sizes import Cost
from rlx.nets.reward_model import RewardModel
from rlx.reward_models import empty_reward_model
from rlx.text_building import generator_process, indexed, shares
from rlx.text_models import build_tokenizer
from rlx.text_settings import TextSettings

if TYPE_CHECKING:
    from rlx.text_algorithm import TextAlgorithm

TITLE = "where each model lives, and what it takes in each of the processes that are named"
COLUMNS = ("model", "process", "device", "parameters", "weights", "gradient", "optimizer", "")
NUMBERS = slice(3, 7)
"""The columns that are set to the right."""


class ModelPlace(NamedTuple):
    """A model in a process, or in several that are alike."""

    model: str
    process: str
    """driver, learner/0..3, token_runner/0, reward_model/0..1, or vllm for a server that is not of the run."""
    device: str
    cost: Cost | None
    """In each process, of its share; None where the model is another one's, or its size cannot be told."""
    remark: str = ""
    """Whose it is; or why its size cannot be told."""


def model_places(s: TextSettings, algorithm: type[TextAlgorithm]) -> list[ModelPlace]:
    """Return where the policy, its value model, its reference and the reward model of a run live."""
    tokenizer = build_tokenizer(s.model)
    with torch.device("meta"):
        policy = algorithm.policy_builder(s, len(tokenizer))()
    device = s.learners.device
    if device == "auto":
        device, _ = choose_device(device, lambda: policy)
    places = _learned(s, algorithm, policy, device)
    if algorithm.generates(s):
        places.append(_generating(s, policy.model, device))
        places += [_scoring(s, device)] if s.reward.model is not None else []
    return places


def placement_table(s: TextSettings, algorithm: type[TextAlgorithm]) -> str:
    """Return `model_places` in words, a line each."""
    rows = [COLUMNS, *map(_cells, model_places(s, algorithm))]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    aligned = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in rows]
    for row, cells in zip(rows, aligned, strict=True):
        cells[NUMBERS] = [cell.rjust(width) for cell, width in zip(row[NUMBERS], widths[NUMBERS], strict=True)]
    return "\n".join([TITLE, *("  ".join(["", *cells]).rstrip() for cells in aligned)])


def _learned(s: TextSettings, algorithm: type[TextAlgorithm], policy: nn.Module, device: str) -> list[ModelPlace]:
    process = indexed("learner", s.learners.num_learners) if s.learners.num_learners else "driver"
    owned: dict[str, list[nn.Parameter]] = {}
    for name, parameter in policy.named_parameters():
        owned.setdefault(_owner(name), []).append(parameter)
    if isinstance(policy, RewardModel):
        owned = {"reward model": list(policy.parameters())}
    shares_trunk = "a head on the policy's trunk" if s.model.value == "shared" else ""
    places = []
    for model, parameters in owned.items():
        remark = shares_trunk * (model == "value model")
        if not s.learners.optimizer_offload or device == "cpu":
            cost = Cost.of(parameters, learns=True, shares=shares(s), offloads=s.learners.optimizer_offload)
            places.append(ModelPlace(model, process, device, cost, remark))
            continue
        on_device, on_host = Cost.offloaded(parameters)
        places.append(ModelPlace(model, process, device, on_device, remark))
        if on_host.parameters:
            places.append(ModelPlace(model, process, "cpu", on_host, "its optimizer, in host memory"))
    if algorithm.needs_reference(s.training) and "reference" not in owned:
        places.append(ModelPlace("reference", process, device, None, "the policy without its adapter"))
    return places


def _owner(parameter: str) -> str:
    """Return which model of a policy a parameter belongs to."""
    if parameter.startswith(VALUE_FUNCTION):
        return "value model"
    return "reference" if parameter.startswith("reference.") else "policy"


def _generating(s: TextSettings, model: nn.Module, device: str) -> ModelPlace:
    if s.token_runners.engine == "vllm":
        return ModelPlace("policy", "vllm", "-", None, f"generates, at {s.token_runners.url}")
    place = generator_process(s, device)
    if place.reads_learner:
        return ModelPlace("policy", place.name, place.device, None, "generates with the learner's own weights")
    return ModelPlace("policy", place.name, place.device, Cost.of(model.parameters()), "generates")


def _scoring(s: TextSettings, device: str) -> ModelPlace:
    process = indexed("reward_model", s.reward.num_actors) if s.reward.num_actors else "driver"
    try:
        cost, remark = Cost.of(empty_reward_model(s.reward.model or "").parameters()), ""
    except RlxError as error:  # as of a run that has not begun
        cost, remark = None, f"unknown: {error}"
    return ModelPlace("reward model", process, device if s.reward.device == "auto" else s.reward.device, cost, remark)


def _cells(place: ModelPlace) -> tuple[str, ...]:
    if place.cost is None:
        numbers = ["-"] * 4
    else:
        parameters, *sizes = place.cost
        numbers = [f"{parameters:,}", *(in_words(size) if size else "-" for size in sizes)]
    return (place.model, place.process, place.device, *numbers, place.remark)
