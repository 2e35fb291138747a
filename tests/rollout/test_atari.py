"""Atari games: native and scalar ones are equal, and what learning sees is apart from what is reported."""

import numpy as np
import pytest
import torch
from gymnasium.vector import VectorEnv

from rlx.algorithms.ppo import PPOConfig
from rlx.errors import EnvError
from rlx.nets.acting import acting_for
from rlx.nets.policy import build_policy
from rlx.rollout.atari import AtariEnv, is_atari
from rlx.rollout.env_runner import EnvRunner
from rlx.rollout.evaluation import evaluate
from rlx.rollout.fragment import Fragment
from rlx.rollout.in_place import episode_seed
from rlx.rollout.vector import make_envs
from rlx.rollout.vector_env import VectorEnvAdapter
from rlx.settings import AtariSection

pytest.importorskip("ale_py")


@pytest.fixture(autouse=True)
def one_thread():
    """On a machine that is busy otherwise, two threads that wait for each other take ten times as long."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def protocol(**changes):
    return AtariSection(**changes).model_dump()


def test_native_games_are_the_scalar_ones_frame_by_frame_beyond_the_end_of_a_game():
    """Environment i is seeded with the first seed + i; a later game continues the emulator's own generator."""
    envs = make_envs("ALE/Breakout-v5", 2, atari=protocol(), seed=3, counts_lives=True)
    assert isinstance(envs, VectorEnvAdapter) and not envs.resets_on_next_step
    twins = [AtariEnv("ALE/Breakout-v5", protocol()) for _ in range(2)]
    obs_B = envs.reset()
    for i, twin in enumerate(twins):
        np.testing.assert_array_equal(twin.reset(seed=episode_seed(3, 0, 0) + i)[0], obs_B[i])
    rng, games = np.random.default_rng(0), [0, 0]
    for _ in range(500):
        action_B = rng.integers(4, size=2)
        obs_B, reward_B, terminated_B, truncated_B, final_obs = envs.step(action_B)
        for i, twin in enumerate(twins):
            obs, reward, terminated, truncated, info = twin.step(action_B[i])
            assert (reward_B[i], terminated_B[i], truncated_B[i]) == (reward, terminated, truncated)
            np.testing.assert_array_equal(final_obs.get(i, obs_B[i]), obs)
            if terminated:
                games[i] += 1
                obs, info = twin.reset()
                np.testing.assert_array_equal(obs_B[i], obs)
            assert envs.lives_B[i] == info["lives"]
    assert min(games) >= 1


def test_a_game_leaves_the_metadata_of_other_vector_environments_alone():
    """ale-py writes its autoreset mode into the base class, whose dict every class without one of its own reads."""
    make_envs("ALE/Pong-v5", 1, atari=protocol())
    assert "autoreset_mode" not in VectorEnv.metadata


@pytest.mark.parametrize("vectorization", ["native", pytest.param("in_place", marks=pytest.mark.slow)])
def test_lost_lives_and_cut_rewards_are_learned_from_and_whole_games_are_reported(vectorization):
    """Space Invaders gives 5 to 30 points a hit and three lives. The twin plays the runner's actions once more."""
    atari = protocol(episodic_life=True, sticky_actions=0.0)
    runner = EnvRunner("ALE/SpaceInvaders-v5", 1, build_policy, atari=atari, vectorization=vectorization, seed=5)
    runner.set_weights(0, runner._parameters.numpy().copy())
    samples = [runner.sample(400), runner.sample(300)]
    twin = AtariEnv("ALE/SpaceInvaders-v5", atari)
    _, info = twin.reset(seed=episode_seed(5, 0, 0))
    score, length, lives, episodes, seen = 0.0, 0, info["lives"], [], []
    for t in (row for sample in samples for row in rows(sample.trajectory)):
        _, reward, terminated, truncated, info = twin.step(t["action"])
        is_lost = 0 < info["lives"] < lives
        assert t["reward"] == min(reward, 1.0) and t["mask"]
        assert t["terminated"] == (terminated or is_lost) and t["truncated"] == truncated
        if t["terminated"]:
            assert t["next_value"] == 0.0
        seen.append((reward > 1, is_lost, terminated))
        score, length, lives = score + reward, length + 1, info["lives"]
        if terminated or truncated:
            episodes.append((score, length))
            _, info = twin.reset(seed=episode_seed(5, 0, len(episodes)) if vectorization == "in_place" else None)
            score, length, lives = 0.0, 0, info["lives"]
    assert [episode for sample in samples for episode in sample.episodes] == episodes
    assert np.all(np.sum(seen, axis=0) >= [2, 2, 1])


