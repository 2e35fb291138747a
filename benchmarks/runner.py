"""Measures an env runner alone: steps a second with random actions, beside the environments' own loop.

    python benchmarks/runner.py            # into docs/benchmarks.md; needs rlx[atari,mujoco]

The own loop is gymnasium's or ale-py's vector environment, stepped with actions drawn beforehand and nothing else.
The runner does all that it does in training (fragments, episodes, masks, checks), with the same random actions; and
once more with an untrained policy, to show how much of its time a network takes. On a machine that others use as well,
steps per second of processor time say more than steps per second.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import ale_py
import gymnasium
import numpy as np
import torch
from gymnasium import spaces
from report import DOCS, busy_cores, describe, machine, markdown_table, publish
from turns import span

from rlx.nets.policy import build_policy
from rlx.rollout.env_runner import EnvRunner
from rlx.rollout.mujoco_warnings import log_warnings
from rlx.settings import AtariSection

NUM_STEPS = 128
TARGET = 0.8


class Work(NamedTuple):
    """An environment, and its own loop."""

    num_envs: int
    own: Callable[[str, int], Any]


gymnasium.register_envs(ale_py)


def ale(env_id: str, num_envs: int) -> Any:
    """Return ale-py's own vector environment with the same frames: its defaults but for these."""
    same = {"repeat_action_probability": 0.25, "noop_max": 0, "use_fire_reset": False, "reward_clipping": False}
    return gymnasium.make_vec(env_id, num_envs, "vector_entry_point", **same)


WORK = {
    "CartPole-v1": Work(16, partial(gymnasium.make_vec, vectorization_mode="vector_entry_point")),
    "Pendulum-v1": Work(8, partial(gymnasium.make_vec, vectorization_mode="sync")),
    "HalfCheetah-v5": Work(8, partial(gymnasium.make_vec, vectorization_mode="sync")),
    "ALE/Pong-v5": Work(8, ale),
}


class RandomActing:
    """Acts at random, of a fragment's actions drawn at its start."""

    state_B = None

    def __init__(self, space: spaces.Space[Any]) -> None:
        self.space = space

    def start(self, num_steps: int, num_envs: int, rng: np.random.Generator) -> None:
        """Draw the actions."""
        self.action_T_B = actions(self.space, num_steps, num_envs, rng)

    def act(self, t: int, obs_B: np.ndarray) -> np.ndarray:
        """Return the actions of step t."""
        return self.action_T_B[t]

    def finish(self, obs_T_B: np.ndarray, action_T_B: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return zeros."""
        zeros_T_B = np.zeros(obs_T_B.shape[:2], np.float32)
        return zeros_T_B, zeros_T_B.copy()

    def value(self, obs_N: np.ndarray, after_N: Any = ()) -> np.ndarray:
        """Return zeros."""
        return np.zeros(len(obs_N), np.float32)

    def forget(self, first_B: np.ndarray) -> None:
        """Nothing is remembered."""

    def states(self) -> None:
        """Nothing is remembered."""


def actions(space: spaces.Space[Any], num_steps: int, num_envs: int, rng: np.random.Generator) -> np.ndarray:
    """Return uniform random actions [T, B] or [T, B, A]."""
    if isinstance(space, spaces.Discrete):
        return rng.integers(space.n, size=(num_steps, num_envs))
    assert isinstance(space, spaces.Box)
    return rng.uniform(space.low, space.high, (num_steps, num_envs, *space.shape)).astype(space.dtype)


def own_loop(env_id: str, seconds: float) -> Callable[[], dict[str, float]]:
    """Return a function that measures the environments' own loop for `seconds`."""
    num_envs, make = WORK[env_id]
    env = make(env_id, num_envs)
    env.reset(seed=1)
    rng = np.random.default_rng(1)

    def measure() -> dict[str, float]:
        started, cpu_started, steps = time.perf_counter(), time.process_time(), 0
        while time.perf_counter() - started < seconds:
            for action_B in actions(env.single_action_space, NUM_STEPS, num_envs, rng):
                env.step(action_B)
            steps += NUM_STEPS * num_envs
        wall_s, cpu_s = time.perf_counter() - started, time.process_time() - cpu_started
        return {"steps_per_s": steps / wall_s, "steps_per_cpu_s": steps / cpu_s}

    return measure


def runner(env_id: str, seconds: float, is_random: bool) -> Callable[[], dict[str, float]]:
    """Return a function that measures an env runner for `seconds`; steps that only reset count, as in the own loop."""
    built = EnvRunner(
        *(env_id, WORK[env_id].num_envs, build_policy),
        seed=1,
        num_cores=int(machine()["cores"] or 1),
        atari=AtariSection().model_dump(),
    )
    built.set_weights(0, built._parameters.numpy().copy())
    if is_random:
        built._acting = RandomActing(built.spaces()[1])
    built.sample(NUM_STEPS)

    def measure() -> dict[str, float]:
        started, cpu_started, steps, inference_s = time.perf_counter(), time.process_time(), 0, 0.0
        while time.perf_counter() - started < seconds:
            sample = built.sample(NUM_STEPS)
            steps += sample.trajectory.mask.size
            inference_s += sample.inference_s
        wall_s, cpu_s = time.perf_counter() - started, time.process_time() - cpu_started
        return {"steps_per_s": steps / wall_s, "steps_per_cpu_s": steps / cpu_s, "inference": inference_s / wall_s}

    return measure


def page(conditions: dict[str, Any], results: dict[str, list[dict[str, Any]]]) -> str:
    """Return the table: medians over the rounds, and the median of the ratios within them."""
    rows = []
    for env_id, rounds in results.items():
        own, ours, policy = ([one[name] for one in rounds] for name in ("own", "random", "policy"))
        ratios, cpu_ratios = (
            [b[rate] / a[rate] for a, b in zip(own, ours, strict=True)] for rate in ("steps_per_s", "steps_per_cpu_s")
        )
        row = [f"{env_id}, {WORK[env_id].num_envs}"]
        row += [f"{median(one['steps_per_s'] for one in side):,.0f}" for side in (own, ours)]
        for values in (ratios, cpu_ratios):
            row += [f"{median(values):.2f}", span(values, ".2f")]
        row += [f"{TARGET}"]
        row += [f"{median(one['steps_per_s'] for one in policy):,.0f}"]
        row += [f"{100 * median(one['inference'] for one in policy):.0f}%"]
        rows.append(row)
    header = ["environment, how many", "own loop, steps/s", "runner, random actions", "ratio", "range"]
    header += ["ratio of steps per processor second", "range", "wanted"]
    header += ["runner, untrained policy", "of it inference"]
    return f"{markdown_table(header, rows)}\n\n{len(rounds)} rounds. {describe(conditions)}"


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--envs", nargs="+", default=list(WORK), choices=list(WORK))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0, help="of each measurement")
    parser.add_argument("--out", type=Path, default=DOCS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    log_warnings()
    conditions = machine() | {"busy_cores_before": busy_cores()}
    results: dict[str, list[dict[str, Any]]] = {}
    for env_id in options.envs:
        sides = {
            "own": own_loop(env_id, options.seconds),
            "random": runner(env_id, options.seconds, True),
            "policy": runner(env_id, options.seconds, False),
        }
        results[env_id] = [{name: measure() for name, measure in sides.items()} for _ in range(options.rounds)]
        print(page(conditions, {env_id: results[env_id]}).splitlines()[2], flush=True)
    publish(options.out, "env runner", {"machine": conditions, "results": results}, page(conditions, results))


if __name__ == "__main__":
    main()
