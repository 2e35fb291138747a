"""What hooks tell of episodes: the right info with the right episode, whatever steps the environments."""

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, SyncVectorEnv


class Numbered(gymnasium.Env):
    """Episodes of 2 steps, numbered from 0; the last info is rich, all others are empty. May break once."""

    observation_space = spaces.Box(-np.inf, np.inf, (1,), np.float32)
    action_space = spaces.Discrete(2)

    def __init__(self, breaks=None, quiet=False):
        self.episode, self.total, self.breaks, self.quiet = -1, 0, breaks, quiet

    def reset(self, *, seed=None, options=None):
        self.episode, self.steps = self.episode + 1, 0
        return np.zeros(1, np.float32), {"begins": True}

    def step(self, action):
        self.steps, self.total = self.steps + 1, self.total + 1
        if self.total == self.breaks:
            raise RuntimeError("broken")
        ended = self.steps == 2
        info = {
            "number": self.episode,
            "nested": {"half": self.episode / 2, "array": np.array([self.episode, 7])},
            "text": f"episode {self.episode}",
        }
        return np.zeros(1, np.float32), 1.0, ended, False, info if ended and not self.quiet else {}


class Listener:
    def __init__(self):
        self.episodes = []

    def on_env_created(self, env, index):
        pass

    def on_episode_end(self, episode):
        self.episodes.append(episode)
        return {"number": episode.info.get("number", -1)}


def listening(make_runner, env, num_envs, **options):
    listener = Listener()
    return make_runner(env, num_envs, callbacks=lambda: [listener], **options), listener


def vector(mode, **kwargs):
    return lambda num_envs: SyncVectorEnv([lambda: Numbered(**kwargs)] * num_envs, autoreset_mode=mode)


@pytest.mark.parametrize(
    "env, steps",
    [(Numbered, 5), *((vector(mode), 8 if mode is AutoresetMode.NEXT_STEP else 5) for mode in AutoresetMode)],
)
def test_an_episode_comes_with_its_last_info_whatever_steps_it(make_runner, env, steps):
    runner, listener = listening(make_runner, env, 2, first_env_index=4)
    metrics = runner.sample(steps).episode_metrics
    numbers = [0, 0, 1, 1] if steps == 5 else [0, 0, 1, 1, 2, 2]  # a reset takes a step of its own in NEXT_STEP
    assert metrics == {"number": [float(number) for number in numbers]}
    assert [episode.env_index for episode in listener.episodes] == [4, 5] * (len(numbers) // 2)
    for episode, number in zip(listener.episodes, numbers, strict=True):
        assert (episode.return_, episode.length, episode.terminated) == (2.0, 2, True)
        assert {**episode.info, "nested": None} == {"number": number, "nested": None, "text": f"episode {number}"}
        assert episode.info["nested"]["half"] == number / 2
        assert episode.info["nested"]["array"].tolist() == [number, 7]


@pytest.mark.parametrize("mode", AutoresetMode)
def test_an_environment_without_infos_has_empty_ones(make_runner, mode):
    runner, listener = listening(make_runner, vector(mode, quiet=True), 2)
    runner.sample(5)
    assert listener.episodes and all(episode.info == {} for episode in listener.episodes)


def test_what_a_cut_fragment_has_seen_is_forgotten(make_runner):
    runner, listener = listening(make_runner, lambda: Numbered(breaks=4), 1)
    with pytest.raises(RuntimeError, match="broken"):
        runner.sample(6)  # episode 0 ended in it, and nobody was told
    runner.sample(4)
    assert [episode.info["number"] for episode in listener.episodes] == [2, 3]
