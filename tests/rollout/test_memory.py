"""A runner's policy remembers an episode, all of it and nothing else, however episodes end."""

from functools import partial

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from rlx import actors
from rlx.checkpoint import load_checkpoint, save_checkpoint
from rlx.envs.recall import Recall
from rlx.nets.policy import build_policy
from rlx.rollout.env_runner import EnvRunner
from rlx.rollout.evaluation import evaluate
from rlx.rollout.runner_group import RunnerGroup

BUILD = partial(build_policy, hidden=(4,), memory="lstm", memory_size=3, sequence_length=4, seed=2)
MODES = ["in_place", AutoresetMode.NEXT_STEP, AutoresetMode.SAME_STEP, AutoresetMode.DISABLED]


class Count(gymnasium.Env):
    """Observations count the steps; episodes last 3 or 5 steps and are truncated or terminated by turns."""

    observation_space = spaces.Box(-np.inf, np.inf, (1,), np.float32)
    action_space = spaces.Discrete(2)

    def __init__(self, fails_at=None):
        self.episode, self.total, self.fails_at = -1, 0, fails_at

    def reset(self, *, seed=None, options=None):
        self.episode, self.steps = self.episode + 1, 0
        return np.zeros(1, np.float32), {}

    def step(self, action):
        self.total += 1
        if self.total == self.fails_at:
            raise OSError("gone")
        self.steps += 1
        ended = self.steps == (3, 5)[self.episode % 2]
        terminated = ended and self.episode % 4 >= 2
        return np.full(1, self.steps, np.float32), 1.0, terminated, ended and not terminated, {}


def source(mode, make=Count):
    """Return two environments, in place or as a vector environment of this autoreset mode."""
    return make if mode == "in_place" else lambda: SyncVectorEnv([make, make], autoreset_mode=mode)


def replayed(policy, trajectory, state):
    """Return logp, value and next_value by steps through one environment's column [T], and the state after it.

    Written for one environment at a time, from the rows' flags: the memory is emptied where `first` says.
    """
    logp, value, next_value = [], [], []
    with torch.inference_mode():
        for t in range(len(trajectory["obs"])):
            if trajectory["first"][t]:
                state = torch.zeros_like(state)
            obs = torch.from_numpy(trajectory["obs"][t : t + 1])
            head, v, state = policy.step(obs, state)
            logp.append(policy.distribution.logp(head, torch.from_numpy(trajectory["action"][t : t + 1])).item())
            value.append(v.item())
            following = torch.full((1, 1), float(trajectory["obs"][t, 0] + 1))  # Count counts
            next_value.append(0.0 if trajectory["terminated"][t] else policy.step(following, state)[1].item())
    return np.array(logp), np.array(value), np.array(next_value), state


@pytest.mark.parametrize("fails_at", [None, 6], ids=["sound", "failing"])
@pytest.mark.parametrize("mode", MODES)
def test_every_value_is_that_of_a_memory_of_its_episode(mode, fails_at, make_runner):
    """Fragments of 7 steps as sequences of 4: episodes end within fragments, at their borders (in the 7th fragment,
    where they reset on the next step), and in every way.
    """
    number = iter(range(100))
    make = lambda: Count(fails_at if next(number) == 1 else None)  # noqa: E731 - the second environment, until rebuilt
    runner = make_runner(source(mode, make), 2, BUILD, on_env_error="rebuild")
    policy = BUILD(spaces.Box(-1, 1, (1,)), spaces.Discrete(2))
    states = [torch.zeros(1, policy.state_size) for _ in range(2)]
    ends = 0
    for _ in range(8):
        trajectory = runner.sample(7).trajectory
        assert trajectory.state.shape == (2, 2, 12)
        sequences = trajectory.tensors().rows("obs", "action", "mask", "logp", "value")
        with torch.inference_mode():
            new_logp, _, new_value = policy.evaluate(sequences)
        for new, old in ((new_logp, sequences.logp), (new_value, sequences.value)):
            torch.testing.assert_close(new[sequences.mask], old[sequences.mask], rtol=1e-5, atol=1e-5)
        for index in range(2):
            column = {name: array[:, index] for name, array in trajectory.arrays().items()}
            logp, value, next_value, states[index] = replayed(policy, column, states[index])
            mask = column["mask"]
            ends += (column["truncated"] & mask)[:-1].sum()
            for name, expected in (("logp", logp), ("value", value), ("next_value", next_value)):
                # A truncation by failure bootstraps from the last observation there was, which the next row holds.
                rows = mask if name != "next_value" else mask & ~np.append(~mask[1:] & column["truncated"][:-1], False)
                np.testing.assert_allclose(column[name][rows], expected[rows], rtol=1e-4, atol=1e-6, err_msg=name)
    assert ends > 3, "episodes were cut in the middle of fragments"


