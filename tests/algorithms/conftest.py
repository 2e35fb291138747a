"""Fixtures for tests of algorithms."""

import contextlib

import pytest
import torch

from rlx import actors
from rlx.building import LazyRuntime
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
def shared_processes():
    """Have runs of a file's tests take turns with runtimes, which import once for all; each ends its actors there.

    A run with a folder has a runtime of its own, whose logs go there, and so has one beside another.
    """
    free = {}
    with contextlib.ExitStack() as stack:

        class Shared(LazyRuntime):
            taken = None

            def __call__(self):
                preload = (*self._options.get("preload", ()), "rlx.rollout.env_runner")
                if self._runtime is None and self._options.keys() == {"preload"} and free.get(preload, True):
                    runtime = free.get(preload) or stack.enter_context(actors.runtime("local", preload=preload))
                    free[preload] = None
                    self.taken, self._runtime = preload, runtime
                return super().__call__()

            def close(self):
                if self.taken is not None:
                    for name, state in self._runtime.state().items():
                        if state.status not in ("dead", "failed"):
                            self._runtime.kill(self._runtime.lookup(name))
                    free[self.taken], self._runtime, self.taken = self._runtime, None, None
                super().close()

        patch = stack.enter_context(pytest.MonkeyPatch.context())
        patch.setattr("rlx.trainable.LazyRuntime", Shared)
        yield
