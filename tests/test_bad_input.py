"""Everything a user can get wrong ends in one sentence with the cure, an exit code that is not 0, and no traceback."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import rlx
from rlx.algorithms.ppo import PPOConfig
from rlx.checkpoint import list_checkpoints, load_checkpoint
from rlx.cli import main
from rlx.errors import ConfigError, EnvError

CONFIG = """\
algorithm: ppo
environment: {id: CartPole-v1}
env_runners: {num_envs_per_env_runner: 4, rollout_fragment_length: 32}
training: {epochs: 1, minibatch_size: 64}
checkpointing: {interval: 1}
reporting: {progress: none}
stop: {iterations: 3}
"""

ENVS = """\
import gymnasium
import numpy as np
from gymnasium import spaces


class Good(gymnasium.Env):
    observation_space = spaces.Box(-1, 1, (2,), np.float32)
    action_space = spaces.Discrete(2)
    steps = 0

    def reset(self, *, seed=None, options=None):
        return np.zeros(2, np.float32), {}

    def step(self, action):
        self.steps += 1
        return np.zeros(2, np.float32), 0.0, False, self.steps % 7 == 0, {}


class ResetWithoutInfo(Good):
    def reset(self, *, seed=None, options=None):
        return np.zeros(2, np.float32)


class ResetWithoutSeed(Good):
    def reset(self):
        return np.zeros(2, np.float32), {}


class StepOfFour(Good):
    def step(self, action):
        return np.zeros(2, np.float32), 0.0, False, {}


class WrongShape(Good):
    def step(self, action):
        self.steps += 1
        return np.zeros(2 if self.steps < 10 else 3, np.float32), 0.0, False, False, {}


class NoDict(Good):
    observation_space = spaces.Dict(a=spaces.Box(-1, 1, (2,)))


class SequenceSpace(Good):
    observation_space = spaces.Sequence(spaces.Discrete(2))


class SequenceAction(Good):
    action_space = spaces.Sequence(spaces.Discrete(2))


class NoSpaces(gymnasium.Env):
    pass


class NotAnEnv:
    pass


class NoReward(Good):
    def step(self, action):
        return np.zeros(2, np.float32), None, False, False, {}


class TextForBool(Good):
    def step(self, action):
        return np.zeros(2, np.float32), 0.0, "no", False, {}


class NanObs(Good):
    def step(self, action):
        obs, *rest = super().step(action)
        return obs + (np.float32("nan") if self.steps == 10 else 0), *rest


class NanReward(Good):
    def step(self, action):
        obs, _, *rest = super().step(action)
        return obs, float("nan") if self.steps == 10 else 0.0, *rest


class HugeReward(Good):
    def step(self, action):
        obs, _, *rest = super().step(action)
        return obs, 1e30, *rest


class Raises(Good):
    def step(self, action):
        if self.steps == 50:
            raise ZeroDivisionError("a bug in the environment")
        return super().step(action)


class Silent(gymnasium.vector.VectorEnv):
    '''Does not say how it resets.'''

    def __init__(self, num_envs):
        self.num_envs = num_envs
        self.single_observation_space, self.single_action_space = Good.observation_space, Good.action_space


ONE = Good()


def always_the_same():
    return ONE