def test_a_failed_step_is_bootstrapped_with_the_memory_of_the_steps_before(make_runner):
    """Environment 0 fails at its third step: what its second step led to is the observation of the failed row."""
    number = iter(range(9))
    runner = make_runner(lambda: Count(3 if next(number) == 0 else None), 2, BUILD, on_env_error="rebuild")
    t = runner.sample(6).trajectory
    assert t.mask[:, 0].tolist() == [True, True, False, True, True, True] and t.truncated[1, 0]
    assert t.next_value[1, 0] == t.value[2, 0] != 0
    assert t.value[3, 0] == t.value[0, 0], "the new episode begins with nothing remembered"
    assert t.value[4, 0] == t.value[1, 0]


@pytest.mark.parametrize("vectorization", ["in_place", "native"])
def test_a_runner_with_a_memory_continues_bit_for_bit_in_the_middle_of_an_episode(vectorization, make_runner, tmp_path):
    """The native CartPole resets on the next step."""
    straight, first, resumed = (
        make_runner("CartPole-v1", 2, BUILD, seed=4, vectorization=vectorization) for _ in range(3)
    )
    expected = [straight.sample(15).trajectory for _ in range(4)]
    for _ in range(2):
        first.sample(15)
    state = save_checkpoint(tmp_path / "runner", first.get_state())
    first.sample(15)
    resumed.set_state(load_checkpoint(state))
    for trajectory in expected[2:]:
        for name, array in resumed.sample(15).trajectory.arrays().items():
            np.testing.assert_array_equal(array, getattr(trajectory, name), err_msg=name)
    assert expected[2].state[0].any(), "something was remembered across the border"


def test_an_interrupted_fragment_leaves_nothing_in_the_memory(make_runner):
    class Interrupted(Count):
        def step(self, action):
            if self.total == 5:
                self.total += 1
                raise KeyboardInterrupt
            return super().step(action)

    runner = make_runner(Interrupted, 1, BUILD)
    value = runner.sample(2).trajectory.value[0, 0]
    with pytest.raises(KeyboardInterrupt):
        runner.sample(4)
    trajectory = runner.sample(2).trajectory
    assert trajectory.first[0, 0] and trajectory.value[0, 0] == value


def test_a_runner_in_another_process_remembers_like_one_here():
    groups = []
    with actors.runtime("local") as runtime:
        for num_runners in (0, 1):
            group = RunnerGroup(
                Recall, BUILD, num_runners=num_runners, num_envs=2, runtime=lambda: runtime, kwargs={"delay": 2}, seed=1
            )
            runner = EnvRunner(Recall, 1, BUILD)
            group.publish(0, runner._parameters.numpy().copy())
            groups.append([group.sample(6).trajectory for _ in range(2)])
            group.close()
    for here, there in zip(*groups, strict=True):
        assert there.state.shape == (2, 2, 12) and there.state.any()
        for name, array in here.arrays().items():
            np.testing.assert_array_equal(array, there.arrays()[name], err_msg=name)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("deterministic", [True, False])
def test_evaluation_begins_every_episode_with_nothing_remembered(mode, deterministic):
    """Every episode's third step included, the policy has seen as many observations as its episode has had."""
    result = evaluate(source(mode, Echo), EchoPolicy(), num_episodes=7, num_envs=2, deterministic=deterministic)
    assert result.returns == [3.0] * 7


class Echo(Count):
    """Count with episodes of 3 steps; the reward is the action, which says whether the memory holds the step count."""

    def step(self, action):
        obs, _, _, _, info = super().step(0)
        self.episode = 0
        return obs, float(action), self.steps == 3, False, info


class EchoPolicy(type(BUILD(spaces.Box(-1, 1, (1,)), spaces.Discrete(2)))):
    """Remembers how many observations it has seen; answers 1 where that is what the observation counts."""

    def __init__(self):
        parts = BUILD(spaces.Box(-1, 1, (1,)), spaces.Discrete(2))
        super().__init__(
            *(parts.encoder, parts.action_head, parts.value_encoder, parts.value_head, parts.distribution),
            memory=parts.memory, value_memory=parts.value_memory, sequence_length=4,
        )  # fmt: skip

    def step(self, obs, state):
        is_right = (obs[:, 0] == state[:, 0]).float()
        head = 1e6 * torch.stack([1 - is_right, is_right], 1)
        return head, state[:, 0], state + 1
