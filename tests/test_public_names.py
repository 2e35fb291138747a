"""The public names of rlx: what a user imports today works tomorrow."""

import pytest

import rlx

NAMES = [
    "Algorithm",
    "AlgorithmConfig",
    "Callback",
    "Episode",
    "Schedule",
    "Section",
    "Settings",
    "TrainedPolicy",
    "TrainingSection",
    "errors",
    "load_config",
    "load_policy",
]


def test_the_public_names_are_these():
    assert rlx.__all__ == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_public_name_can_be_imported(name):
    assert getattr(rlx, name).__name__.rpartition(".")[2] == name


def test_tab_completion_shows_the_public_names():
    assert dir(rlx) == sorted(NAMES)


def test_an_unknown_name_is_refused_with_the_known_ones():
    with pytest.raises(AttributeError, match="no attribute 'load_polcy'; public names: Algorithm, "):
        rlx.load_polcy  # noqa: B018
