import gymnasium
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from rlx.errors import EnvError
from rlx.rollout.in_place import InPlaceEnvs
from rlx.rollout.vector import VectorEnvAdapter, make_envs

NUM_ENVS = 3
MODES = ["in_place", *AutoresetMode]


@pytest.fixture(params=MODES, ids=lambda mode: getattr(mode, "name", mode))
def source(request, numbered_walks):
    """What to give to make_envs for the same three walks, in each way of stepping them."""
    factory = numbered_walks()
    if request.param == "in_place":
        return factory
    return lambda: SyncVectorEnv([factory] * NUM_ENVS, autoreset_mode=request.param)


def scripted_action(obs_B):
    return np.rint(obs_B.sum(-1) * 4).astype(np.int64) % 3


def own_loop(walk, number, count):
    """The same transitions from the plainest loop: (obs, action, reward, terminated, truncated, next obs)."""
    env = walk(number)
    transitions, (obs, _) = [], env.reset()
    for _ in range(count):
        action = int(scripted_action(obs))
        next_obs, reward, terminated, truncated, _ = env.step(1 + action)
        transitions.append((obs, action, reward, terminated, truncated, next_obs))
        obs = env.reset()[0] if terminated or truncated else next_obs
    return transitions


def assert_same(actual, expected):
    assert len(actual) == len(expected) > 60
    for row, reference in zip(actual, expected, strict=True):
        for value, right in zip(row, reference, strict=True):
            np.testing.assert_array_equal(np.float32(value), np.float32(right))


def test_every_autoreset_mode_gives_the_transitions_of_a_plain_loop(source, walk):
    envs = make_envs(source, NUM_ENVS)
    obs_B = envs.reset()
    seen = [[] for _ in range(NUM_ENVS)]
    is_reset_row = np.zeros(NUM_ENVS, bool)
    for _ in range(100):
        before_B, action_B = obs_B.copy(), scripted_action(obs_B)
        obs_B, reward_B, terminated_B, truncated_B, final_obs = envs.step(action_B)
        for i in range(NUM_ENVS):
            if not is_reset_row[i]:
                outcome = (reward_B[i], terminated_B[i], truncated_B[i], np.array(final_obs.get(i, obs_B[i])))
                seen[i].append((before_B[i], action_B[i], *outcome))
        if envs.resets_on_next_step:
            is_reset_row = terminated_B | truncated_B
    for number, transitions in enumerate(seen):
        expected = own_loop(walk, number, len(transitions))
        assert any(row[3] for row in expected) and any(row[4] for row in expected)
        assert_same(transitions, expected)


def test_fragments_of_every_mode_join_to_the_transitions_of_a_plain_loop(source, walk, make_runner):
    """Fragments of 5 and 4 steps put the reset row of NEXT_STEP on either side of the border."""
    runner = make_runner(source, NUM_ENVS)
    samples = [runner.sample(num_steps) for num_steps in [5, 4] * 10]
    weight = np.float32([1, 0.1, 0.01, 0.001])
    for number in range(NUM_ENVS):
        columns = []
        for trajectory in (sample.trajectory for sample in samples):
            fields = ("obs", "action", "reward", "terminated", "truncated", "next_value")
            mask = trajectory.mask[:, number]
            columns += zip(*(getattr(trajectory, name)[:, number][mask] for name in fields), strict=True)
        expected = own_loop(walk, number, len(columns))
        assert_same([row[:5] for row in columns], [row[:5] for row in expected])
        next_values = [0.0 if terminated else next_obs @ weight for *_, terminated, _, next_obs in expected]
        np.testing.assert_allclose([row[5] for row in columns], next_values, rtol=1e-5, atol=1e-6)


def test_episodes_of_every_mode_have_the_plain_loops_returns_and_lengths(source, walk, make_runner):
    runner = make_runner(source, NUM_ENVS)
    episodes = [episode for _ in range(12) for episode in runner.sample(5).episodes]
    expected = []
    for number in range(NUM_ENVS):
        total, length = 0.0, 0
        for _, _, reward, terminated, truncated, _ in own_loop(walk, number, 60):
            total, length = total + reward, length + 1
            if terminated or truncated:
                expected.append((round(total, 6), length))
                total, length = 0.0, 0
    found = {(round(total, 6), length) for total, length in episodes}
    assert len(episodes) == len(found) > 20
    assert found <= set(expected)  # NEXT_STEP spends steps on resets, so it ends fewer


