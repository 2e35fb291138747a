"""Learner: epochs of minibatches over one batch: loss, gradient, all-reduce, clip, step."""

from __future__ import annotations

import functools
import logging
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from rlx.actors import machine
from rlx.errors import CheckpointError, RlxError
from rlx.functional.masking import sample_weight
from rlx.learner.adam import FlatAdam
from rlx.learner.gradient import Loss, Stats, gradient_function
from rlx.learner.meeting import Meeting, meet, open_store
from rlx.learner.microbatches import Parts, accumulated_gradient, blank, evaluate_in_microbatches, microbatches
from rlx.learner.target import Target
from rlx.nets.flat import FlatParameters
from rlx.trajectory import Batch

log = logging.getLogger("rlx")

VALUE_FUNCTION = "value_"
"""The names of the parameters that only the value function has begin with this."""


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
        adam_betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.0,
        max_grad_norm: float | None = 0.5,
        compile: bool = False,
        device: str = "cpu",
        prepare: Callable[[nn.Module, Batch], Batch] | None = None,
        target_update_interval: int | None = None,
        weigh: Callable[[Tensor], Tensor] = sample_weight,
        max_tokens_per_microbatch: int | None = None,
        optimizer_offload: bool = False,
    ) -> None:
        """`prepare` (policy, batch) completes every batch before its first epoch, without gradients.

        It gets a target policy, the policy as it was at most `target_update_interval` updates ago, where that is set.
        weigh: makes of the mask of a whole minibatch the weights that sum a loss to its mean, or to another aggregate.
        max_tokens_per_microbatch: rows of tokens (a batch with `length`) are sorted by length and cut into microbatches
        of at most so many tokens, padding included, whose gradients are added up; a longer row is alone in one.
        weight_decay: as in AdamW, of every parameter with two axes or more.
        optimizer_offload: keep the float32 buffer and the moments in host memory, and make the step there.
        """
        self.device = torch.device(device)
        self.policy = build_policy()
        self.max_grad_norm = max_grad_norm
        self.weigh, self.max_tokens = weigh, max_tokens_per_microbatch
        self.prepare = prepare
        self._loss = loss
        self._adam_options = (adam_eps, *adam_betas, weight_decay)
        self._offloads = optimizer_offload
        self._own_parameters(compile)
        self.target = (
            None if target_update_interval is None else Target(build_policy, target_update_interval, self.device)
        )
        self.rank, self.world_size = 0, 1
        self._store = None  # that learners meet at, where this is learner 0

    def _own_parameters(self, compile: bool) -> None:
        """Make what holds the parameters, steps them and finds their gradient."""
        self.policy.to(self.device)
        self.flat = FlatParameters(self.policy, self.device, on_host=self._offloads)
        matrices = [view for view in self.flat.views(self.flat.data) if view.ndim > 1]
        self.adam = FlatAdam(self.flat.data, *self._adam_options, matrices, self.flat.first_of(VALUE_FUNCTION))
        if self.max_tokens is None:
            self.gradient = gradient_function(self.policy, self.flat, self._loss, compile=compile)
        else:
            if compile:
                log.info("learners.compile has nothing to do: every microbatch of tokens has a shape of its own")
            self.gradient = accumulated_gradient(self.policy, self.flat, self._loss, self.max_tokens)

    def node(self) -> machine.Node:
        """Return the machine that this learner is on."""
        return machine.node()

    def open_store(self, host: str) -> int:
        """Have the next meeting at this address of this machine; return the port."""
        self._store = open_store(host)
        return self._store.port

    def join(self, rank: int, meeting: Meeting, timeout_s: float) -> None:
        """Meet the other learners (gloo on CPU, nccl on GPU) and start from the weights of rank 0."""
        self.rank, self.world_size = rank, len(meeting.hosts)
        if dist.is_initialized():  # with learners that have ended since
            dist.destroy_process_group()
        meet(self._store, rank, meeting, timeout_s, "nccl" if self.device.type == "cuda" else "gloo")
        self._agree()

    def _agree(self) -> None:
        """Take over the weights of rank 0."""
        whole = self.flat.data.to(self.device)  # nccl reaches no host memory
        dist.broadcast(whole, src=0)
        self.flat.data.copy_(whole)
        self.flat.refresh()

    @np.errstate(over="ignore", invalid="ignore")  # stats that are not finite tell, and whoever reads them raises
    def update(
        self,
        batch: Batch,
        *,
        epochs: int,
        minibatch_size: int | None = None,
        minibatch_sequences: int | None = None,
        lr: float,
        value_lr: float | None = None,
        seed: int,
        coefficients: Mapping[str, float] = MappingProxyType({}),
        target_kl: float | None = None,
    ) -> dict[str, float]:
        """Make `epochs` passes over the whole batch in shuffled minibatches; return the means of the stats.

        Every learner gets the whole batch, with `mask` [N] or, where its rows are sequences, [S, L];
        `minibatch_size` counts samples either way, `minibatch_sequences` in its place counts rows. The last minibatch
        of an epoch may be smaller; without either there is one, the whole batch.
        The parameters of a value function of its own (`VALUE_FUNCTION`) step by `value_lr`, where it is given.
        With `target_kl` the update ends before the first step whose minibatch has stats["kl"] above it.
        """
        started = time.perf_counter()
        self._seed(seed)  # whatever the policy draws (dropout, say) repeats on resume
        batch = self._own(batch)
        if self.prepare is not None:
            with torch.no_grad():
                batch = self.prepare(self.policy if self.target is None else self.target.of(self.flat), batch)
        generator = torch.Generator().manual_seed(seed)
        history: list[Stats] = []
        stopped_early = False
        rows_each = _rows_each(batch, minibatch_size, minibatch_sequences)
        for _ in range(epochs):
            order = torch.randperm(len(batch), generator=generator).to(self.device)
            for minibatch in self._shares(batch, order, rows_each):
                gradient, stats = self.gradient(minibatch, coefficients)
                if target_kl is not None and "kl" not in stats:
                    raise RlxError(
                        "training.target_kl needs a stat named kl from the loss; return one, or set it to null."
                    )
                stopped_early = target_kl is not None and self._total(stats["kl"]) > target_kl
                if stopped_early:
                    break
                stats["grad_norm"] = self._step(gradient, lr, value_lr)
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

    @torch.no_grad()
    def evaluate(self, batch: Batch, *names: str) -> Batch:
        """Return a batch of the columns `names` ("logp", "entropy", "value", "ref_logp") of rows of tokens, on the CPU.

        They are what the loss would see, [S, L] like the mask, and 0 off it; for a reward model "score", [S].
        """
        batch = self._own(batch)
        columns = evaluate_in_microbatches(self.policy, batch, names, self._microbatches(batch))
        return Batch(**{name: column.cpu() for name, column in columns.items()})

    @torch.no_grad()
    def measure(self, batch: Batch, coefficients: Mapping[str, float] = MappingProxyType({})) -> dict[str, float]:
        """Return the loss and its stats on rows of tokens, and learn nothing from them."""
        batch = self._own(batch)
        weighed = Batch(**batch.tensors, weight=self.weigh(batch.mask))
        sums: dict[str, float] = {}
        for _, part in self._microbatches(weighed):
            total, stats = self._loss(self.policy, part, coefficients)
            for name, stat in ({"loss": total} | stats).items():
                sums[name] = sums.get(name, 0.0) + float(stat)
        return sums

    def weights(self) -> np.ndarray:
        """Return all learned parameters, float32 [n] (a copy)."""
        return self.flat.numpy().copy()

    def get_state(self) -> dict[str, Any]:
        """Return everything that `set_state` needs to go on exactly."""
        target = None if self.target is None else self.target.get_state()
        state = {"policy": self.flat.arrays(), "adam": self.adam.get_state(), "target": target}
        buffers = {name: buffer.cpu().numpy().copy() for name, buffer in self._buffers().items()}
        state |= {"buffers": buffers} if buffers else {}
        return state if self._frozen is None else state | {"frozen": self._frozen}

    def set_state(self, state: dict[str, Any]) -> None:
        """Continue from `get_state`."""
        saved = {name: array.shape for name, array in state["policy"].items()}
        mine = {name: tuple(p.shape) for name, p in zip(self.flat.names, self.flat.parameters, strict=True)}
        if saved != mine:
            name = min({*saved.items()} ^ {*mine.items()})[0]
            raise CheckpointError(
                f"the checkpoint is of another network: its {name} is of shape {saved.get(name)}, and here it is "
                f"{mine.get(name)}; go on with the model and environment that the run began with."
            )
        if state.get("frozen", self._frozen) != self._frozen:
            raise CheckpointError(
                "the checkpoint was made beside other weights that are not learned, as a reference or the model under "
                "an adapter, than there are now: what model.path, reference_path or value_path names has changed, and "
                "no copy of it is kept in the run's folder origin; put it back, or begin a new run."
            )
        self.flat.load(np.concatenate([state["policy"][name].ravel() for name in self.flat.names]))
        self.adam.set_state(state["adam"])
        for name, buffer in self._buffers().items():
            buffer.copy_(torch.from_numpy(np.array(state["buffers"][name])))
        if self.target is not None:
            self.target.set_state(state["target"])

    def _seed(self, seed: int) -> None:
        # torch.manual_seed seeds absent GPUs too, and keeps a stack trace for each kind: half a millisecond a call.
        (torch.default_generator if self.device.type == "cpu" else torch).manual_seed(seed)

    @functools.cached_property
    def _frozen(self) -> int | None:
        """A checksum of the parameters that are not learned; None where there are none."""
        frozen = [p for p in self.policy.parameters() if not p.requires_grad]
        sums = 0
        for parameter in frozen:
            sums = zlib.crc32(parameter.detach().cpu().flatten().view(torch.uint8).numpy().data, sums)
        return sums if frozen else None

    def _buffers(self) -> dict[str, Tensor]:
        """Return what belongs to the policy's state and is no parameter: how a reward model normalises, say."""
        lasting = self.policy.state_dict().keys()
        return {name: buffer for name, buffer in self.policy.named_buffers() if name in lasting}

    def _own(self, batch: Batch) -> Batch:
        """Return the batch on this learner's device; of rows of tokens, with zeros where nothing counts."""
        batch = batch.map(lambda tensor: tensor.to(self.device, non_blocking=True))
        return blank(batch) if "length" in batch.tensors else batch

    def _microbatches(self, batch: Batch) -> Parts:
        return microbatches(self.policy, batch, self.max_tokens)

    def _shares(self, batch: Batch, order: Tensor, rows_each: int) -> Iterator[Batch]:
        """Yield this learner's share of each minibatch of `order`, with `weight`: the share in the global mean."""
        minibatches = order.split(rows_each)
        rows = [minibatch.tensor_split(self.world_size)[self.rank] for minibatch in minibatches]
        weights = [self.weigh(batch.mask[part]).tensor_split(self.world_size)[self.rank] for part in minibatches]
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

    def _step(self, gradient: Tensor, lr: float, value_lr: float | None) -> Tensor:
        """Sum the gradient over all learners, clip its norm, step, and return the norm before clipping."""
        norm = self._sum(gradient).norm()
        if self.max_grad_norm is not None:
            gradient.mul_((self.max_grad_norm / (norm + 1e-6)).clamp_(max=1.0))
        self.adam.step(gradient, lr, value_lr)
        self.flat.refresh()
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


def _rows_each(batch: Batch, minibatch_size: int | None, minibatch_sequences: int | None) -> int:
    if minibatch_sequences is not None:
        return minibatch_sequences
    return len(batch) if minibatch_size is None else max(1, minibatch_size // batch.mask[0].numel())


def _mean(values: list[Tensor] | list[float]) -> Tensor:
    stacked = torch.stack(values) if isinstance(values[0], Tensor) else torch.tensor(values)  # type: ignore[arg-type]
    return stacked.float().mean()
