"""What a CUDA graph does, on a CPU: the operations of one run are done again, on the memory of that run."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map


class _Recorder(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        self.calls.append(tree_map(_memory, (func, args, kwargs or {}, found)))
        return found


def _memory(one):
    """Return what stays with a tensor's memory when the tensor itself moves on to another."""
    return one.detach() if isinstance(one, torch.Tensor) else one


class Recording:
    """Captures work as a graph does: Python runs once, numbers that it has read stay what they were."""

    captured = 0
    """Works captured so far, by all."""

    def __call__(self, work):
        with _Recorder() as recorder:
            work()
        Recording.captured += 1

        def replay():
            for func, args, kwargs, found in recorder.calls:
                again = func(*args, **kwargs)
                for old, new in zip(tree_leaves(found), tree_leaves(again), strict=True):
                    if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                        old.copy_(new)
                    elif not isinstance(old, torch.Tensor):
                        assert old == new, f"{func} gave {old} when it was captured, and now {new}"

        return replay