def test_native_cartpole_gives_the_transitions_of_the_scalar_one():
    """Both start an episode in the same state and are pushed to the right until the pole falls."""
    native = make_envs("CartPole-v1", 2, vectorization="native")
    scalar = make_envs("CartPole-v1", 2, vectorization="in_place")
    start_B = native.reset()
    scalar.reset()
    for env, state in zip(scalar.envs, native.env.state.T, strict=True):
        env.unwrapped.state = state.copy()
    right_B, lengths = np.ones(2, np.int64), [0, 0]
    for t in range(12):
        obs_B, reward_B, terminated_B, truncated_B, _ = native.step(right_B)
        twin_obs_B, _, twin_terminated_B, _, twin_finals = scalar.step(right_B)
        for i in (j for j in range(2) if not lengths[j]):
            np.testing.assert_allclose(obs_B[i], twin_finals.get(i, twin_obs_B[i]), rtol=1e-5, atol=1e-7)
            assert (reward_B[i], terminated_B[i], truncated_B[i]) == (1.0, twin_terminated_B[i], False)
            lengths[i] = t + 1 if terminated_B[i] else 0
    assert all(8 <= length <= 11 for length in lengths) and (abs(start_B) <= 0.05).all()


def test_auto_prefers_the_native_vector_environment_and_falls_back_with_a_log_line(count, caplog):
    assert isinstance(make_envs("CartPole-v1", 2), VectorEnvAdapter)
    assert isinstance(make_envs("CartPole-v1", 2, vectorization="in_place"), InPlaceEnvs)
    assert isinstance(make_envs("Pendulum-v1", 2), InPlaceEnvs)
    with pytest.raises(EnvError, match="no native vector environment"):
        make_envs("Pendulum-v1", 2, vectorization="native")
    gymnasium.register("rlx-test/Count-v0", entry_point=count, vector_entry_point="no_such_package:Env")
    try:
        assert isinstance(make_envs("rlx-test/Count-v0", 2), InPlaceEnvs)
    finally:
        del gymnasium.registry["rlx-test/Count-v0"]
    assert "No module named 'no_such_package'" in caplog.text


def test_environments_are_made_from_ids_import_paths_classes_factories_and_vector_environments(count):
    path = "gymnasium.envs.classic_control.cartpole"
    assert make_envs(f"{path}:CartPoleEnv", 2).num_envs == 2
    assert isinstance(make_envs(f"{path}:CartPoleVectorEnv", 2), VectorEnvAdapter)
    assert isinstance(make_envs("gymnasium.envs:CartPole-v1", 2), VectorEnvAdapter)
    assert make_envs(count, 2, kwargs={"length": 5}).envs[1].length == 5
    vector = SyncVectorEnv([count] * 2)
    assert make_envs(vector, 2).env is vector
    with pytest.raises(EnvError, match="has 2 environments and num_envs=3"):
        make_envs(vector, 3)
    with pytest.raises(EnvError, match="cannot import 'no_such_package'"):
        make_envs("no_such_package.module:Env", 2)
    with pytest.raises(EnvError, match="NoSuchEnv"):
        make_envs("NoSuchEnv-v0", 2)
    one = count()
    with pytest.raises(EnvError, match="the same environment twice"):
        make_envs(lambda: one, 2)
    with pytest.raises(EnvError, match="made a int"):
        make_envs(lambda: 3, 2)
    with pytest.raises(EnvError, match="3 cannot be used as an environment"):
        make_envs(3, 2)


def test_a_vector_environment_without_autoreset_mode_says_what_to_set(count):
    vector = SyncVectorEnv([count] * 2)
    del vector.metadata["autoreset_mode"]
    with pytest.raises(EnvError, match=r"set metadata\['autoreset_mode'\].*NEXT_STEP, SAME_STEP or DISABLED"):
        make_envs(vector, 2)


def test_episodes_are_seeded_by_run_seed_environment_and_episode():
    """Environment 1 of a runner that begins at 0 is environment 0 of one that begins at 1."""
    first, second = (make_envs("Pendulum-v1", 2, seed=5, first_env_index=index) for index in (0, 1))
    for _ in range(3):
        a, b = first.reset().copy(), second.reset().copy()
        np.testing.assert_array_equal(a[1], b[0])
        assert not np.array_equal(a[0], b[0])
    assert not np.array_equal(
        make_envs("Pendulum-v1", 1, seed=6).reset()[0], make_envs("Pendulum-v1", 1, seed=5).reset()[0]
    )


class Recorder(gymnasium.Env):
    """Keeps the actions it was given."""

    def __init__(self, observation_space, action_space, obs):
        self.observation_space, self.action_space, self.obs, self.actions = observation_space, action_space, obs, []

    def reset(self, *, seed=None, options=None):
        return self.obs, {}

    def step(self, action):
        self.actions.append(action)
        return self.obs, 0.0, False, False, {}