a_number = 3
"""

MODULE = "envs_of_test_bad_input"


@pytest.fixture(autouse=True)
def at_home(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    Path("tiny.yaml").write_text(CONFIG)
    Path(f"{MODULE}.py").write_text(ENVS)
    yield
    sys.modules.pop(MODULE, None)


def fails_with(capsys, arguments: list[str], code: int, sentence: str) -> str:
    """Run the command line; check its exit code and sentence; return what it said."""
    __tracebackhide__ = True
    assert main(arguments) == code
    said = capsys.readouterr()
    assert sentence in said.err, said.err
    assert "rlx: error: " in said.err and "Traceback" not in said.err
    assert len(said.err) < 3000
    return said.err


# Settings: exit code 2, before anything is made ------------------------------------------------------------------

SETTINGS = {
    "misspelt": ("training.clp_range=1", "training.clp_range is not a setting of PPO (--set). Did you mean training."),
    "misspelt section": ("trainin.lr=1", "trainin is not a section. Did you mean training?"),
    "in the wrong section": ("environment.gamma=1", "Did you mean training.gamma?"),
    "mistyped": ("training.lr=fast", 'training.lr is "fast" (--set); it must be a number >= 0'),
    "negative": ("training.lr=-1", "training.lr is -1 (--set); it must be a number >= 0"),
    "fraction": ("training.epochs=2.5", "training.epochs is 2.5 (--set); it must be an integer > 0"),
    "not a number": ("training.gamma=.nan", "training.gamma is .nan (--set); it must be a number"),
    "infinite": ("training.lr=.inf", "training.lr is .inf (--set); it must be a number"),
    "truth for a count": ("env_runners.num_env_runners=true", "env_runners.num_env_runners is true (--set)"),
    "number for truth": ("training.normalize_advantage=1", "is 1 (--set); it must be true or false"),
    "empty layer": ("model.hidden=[0]", "model.hidden is [0] (--set); it must be a list with each item an integer"),
    "half a schedule": ("training.lr={start: 1}", "must be a number >= 0 or {start, end, env_steps}"),
    "section as number": ("training=3", "training is 3 (--set); it must be a mapping of its settings"),
    "no assignment": ("nonsense", "--set nonsense is no assignment; write --set KEY=VALUE"),
    "no key": ("=3", "--set =3 is no assignment"),
    "no YAML": ("training.epochs=[[", "--set training.epochs: this is not YAML"),
    "dunder": ("__class__.x=1", "__class__ is not a section."),
    "minibatch too large": (
        "training.minibatch_size=1000",
        "training.minibatch_size=1000 is larger than the batch of 128 = 1 env runners x 4 envs x 32 steps; "
        "set it to 128 or less.",
    ),
    "more learners than samples": (
        "learners.num_learners=65",
        "learners.num_learners=65 leaves some learners without a sample of a minibatch of 64; set it to 64 or less.",
    ),
    "no limit": ("stop.iterations=null", "stop sets no limit, so the run would never end; set at least one of stop."),
    "unknown engine": (
        "runtime.engine=rey",
        'runtime.engine is "rey" (--set); it must be one of local, inline, cluster, ray',
    ),
    "unknown algorithm": ("algorithm=ppoo", 'algorithm is "ppoo" (--set); the shipped ones are'),
    "algorithm file missing": ("algorithm=./nope.py", 'algorithm is "./nope.py" (--set); there is no file'),
    "algorithm module missing": ("algorithm=no.such", 'algorithm is "no.such" (--set); there is no module no'),
    "module without algorithm": ("algorithm=json.decoder", "must define exactly one AlgorithmConfig subclass"),
    "unknown env": ("environment.id=CartPol-v1", "gymnasium has no such environment. Did you mean CartPole-v1"),
    "old env version": ("environment.id=HalfCheetah-v2", "Did you mean HalfCheetah-v5 or HalfCheetah-v4?"),
    "env module missing": ("environment.id=no_module:Env", "there is no module no_module on the Python path"),
    "env class missing": (f"environment.id={MODULE}:Goood", f"{MODULE} has no Goood. Did you mean Good?"),
    "env not callable": (f"environment.id={MODULE}:a_number", "of type int, and must be a class or a factory"),
    "env not set": ("environment.id=null", "environment.id is not set; give a gymnasium id such as CartPole-v1"),
    "env not installed": ("environment.id=phys2d/CartPole-v1", "it needs jax, which is not installed: pip install"),
    "cnn on numbers": ("model.encoder=cnn", "model.encoder=cnn needs images of 3 axes, not (4,)"),
}


@pytest.mark.parametrize("assignment, sentence", SETTINGS.values(), ids=SETTINGS)
def test_a_setting_that_cannot_be(assignment, sentence, capsys):
    fails_with(capsys, ["train", "tiny.yaml", "--run-dir", "made", "--set", assignment], 2, sentence)
    assert not Path("made").exists()


def test_learners_that_would_wait_for_each_other_in_one_process_are_refused(capsys):
    changes = ["--set", "runtime.engine=inline", "--set", "learners.num_learners=2"]
    sentence = (
        "runtime.engine=inline has one process, in which learners.num_learners=2 cannot learn side by side; set "
        "runtime.engine=local, or num_learners to 0 or 1."
    )
    fails_with(capsys, ["train", "tiny.yaml", "--run-dir", "made", *changes], 2, sentence)
    assert not Path("made").exists()
    for config in ("impala", "grpo", "sft"):
        fails_with(capsys, ["train", config, "--dry-run", *changes], 2, sentence)
    assert main(["train", "tiny.yaml", "--set", "runtime.engine=inline", "--set", "learners.num_learners=1"]) == 0


@pytest.mark.parametrize("address", ["here", "10.0.0.1", "10.0.0.1:99999", "http://10.0.0.1"])
def test_an_address_of_a_cluster_has_a_port(address, capsys):
    changes = ["--set", "runtime.engine=cluster", "--set", f"runtime.address={address}"]
    sentence = f"runtime.address is '{address}'; with runtime.engine=cluster it must be HOST:PORT of the cluster's head"
    for config in ("tiny.yaml", "grpo"):
        fails_with(capsys, ["train", config, "--run-dir", "made", *changes], 2, sentence)
    assert not Path("made").exists()


def test_a_cluster_that_nothing_of_the_run_is_on_is_told(capsys):
    changes = ["--set", "runtime.engine=cluster", "--set", "runtime.address=127.0.0.1:1"]  # where nobody listens
    sentence = (
        "runtime.engine=cluster, and nothing of this run is there: runners and learners are in the driver; set "
        "env_runners.num_env_runners or learners.num_learners above 0"
    )
    assert main(["train", "tiny.yaml", *changes]) == 0
    assert sentence in capsys.readouterr().err
    assert main(["train", "tiny.yaml"]) == 0
    assert "nothing of this run" not in capsys.readouterr().err


def test_every_wrong_setting_is_named_at_once(capsys):
    arguments = ["train", "tiny.yaml", "--set", "training.clp_range=1", "--set", "training.epochs=0"]
    said = fails_with(capsys, arguments, 2, "training.clp_range is not a setting")
    assert "training.epochs is 0" in said


YAML_FILES = {
    "empty": (b"", "algorithm is not given; write algorithm: NAME, where the shipped ones are appo, dpo, grpo"),
    "binary": (b"\xff\xfe\x00", "bad.yaml cannot be read"),
    "a list": (b"- 1", "bad.yaml is [1]; it must be a mapping of sections"),
    "a tab": (b"algorithm: ppo\n\tx: 3\n", "bad.yaml:2: this is not YAML"),
    "misspelt": (b"algorithm: ppo\ntraining:\n  clp: 3\n", "training.clp is not a setting of PPO (bad.yaml:3)."),
    "twice": (b"algorithm: ppo\nstop: {iterations: 1}\nstop: {iterations: 2}\n", "stop is given twice"),
}


@pytest.mark.parametrize("content, sentence", YAML_FILES.values(), ids=YAML_FILES)
def test_a_config_file_that_cannot_be(content, sentence, capsys):
    Path("bad.yaml").write_bytes(content)
    fails_with(capsys, ["train", "bad.yaml", "--run-dir", "made"], 2, sentence)
    assert not Path("made").exists()


def test_a_device_that_is_not_there(capsys):
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    sentence = "learners.device is cuda and torch finds no CUDA device here; set it to auto or cpu."
    fails_with(capsys, ["train", "tiny.yaml", "--set", "learners.device=cuda"], 2, sentence)


def test_bad_input_is_told_before_a_process_starts_or_a_slow_library_loads():
    """In a fresh process. What makes the sentence late are processes and imports; seconds depend on the machine."""
    code = (
        "import sys, psutil\nfrom rlx.cli import main\ncode = main(sys.argv[1:])\n"
        "slow = {'torch._dynamo', 'transformers', 'matplotlib', 'pandas', 'pyarrow', 'datasets', 'cv2', 'pygame'}\n"
        "print(len(psutil.Process().children(recursive=True)), sorted(slow & set(sys.modules)))\nsys.exit(code)"
    )
    changes = ["env_runners.num_env_runners=2", "learners.num_learners=2", "training.minibatch_size=1000"]
    arguments = ["train", "tiny.yaml", *(word for change in changes for word in ("--set", change))]
    process = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=60)
    assert (process.returncode, process.stdout) == (2, "0 []\n")
    assert "minibatch_size=1000 is larger than the batch" in process.stderr


# Environments: exit code 1, before or during the run -------------------------------------------------------------

BROKEN_ENVS = {
    "ResetWithoutInfo": "reset() returned array of shape (2,) and dtype float32; gymnasium asks for (obs, info)",
    "ResetWithoutSeed": "gymnasium asks for reset(*, seed=None, options=None)",
    "StepOfFour": "step() returned a tuple of 4",
    "WrongShape": "array of shape (3,)",
    "NoDict": "reset() returned the observation array of shape (2,) and dtype float32; its observation_space is Dict(",
    "SequenceSpace": "SequenceSpace: the observation space holds Sequence, whose values have no fixed size; wrap the",
    "SequenceAction": "SequenceAction: the action space is Sequence, which has no fixed number of choices; wrap the",
    "NoSpaces": "NoSpaces has no observation_space",
    "NotAnEnv": "NotAnEnv made a NotAnEnv, not a gymnasium.Env or VectorEnv",
    "NoReward": "step() returned the reward None; gymnasium asks for a number",
    "TextForBool": "step() returned terminated 'no'; gymnasium asks for a bool",
    "NanObs": "NanObs, environment 0: observation [nan nan] at step 10 of fragment 0; it must be finite",
    "NanReward": "NanReward, environment 0: reward nan at step 9 of fragment 0; it must be finite",
    "HugeReward": "learner/loss became inf in iteration 1; checkpoints are untouched.",
    "Silent": "Silent states autoreset_mode None; set metadata['autoreset_mode']",
    "always_the_same": "always_the_same returned the same environment twice",
}


@pytest.mark.parametrize("env, sentence", BROKEN_ENVS.items(), ids=BROKEN_ENVS)
def test_an_environment_that_cannot_be(env, sentence, capsys):
    fails_with(
        capsys, ["train", "tiny.yaml", "--run-dir", "run", "--set", f"environment.id={MODULE}:{env}"], 1, sentence
    )


def test_an_environment_that_does_not_know_its_arguments(capsys):
    for env in ("CartPole-v1", f"{MODULE}:Good"):
        changes = [f"environment.id={env}", "environment.kwargs={gravity: 3}", "environment.vectorization=in_place"]
        arguments = ["train", "tiny.yaml", *(word for change in changes for word in ("--set", change))]
        said = fails_with(capsys, arguments, 1, "gravity")
        assert "cannot be" in said


@pytest.mark.slow
def test_nan_in_an_env_runner_process_is_the_same_sentence(capsys):
    changes = [f"environment.id={MODULE}:NanObs", "env_runners.num_env_runners=1"]
    arguments = ["train", "tiny.yaml", *(word for change in changes for word in ("--set", change))]
    fails_with(capsys, arguments, 1, "NanObs, environment 0: observation [nan nan] at step 10 of fragment 0")


def test_an_environment_that_raises_keeps_its_traceback_and_the_run(capsys):
    """The traceback leads to the user's bug, so this one error is shown with it; the run can still go on."""
    arguments = ["train", "tiny.yaml", "--run-dir", "run", "--set", f"environment.id={MODULE}:Raises"]
    arguments += ["--set", "fault_tolerance.on_env_error=raise"]
    with pytest.raises(ZeroDivisionError, match="a bug in the environment") as raised:
        main(arguments)
    assert "at step 18 of fragment 1 (32 steps)" in " ".join(raised.value.__notes__)  # after 50 = 32 + 18 steps
    assert capsys.readouterr().err.endswith("go on from its last checkpoint: rlx train --resume run\n")
    assert load_checkpoint(list_checkpoints(Path("run/checkpoints"))[-1])["iteration"] == 1


