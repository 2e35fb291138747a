"""Environments of nested spaces, from their border to a policy that acts; and how a checkpoint holds spaces."""

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from rlx.checkpoint import load_checkpoint, save_checkpoint
from rlx.errors import EnvError
from rlx.nets.observation import ObservationLayout
from rlx.nets.policy import build_policy
from rlx.rollout.evaluation import evaluate
from rlx.rollout.in_place import saved_rows
from rlx.rollout.spaces import layouts, space_from_state, space_to_state
from rlx.rollout.vector import make_envs

NUM_ENVS = 3


class Nested(gymnasium.Wrapper):
    """A Walk whose observation is a Dict with a Tuple in it, and whose action is a Tuple with a Dict in it."""

    observation_space = spaces.Dict(
        {
            "picture": spaces.Box(0, 255, (9, 9), np.uint8),
            "rest": spaces.Tuple([spaces.Box(-np.inf, np.inf, (2, 2), np.float64), spaces.Discrete(7)]),
            "word": spaces.Text(2, min_length=0, charset="ab"),
        }
    )
    action_space = spaces.Tuple(
        [spaces.Dict({"way": spaces.Discrete(3, start=1)}), spaces.Box(-1, 1, (2,)), spaces.MultiBinary(2)]
    )

    def see(self, obs):
        number, _, steps, _ = obs
        picture = np.full((9, 9), 10 * number + steps, np.uint8)
        return {
            "picture": picture,
            "rest": (obs.astype(np.float64).reshape(2, 2), int(steps)),
            "word": "ab"[: int(number)],
        }

    def reset(self, *, seed=None, options=None):
        obs, info = self.env.reset(seed=seed)
        return self.see(obs), info

    def step(self, action):
        assert self.action_space.contains(action)
        obs, reward, *rest = self.env.step(action[0]["way"])
        return self.see(obs), reward + float(action[1].sum()), *rest


@pytest.fixture(params=["in_place", *AutoresetMode], ids=lambda mode: getattr(mode, "name", mode))
def envs(request, numbered_walks):
    """The same three nested walks, in each way of stepping them."""
    factory = numbered_walks()

    def make():
        return Nested(factory())

    if request.param == "in_place":
        return make_envs(make, NUM_ENVS)
    return make_envs(lambda: SyncVectorEnv([make] * NUM_ENVS, autoreset_mode=request.param), NUM_ENVS)


def test_rows_of_every_autoreset_mode_are_the_observations_of_a_plain_loop(envs, walk):
    rng = np.random.default_rng(0)
    obs_B, is_reset_row = envs.reset(), np.zeros(NUM_ENVS, bool)
    own = [Nested(walk(number)) for number in range(NUM_ENVS)]
    expected = [env.reset()[0] for env in own]
    ends = 0

    def row(observation):
        return envs.layout.encode(observation, np.empty(envs.layout.shape, envs.layout.dtype))

    for _ in range(60):
        assert obs_B.dtype == np.uint8
        rows = np.concatenate([rng.integers(0, 3, (3, 1)), rng.integers(0, 2, (3, 2)), rng.normal(size=(3, 2))], -1)
        obs_B, reward_B, terminated_B, truncated_B, final_obs = envs.step(rows.astype(np.float32))
        actions = envs.actions.each(rows.astype(np.float32))
        for i, env in enumerate(own):
            if is_reset_row[i]:
                expected[i] = env.reset()[0]
            else:
                expected[i], reward, *flags, _ = env.step(actions[i])
                assert reward_B[i] == pytest.approx(reward) and [terminated_B[i], truncated_B[i]] == flags
                np.testing.assert_array_equal(final_obs.get(i, obs_B[i]), row(expected[i]))
                if any(flags) and not envs.resets_on_next_step:
                    expected[i], ends = env.reset()[0], ends + 1
            np.testing.assert_array_equal(obs_B[i], row(expected[i]))
        if envs.resets_on_next_step:
            is_reset_row = terminated_B | truncated_B
            ends += is_reset_row.sum()
    assert ends > 10


def test_only_the_numbers_of_a_box_are_normalised(numbered_walks, make_runner):
    factory = numbered_walks()
    runner = make_runner(lambda: Nested(factory()), 2, build_policy, normalize_obs=True)
    plain = make_runner(lambda: Nested(numbered_walks()()), 2, build_policy)
    state = {"obs": {"count": 9, "mean": np.float64([1, 0, 0, 0]), "m2": np.float64([9, 36, 9, 9])}, "returns": None}
    runner.set_weights(0, runner._parameters.numpy().copy(), state)
    sample, layout = runner.sample(3), runner._layout
    before, after = layout.floats(plain.sample(1).trajectory.obs)[0, 0], layout.floats(sample.trajectory.obs)[0, 0]
    np.testing.assert_allclose(after[:4], (before[:4] - [1, 0, 0, 0]) / [1, 2, 1, 1], atol=1e-6)
    np.testing.assert_array_equal(after[4:], before[4:])
    assert sample.obs_moments.count == 6 and sample.obs_moments.mean.shape == (4,)
    pixels = sample.trajectory.obs[:, 1, 4 * layout.num_floats :][:, :81]
    np.testing.assert_array_equal(pixels, 10 + np.arange(3)[:, None].repeat(81, 1))