def test_box_actions_are_clipped_towards_the_environment_only(make_runner):
    space = spaces.Box(np.float64([-1, -2]), np.float64([1, 0.5]), dtype=np.float64)
    env = Recorder(spaces.Box(-9, 9, (1,), np.float32), space, np.array([2], np.float32))
    trajectory = make_runner(lambda: env, 1).sample(2).trajectory
    np.testing.assert_array_equal(trajectory.action, np.full((2, 1, 2), 8, np.float32))
    np.testing.assert_array_equal(env.actions, [[1, 0.5], [1, 0.5]])
    assert env.actions[0].dtype == np.float64


def test_unbounded_box_actions_keep_their_value_and_take_the_environments_shape(make_runner):
    space = spaces.Box(-np.inf, np.inf, (2, 2), np.float32)
    env = Recorder(spaces.Box(-9, 9, (1,), np.float32), space, np.array([2], np.float32))
    envs = make_envs(lambda: env, 1)
    envs.reset()
    envs.step(np.array([[10, 20, 30, 40]], np.float32))
    np.testing.assert_array_equal(env.actions, [[[10, 20], [30, 40]]])


def test_discrete_observations_become_one_hot_from_their_start(make_runner):
    env = Recorder(spaces.Discrete(4, start=2), spaces.Discrete(2, start=5), 3)
    trajectory = make_runner(lambda: env, 1).sample(2).trajectory
    np.testing.assert_array_equal(trajectory.obs, [[[0, 1, 0, 0]], [[0, 1, 0, 0]]])
    assert trajectory.obs.dtype == np.float32
    assert env.actions == [5, 5]
    np.testing.assert_array_equal(trajectory.action, [[0], [0]])


VECTOR, SEQUENCE = spaces.Box(0, 1, (2,)), spaces.Sequence(spaces.Discrete(2))
BITS, TWO = spaces.MultiBinary(2), spaces.Discrete(2)
GRAPH = spaces.Graph(spaces.Box(0, 1, (2,)), None)


def masked(mask):
    return spaces.Dict({"a": VECTOR, "action_mask": mask})


@pytest.mark.parametrize(
    ("observation_space", "action_space", "sentence"),
    [
        (spaces.Dict({"a": spaces.Tuple([SEQUENCE])}), spaces.Discrete(2), "at 'a.0', holds Sequence"),
        (GRAPH, spaces.Discrete(2), "the observation space holds Graph, whose values have no fixed size; wrap"),
        (spaces.OneOf([VECTOR, SEQUENCE]), spaces.Discrete(2), "holds OneOf, whose values have no fixed size"),
        (spaces.Dict({}), spaces.Discrete(2), "holds no number that a policy could look at"),
        (VECTOR, spaces.Dict({"a": spaces.Text(3)}), "the action space, at 'a', is Text, which has no fixed number"),
        (VECTOR, SEQUENCE, "the action space is Sequence, which has no fixed number of choices; wrap"),
        (VECTOR, spaces.Box(0, 5000, (2,), np.int64), "a Box of integers with 5001 values, .* at most 1024; narrow"),
        (VECTOR, spaces.Tuple([]), "leaves nothing to choose"),
        (masked(spaces.Tuple([TWO, TWO])), spaces.MultiBinary(2), "'action_mask.0' is Discrete\\(2\\); masks are of"),
        (masked(spaces.MultiBinary(3)), spaces.Discrete(2), "'action_mask' has 3 entries .* has 2 choices, 2; give"),
        (
            masked(spaces.Tuple([BITS, BITS])),
            spaces.Discrete(4),
            "has 2 at '0' \\+ 2 at '1' entries .* own structure and",
        ),
        (masked(spaces.Dict([("b", BITS), ("a", BITS)])), spaces.Dict({"a": TWO, "b": TWO}), "2 at 'b' .* and order"),
        (masked(spaces.MultiBinary(3)), spaces.MultiDiscrete([2, 3]), "has 5 choices, 2 \\+ 3; give one entry"),
        (masked(spaces.MultiBinary(3)), spaces.Box(-1, 1, (3,)), "has none; give one entry for each choice"),
    ],
)
def test_spaces_that_cannot_be_are_named_in_one_sentence_with_the_cure(observation_space, action_space, sentence):
    with pytest.raises(EnvError, match=sentence) as caught:
        make_envs(lambda: Recorder(observation_space, action_space, None), 1)
    assert "<lambda>" in str(caught.value) and "\n" not in str(caught.value)
