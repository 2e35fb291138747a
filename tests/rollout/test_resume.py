"""Exact continuation: N fragments in one go equal N/2, a checkpoint, a new process, and N/2 more."""

import itertools
import subprocess
import sys

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.vector import SyncVectorEnv, VectorEnv

from rlx.checkpoint import load_checkpoint, save_checkpoint
from rlx.errors import CheckpointError
from rlx.nets.policy import build_policy
from rlx.rollout.env_state import CannotCapture, capture, restore

CASES = {
    "native": ("CartPole-v1", {"vectorization": "native"}),
    "in_place": ("CartPole-v1", {"vectorization": "in_place"}),
    "pendulum": ("Pendulum-v1", {"kwargs": {"max_episode_steps": 40}}),
    "discrete": ("FrozenLake-v1", {}),
    "mujoco": ("HalfCheetah-v5", {"kwargs": {"max_episode_steps": 30}}),
}

RUN = """
import sys
import numpy as np
from rlx.checkpoint import load_checkpoint, save_checkpoint
from rlx.nets.policy import build_policy
from rlx.rollout.env_runner import EnvRunner

def make(env, options):
    runner = EnvRunner(env, 3, build_policy, seed=3, normalize_obs=True, normalize_reward=True, **options)
    runner.set_weights(0, runner._parameters.numpy().copy())
    return runner

def fragments(runner, count):
    return [tree(runner.sample(25)) for _ in range(count)]

def tree(sample):
    moments = [m and m.get_state() for m in (sample.obs_moments, sample.return_moments)]
    return {**sample.trajectory.arrays(), "episodes": np.array(sample.episodes), "moments": moments}
"""

CHILD = (
    RUN
    + """
for name, (env, options) in eval(sys.argv[2]).items():
    runner = make(env, options)
    runner.set_state(load_checkpoint(Path(sys.argv[1]) / name))
    save_checkpoint(Path(sys.argv[1]) / f"{name}_result", {"fragments": fragments(runner, 3)})
"""
).replace("import sys", "import sys\nfrom pathlib import Path", 1)


@pytest.mark.slow
def test_a_runner_continues_bit_for_bit_in_a_new_process(tmp_path):
    pytest.importorskip("mujoco")
    parts = {}
    exec(RUN, parts)
    expected = {}
    for name, (env, options) in CASES.items():
        runner = parts["make"](env, options)
        parts["fragments"](runner, 3)
        save_checkpoint(tmp_path / name, runner.get_state())
        expected[name] = parts["fragments"](runner, 3)
    command = [sys.executable, "-c", CHILD, str(tmp_path), repr(CASES)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert "not exact" not in result.stderr
    for name in CASES:
        actual = load_checkpoint(tmp_path / f"{name}_result")["fragments"]
        assert_equal_trees(actual, expected[name], name)
        assert sum(len(fragment["episodes"]) for fragment in actual) > 0, name


def assert_equal_trees(actual, expected, where):
    if isinstance(expected, dict):
        assert actual.keys() == expected.keys()
        for key in expected:
            assert_equal_trees(actual[key], expected[key], f"{where}.{key}")
    elif isinstance(expected, list):
        for index, pair in enumerate(zip(actual, expected, strict=True)):
            assert_equal_trees(*pair, f"{where}[{index}]")
    else:
        np.testing.assert_array_equal(actual, expected, err_msg=where)


def test_a_runner_continues_bit_for_bit_after_a_checkpoint_between_fragments(tmp_path, make_runner):
    """The quick form of the test above: a new runner in this process, native and in place, several times over."""
    for name in ("native", "in_place", "pendulum"):
        env, options = CASES[name]
        straight, broken = (make_runner(env, 3, build_policy, seed=3, **options) for _ in range(2))
        for fragment in range(4):
            sample = straight.sample(7)
            restored = make_runner(env, 3, build_policy, seed=3, **options)
            restored.set_state(load_checkpoint(save_checkpoint(tmp_path / f"{name}_{fragment}", broken.get_state())))
            broken = restored
            twin = broken.sample(7)
            assert_equal_trees(twin.trajectory.arrays(), sample.trajectory.arrays(), f"{name} {fragment}")
            assert twin.episodes == sample.episodes


def test_an_environment_that_is_not_deterministic_is_reset_and_reported(make_runner, caplog):
    numbers = itertools.count()

    class Drifting(gymnasium.Env):
        observation_space = spaces.Box(-np.inf, np.inf, (1,), np.float32)
        action_space = spaces.Discrete(2)

        def reset(self, *, seed=None, options=None):
            return np.zeros(1, np.float32), {}

        def step(self, action):
            return np.float32([next(numbers)]), 1.0, False, False, {}

    first, second = make_runner(Drifting, 2), make_runner(Drifting, 2)
    first.sample(3)
    second.set_state(first.get_state())
    assert "not deterministic" in caplog.text and "2 of 2 environments" in caplog.text
    sample = second.sample(2)
    np.testing.assert_array_equal(sample.trajectory.obs[0], [[0], [0]])
    np.testing.assert_array_equal(second._length_B, [2, 2])


def test_a_vector_environment_that_cannot_be_captured_is_reset_and_reported(make_runner, count, caplog):
    first, second = (make_runner(lambda: SyncVectorEnv([count]), 1) for _ in range(2))
    first.sample(2)
    second.set_state(first.get_state())
    assert "cannot be saved (SyncVectorEnv.env_fns" in caplog.text and "in_place can be resumed exactly" in caplog.text
    np.testing.assert_array_equal(second.sample(2).trajectory.obs[:, 0, 0], [0, 1])


def test_state_of_another_number_of_environments_or_kind_is_refused(make_runner):
    state = make_runner("CartPole-v1", 2, vectorization="native").get_state()
    with pytest.raises(CheckpointError, match="2 of kind vector, this runner has 3 of kind vector"):
        make_runner("CartPole-v1", 3).set_state(state)
    with pytest.raises(CheckpointError, match="2 of kind vector, this runner has 2 in_place"):
        make_runner("CartPole-v1", 2, vectorization="in_place").set_state(state)


class Plain(VectorEnv):
    def __init__(self):
        self.numbers = {"a": [1, 2.5, (True, None)], 3: np.float32(0.1)}
        self.text, self.grid = "x", np.arange(4).reshape(2, 2)
        self.generator = np.random.Generator(np.random.MT19937(1))
        self.generator.normal()


def test_plain_attributes_survive_a_checkpoint_with_their_types(tmp_path):
    env, other = Plain(), Plain()
    other.numbers, other.text, other.grid = {}, "", np.zeros(1)
    other.generator = np.random.default_rng()
    other.generator = np.random.Generator(np.random.MT19937(9))
    saved = save_checkpoint(tmp_path / "env", {"env": capture(env)})
    restore(other, load_checkpoint(saved)["env"])
    assert other.numbers == env.numbers and type(other.numbers[3]) is np.float32
    assert type(other.numbers["a"][2]) is tuple and other.text == "x"
    np.testing.assert_array_equal(other.grid, env.grid)
    np.testing.assert_array_equal(other.generator.normal(size=3), env.generator.normal(size=3))


def test_attributes_that_would_not_come_back_whole_are_named():
    env = Plain()
    env.window = env.grid[0]
    with pytest.raises(CannotCapture, match=r"Plain.window shares its memory"):
        capture(env)
    del env.window
    env.parts = [object()]
    with pytest.raises(CannotCapture, match=r"Plain.parts\[0\] is a object"):
        capture(env)