def test_an_error_in_the_middle_leaves_an_algorithm_that_trains_on():
    steps = iter(range(1000))

    class RaisesOnce(importlib.import_module(MODULE).Good):
        def step(self, action):
            if next(steps) == 50:
                raise ZeroDivisionError("once")
            return super().step(action)

    config = PPOConfig().environment(RaisesOnce, vectorization="in_place").training(epochs=1, minibatch_size=32)
    config.env_runners(num_envs_per_env_runner=2, rollout_fragment_length=20).fault_tolerance(on_env_error="raise")
    with config.build() as algorithm:
        assert algorithm.train()["env_steps"] == 40
        with pytest.raises(ZeroDivisionError):
            algorithm.train()
        assert (algorithm.iteration, algorithm.env_steps) == (1, 40)
        assert algorithm.train()["env_steps"] == 80


# The same in Python ----------------------------------------------------------------------------------------------


def test_the_builder_says_the_same():
    with pytest.raises(
        ConfigError, match=r"training.clp_range is not a setting of PPO. Did you mean training.clip_range"
    ):
        PPOConfig().training(clp_range=1)
    with pytest.raises(ConfigError, match="is larger than the batch of 1024"):
        PPOConfig().environment("CartPole-v1").training(minibatch_size=2000).build()
    with pytest.raises(ConfigError, match=r"environment.id is not set"):
        PPOConfig().build()
    with pytest.raises(ConfigError, match="stop sets no limit"), PPOConfig().environment("CartPole-v1").build() as one:
        one.fit()
    with pytest.raises(
        EnvError, match=r"an observation of shape \(3,\) was given; allowed are \(4,\) or \(N, \*\(4,\)\)"
    ):
        config = PPOConfig().environment("CartPole-v1")
        with config.build() as algorithm:
            rlx.load_policy(algorithm.save("saved")).act([1.0, 2.0, 3.0])
