"""Who computes where, with as many GPUs as a test says there are."""

import pytest
import torch

from rlx.errors import ConfigError
from rlx.nets.device import check_device, nth
from rlx.text_building import devices_beside, generator_process
from rlx.text_settings import TextSettings


@pytest.fixture
def three_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)


def settings(**sections):
    return TextSettings.model_validate(sections)


def test_a_device_that_is_not_there_is_refused_by_its_setting(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=r"reward\.device is cuda and torch finds no CUDA device here; set it to"):
        check_device("reward.device", "cuda")
    check_device("reward.device", "auto")


def test_gpus_are_taken_in_turns_learners_first(three_gpus):
    assert [nth("cuda", index) for index in range(4)] == ["cuda:0", "cuda:1", "cuda:2", "cuda:0"]
    assert nth("cpu", 5) == "cpu"
    two_learners = settings(learners={"num_learners": 2}, token_runners={"num_token_runners": 2})
    assert devices_beside(two_learners, "cuda", 2) == ["cuda:2", "cuda:0"]
    learns_in_the_driver = settings(token_runners={"num_token_runners": 2})
    assert devices_beside(learns_in_the_driver, "cuda", 2) == ["cuda:1", "cuda:2"]
    assert devices_beside(learns_in_the_driver, "cpu", 2) == ["cpu", "cpu"]


@pytest.mark.parametrize(
    ("sections", "expected"),
    [
        ({}, ("driver", "cuda", True)),
        ({"token_runners": {"device": "cpu"}}, ("driver", "cuda", True)),  # it reads the learner's own weights
        ({"learners": {"num_learners": 1}}, ("driver", "cuda", False)),
        ({"token_runners": {"num_token_runners": 2}}, ("token_runner/0..1", "cuda", False)),
        ({"token_runners": {"num_token_runners": 2, "device": "cpu"}}, ("token_runner/0..1", "cpu", False)),
    ],
)
def test_who_generates_is_where_the_learners_are_unless_it_is_said_otherwise(sections, expected, three_gpus):
    assert generator_process(settings(**sections), "cuda") == expected
