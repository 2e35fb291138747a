"""ShardedLearner: a learner that holds a share of every parameter, for language models that no device can hold."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from rlx.errors import ConfigError, RlxError
from rlx.learner.adam import FlatAdam
from rlx.learner.gradient import Stats
from rlx.learner.learner import VALUE_FUNCTION, Learner
from rlx.learner.meeting import Meeting
from rlx.learner.microbatches import Parts, accumulate, not_empty, nothing
from rlx.nets.transformer import decoder_layers
from rlx.nets.trunk import Trunk
from rlx.trajectory import Batch

ENTRANCES = ("evaluate", "ref_logp")
"""The methods of a policy that run its layers: whoever calls them has the parameters gathered."""


class ShardedLearner(Learner):
    """Holds its share of all parameters, of their gradient and of Adam's moments, by torch's FSDP2.

    The parameters of a decoder layer are gathered from all learners while it runs, forwards and backwards (Zhao et al.
    2023, arXiv:2304.11277); those of embeddings, last norm and language head while the network runs. Nothing is
    replicated but buffers. So the learners have to run the same layers in the same order: every method is for all of
    them to call, and who has fewer microbatches than another runs some of nothing.

    What rank 0 returns of weights and state is whole, and what the others do is empty. The state is that of a Learner:
    either kind goes on from the other's.
    """

    def join(self, rank: int, meeting: Meeting, timeout_s: float) -> None:
        """Meet the other learners, and hold from now on a share of the weights of rank 0."""
        if self.device.type == "cuda":  # one device a learner: nccl serves no two on the same
            self.device = torch.device("cuda", rank % torch.cuda.device_count())
            torch.cuda.set_device(self.device)
        super().join(rank, meeting, timeout_s)

    def _own_parameters(self, compile: bool) -> None:
        """Leave them where they were made until the others are there."""
        if self.max_tokens is None:
            raise RlxError("sharded learners go through rows of tokens in microbatches: set max_tokens_per_microbatch.")
        if not hasattr(FSDPModule, "set_force_sum_reduction_for_comms"):
            raise ConfigError(
                f"learners.sharding=full needs an FSDP2 that can sum gradients, which torch {torch.__version__} lacks; "
                "install a newer torch, or set sharding to none."
            )

    def _agree(self) -> None:
        _ = self._frozen  # a checksum, which is kept, of what is whole for the last time
        shard(self.policy, init_device_mesh(self.device.type, (self.world_size,)), self.device)
        shards: Any = Shards(self.policy)
        adam: Any = ShardedAdam(shards, *self._adam_options)
        gradient: Any = self._gradient
        self.flat, self.adam, self.gradient = shards, adam, gradient

    def _gradient(self, minibatch: Batch, coefficients: Mapping[str, float]) -> tuple[list[Tensor], Stats]:
        """Return this learner's shares of the gradient, summed over all learners, and its part of the stats."""
        for parameter in self.flat.parameters:
            parameter.grad = None
        stats = accumulate(self.policy, self._loss, self._microbatches(not_empty(minibatch)), coefficients)
        return [_gradient_of(parameter) for parameter in self.flat.parameters], stats

    def _step(self, gradient: Any, lr: float, value_lr: float | None) -> Tensor:
        norm = self._sum(torch.stack([part.norm() for part in gradient]).square().sum()).sqrt()
        if self.max_grad_norm is not None:
            scale = (self.max_grad_norm / (norm + 1e-6)).clamp_(max=1.0)
            for part in gradient:
                part.mul_(scale)
        self.adam.step(gradient, lr, value_lr)
        return norm

    def _microbatches(self, batch: Batch) -> Parts:
        """Yield the microbatches of these rows, and then some of nothing, until all learners have as many."""
        parts = list(super()._microbatches(batch)) if len(batch) else []
        most = torch.tensor(len(parts), device=self.device)
        dist.all_reduce(most, op=dist.ReduceOp.MAX)
        yield from parts
        for _ in range(int(most) - len(parts)):
            yield nothing(batch)


