"""LearnerGroup: one learner in the driver, or several on actors, behind one call."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from rlx.actors import ActorHandle, GroupFuture, Runtime
from rlx.errors import ConfigError
from rlx.learner.gradient import Loss
from rlx.learner.learner import Learner
from rlx.nets.threads import limit_threads
from rlx.trajectory import Batch

log = logging.getLogger("rlx")

# Below this many parameters a GPU's launch costs exceed the arithmetic that it saves.
GPU_WORTH_PARAMETERS = 200_000


class LearnerGroup:
    """`num_learners` = 0 learns in the driver; n learners on actors make the same steps as one, up to rounding.

    `version` counts updates: it stamps the weights that `weights()` returns.
    """

    def __init__(
        self,
        build_policy: Callable[[], nn.Module],
        loss: Loss,
        *,
        num_learners: int = 0,
        runtime: Callable[[], Runtime] | None = None,
        device: str = "auto",
        torch_threads: int = 1,
        start_timeout_s: float = 60.0,
        update_timeout_s: float = 300.0,
        **learner_options: Any,
    ) -> None:
        device, reason = choose_device(device, build_policy)
        log.info("learners: %s on %s (%s)", num_learners or "in the driver", device, reason)
        limit_threads(torch_threads)
        options = {"device": device, **learner_options}
        self.version = 0
        self.gradient_steps = 0
        self.timeout_s = update_timeout_s
        self._local: Learner | None = None
        self._actors: list[ActorHandle] = []
        if num_learners == 0:
            self._local = Learner(build_policy, loss, **options)
        else:
            assert runtime is not None
            self._rt = runtime()
            names = [f"learner/{rank}" for rank in range(num_learners)]
            # gloo listens on the loopback interface only: learners of one machine need no other.
            environment = {"GLOO_SOCKET_IFNAME": "lo"}
            self._actors = [
                self._rt.spawn(
                    Learner, build_policy, loss, name=name, env=environment, threads=torch_threads, **options
                )
                for name in names
            ]
            try:
                self._meet(start_timeout_s)
            except BaseException:
                self.close()
                raise

    def update(self, batch: Batch, **options: Any) -> dict[str, float]:
        """Run `Learner.update` on every learner; return the stats, which are global means."""
        stats = self._all("update", batch, **options)[0]
        self.gradient_steps += int(stats["gradient_steps"])
        self.version += 1
        return stats

    def weights(self) -> np.ndarray:
        """Return all parameters, float32 [n]."""
        return self._first("weights")

    def get_state(self) -> dict[str, Any]:
        """Return parameters, optimizer and counters."""
        return {"version": self.version, "gradient_steps": self.gradient_steps, "learner": self._first("get_state")}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Continue from `get_state`; the number of learners may differ."""
        self.version, self.gradient_steps = int(state["version"]), int(state["gradient_steps"])
        self._all("set_state", state["learner"])

    def close(self) -> None:
        """End the learner actors."""
        actors, self._actors = self._actors, []
        for actor in actors:
            self._rt.kill(actor)

    def _meet(self, timeout_s: float) -> None:
        """Have the learners find each other, by way of a file that nobody needs once they have."""
        size = len(self._actors)
        with tempfile.TemporaryDirectory(prefix="rlx-learners-") as folder:
            store = str(Path(folder) / "store")
            joins = [actor.join.call(rank, size, store, timeout_s) for rank, actor in enumerate(self._actors)]
            GroupFuture(joins).values(timeout_s)

    def _all(self, method: str, *args: Any, **kwargs: Any) -> list[Any]:
        if self._local is not None:
            return [getattr(self._local, method)(*args, **kwargs)]
        return getattr(self._rt.group(self._actors), method).call(*args, **kwargs).values(self.timeout_s)

    def _first(self, method: str) -> Any:
        if self._local is not None:
            return getattr(self._local, method)()
        return getattr(self._actors[0], method).call().result(self.timeout_s)


def choose_device(device: str, build_policy: Callable[[], nn.Module]) -> tuple[str, str]:
    """Return the device to learn on, and the reason in words; "auto" weighs the size of the net."""
    has_cuda = torch.cuda.is_available()
    if device == "cuda" and not has_cuda:
        raise ConfigError("learners.device is cuda and torch finds no CUDA device here; set it to auto or cpu.")
    if device != "auto":
        return device, "as set by learners.device"
    if not has_cuda:
        return "cpu", "no CUDA device"
    size = sum(p.numel() for p in build_policy().parameters())
    if size < GPU_WORTH_PARAMETERS:
        return "cpu", f"{size} parameters: a GPU's launch costs exceed what it saves; learners.device=cuda forces it"
    return "cuda", f"{size} parameters"
