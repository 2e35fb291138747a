"""A trained policy, ready to act: `rlx.load_policy(path).act(obs)`.

Everything between an observation and an action comes from the checkpoint: the encoding of the observation, the
frozen normaliser, the network, and the action's clipping towards the environment. A policy with a memory remembers
what it was shown; `policy.reset()` begins an episode.
"""

from __future__ import annotations

import functools
import textwrap
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rlx.checkpoint import load_state
from rlx.errors import CheckpointError, EnvError
from rlx.metrics import Metrics
from rlx.nets.acting import acting_for
from rlx.nets.flat import FlatParameters
from rlx.nets.observation import MISFIT
from rlx.nets.policy import Policy, build_policy
from rlx.nets.summary import NO_BREAK, summarize
from rlx.rollout.env_changes import Changes, changes_from_state
from rlx.rollout.evaluation import evaluate
from rlx.rollout.in_place import describe
from rlx.rollout.normalizers import Normalizer, ObsNormalizer
from rlx.rollout.spaces import layouts, space_from_state
from rlx.rollout.vector import make_envs
from rlx.settings import Settings


class TrainedPolicy:
    """A policy with its pre- and post-processing; made by `load_policy`."""

    def __init__(self, settings: Settings, state: Mapping[str, Any]) -> None:
        self.settings = settings
        self.observation_space, self.action_space = map(space_from_state, state["spaces"])
        self._layout, self._actions = layouts(self.observation_space, self.action_space, "the policy's environment")
        self.policy = policy_builder(settings)(self.observation_space, self.action_space)
        weights = {name: torch.from_numpy(array) for name, array in state["learners"]["learner"]["policy"].items()}
        self.policy.load_state_dict(weights)
        self.normalizer_state = state["runners"]["normalizer"]
        self.env_changes = changes_from_state(state["runners"].get("env_changes", ()))
        self._acting = acting_for(self.policy)
        moments = Normalizer.from_state(self.normalizer_state).obs
        self._normalize = ObsNormalizer(moments, settings.environment.obs_clip, self._layout.scalable)

    def act(self, obs: Any, *, deterministic: bool = True, rng: np.random.Generator | None = None) -> Any:
        """Return the action for one observation of the environment's space, or actions for a batch [N, ...] of them.

        Batches of Dict and Tuple observations, and the actions for them, are as gymnasium's vector environments have
        them: a dict or tuple of batches. deterministic=False samples, with `rng` (a fresh one each call if none is
        given). No action is returned that the observation's "action_mask" forbids. A policy with a memory takes the
        observations of successive calls for those of one episode, or of N: call `reset` where one begins.
        """
        rows, single = self._rows(obs)
        state_N = self._acting.state_B
        if state_N is not None and len(state_N) != len(rows):
            raise EnvError(
                f"the policy remembers {len(state_N)} environments and was given observations of {len(rows)}; "
                "call reset() before the first observations of others."
            )
        obs_N = self._normalize(rows)
        if deterministic:
            action_N = self._acting.best(obs_N)
        else:
            self._acting.start(1, len(obs_N), rng or np.random.default_rng())
            action_N = self._acting.act(0, obs_N)
        return self._actions.each(action_N)[0] if single else self._actions.to_env(action_N)

    def _rows(self, obs: Any) -> tuple[np.ndarray, bool]:
        """Return one observation or a batch as rows, and whether it was one."""
        layout = self._layout
        try:
            count = layout.num_observations(obs)
            rows = np.empty((1 if count is None else count, *layout.shape), layout.dtype)
            if count is None:
                layout.encode(obs, rows[0])
            else:
                layout.encode_batch(obs, rows)
        except MISFIT as error:
            raise EnvError(f"the observation {describe(obs)} is not of {self.observation_space}: {error}") from None
        if not np.isfinite(layout.floats(rows)).all():
            raise EnvError(f"the observation {obs!r} is not finite; the policy was trained on finite ones only.")
        legal = layout.mask(rows)
        if legal is not None and self._actions.is_stuck(legal).any():
            raise EnvError(f"the observation {obs!r} has an action mask that leaves no legal action.")
        return rows, count is None

    def reset(self, where: np.ndarray | None = None) -> None:
        """Forget the past: all of it, or that of the environments of a batch `where` [N] is True.

        Of no effect where the policy has no memory.
        """
        if where is None:
            self._acting.state_B = None
        elif self._acting.state_B is not None:
            self._acting.forget(np.asarray(where, bool))

    @property
    def state(self) -> np.ndarray | None:
        """What the policy remembers, float32 [N, H], to be set again later; None before an episode, or always."""
        return self._acting.state_B

    @state.setter
    def state(self, state_N: np.ndarray | None) -> None:
        self._acting.state_B = state_N

    def evaluate(
        self, num_episodes: int | None = None, seed: int | None = None, on_frame: Callable | None = None
    ) -> Metrics:
        """Return the evaluation/* metrics over episodes on fresh environments, changed as the run had changed its."""
        return evaluation_metrics(
            *(self.settings, self.policy, self.normalizer_state, num_episodes),
            seed=seed,
            changes=self.env_changes,
            on_frame=on_frame,
        )


