"""evaluate: returns of whole episodes, on environments of its own."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from time import monotonic
from typing import Any

import numpy as np

from rlx.errors import EnvError
from rlx.nets.acting import Acting, acting_for
from rlx.nets.policy import Policy
from rlx.rollout.env_changes import Changes
from rlx.rollout.in_place import InPlaceEnvs
from rlx.rollout.normalizers import Normalizer, ObsNormalizer, State
from rlx.rollout.vector import Envs, EnvSource, VectorEnvAdapter, make_envs, resolve

EVALUATION_STREAM = 2
NOISE_STEPS = 64
"""Steps whose noise is drawn at once when actions are sampled."""

OnFrame = Callable[[np.ndarray], None]
Choose = Callable[[np.ndarray], np.ndarray]
Forget = Callable[[np.ndarray], None]
Show = Callable[[], None]


@dataclass(frozen=True)
class EvaluationResult:
    """What each episode gave, in the order of the episodes' seeds."""

    returns: list[float]
    lengths: list[int]


def evaluate(
    env: EnvSource,
    policy: Policy,
    *,
    num_episodes: int,
    num_envs: int = 8,
    normalizer_state: State | None = None,
    obs_clip: float = 10.0,
    deterministic: bool = True,
    seed: int = 0,
    kwargs: Mapping[str, Any] | None = None,
    atari: Mapping[str, Any] | None = None,
    changes: Changes = (),
    on_frame: OnFrame | None = None,
    timeout_s: float = 3600.0,
) -> EvaluationResult:
    """Return `num_episodes` episodes of `policy` on environments, statistics and noise of their own.

    Scalar environments: episode k is reset with seed + k and counts once, whatever num_envs is, so that short
    episodes are not favoured. An environment that only exists as a VectorEnv counts a fixed number of episodes of
    each of its environments. changes: what the environments are changed by, before their first episode. on_frame gets
    every rgb frame of the first environment. EnvError after timeout_s.
    Atari games end with their last life and count every point, whatever training sees of them.
    """
    options = dict(kwargs or {})
    if on_frame is not None and _takes_render_mode(env):
        options["render_mode"] = "rgb_array"
    envs = make_envs(env, min(num_envs, num_episodes), kwargs=options, vectorization="in_place", seed=seed, atari=atari)
    acting = acting_for(policy)
    choose = _chooser(envs, acting, normalizer_state, obs_clip, deterministic, seed)
    episodes = _Episodes(num_episodes, envs.name, monotonic() + timeout_s)
    show = _shower(envs, on_frame)
    try:
        envs.change(changes)
        if isinstance(envs, InPlaceEnvs):
            _run_scalar(envs, choose, acting.forget, episodes, seed, show)
        else:
            _run_vector(envs, choose, acting.forget, episodes, show)
    finally:
        envs.close()
    return episodes.result()


class _Episodes:
    """The sums of each counted episode, and the deadline."""

    def __init__(self, count: int, name: str, deadline: float) -> None:
        self.returns = np.zeros(count)
        self.lengths = np.zeros(count, np.int64)
        self.ended = 0
        self._name, self._deadline = name, deadline

    def add(self, episode: int, reward: float, ended: bool) -> None:
        self.returns[episode] += reward
        self.lengths[episode] += 1
        self.ended += ended

    def check_deadline(self) -> None:
        if monotonic() > self._deadline:
            raise EnvError(
                f"{self._name}: {self.ended} of {len(self.returns)} evaluation episodes have ended in time and the "
                f"longest has {self.lengths.max()} steps; give the environment a time limit (kwargs max_episode_steps)."
            )

    def result(self) -> EvaluationResult:
        if not np.isfinite(self.returns).all():
            episode = int(np.argmin(np.isfinite(self.returns)))
            raise EnvError(f"{self._name}: evaluation episode {episode} has return {self.returns[episode]}.")
        return EvaluationResult(self.returns.tolist(), self.lengths.tolist())


def _run_scalar(envs: InPlaceEnvs, choose: Choose, forget: Forget, episodes: _Episodes, seed: int, show: Show) -> None:
    waiting = iter(range(envs.num_envs, len(episodes.returns)))
    running = {index: index for index in range(envs.num_envs)}
    for index, episode in running.items():
        envs.reset_one(index, seed + episode)
    show()
    while running:
        episodes.check_deadline()
        action_B = envs.actions.each(choose(envs.obs_B))
        for index, episode in list(running.items()):
            reward, terminated, truncated = envs.step_one(index, action_B[index])
            episodes.add(episode, reward, terminated or truncated)
            if index == 0:
                show()
            if terminated or truncated:
                following = next(waiting, None)
                if following is None:
                    del running[index]
                else:
                    envs.reset_one(index, seed + following)
                    forget(np.arange(envs.num_envs) == index)
                    running[index] = following
                    if index == 0:
                        show()


def _run_vector(envs: Envs, choose: Choose, forget: Forget, episodes: _Episodes, show: Show) -> None:
    count = len(episodes.returns)
    own = [list(range(index, count, envs.num_envs)) for index in range(envs.num_envs)]
    envs.reset()
    is_reset_row = np.zeros(envs.num_envs, bool)
    show()
    while any(own):
        episodes.check_deadline()
        _, reward_B, terminated_B, truncated_B, _ = envs.step(choose(envs.obs_B))
        if own[0]:
            show()
        done_B = np.logical_or(terminated_B, truncated_B)
        for index, mine in enumerate(own):
            if mine and not is_reset_row[index]:
                episodes.add(mine[0], float(reward_B[index]), bool(done_B[index]))
                if done_B[index]:
                    mine.pop(0)
        forget(is_reset_row if envs.resets_on_next_step else done_B)
        if envs.resets_on_next_step:
            is_reset_row = done_B


def _chooser(
    envs: Envs, acting: Acting, normalizer_state: State | None, obs_clip: float, deterministic: bool, seed: int
) -> Choose:
    """Return a function from observations [B, ...] to the policy's actions."""
    normalize = ObsNormalizer(Normalizer.from_state(normalizer_state).obs, obs_clip, envs.layout.scalable)
    noise = np.random.default_rng([seed, EVALUATION_STREAM])
    step = 0

    def choose(raw_B: np.ndarray) -> np.ndarray:
        nonlocal step
        obs_B = normalize(raw_B)
        if deterministic:
            return acting.best(obs_B)
        if step % NOISE_STEPS == 0:
            acting.start(NOISE_STEPS, envs.num_envs, noise)
        step += 1
        return acting.act((step - 1) % NOISE_STEPS, obs_B)

    return choose


def _takes_render_mode(env: EnvSource) -> bool:
    source, _ = resolve(env)
    if isinstance(source, str):  # a gymnasium id
        return True
    try:
        return "render_mode" in inspect.signature(source).parameters
    except (TypeError, ValueError):  # a VectorEnv; a callable written in C
        return False


def _shower(envs: Envs, on_frame: OnFrame | None) -> Show:
    """Return a function that passes the first environment's frame on."""

    def show() -> None:
        if on_frame is None:
            return
        if isinstance(envs, InPlaceEnvs):
            frame: Any = envs.envs[0].render()
        else:
            assert isinstance(envs, VectorEnvAdapter)
            frames = envs.env.render()
            frame = None if frames is None else frames[0]
        if frame is None:
            raise EnvError(f"{envs.name}: render() returned None; make the environment with render_mode='rgb_array'.")
        on_frame(np.asarray(frame))

    return show