def shard(policy: nn.Module, mesh: DeviceMesh, device: torch.device) -> None:
    """Leave in a policy this process' share of every parameter, as rank 0 has them.

    What is learned is kept in float32. Where it was made in bfloat16 it is gathered and computed in that, but for the
    heads of values and scores; gradients are summed in float32.
    """
    halves = any(p.requires_grad and p.dtype == torch.bfloat16 for p in policy.parameters())
    precision = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if halves else MixedPrecisionPolicy()
    heads = [module for module in policy.children() if isinstance(module, nn.Linear)]
    reference: Any = getattr(policy, "reference", None)
    layers = [*decoder_layers(policy), *([] if reference is None else [reference])]
    units = dict.fromkeys(heads, MixedPrecisionPolicy()) | dict.fromkeys([*layers, policy], precision)
    for unit, precision_of_unit in units.items():
        _share_out(unit, device)
        fully_shard(unit, mesh=mesh, reshard_after_forward=True, mp_policy=precision_of_unit)
        assert isinstance(unit, FSDPModule)
        unit.set_gradient_divide_factor(1.0)  # a loss's weights make its parts add up
        unit.set_force_sum_reduction_for_comms(True)
    if reference is not None:
        _gather_for_ref_logp(policy, reference)
    for name in ENTRANCES:
        if hasattr(policy, name):
            setattr(policy, name, _cloned(getattr(policy, name)))
            register_fsdp_forward_method(policy, name)
    for trunk in vars(policy).values():
        if isinstance(trunk, Trunk):
            trunk.always_runs = True


def _cloned(method: Callable[..., Any]) -> Callable[..., Any]:
    """Return the method with copies of what it returns: a view that a loss changes in place would lose FSDP2's hook."""

    def cloned(*args: Any, **kwargs: Any) -> Any:
        found = method(*args, **kwargs)
        return found.clone() if isinstance(found, Tensor) else tuple(tensor.clone() for tensor in found)

    return cloned


def _gather_for_ref_logp(policy: Any, reference: Any) -> None:
    """Have what the reference has beside its layers gathered for `ref_logp` alone; nothing calls it as a whole."""
    ref_logp = policy.ref_logp

    def gathered(minibatch: Batch) -> Tensor:
        reference.unshard()
        try:
            return ref_logp(minibatch)
        finally:
            reference.reshard()

    policy.ref_logp = gathered


def _share_out(unit: nn.Module, device: torch.device) -> None:
    """Bring what is still whole to the device, as rank 0 has it."""
    for parameter in unit.parameters():
        if not isinstance(parameter, DTensor):
            parameter.data = parameter.data.to(device, torch.float32 if parameter.requires_grad else parameter.dtype)
            dist.broadcast(parameter.data, src=0)


class Shards:
    """The learned parameters of a sharded policy: for Learner what FlatParameters is."""

    def __init__(self, policy: nn.Module) -> None:
        named = [(name, p) for name, p in policy.named_parameters() if p.requires_grad]
        self.names, self.parameters = [name for name, _ in named], [p for _, p in named]

    def arrays(self) -> dict[str, np.ndarray]:
        """Return every parameter by its name, gathered one after the other."""
        found = {name: whole(_own(p), p) for name, p in zip(self.names, self.parameters, strict=True)}
        return {name: array for name, array in found.items() if array is not None}

    def numpy(self) -> np.ndarray:
        """Return all parameters, float32 [n]."""
        return self.joined([_own(p) for p in self.parameters])

    def joined(self, shares: list[Tensor]) -> np.ndarray:
        """Return what these are this process' shares of, in the order and the shapes of the parameters, as [n]."""
        arrays = [whole(share, p) for share, p in zip(shares, self.parameters, strict=True)]
        return np.concatenate([np.empty(0, np.float32), *(array.ravel() for array in arrays if array is not None)])

    def cut(self, joined: np.ndarray) -> list[Tensor]:
        """Return this process' shares of what `joined` returned on rank 0."""
        ends = np.cumsum([p.numel() for p in self.parameters])
        arrays = np.split(np.asarray(joined), ends[:-1])
        return [share(torch.from_numpy(np.array(a)), p) for a, p in zip(arrays, self.parameters, strict=True)]

    def load(self, weights: np.ndarray) -> None:
        """Take this process' share of `weights` float32 [n]."""
        for parameter, own in zip(self.parameters, self.cut(weights), strict=True):
            _own(parameter).copy_(own)


