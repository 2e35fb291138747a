"""Fixtures for tests of algorithms."""

import pytest
import torch

from rlx.trajectory import Batch

GARBAGE = {"nan": (float("nan"), 7), "large": (1e9, 10**9), "random": (None, None)}


def with_garbage(batch: Batch, kind: str) -> Batch:
    """Return rows of tokens with something else wherever nothing counts.

    Within a row's length every token is read; every other column counts where the mask is true.
    """
    number, token = GARBAGE[kind]
    generator = torch.Generator().manual_seed(1)
    columns = dict(batch.tensors)
    within = torch.arange(batch.mask.shape[-1]) < batch.length[..., None]
    for name, column in columns.items():
        if name in ("mask", "length") or column.shape != batch.mask.shape:
            continue
        if column.dtype == torch.bool:
            garbage = torch.ones_like(column)
        elif column.dtype == torch.int64:
            ids = torch.randint(0, 13, column.shape, generator=generator)
            garbage = ids if token is None else torch.full_like(column, token)
        else:
            values = torch.randn(column.shape, generator=generator)
            garbage = values if number is None else torch.full_like(column, number)
        columns[name] = torch.where(within if name == "obs" else batch.mask, column, garbage)
    return Batch(**columns)


@pytest.fixture(params=GARBAGE)
def garbage(request):
    """A function that fills all of a batch that does not count with something, three ways."""
    return lambda batch: with_garbage(batch, request.param)


@pytest.fixture
def computed():
    """Return what an iteration computed: its metrics without times."""

    def without_times(row):
        return {name: value for name, value in row.items() if not name.startswith(("time/", "env_steps_per_s"))}

    return without_times


@pytest.fixture
def ragged():
    """Prompts of 2 to 9 tokens."""
    return [{"prompt": f"{'+'.join(str(a + b) for b in range(1 + a % 4))}="} for a in range(1, 65)]


@pytest.fixture
def sharpen():
    """Make a policy's law uneven, as training does: sharpen(algorithm) scales its weights up; the runners see it."""

    def scale(algorithm, factor=4.0):
        state = algorithm.learners.get_state()
        for name, array in state["learner"]["policy"].items():
            if array.ndim > 1:
                state["learner"]["policy"][name] = array * factor
        algorithm.learners.set_state(state)
        algorithm._weights_are_stale = True

    return scale


@pytest.fixture(scope="module", autouse=True)
def runs_share_processes(shared_processes):
    """Have the runs of every file here start their actors where those before them did."""
