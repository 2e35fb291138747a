"""Learner: epochs of minibatches over one batch: loss, gradient, all-reduce, clip, step."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from rlx.errors import RlxError
from rlx.functional.masking import sample_weight
from rlx.learner.adam import FlatAdam
from rlx.learner.gradient import Loss, Stats, gradient_function
from rlx.learner.target import Target
from rlx.nets.flat import FlatParameters
from rlx.trajectory import Batch


class Learner:
    """Owns one copy of the parameters and the optimizer.

    As one of `world_size` learners it takes its share of every minibatch; gradients are summed over all of
    them, so that any number of learners makes the same steps as one, up to rounding. One all-reduce of the flat
    gradient does what torch's DistributedDataParallel does with buckets and hooks.
    """

    def __init__(
        self,
        build_policy: Callable[[], nn.Module],
        loss: Loss,
        *,
        adam_eps: float = 1e-5,
        max_grad_norm: float | None = 0.5,
        compile: bool = False,
        device: str = "cpu",
        prepare: Callable[[nn.Module, Batch], Batch] | None = None,
        target_update_interval: int | None = None,
    ) -> None:
        """`prepare` (policy, batch) completes every batch before its first epoch, without gradients.

        It gets a target policy, the policy as it was at most `target_update_interval` updates ago, where that is set.
        """
        self.device = torch.device(device)
        self.policy = build_policy().to(self.device)
        self.flat = FlatParameters(self.policy, self.device)
        self.adam = FlatAdam(self.flat.data, adam_eps)
        self.max_grad_norm = max_grad_norm
        self.gradient = gradient_function(self.policy, self.flat, loss, compile=compile)
        self.prepare = prepare
        self.target = (
            None if target_update_interval is None else Target(build_policy, target_update_interval, self.device)
        )
        self.rank, self.world_size = 0, 1

    def join(self, rank: int, world_size: int, store_path: str, timeout_s: float) -> None:
        """Meet the other learners (gloo on CPU, nccl on GPU) and start from the weights of rank 0."""
        self.rank, self.world_size = rank, world_size
        if dist.is_initialized():  # with learners that have ended since
            dist.destroy_process_group()
        dist.init_process_group(
            "nccl" if self.device.type == "cuda" else "gloo",
            init_method=f"file://{store_path}",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=timeout_s),
        )
        dist.broadcast(self.flat.data, src=0)

    @np.errstate(over="ignore", invalid="ignore")  # stats that are not finite tell, and whoever reads them raises
    def update(
        self,
        batch: Batch,
        *,
        epochs: int,
        minibatch_size: int,
        lr: float,
        seed: int,
        coefficients: Mapping[str, float] = MappingProxyType({}),
        target_kl: float | None = None,
    ) -> dict[str, float]:
        """Make `epochs` passes over the whole batch in shuffled minibatches; return the means of the stats.

        Every learner gets the whole batch, with `mask` [N] or, where its rows are sequences, [S, L];
        `minibatch_size` counts samples either way. The last minibatch of an epoch may be smaller.
        With `target_kl` the update ends before the first step whose minibatch has stats["kl"] above it.
        """
        started = time.perf_counter()
        self._seed(seed)  # whatever the policy draws (dropout, say) repeats on resume
        batch = batch.map(lambda tensor: tensor.to(self.device, non_blocking=True))
        if self.prepare is not None:
            with torch.no_grad():
                batch = self.prepare(self.policy if self.target is None else self.target.of(self.flat), batch)
        generator = torch.Generator().manual_seed(seed)
        history: list[Stats] = []
        stopped_early = False
        for _ in range(epochs):
            order = torch.randperm(len(batch), generator=generator).to(self.device)
            for minibatch in self._shares(batch, order, minibatch_size):
                gradient, stats = self.gradient(minibatch, coefficients)
                if target_kl is not None and "kl" not in stats:
                    raise RlxError(
                        "training.target_kl needs a stat named kl from the loss; return one, or set it to null."
                    )
                stopped_early = target_kl is not None and self._total(stats["kl"]) > target_kl
                if stopped_early:
                    break
                stats["grad_norm"] = self._step(self._sum(gradient), lr)
                history.append(stats)
            if stopped_early:
                break
        if self.target is not None:
            self.target.count_update()
        return self._means(history) | {
            "gradient_steps": len(history),
            "stopped_early": float(stopped_early),
            "busy_s": time.perf_counter() - started,
        }

    def weights(self) -> np.ndarray:
        """Return all parameters, float32 [n] (a copy)."""
        return self.flat.numpy().copy()

    def get_state(self) -> dict[str, Any]:
        """Return everything that `set_state` needs to go on exactly."""
        policy = {name: p.detach().cpu().numpy().copy() for name, p in self.policy.named_parameters()}
        target = None if self.target is None else self.target.get_state()
        return {"policy": policy, "adam": self.adam.get_state(), "target": target}

    def set_state(self, state: dict[str, Any]) -> None:
        """Continue from `get_state`."""
        self.flat.load(np.concatenate([state["policy"][name].ravel() for name, _ in self.policy.named_parameters()]))
        self.adam.set_state(state["adam"])
        if self.target is not None:
            self.target.set_state(state["target"])

    def _seed(self, seed: int) -> None:
        # torch.manual_seed seeds absent GPUs too, and keeps a stack trace for each kind: half a millisecond a call.
        (torch.default_generator if self.device.type == "cpu" else torch).manual_seed(seed)

    def _shares(self, batch: Batch, order: Tensor, minibatch_size: int) -> Iterator[Batch]:
        """Yield this learner's share of each minibatch of `order`, with `weight`: the share in the global mean."""
        samples_a_row = batch.mask[0].numel()
        minibatches = order.split(max(1, minibatch_size // samples_a_row))
        rows = [minibatch.tensor_split(self.world_size)[self.rank] for minibatch in minibatches]
        weights = [sample_weight(batch.mask[part]).tensor_split(self.world_size)[self.rank] for part in minibatches]
        mine = batch.take(torch.cat(rows))  # one gather an epoch; minibatches are views of it
        columns = {name: tensor.split([len(part) for part in rows]) for name, tensor in mine.tensors.items()}
        for number, weight in enumerate(weights):
            yield Batch(**{name: column[number] for name, column in columns.items()}, weight=weight)

    def _sum(self, tensor: Tensor) -> Tensor:
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def _total(self, share: Tensor | float) -> float:
        """Return the sum of a stat's shares over all learners."""
        return self._sum(torch.as_tensor(share).clone()).item()

    def _step(self, gradient: Tensor, lr: float) -> Tensor:
        """Clip the global norm, step, and return the norm before clipping."""
        norm = gradient.norm()
        if self.max_grad_norm is not None:
            gradient.mul_((self.max_grad_norm / (norm + 1e-6)).clamp_(max=1.0))
        self.adam.step(gradient, lr)
        return norm

    def _means(self, history: list[Stats]) -> dict[str, float]:
        if not history:
            return {}
        means = torch.stack([_mean([stats[name] for stats in history]) for name in history[0]])
        names = list(history[0])
        norm = means[names.index("grad_norm")].clone()  # the same on every learner; the others are parts of a sum
        self._sum(means)
        means[names.index("grad_norm")] = norm
        return dict(zip(names, means.tolist(), strict=True))


def _mean(values: list[Tensor] | list[float]) -> Tensor:
    stacked = torch.stack(values) if isinstance(values[0], Tensor) else torch.tensor(values)  # type: ignore[arg-type]
    return stacked.float().mean()
