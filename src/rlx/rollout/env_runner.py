"""EnvRunner: steps B environments with a policy and returns what happened as a Trajectory.

`sample(T)` reads top-down as the life of a fragment: collect, check, evaluate, account. Only `_collect` runs
per step; everything that can be done on whole [T, B] arrays waits until after it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from time import perf_counter
from typing import Any

import numpy as np

from rlx.actors import Published
from rlx.actors.interface import AnyChannel
from rlx.nets.acting import acting_for
from rlx.nets.flat import FlatParameters
from rlx.nets.observation import Space
from rlx.nets.policy import Policy
from rlx.rollout.atari import is_atari
from rlx.rollout.checks import FragmentChecks
from rlx.rollout.env_changes import Changes
from rlx.rollout.failures import Failures
from rlx.rollout.fragment import Fragment
from rlx.rollout.hooks import EnvHooks
from rlx.rollout.in_place import FAILED, InPlaceEnvs, Step
from rlx.rollout.normalizers import DiscountedReturn, Normalizer, ObsNormalizer, RunningMoments, State
from rlx.rollout.sample import Sample
from rlx.rollout.vector import Envs, EnvSource, make_envs
from rlx.trajectory import Trajectory

BuildPolicy = Callable[[Space, Space], Policy]

# Separates the runner's noise from other generators that are seeded with the same run seed.
ACTING_STREAM = 1
NUMBERS_PER_CALL = 1 << 20
"""More fragments and episodes of one environment than any call begins: from call to call no number comes twice."""


class EnvRunner:
    """Owns `num_envs` environments and a copy of the policy.

    env, kwargs, vectorization, num_processes, num_cores: see `make_envs`. first_env_index: number of the first
    environment among all runners' ones; with `seed` it decides every random draw. gamma: of the discounted returns
    that rewards are scaled by. Of observations only the numbers of a Box are normalised, and no uint8 image.
    policy_channel: where weights, statistics and changes of the environments are published, as {"weights",
    "normalizer", "env_changes"}; a sample begins with the newest. on_env_error, max_env_failures, env_step_timeout_s:
    see `Failures`; the row of a step that failed is masked, and the one before it truncated. atari: see
    `rlx.settings.AtariSection`; episodes are accounted for before lives and clipping come in. callbacks: makes those
    that hear of environments and episodes, see `EnvHooks`.
    """

    def __init__(
        self,
        env: EnvSource,
        num_envs: int,
        build_policy: BuildPolicy,
        *,
        kwargs: Mapping[str, Any] | None = None,
        vectorization: str = "auto",
        num_processes: int | None = None,
        num_cores: int = 1,
        seed: int = 0,
        first_env_index: int = 0,
        gamma: float = 0.99,
        normalize_obs: bool = False,
        normalize_reward: bool = False,
        obs_clip: float = 10.0,
        on_env_error: str = "raise",
        max_env_failures: int = 10,
        env_step_timeout_s: float | None = None,
        policy_channel: AnyChannel | None = None,
        atari: Mapping[str, Any] | None = None,
        callbacks: Callable[[], Sequence[Any]] | None = None,
    ) -> None:
        self._hooks = None if callbacks is None else EnvHooks(callbacks)
        self._failures = Failures(
            num_envs,
            on_env_error=on_env_error,
            max_env_failures=max_env_failures,
            env_step_timeout_s=env_step_timeout_s,
        )
        games = atari if atari is not None and is_atari(env) else {"episodic_life": False, "clip_reward": False}
        self._clips_reward = bool(games["clip_reward"])
        self._envs: Envs = make_envs(
            *(env, num_envs),
            kwargs=kwargs,
            vectorization=vectorization,
            num_processes=num_processes,
            num_cores=num_cores,
            seed=seed,
            first_env_index=first_env_index,
            failures=self._failures,
            atari=atari,
            counts_lives=bool(games["episodic_life"]),
            hooks=self._hooks,
        )
        self._checks = FragmentChecks(self._envs, first_env_index)
        self._layout = self._envs.layout
        policy = build_policy(*self.spaces())
        self._parameters = FlatParameters(policy)
        self._acting = acting_for(policy)  # after FlatParameters: it may hold views of them
        self._obs_clip = obs_clip
        self._normalizer: ObsNormalizer | None = None
        if normalize_obs and self._layout.num_scalable:
            self._normalizer = ObsNormalizer(RunningMoments(), obs_clip, self._layout.scalable)
        self._discounted = DiscountedReturn(num_envs, gamma) if normalize_reward else None
        self._seed, self._first = seed, first_env_index
        self._channel = policy_channel
        self._published: Published | None = None  # the last one taken
        self._version: int | None = None
        self._fragment = 0
        self._is_new = True
        self._intact = False
        self._forget(np.ones(num_envs, bool))

    def spaces(self) -> tuple[Space, Space]:
        """Return the observation and action space of one environment."""
        return self._envs.observation_space, self._envs.action_space

    def set_weights(self, version: int, weights: np.ndarray, normalizer_state: State | None = None) -> None:
        """Act with `weights` (flat float32) and these statistics from the next sample on."""
        self._parameters.load(weights)
        self._version = version
        if self._normalizer is not None:
            moments = Normalizer.from_state(normalizer_state).obs or RunningMoments()
            self._normalizer = ObsNormalizer(moments, self._obs_clip, self._layout.scalable)

    def change_envs(self, changes: Changes) -> None:
        """Have the environments changed so: see `Envs.change`."""
        self._envs.change(changes)

    def sample(self, num_steps: int, call: int = 0) -> Sample:
        """Return the next `num_steps` steps of every environment.

        call: the number of this call in the whole run. A runner without a past numbers its episodes and fragments,
        which decide all random draws, by it: one that is started again in mid-run does not live through the run's
        first episodes once more.
        """
        started = perf_counter()
        self._take_newest()
        if self._version is None:
            raise RuntimeError("sample() before set_weights(): the runner does not know which weights to act with")
        self._failures.watchdog.watch()
        if not self._intact:  # the first fragment, or an exception or interrupt cut the last one
            self._restart(call)
        self._intact = False
        if self._hooks is not None:
            self._hooks.forget()
        fragment = self._collect(num_steps)
        self._checks.finite(fragment, self._fragment - 1)
        inference_started = perf_counter()
        logp_T_B, value_T_B = self._acting.finish(fragment.obs, fragment.action)
        next_value_T_B = self._next_values(fragment, value_T_B)
        fragment.inference_s += perf_counter() - inference_started

        done_T_B = fragment.terminated | fragment.truncated
        first_T_B = self._firsts(done_T_B, fragment.failed)
        mask_T_B = self._mask(done_T_B) & ~fragment.failed
        self._checks.legal(fragment, mask_T_B, self._fragment - 1)
        fragment.reward[~mask_T_B] = 0.0
        episodes = self._ended_episodes(fragment.reward, done_T_B, fragment.failed, mask_T_B)
        episode_metrics: dict[str, list[float]] = {}
        if self._hooks is not None:
            episode_metrics = self._hooks.episodes_ended(episodes, done_T_B, fragment.terminated, self._first)
        if self._envs.lives_B is not None:
            life_lost_T_B = fragment.life_lost() & mask_T_B
            fragment.terminated |= life_lost_T_B
            next_value_T_B[life_lost_T_B] = 0.0
        if self._clips_reward:
            np.clip(fragment.reward, -1.0, 1.0, out=fragment.reward)
        obs_moments, return_moments = self._moments(fragment, done_T_B, mask_T_B)
        self._envs.record(fragment.action, done_T_B | fragment.failed)
        # The last good observation is obs[t] of the failed row, so next_value[t - 1] is its value already.
        fragment.truncated[:-1] |= fragment.failed[1:] & mask_T_B[:-1] & ~done_T_B[:-1]
        trajectory = Trajectory(
            obs=fragment.obs,
            action=fragment.action,
            logp=logp_T_B,
            value=value_T_B,
            next_value=next_value_T_B,
            reward=fragment.reward.astype(np.float32),
            terminated=fragment.terminated,
            truncated=fragment.truncated,
            mask=mask_T_B,
            first=first_T_B,
            weights_version=np.full(mask_T_B.shape, self._version, np.int64),
            state=self._acting.states(),
        )
        self._intact = True
        return Sample(
            trajectory,
            episodes,
            obs_moments,
            return_moments,
            env_s=fragment.env_s,
            inference_s=fragment.inference_s,
            busy_s=perf_counter() - started,
            stepped_one_by_one=isinstance(self._envs, InPlaceEnvs),
            env_failures=self._failures.take_count(),
            episode_metrics=episode_metrics,
        )

    def cut(self) -> None:
        """Begin new episodes with the next sample, as after an interrupt: nobody has seen the last one."""
        self._intact = False

    def get_state(self, call: int = 0) -> State:
        """Return all that `set_state` needs to go on exactly, as plain values and arrays; the weights stand apart.

        call: as in `sample`.
        """
        if not self._intact:
            self._restart(call)
        return {
            "fragment": self._fragment,
            "envs": self._envs.get_state(),
            "return": self._return_B.copy(),
            "length": self._length_B.copy(),
            "discounted_return": None if self._discounted is None else self._discounted.return_B.copy(),
            "ended": self._ended_B.copy(),
            "memory": self._acting.state_B,
        }

    def set_state(self, state: State) -> None:
        """Continue where `get_state` was called."""
        self._failures.watchdog.watch()
        restored_B = self._envs.set_state(state["envs"])
        self._fragment = int(state["fragment"])
        self._return_B, self._length_B = state["return"].copy(), state["length"].copy()
        self._ended_B = state["ended"].copy()
        self._acting.state_B = state.get("memory")  # which a checkpoint from before there were memories has not
        if self._discounted is not None and state["discounted_return"] is not None:
            self._discounted.return_B = state["discounted_return"].copy()
        self._forget(~restored_B)
        self._is_new, self._intact = False, True

    def close(self) -> None:
        """Release the environments."""
        self._envs.close()

    def _take_newest(self) -> None:
        published = self._channel.latest() if self._channel is not None else None
        if published is not None and published is not self._published:
            self.set_weights(published.version, published.value["weights"], published.value["normalizer"])
            self.change_envs(published.value["env_changes"])
            self._published = published

    def _restart(self, call: int) -> None:
        if self._is_new:
            self._fragment = call * NUMBERS_PER_CALL
            self._envs.begin_at(self._fragment)
            self._is_new = False
        self._envs.reset()
        self._forget(np.ones(self._envs.num_envs, bool))
        self._intact = True

    def _forget(self, new_B: np.ndarray) -> None:
        """Empty the accounts of the environments that begin a new episode."""
        if new_B.all():
            self._return_B = np.zeros(len(new_B))
            self._length_B = np.zeros(len(new_B), np.int64)
            self._ended_B = np.zeros(len(new_B), bool)
        self._return_B[new_B], self._length_B[new_B], self._ended_B[new_B] = 0.0, 0, False
        if self._discounted is not None:
            self._discounted.return_B[new_B] = 0.0
        self._acting.forget(new_B)

    def _collect(self, num_steps: int) -> Fragment:
        envs, acting, normalizer, clock = self._envs, self._acting, self._normalizer, perf_counter
        fragment = Fragment.empty(num_steps, envs, normalizer is not None)
        if fragment.lives is not None:
            fragment.lives[0] = envs.lives_B
        started = clock()
        noise = np.random.default_rng([self._seed, ACTING_STREAM, self._first, self._fragment])
        self._fragment += 1
        acting.start(num_steps, envs.num_envs, noise)
        inference_s, env_s = clock() - started, 0.0
        raw_B = envs.obs_B
        step = envs.step if acting.state_B is None else self._step_and_forget
        self._done_B = self._ended_B
        raw_T_B, action_T_B, reward_T_B = fragment.raw, fragment.action, fragment.reward
        terminated_T_B, truncated_T_B = fragment.terminated, fragment.truncated
        for t in range(num_steps):
            raw_T_B[t] = raw_B
            obs_B = raw_T_B[t] if normalizer is None else normalizer(raw_T_B[t], out=fragment.obs[t])
            acting_started = clock()
            action_B = acting.act(t, obs_B)
            self._checks.action(action_B, t, self._fragment - 1)
            stepping_started = clock()
            action_T_B[t] = action_B
            try:
                raw_B, reward_T_B[t], terminated_B, truncated_B, final_obs = step(action_B)
            except Exception as error:
                error.add_note(f"at step {t} of fragment {self._fragment - 1} ({num_steps} steps)")
                raise
            env_s += clock() - stepping_started
            inference_s += stepping_started - acting_started
            terminated_T_B[t], truncated_T_B[t] = terminated_B, truncated_B
            if fragment.lives is not None:
                fragment.lives[t + 1] = envs.lives_B
            for index, obs in final_obs.items():
                if obs is FAILED:
                    fragment.failed[t, index] = True
                elif truncated_B[index] and not terminated_B[index]:
                    fragment.cuts.append((t, index, obs))
        fragment.env_s, fragment.inference_s = env_s, inference_s
        return fragment

    def _step_and_forget(self, action_B: np.ndarray) -> Step:
        """Step, and empty the memory of the environments whose next observation begins an episode."""
        _, _, terminated_B, truncated_B, final_obs = step = self._envs.step(action_B)
        done_B = np.logical_or(terminated_B, truncated_B)
        failed_B = np.array([final_obs.get(index) is FAILED for index in range(len(done_B))])
        self._acting.forget(self._over(done_B, failed_B, self._done_B))
        self._done_B = done_B
        return step

    def _over(self, done: np.ndarray, failed: np.ndarray, done_before: np.ndarray) -> np.ndarray:
        """Return True where the observation after a row begins an episode, given what the row and the last one are."""
        return (done_before if self._envs.resets_on_next_step else done) | failed

    def _next_values(self, fragment: Fragment, value_T_B: np.ndarray) -> np.ndarray:
        """Return V of the observations that followed, before any reset; 0 where terminated."""
        finals = [obs for _, _, obs in fragment.cuts]
        last_B, last = self._envs.obs_B, len(value_T_B) - 1
        after_N = [(last, index) for index in range(len(last_B))] + [(t, index) for t, index, _ in fragment.cuts]
        obs_N = np.concatenate([last_B, np.stack(finals)]) if finals else last_B
        tail_N = self._acting.value(obs_N if self._normalizer is None else self._normalizer(obs_N), after_N)
        next_value_T_B = np.concatenate([value_T_B[1:], tail_N[None, : len(last_B)]])
        for (t, index, _), value in zip(fragment.cuts, tail_N[len(last_B) :], strict=True):
            next_value_T_B[t, index] = value
        next_value_T_B[fragment.terminated] = 0.0
        return next_value_T_B

    def _firsts(self, done_T_B: np.ndarray, failed_T_B: np.ndarray) -> np.ndarray:
        """Return True where an episode begins, also across the border."""
        over_T_B = self._over(done_T_B, failed_T_B, np.concatenate([self._ended_B[None], done_T_B[:-1]]))
        begins_B = (self._length_B == 0) & ~self._ended_B
        return np.concatenate([begins_B[None], over_T_B[:-1]])

    def _mask(self, done_T_B: np.ndarray) -> np.ndarray:
        """Return False where the row only resets: after an ended episode, also across the fragment's border."""
        if not self._envs.resets_on_next_step:
            return np.ones(done_T_B.shape, bool)
        mask_T_B = ~np.concatenate([self._ended_B[None], done_T_B[:-1]])
        self._ended_B = done_T_B[-1].copy()
        return mask_T_B

    def _ended_episodes(
        self, reward_T_B: np.ndarray, done_T_B: np.ndarray, failed_T_B: np.ndarray, mask_T_B: np.ndarray
    ) -> list[tuple[float, int]]:
        """Return (return, length) of the episodes that ended; running ones are carried over, failed ones dropped."""
        num_steps, num_envs = done_T_B.shape
        # What one environment did up to an end, or up to the border, is a piece P of the rows, environment by
        # environment; all pieces are summed at once, as short episodes are many.
        over_N = (done_T_B | failed_T_B).T.ravel()
        start_P = np.union1d(np.arange(num_envs) * num_steps, over_N.nonzero()[0] + 1)
        start_P = start_P[start_P < len(over_N)]
        last_P = np.append(start_P[1:], len(over_N)) - 1
        return_P = np.add.reduceat(reward_T_B.T.ravel(), start_P)
        length_P = np.add.reduceat(mask_T_B.T.ravel(), start_P, dtype=np.int64)
        goes_on_P = start_P % num_steps == 0
        return_P[goes_on_P] += self._return_B
        length_P[goes_on_P] += self._length_B
        carried_P, is_over_P = last_P % num_steps == num_steps - 1, over_N[last_P]
        self._return_B, self._length_B = (np.where(is_over_P, 0, piece)[carried_P] for piece in (return_P, length_P))
        (ended,) = done_T_B.T.ravel()[last_P].nonzero()
        ended = ended[np.argsort(last_P[ended] % num_steps, kind="stable")]  # in the order of their ends
        return list(zip(return_P[ended].tolist(), length_P[ended].tolist(), strict=True))

    def _moments(
        self, fragment: Fragment, done_T_B: np.ndarray, mask_T_B: np.ndarray
    ) -> tuple[RunningMoments | None, RunningMoments | None]:
        """Return the moments of observations and discounted returns; None for what is not normalised."""
        obs_moments = None
        if self._normalizer is not None:
            obs_moments = RunningMoments()
            obs_moments.update(self._layout.scalable(fragment.raw)[mask_T_B])
        if self._discounted is None:
            return obs_moments, None
        return obs_moments, self._discounted.moments(fragment.reward, done_T_B, mask_T_B)
