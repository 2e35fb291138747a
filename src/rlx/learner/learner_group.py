"""LearnerGroup: one learner in the driver, or several on actors, behind one call."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from rlx.actors import ActorHandle, Err, Future, GroupFuture, Reservation, Resources, Restart, Runtime, Stall
from rlx.errors import ActorDied, Infeasible, RlxError
from rlx.learner.gradient import Loss
from rlx.learner.learner import Learner
from rlx.learner.meeting import Meeting
from rlx.nets.device import check_device, nth
from rlx.nets.threads import limit_threads
from rlx.out_of_memory import is_out_of_memory
from rlx.trajectory import Batch

log = logging.getLogger("rlx")

# Below this many parameters a GPU's launch costs exceed the arithmetic that it saves.
GPU_WORTH_PARAMETERS = 200_000
STALLS_PER_TIMEOUT = 4
"""A call is looked at as a possible stall after the timeout divided by this."""
MEETING_GRACE_S = 5.0  # in which learners that wait in vain for one can say for which


class LearnersLost(ActorDied):
    """The learners were started again, all of them, because one died or hung; `set_state` has them go on."""


class LearnerGroup:
    """`num_learners` = 0 learns in the driver; n learners on actors make the same steps as one, up to rounding.

    `version` counts updates: it stamps the weights that `weights()` returns.

    restart: how often the learners are started again, all together, when one dies or misses update_timeout_s. They have
    lost their state then, so every call raises LearnersLost until `set_state`; ActorDied, with advice, when they may
    not be started again.
    sharded: each of at least two learners holds a share of the parameters; see ShardedLearner.
    allow_plain_gradients: on a cluster, learners may be on several machines, between which what they sum travels
    neither encrypted nor authenticated; else all are on one machine, wherever there is room for them together.
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
        restart: Restart | None = None,
        sharded: bool = False,
        allow_plain_gradients: bool = False,
        **learner_options: Any,
    ) -> None:
        device, reason = choose_device(device, build_policy)
        log.info("learners: %s on %s (%s)", num_learners or "in the driver", device, reason)
        limit_threads(torch_threads)
        self.device = device
        """"cpu" or "cuda"."""
        self.version = 0
        self.gradient_steps = 0
        self.timeout_s, self._start_timeout_s = update_timeout_s, start_timeout_s
        self._restart = restart
        self._joined: list[int] = []  # the incarnations that have met
        self._current: list[int] = []  # those that have the state of this run
        self._local: Learner | None = None
        self._actors: list[ActorHandle] = []
        self._ends: dict[str, str] = {}  # by actor, in words: how its last incarnation ended
        self._stalls: dict[str, str] = {}  # and why it does not answer, where the system knows
        self._where: dict[str, str] = {}  # by actor, in words, on which machine, where they are on several
        self._sharded, self._may_spread = sharded, allow_plain_gradients
        if num_learners == 0:
            self._local = Learner(build_policy, loss, device=device, **learner_options)
        else:
            assert runtime is not None
            self._rt = runtime()
            make = (Learner, build_policy, loss)
            if sharded:
                from rlx.learner.sharded import ShardedLearner

                make = (ShardedLearner, build_policy, loss)
            try:
                self._spawn(make, num_learners, torch_threads, **learner_options)
                for actor in self._actors:  # before they are supervised: what __init__ raises, no restart cures
                    actor.ready(start_timeout_s)
                if restart is not None:
                    for actor in self._actors:
                        self._rt.monitor(actor, on_restart=self._on_restart, on_stall=self._on_stall)
                    self._rt.group(self._actors, restart, strategy="one_for_all")
                self._meet()
                self._current = self._joined
            except BaseException:
                self.close()
                raise

    def update(self, batch: Batch, **options: Any) -> dict[str, float]:
        """Run `Learner.update` on every learner; return the stats, which are global means."""
        stats = self._all("update", batch, **options)[0]
        self.gradient_steps += int(stats["gradient_steps"])
        self.version += 1
        return stats

    def evaluate(self, batch: Batch, *names: str) -> Batch:
        """Run `Learner.evaluate`, each learner on its share of the rows; return the columns of all rows, in order."""
        if self._local is not None:
            return self._local.evaluate(batch, *names)
        self._check_state()
        shares = torch.arange(len(batch)).tensor_split(len(self._actors))
        shares = [rows for rows in shares if len(rows) or self._sharded]
        calls = zip(self._actors, shares, strict=False)
        parts = self._answers_with_state([actor.evaluate.call(batch.take(rows), *names) for actor, rows in calls])
        return Batch(**{name: torch.cat([part.tensors[name] for part in parts]) for name in names})

    def measure(self, batch: Batch) -> dict[str, float]:
        """Return the loss and its stats on rows of tokens, by `Learner.measure`."""
        return self._first("measure", batch)

    @property
    def local_policy(self) -> Any:
        """The learner's policy, where the driver learns; else None."""
        return None if self._local is None else self._local.policy

    def weights(self, copy: bool = True) -> np.ndarray:
        """Return all learned parameters, float32 [n].

        copy: False, for who copies them at once, may return a view that changes with the next update.
        """
        if self._local is not None and not copy:
            return self._local.flat.numpy()
        return self._first("weights")

    def get_state(self) -> dict[str, Any]:
        """Return parameters, optimizer and counters."""
        return {"version": self.version, "gradient_steps": self.gradient_steps, "learner": self._first("get_state")}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Continue from `get_state`; the number of learners may differ."""
        self.version, self.gradient_steps = int(state["version"]), int(state["gradient_steps"])
        if self._local is not None:
            self._local.set_state(state["learner"])
            return
        if self._joined != self._incarnations_up():
            self._meet()
        self._answers(self._rt.group(self._actors).set_state.call(state["learner"]).futures, self.timeout_s)
        self._current, self._ends, self._stalls = self._joined, {}, {}
        self._check_state()

    def close(self) -> None:
        """End the learner actors."""
        actors, self._actors = self._actors, []
        for actor in actors:
            self._rt.kill(actor)

    def _spawn(self, make: tuple[Any, ...], count: int, threads: int, **options: Any) -> None:
        """Start the learners: on a cluster where their resources are, which they get all or none."""
        reserved = self._reserve(count, threads) if "machines" in self._rt.capabilities else None
        try:
            for rank in range(count):
                actor = self._rt.spawn(
                    *make,
                    name=f"learner/{rank}",
                    threads=threads,
                    reservation=None if reserved is None else reserved[rank],
                    stall_after_s=self.timeout_s / STALLS_PER_TIMEOUT,
                    device=nth(self.device, rank) if reserved is None else self.device,
                    **options,
                )
                self._actors.append(actor)
        finally:
            if reserved is not None:
                reserved.release()  # with the last of them

    def _reserve(self, count: int, threads: int) -> Reservation:
        wants = [Resources(cpu=threads, gpu=int(self.device == "cuda"))] * count
        try:
            return self._rt.reserve(wants, self._start_timeout_s, "pack" if self._may_spread else "strict_pack")
        except Infeasible as error:
            advice = "lower learners.num_learners or learners.torch_threads"
            if count > 1 and not self._may_spread:
                advice += (
                    ", or set learners.allow_plain_gradients=true to have learners on several machines, between which "
                    "gradients then travel neither encrypted nor authenticated (docs/cluster_security.md)"
                )
            raise Infeasible(f"learners.num_learners={count}: {str(error).rstrip('.')}; {advice}.") from error

    def _meet(self) -> None:
        """Have the learners find each other, at a store that learner 0 opens for this."""
        timeout_s, met = self._start_timeout_s, self._incarnations_up()
        if len(self._actors) > 1:
            nodes = self._answers([actor.node.call() for actor in self._actors], timeout_s)
            names = [actor.name for actor in self._actors]
            meeting = Meeting.of(names, nodes)
            self._where = {name: words.removeprefix(name) for name, words in zip(names, meeting.names, strict=True)}
            if meeting.is_exposed and not self._may_spread:
                raise RlxError(
                    f"{', '.join(meeting.names)} would send gradients over the network neither encrypted nor "
                    "authenticated; set learners.allow_plain_gradients=true if nobody else is on it."
                )
            [port] = self._answers([self._actors[0].open_store.call(meeting.hosts[0])], timeout_s)
            meeting = meeting._replace(port=port)
            joins = [actor.join.call(rank, meeting, timeout_s) for rank, actor in enumerate(self._actors)]
            self._answers(joins, timeout_s + MEETING_GRACE_S)
        self._joined = met

    def _all(self, method: str, *args: Any, **kwargs: Any) -> list[Any]:
        if self._local is not None:
            return [getattr(self._local, method)(*args, **kwargs)]
        self._check_state()
        return self._answers_with_state(getattr(self._rt.group(self._actors), method).call(*args, **kwargs).futures)

    def _first(self, method: str, *arguments: Any) -> Any:
        if self._local is not None:
            return getattr(self._local, method)(*arguments)
        self._check_state()
        asked = self._actors if self._sharded else self._actors[:1]  # those who hold shares answer together
        return self._answers_with_state([getattr(actor, method).call(*arguments) for actor in asked])[0]

    def _answers_with_state(self, futures: Sequence[Future[Any]]) -> list[Any]:
        try:
            answers = self._answers(futures, self.timeout_s)
        except LearnersLost:
            raise
        except Exception as error:  # a learner's lost connection to one that died, or failed, is not the cause
            self._check_state()
            if (cause := _out_of_memory(futures)) not in (None, error):
                raise cause from error
            raise
        self._check_state()  # a call that finds its learner dead is answered by the next incarnation
        return answers

    def _answers(self, futures: Sequence[Future[Any]], timeout_s: float) -> list[Any]:
        """Return what the learners answered; LearnersLost where that ended, or will end, with their restart."""
        group = GroupFuture(futures)
        if self._restart is None:
            return group.values(timeout_s)
        outcomes = group.result(timeout_s)
        late = {actor.name: actor for actor, one in zip(self._actors, futures, strict=False) if not one.done()}
        if late and self._are_starting():
            raise LearnersLost(self._last_end())
        if late:
            name = next((name for name in late if name in self._stalls), next(iter(late)))  # others wait for that one
            self._rt.restart(late[name])
            why = f": it is {self._stalls[name]}" if name in self._stalls else ""
            call = f"{name}.{futures[0].method}(){self._where.get(name, '')}"
            raise LearnersLost(f"{call} has not answered within {timeout_s:g} s{why}.")
        for outcome in outcomes:
            if isinstance(outcome, Err) and isinstance(outcome.error, ActorDied):
                raise LearnersLost(str(outcome.error)) from outcome.error
        return group.values()

    def _check_state(self) -> None:
        if self._incarnations() != self._current or self._are_starting():
            raise LearnersLost(self._last_end())

    def _are_starting(self) -> bool:
        states = self._rt.state()
        return any(states[actor.name].status == "restarting" for actor in self._actors)

    def _last_end(self) -> str:
        """Return how the learners ended that are not there any more, in words."""
        states = self._rt.state()
        ends = [states[actor.name].error for actor in self._actors] + list(self._ends.values())
        return next((end for end in ends if end), "The learners ended between two calls.")

    def _on_restart(self, actor: ActorHandle, error: BaseException) -> None:
        self._ends[actor.name] = str(error)  # `Saves` tells it, with what the run goes back to

    def _on_stall(self, actor: ActorHandle, stall: Stall) -> None:
        if stall.stopped:
            self._stalls[actor.name] = stall.reason.partition(";")[0]

    def _incarnations_up(self) -> list[int]:
        """Return the incarnations once every learner is up; ActorDied, with advice, where one stays dead."""
        for actor in self._actors:
            try:
                actor.ready(self._start_timeout_s)
            except ActorDied as error:
                raise ActorDied(
                    f"{error.__cause__ or error}\nThe learners were started again {actor.incarnation} times already; "
                    "lower training.minibatch_size if memory is short, or raise fault_tolerance.max_restarts."
                ) from error
        return self._incarnations()

    def _incarnations(self) -> list[int]:
        return [actor.incarnation for actor in self._actors]


def _out_of_memory(futures: Sequence[Future[Any]]) -> BaseException | None:
    """Return the error of a learner whose memory ran out, for which others may have waited in vain."""
    outcomes = [future.outcome() for future in futures if future.done()]
    errors = [outcome.error for outcome in outcomes if isinstance(outcome, Err)]
    return next(filter(is_out_of_memory, errors), None)


def choose_device(device: str, build_policy: Callable[[], nn.Module]) -> tuple[str, str]:
    """Return the device to learn on, and the reason in words; "auto" weighs the size of the net."""
    check_device("learners.device", device)
    if device != "auto":
        return device, "as set by learners.device"
    if not torch.cuda.is_available():
        return "cpu", "no CUDA device"
    size = sum(p.numel() for p in build_policy().parameters())
    if size < GPU_WORTH_PARAMETERS:
        return "cpu", f"{size} parameters: a GPU's launch costs exceed what it saves; learners.device=cuda forces it"
    return "cuda", f"{size} parameters"