def load_policy(path: str | Path) -> TrainedPolicy:
    """Return the policy of a checkpoint folder, or of a run folder's newest checkpoint."""
    state = load_state(Path(path))
    if "rollouts" in state:
        raise CheckpointError(
            f"{path} is a run of {state['config']['algorithm']}, on text; use rlx.text_inference.load_text_policy."
        )
    # Without the algorithm's own section no module of its has to be imported: loading executes no code.
    settings = Settings.model_validate({name: value for name, value in state["config"].items() if name != "training"})
    return TrainedPolicy(settings, state)


def policy_builder(settings: Settings) -> Callable[..., Policy]:
    """Return the function (observation space, action space) -> Policy with freshly initialised weights."""
    return functools.partial(build_policy, **dict(settings.model), seed=settings.runtime.seed)


def network_summary(settings: Settings) -> str:
    """Return what network these settings build, a line a part; one environment is made, as it knows the spaces."""
    environment = settings.environment
    envs = make_envs(environment.chosen(), 1, kwargs=environment.kwargs, vectorization="in_place")
    try:
        policy = policy_builder(settings)(envs.observation_space, envs.action_space)
    finally:
        envs.close()
    total = sum(parameter.numel() for parameter in policy.parameters())
    rows = [("observation", repr(envs.layout), ""), ("action", repr(envs.actions), "")]
    rows += [(name, layers, f"{count:,}") for name, layers, count in summarize(policy)]
    lines = [f"network for {envs.name}: {total:,} parameters"]
    for name, text, count in rows:
        first, *more = textwrap.wrap(text, 80) or [""]
        lines += [f"  {name:<14} {first:<80}{count:>11}".rstrip(), *(f"{'':17}{line}" for line in more)]
    return "\n".join(lines).replace(NO_BREAK, " ")


class Evaluator:
    """Plays evaluation episodes with a policy of its own, which gets the learners' weights each time."""

    def __init__(self, build_policy: Callable[[], Policy]) -> None:
        self._build_policy = build_policy
        self._policy: Policy | None = None

    def play(self, settings: Settings, weights: np.ndarray, *arguments: Any, **options: Any) -> Metrics:
        """Return what `evaluation_metrics` returns, for the policy with these weights (flat float32)."""
        if self._policy is None:
            self._policy = self._build_policy()
            self._parameters = FlatParameters(self._policy)
        self._parameters.load(weights)
        return evaluation_metrics(settings, self._policy, *arguments, **options)


def evaluation_metrics(
    settings: Settings,
    policy: Policy,
    normalizer_state: dict[str, Any] | None,
    num_episodes: int | None = None,
    *,
    seed: int | None = None,
    num_envs: int | None = None,
    changes: Changes = (),
    on_frame: Callable | None = None,
) -> Metrics:
    """Return the evaluation/* metrics of `policy` on environments of its own, with a frozen normaliser."""
    e, environment = settings.evaluation, settings.environment
    if seed is None:
        seed = settings.runtime.seed + 1_000_000 if e.seed is None else e.seed
    result = evaluate(
        environment.chosen(),
        policy,
        normalizer_state=normalizer_state,
        obs_clip=environment.obs_clip,
        kwargs=environment.kwargs,
        atari=settings.atari.model_dump(),
        num_episodes=num_episodes or e.num_episodes,
        num_envs=num_envs or e.num_envs,
        deterministic=e.deterministic,
        seed=seed,
        changes=changes,
        on_frame=on_frame,
    )
    returns = np.asarray(result.returns)
    return {
        "evaluation/episode_return_mean": float(returns.mean()),
        "evaluation/episode_return_std": float(returns.std()),
        "evaluation/episode_return_min": float(returns.min()),
        "evaluation/episode_return_max": float(returns.max()),
        "evaluation/episode_length_mean": float(np.mean(result.lengths)),
        "evaluation/episodes": len(returns),
    }