class ShardedAdam:
    """FlatAdam on every share; what it keeps is, gathered, what FlatAdam keeps."""

    def __init__(self, shards: Shards, epsilon: float, beta1: float, beta2: float, weight_decay: float) -> None:
        self._shards = shards
        self._parts = []
        for parameter in shards.parameters:
            data = _own(parameter).view(-1)
            decayed = [data] if parameter.ndim > 1 else []
            self._parts.append(FlatAdam(data, epsilon, beta1, beta2, weight_decay, decayed))
        self._is_value = [name.startswith(VALUE_FUNCTION) for name in shards.names]
        self.steps = self.still = 0
        """As of FlatAdam; what only the value function has never stands still."""

    def step(self, gradient: list[Tensor], lr: float, value_lr: float | None = None) -> None:
        """Move the parameters against the shares of their gradient, as FlatAdam does."""
        stands_still = value_lr is not None and lr == 0.0
        self.steps += 1
        self.still += stands_still
        for adam, part, is_value in zip(self._parts, gradient, self._is_value, strict=True):
            if is_value:
                adam.step(part.view(-1), lr if value_lr is None else value_lr)
            elif not stands_still:
                adam.step(part.view(-1), lr)

    def get_state(self) -> dict[str, Any]:
        """Return the moments, on rank 0 whole and on the others empty, and the step counts."""
        mean, square = (self._shards.joined(moments) for moments in self._moments())
        return {"mean": mean, "square": square, "steps": self.steps, "still": self.still}

    def set_state(self, state: dict[str, Any]) -> None:
        """Continue from `get_state` of rank 0, or that of FlatAdam."""
        for moments, saved in zip(self._moments(), (state["mean"], state["square"]), strict=True):
            for moment, own in zip(moments, self._shards.cut(saved), strict=True):
                moment.copy_(own.view(-1))
        self.steps, self.still = int(state["steps"]), int(state.get("still", 0))
        for adam, is_value in zip(self._parts, self._is_value, strict=True):
            adam.steps = self.steps - self.still * (not is_value)

    def _moments(self) -> tuple[list[Tensor], list[Tensor]]:
        return [adam.mean for adam in self._parts], [adam.square for adam in self._parts]


def whole(share: Tensor, parameter: Any) -> np.ndarray | None:
    """Return what all processes' shares of a parameter, or of a moment of it, make together; None but on rank 0."""
    placed = DTensor.from_local(
        share.view_as(_own(parameter)),
        parameter.device_mesh,
        parameter.placements,
        shape=parameter.shape,
        stride=parameter.stride(),
    )
    gathered = placed.full_tensor()
    return gathered.cpu().numpy().copy() if parameter.device_mesh.get_rank() == 0 else None


def share(values: Tensor, parameter: Any) -> Tensor:
    """Return this process' share of the values of a parameter, on its device; the others are not asked."""
    values = values.view(parameter.shape).to(parameter.device)
    return distribute_tensor(values, parameter.device_mesh, parameter.placements, src_data_rank=None).to_local()


def _own(parameter: Any) -> Tensor:
    return parameter.detach().to_local()


def _gradient_of(parameter: Any) -> Tensor:
    return torch.zeros_like(_own(parameter)) if parameter.grad is None else parameter.grad.to_local()