def rows(trajectory):
    columns = {name: array[:, 0] for name, array in vars(trajectory).items() if array is not None}
    return ({name: column[t] for name, column in columns.items()} for t in range(len(columns["reward"])))


def test_a_life_is_lost_where_the_game_goes_on_with_another_one():
    """By hand, one game: 3 lives, one lost, the last ones gone without the game ending at once, then a new game."""
    envs = make_envs("ALE/Pong-v5", 1, atari=protocol(), counts_lives=True)
    fragment = Fragment.empty(6, envs, False)
    fragment.lives[:, 0] = [3, 3, 2, 2, 0, 3, 2]
    for array in (fragment.terminated, fragment.truncated):
        array[:] = False
    fragment.terminated[4] = True
    assert fragment.life_lost()[:, 0].tolist() == [False, True, False, False, False, True]


@pytest.mark.slow
def test_evaluation_plays_whole_games_and_counts_every_point():
    atari = protocol(episodic_life=True)
    probe = AtariEnv("ALE/SpaceInvaders-v5", atari)
    policy = build_policy(probe.observation_space, probe.action_space)
    result = evaluate("ALE/SpaceInvaders-v5", policy, num_episodes=1, seed=4, atari=atari)
    obs, info = probe.reset(seed=4)
    score, length, lives, ended = 0.0, 0, {info["lives"]}, False
    acting = acting_for(policy)
    while not ended:
        obs, reward, terminated, truncated, info = probe.step(acting.best(obs[None])[0])
        score, length, ended = score + reward, length + 1, terminated or truncated
        lives.add(info["lives"])
    assert (result.returns, result.lengths) == ([score], [length])
    assert {1, 2, 3} <= lives


def test_settings_reach_the_emulator():
    atari = protocol(frame_skip=3, stack=2, size=50, full_action_space=True, max_frames=30, sticky_actions=0.0)
    env = AtariEnv("ALE/Pong-v5", atari, render_mode="rgb_array")
    assert env.observation_space.shape == (2, 50, 50) and env.action_space.n == 18
    env.reset(seed=0)
    ends = [env.step(0)[2:4] for _ in range(10)]
    assert ends == [(False, False)] * 9 + [(False, True)]
    assert env.render().shape == (200, 200, 3)
    sticky, other = (AtariEnv("ALE/Pong-v5", protocol(sticky_actions=share)) for share in (0.9, 0.0))
    for game in (sticky, other):
        game.reset(seed=0)
    assert any(not np.array_equal(sticky.step(2 + t % 2)[0], other.step(2 + t % 2)[0]) for t in range(30))


def test_only_ids_of_the_ale_namespace_are_atari():
    assert is_atari("ALE/Pong-v5") and is_atari("ale_py:ALE/Pong-v5")
    assert not is_atari("CartPole-v1") and not is_atari(AtariEnv)


def test_what_the_emulator_does_not_know_is_an_env_error():
    with pytest.raises(EnvError, match=r"ALE/NoSuchGame-v5 cannot be made"):
        make_envs("ALE/NoSuchGame-v5", 1, atari=protocol())
    with pytest.raises(EnvError, match=r"ALE/Pong-v5 cannot be made: .*difficulty"):
        make_envs("ALE/Pong-v5", 1, atari=protocol(), kwargs={"difficulty": 1})


def test_frames_are_counted_apart_from_steps_and_in_atari_runs_only():
    config = PPOConfig().env_runners(num_envs_per_env_runner=2, rollout_fragment_length=4).training(minibatch_size=8)
    with config.copy().environment("ALE/Pong-v5").atari(frame_skip=5).build() as algorithm:
        metrics = [algorithm.train() for _ in range(2)]
    assert [(row["env_steps"], row["frames"]) for row in metrics] == [(8, 40), (16, 80)]
    with config.copy().environment("CartPole-v1").build() as algorithm:
        assert "frames" not in algorithm.train()