class Stuck(gymnasium.Env):
    """After `steps` steps no action is legal; it goes on regardless, or ends there."""

    observation_space = spaces.Dict({"x": spaces.Box(-1, 1, (1,)), "action_mask": spaces.MultiBinary(3)})
    action_space = spaces.Discrete(3)

    def __init__(self, steps=4, ends=False):
        self.limit, self.ends = steps, ends

    def reset(self, *, seed=None, options=None):
        self.steps = 0
        return self.observe(), {}

    def step(self, action):
        assert self.steps == self.limit or action == 1
        self.steps += 1
        return self.observe(), 1.0, self.ends and self.steps == self.limit, False, {}

    def observe(self):
        return {"x": np.zeros(1, np.float32), "action_mask": np.int8([0, self.steps != self.limit, 0])}


def test_an_observation_without_a_legal_action_is_an_env_error_that_says_where(make_runner):
    runner = make_runner(Stuck, 2, build_policy, first_env_index=5)
    with pytest.raises(
        EnvError, match=r"environment 5: the action mask \[0. 0. 0.\] at step 4 of fragment 0 leaves no"
    ):
        runner.sample(8)


@pytest.mark.parametrize("mode", ["in_place", *AutoresetMode])
def test_where_an_episode_has_ended_nothing_has_to_be_legal(mode, make_runner):
    def source():
        return Stuck(ends=True)

    vector = source if mode == "in_place" else lambda: SyncVectorEnv([source] * 2, autoreset_mode=mode)
    trajectory = make_runner(vector, 2, build_policy).sample(12).trajectory
    assert (trajectory.action[trajectory.mask] == 1).all() and trajectory.terminated.sum() >= 4
    assert np.isfinite(trajectory.logp).all()


BITS, TWO = spaces.MultiBinary(2), spaces.Discrete(2)


@pytest.mark.parametrize(
    ("mask", "action"),
    [
        (spaces.Box(0, 1, (2, 2), np.int8), spaces.MultiDiscrete([2, 2])),
        (spaces.MultiBinary(4), spaces.MultiBinary(2)),
        (spaces.MultiDiscrete([2, 2, 2, 2]), spaces.Tuple([TWO, spaces.Box(-1, 1, (1,)), TWO])),
        (spaces.Dict({"b": BITS, "a": BITS}), spaces.Dict({"b": TWO, "a": TWO})),
        (spaces.Tuple([BITS, spaces.Tuple([BITS])]), spaces.Tuple([TWO, spaces.Tuple([TWO])])),
    ],
)
def test_a_mask_is_one_array_or_has_the_action_s_structure(mask, action):
    space = spaces.Dict({"x": spaces.Box(-1, 1, (1,)), "action_mask": mask})
    layout, actions = layouts(space, action, "it")
    assert layout.mask_size == sum(actions.sizes) == 4
    sample = space.sample()
    row = layout.encode(sample, np.empty(layout.shape, layout.dtype))
    entries = np.concatenate([np.ravel(part) for part in flat(sample["action_mask"])])
    np.testing.assert_array_equal(layout.mask(row), entries != 0)


def flat(tree):
    parts = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, tuple) else None
    return [tree] if parts is None else [leaf for part in parts for leaf in flat(part)]


def test_evaluation_obeys_the_mask():
    policy = build_policy(Stuck.observation_space, Stuck.action_space)
    for deterministic in (True, False):
        result = evaluate(lambda: Stuck(ends=True), policy, num_episodes=5, deterministic=deterministic)
        assert result.returns == [4.0] * 5


@pytest.mark.parametrize(
    "space",
    [
        *(Nested.observation_space, Nested.action_space, Stuck.observation_space),
        spaces.Dict([("z", spaces.Discrete(2)), ("a", spaces.Box(np.float32([-1, -np.inf]), np.float32([3, np.inf])))]),
        spaces.MultiDiscrete(np.array([[2, 3], [4, 5]]), np.int16, start=np.array([[1, 0], [0, -1]])),
        spaces.MultiBinary([2, 3]),
        spaces.Text(5, charset=frozenset("xyz")),
        spaces.OneOf([spaces.Discrete(2), spaces.Box(-1, 1, (2,))]),
    ],
)
def test_a_checkpoint_gives_every_space_back_with_its_layout(space, tmp_path):
    saved = save_checkpoint(tmp_path / "iter_1", {"space": space_to_state(space)})
    restored = space_from_state(load_checkpoint(saved)["space"])
    assert restored == space
    observation, both = space.sample(), map(ObservationLayout, (space, restored))
    rows = [layout.encode(observation, np.zeros(layout.shape, layout.dtype)) for layout in both]
    np.testing.assert_array_equal(*rows)


def test_observations_that_an_older_checkpoint_holds_raw_become_rows():
    box, _ = layouts(spaces.Box(-1, 1, (2,), np.float64), spaces.Discrete(2), "it")
    np.testing.assert_array_equal(saved_rows(np.float64([[0.1, 2]]), box), np.float32([[0.1, 2]]))
    discrete, _ = layouts(spaces.Discrete(3, start=1), spaces.Discrete(2), "it")
    np.testing.assert_array_equal(saved_rows(np.array([3, 1]), discrete), [[0, 0, 1], [1, 0, 0]])
