import inspect
import math
import pickle
import random
import subprocess
import sys
import textwrap
from importlib import resources

import cloudpickle
import gymnasium
import jsonschema
import numpy as np
import pytest
from pydantic import Field, PositiveInt, model_validator

from rlx.algorithms.impala import IMPALAConfig
from rlx.algorithms.ppo import PPOConfig
from rlx.config import AlgorithmConfig, list_algorithms, list_configs, load_config
from rlx.errors import ConfigError
from rlx.settings import Schedule, TrainingSection


class ToyTraining(TrainingSection):
    """Hyper-parameters of the toy."""

    lr: Schedule = Field(default=Schedule.constant(3e-4), gt=0)
    """Step size."""
    clip_range: float = Field(default=0.2, gt=0, lt=1)
    """Probability ratio stays within [1 - clip_range, 1 + clip_range]."""
    minibatch_size: PositiveInt | None = 64
    """Samples per step; null: the whole batch."""
    epochs: int = Field(default=4, gt=0)

    @model_validator(mode="after")
    def _one_pass_over_the_whole(self):
        if self.minibatch_size is None and self.epochs > 1:
            raise ValueError("minibatch_size null allows one epoch only")
        return self


class ToyConfig(AlgorithmConfig, training=ToyTraining):
    @staticmethod
    def check(settings):
        batch = settings.env_runners.num_envs_per_env_runner * settings.env_runners.rollout_fragment_length
        if settings.training.minibatch_size > batch:
            raise ConfigError(f"training.minibatch_size={settings.training.minibatch_size} exceeds {batch} samples.")


TOY_FILE = '''
"""A toy."""
from pydantic import Field
from rlx.config import AlgorithmConfig
from rlx.settings import Schedule, TrainingSection

class ToyTraining(TrainingSection):
    lr: Schedule = Field(default=Schedule.constant(3e-4), gt=0)
    """Step size."""
    clip_range: float = Field(default=0.2, gt=0, lt=1)

class ToyConfig(AlgorithmConfig, training=ToyTraining):
    pass
'''


class Corridor(gymnasium.Env):
    class Short(gymnasium.Env):
        pass


def make_corridor():
    return Corridor()


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Return a function that writes toy.yaml next to toy.py, in the current folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "toy.py").write_text(TOY_FILE)

    def write(text):
        (tmp_path / "toy.yaml").write_text("algorithm: ./toy.py\n" + textwrap.dedent(text))
        return "toy.yaml"

    return write


def failure(function, *arguments, **keywords):
    """Return the message of the ConfigError that a call raises."""
    with pytest.raises(ConfigError) as caught:
        function(*arguments, **keywords)
    return str(caught.value)


# --- the builder


def test_builder_calls_chain_and_change_only_what_they_name():
    c = ToyConfig().environment("CartPole-v1").env_runners(num_env_runners=2).training(lr=1e-3).stop(iterations=10)
    assert c.settings.environment.id == "CartPole-v1"
    assert c.settings.env_runners.num_env_runners == 2
    assert c.settings.env_runners.rollout_fragment_length == 128
    assert c.settings.training.lr.at(0) == 1e-3
    assert c.settings.training.clip_range == 0.2
    c.training(clip_range=0.1)
    assert c.settings.training.lr.at(0) == 1e-3


def test_builder_signature_and_docstring_come_from_the_fields():
    signature = inspect.signature(ToyConfig().training)
    assert {"lr", "clip_range", "minibatch_size", "epochs"} <= signature.parameters.keys()
    assert signature.parameters["lr"].default == 3e-4
    assert signature.parameters["clip_range"].annotation is float
    assert signature.parameters["clip_range"].kind is inspect.Parameter.KEYWORD_ONLY
    assert next(iter(inspect.signature(ToyConfig().environment).parameters)) == "id"
    documentation = inspect.getdoc(ToyConfig.training) or ""
    assert "lr: a number > 0 or {start, end, env_steps} (default 0.0003)\n    Step size." in documentation
    assert "clip_range" not in (AlgorithmConfig.training.__doc__ or "")


def test_builder_takes_only_the_environment_by_position():
    with pytest.raises(TypeError):
        ToyConfig().training(3e-4)
    with pytest.raises(TypeError):
        ToyConfig().environment("CartPole-v1", id="Acrobot-v1")
    with pytest.raises(TypeError):
        AlgorithmConfig()


def test_builder_errors_name_key_value_range_and_nearest_key():
    c = ToyConfig()
    assert failure(c.training, clp=1) == "training.clp is not a setting of Toy. Did you mean training.clip_range?"
    assert failure(c.training, lr="fast") == (
        'training.lr is "fast"; it must be a number > 0 or {start, end, env_steps}.'
    )
    assert failure(c.env_runners, num_env_runners=True) == (
        "env_runners.num_env_runners is True; it must be an integer >= 0 or auto."
    )
    assert failure(c.training, seed=1) == (
        "training.seed is not a setting of Toy. Did you mean runtime.seed or evaluation.seed?"
    )
    assert failure(c.runtime, engine="rey") == 'runtime.engine is "rey"; it must be one of local, inline, cluster, ray.'
    assert failure(c.stop, zzz=1) == (
        "stop.zzz is not a setting of Toy. It has iterations, env_steps, episode_return_mean, "
        "evaluation_return_mean, time_s."
    )
    assert failure(c.training, minibatch_size=0) == ("training.minibatch_size is 0; it must be an integer > 0 or null.")
    assert failure(c.training, minibatch_size=None) == "training: minibatch_size null allows one epoch only."
    assert c == ToyConfig()


@pytest.mark.parametrize("value", [True, "3", 2.5, None, [3], math.nan, math.inf])
def test_an_integer_setting_takes_only_whole_numbers(value):
    assert "it must be an integer > 0." in failure(ToyConfig().training, epochs=value)


@pytest.mark.parametrize("value", ["automatic", -1, True, 1.5, None])
def test_the_number_of_env_runners_is_a_number_or_auto(value):
    for config in (
        ToyConfig().set("env_runners.num_env_runners", "auto"),
        ToyConfig().env_runners(num_env_runners="auto"),
    ):
        assert config.settings.env_runners.num_env_runners == "auto" and config.settings.env_runners.fewest == 1
        assert ToyConfig.from_yaml(config.to_yaml()) == config
    shown = '"automatic"' if value == "automatic" else value
    assert failure(ToyConfig().env_runners, num_env_runners=value) == (
        f"env_runners.num_env_runners is {shown}; it must be an integer >= 0 or auto."
    )


def test_sizes_have_to_fit_one_runner_where_there_may_be_one_only():
    made = {"num_env_runners": "auto", "num_envs_per_env_runner": 4, "rollout_fragment_length": 8}
    ppo = PPOConfig().environment("CartPole-v1").env_runners(**made)
    ppo.training(minibatch_size=32).validate()
    assert "larger than the batch of 32" in failure(ppo.training(minibatch_size=33).validate)
    impala = IMPALAConfig().environment("CartPole-v1").env_runners(**made).training(batch_size=64)
    impala.validate()
    assert "training.batch_size=64 has to be null, one fragment" in failure(impala.training(max_age=1).validate)
    impala.training(batch_size=None).validate()


def test_whole_floats_lists_and_numpy_scalars_become_the_type_of_the_field():
    c = ToyConfig().stop(env_steps=1e6).model(hidden=[32]).training(clip_range=np.float32(0.5), epochs=np.int64(2))
    assert (c.settings.stop.env_steps, c.settings.model.hidden) == (1_000_000, (32,))
    assert isinstance(c.settings.stop.env_steps, int)
    assert (type(c.settings.training.clip_range), type(c.settings.training.epochs)) == (float, int)
    assert c.training(minibatch_size=1e3).settings.training.minibatch_size == 1000
    assert c.environment(reward_clip=1).settings.environment.reward_clip == 1.0


def test_a_frozen_config_and_its_settings_cannot_change_but_a_copy_can():
    c = ToyConfig().freeze()
    assert failure(c.training, lr=1.0) == (
        "this config is frozen, as a run uses it: training.lr cannot change; change a copy()."
    )
    assert "frozen" in failure(c.set, "training.lr", 1.0)
    with pytest.raises(ValueError, match="frozen"):
        c.settings.runtime.seed = 1
    with pytest.raises(AttributeError):
        c.settings = None
    assert c.copy().training(lr=1.0) != c
    assert c.settings.training.lr.at(0) == 3e-4


def test_diff_names_what_differs_as_yaml_writes_it():
    c = ToyConfig()
    d = c.copy().training(lr=1e-3).model(hidden=(8,)).environment(make_corridor)
    assert c.diff(d) == {
        "environment.id": (None, f"{__name__}:make_corridor"),
        "model.hidden": ([64, 64], [8]),
        "training.lr": (0.0003, 0.001),
    }
    assert c.diff(c.copy()) == {} and c == c.copy()
    assert repr(ToyConfig().runtime(seed=3).stop(time_s=1, iterations=2)) == (
        "ToyConfig().runtime(seed=3).stop(iterations=2, time_s=1.0)"
    )


def test_set_reads_text_as_yaml():
    c = ToyConfig().set("training.lr", "1e-4").set("model.hidden", "[8, 8]").set("environment.id", "CartPole-v1")
    c.set("environment.kwargs.gravity", "9.8").set("environment.kwargs.map.name", "4x4").set("training.epochs", 2)
    assert c.settings.training.lr.at(0) == 1e-4
    assert c.settings.model.hidden == (8, 8)
    assert c.settings.environment.kwargs == {"gravity": 9.8, "map": {"name": "4x4"}}
    assert c.settings.training.epochs == 2
    assert c.set("environment.kwargs.sign", "=").settings.environment.kwargs["sign"] == "="
    assert failure(c.set, "training.lr.end", 1) == (
        "training.lr.end cannot be set: training.lr is 0.0001, not a mapping."
    )
    c.set("training.lr", "{start: 1, end: 0.5, env_steps: 9}").set("training.lr.end", "0.1")
    assert c.settings.training.lr == Schedule(1.0, 0.1, 9)
    assert failure(c.set, "algorithm", "ppo").startswith("algorithm cannot be set: ToyConfig fixes it")
    assert failure(c.set, "lr", 1) == "lr is not a section. Did you mean training.lr?"
    assert failure(c.set, "training.lr", "0x") == (
        'training.lr is "0x"; it must be a number > 0 or {start, end, env_steps}.'
    )


def test_defaults_of_an_algorithm_are_checked_where_it_is_defined():
    class Short(TrainingSection):
        lr: Schedule = Field(0.5, gt=0)  # type: ignore[assignment]

    class ShortConfig(AlgorithmConfig, training=Short):
        pass

    class Wrong(TrainingSection):
        epochs: int = Field(default=0, gt=0)

    class Missing(TrainingSection):
        epochs: int

    assert ShortConfig().settings.training.lr.at(0) == 0.5
    for training in (Wrong, Missing):
        with pytest.raises(ValueError, match="epochs"):
            type("WrongConfig", (AlgorithmConfig,), {}, training=training)


# --- schedules


def test_a_schedule_is_linear_and_then_constant():
    schedule = ToyConfig().training(lr={"start": 1.0, "end": 0.5, "env_steps": 100}).settings.training.lr
    assert [schedule.at(step) for step in (-5, 0, 25, 100, 1000)] == [1.0, 1.0, 0.875, 0.5, 0.5]
    assert [Schedule.constant(0.1).at(step) for step in (0, 10**9)] == [0.1, 0.1]


@pytest.mark.parametrize(
    "value",
    [0, -1, True, math.nan, {"start": 1, "end": 0, "env_steps": 9}, {"start": 1, "end": 1}, [1, 2]]
    + [{"start": 1, "end": 1, "env_steps": steps} for steps in (0, -1, 1.5, True, math.inf)],
)
def test_a_schedule_outside_its_range_or_shape_is_refused(value):
    message = failure(ToyConfig().training, lr=value)
    assert message == f"training.lr is {value!r}; it must be a number > 0 or {{start, end, env_steps}}."


# --- YAML


def random_value(rng):
    text = rng.choice(["1e-4", "null", "yes", "a: b", "# no", 'it\'s "q"', "two\n\nlines ", "é\u2028", "", "0x1F", "-"])
    return rng.choice([text, None, True, -3, 2.5e-7, 1e300, [text, {"deep": [1, text]}], {"key " + text: text}])


def random_config(rng):
    pick = rng.choice
    ramp = {"start": rng.uniform(1e-9, 1), "end": rng.uniform(1e-9, 1), "env_steps": rng.randrange(1, 10**9)}
    return (
        ToyConfig()
        .environment(
            pick([None, "CartPole-v1", "1e-4", "a.b:C", Corridor, make_corridor, Corridor.Short]),
            kwargs={f"k{i}": random_value(rng) for i in range(4)},
            obs_clip=rng.uniform(1e-300, 1e300),
        )
        .env_runners(num_env_runners=rng.randrange(9), rollout_fragment_length=rng.randrange(1, 10**12))
        .model(hidden=tuple(rng.randrange(1, 99) for _ in range(rng.randrange(4))), activation=pick(["tanh", "silu"]))
        .training(lr=pick([rng.uniform(1e-12, 1), 1, ramp]), clip_range=rng.uniform(1e-6, 0.999))
        .reporting(progress=pick(["none", "auto"]), tensorboard=pick([True, False]))
        .stop(episode_return_mean=pick([None, -1e-5, 475, 1e22]), time_s=pick([None, 3, 0.1]))
    )


def test_random_configs_survive_yaml_and_dict():
    rng = random.Random(0)
    for round in range(12):
        c = random_config(rng)
        assert ToyConfig.from_yaml(c.to_yaml(comments=bool(round % 2))) == c
        assert ToyConfig.from_dict(c.to_dict()) == c


def test_yaml_holds_every_value_in_section_order_and_comments_on_demand():
    text = ToyConfig().to_yaml()
    order = ["algorithm", "environment", "atari", "env_runners", "model", "training", "learners", "evaluation"]
    order += ["fault_tolerance", "checkpointing", "reporting", "runtime", "callbacks", "stop"]
    assert [line.split(":")[0] for line in text.splitlines() if not line.startswith(" ")] == order
    assert "\n  hidden: [64, 64]\n" in text and "\n  lr: 0.0003\n" in text and "\n  iterations: null\n" in text
    assert "#" not in text
    assert "\n  # Step size.\n  lr: 0.0003\n" in ToyConfig().to_yaml(comments=True)


def test_an_empty_section_and_a_missing_one_keep_the_defaults(write):
    c = load_config(write("training:\nmodel: {}\n"))
    assert c == type(c)()
    assert ToyConfig.from_yaml("") == ToyConfig()


def test_yaml_merge_keys_and_exponents_are_read(write):
    c = load_config(
        write("""\
        environment:
          kwargs: {base: &base {a: 1, b: 2}, other: {<<: *base, b: 1e3}}
        training: {lr: 1e-4}
        """)
    )
    assert c.settings.environment.kwargs["other"] == {"a": 1, "b": 1000.0}
    assert c.settings.training.lr.at(0) == 1e-4


def test_everything_that_is_wrong_is_reported_with_file_and_line(write):
    path = write("""\
        environment:
          id: CartPole-v1
        training:
          clp: 0.1
          lr: fast
          clip_range: 1.50
        evaluation: 5
        traning: {}
        stop:
          env_steps: -1e3
          env_steps: no
        model: {hidden: [64, wide], encoder: rnn}
        """)
    overrides = ["runtime.sed=1", "learners.device=tpu", "training.lr.start=1", "seed", "runtime.seed=[1"]
    assert set(failure(load_config, path, overrides).splitlines()) == {
        "stop.env_steps is given twice (toy.yaml:11 and toy.yaml:12); keep one.",
        "training.lr.start cannot be set: training.lr is fast, not a mapping.",
        "--set seed is no assignment; write --set KEY=VALUE, as in training.lr=1e-4.",
        "--set runtime.seed: this is not YAML: expected ',' or ']', but got '<stream end>'.",
        "training.clp is not a setting of Toy (toy.yaml:5). Did you mean training.clip_range?",
        'training.lr is "fast" (toy.yaml:6); it must be a number > 0 or {start, end, env_steps}.',
        "training.clip_range is 1.50 (toy.yaml:7); it must be a number > 0 and < 1.",
        "evaluation is 5 (toy.yaml:8); it must be a mapping of its settings.",
        "traning is not a section (toy.yaml:9). Did you mean training?",
        "stop.env_steps is no (toy.yaml:12); it must be an integer > 0 or null.",
        "model.hidden is [64, wide] (toy.yaml:13); it must be a list with each item an integer > 0.",
        'model.encoder is "rnn" (toy.yaml:13); it must be one of auto, mlp, cnn, impala_cnn.',
        "runtime.sed is not a setting of Toy (--set). Did you mean runtime.seed?",
        'learners.device is "tpu" (--set); it must be one of auto, cpu, cuda.',
    }


def test_a_text_that_is_not_yaml_names_the_line(write):
    message = failure(load_config, write("training:\n  lr: [1, 2\nstop: {}\n"))
    assert message.startswith("toy.yaml:4: this is not YAML: ")
    assert failure(load_config, write("training:\n\tlr: 1\n")).startswith("toy.yaml:3: this is not YAML: ")
    assert failure(load_config, write("a: !!python/name:os.system x\n")).startswith("toy.yaml:2: this is not YAML: ")
    assert failure(load_config, write("when: 2024-13-45\n")).startswith("toy.yaml:1: this is not YAML: ")
    assert failure(ToyConfig.from_yaml, "[1, 2]") == "the config is [1, 2]; it must be a mapping of sections."
    assert failure(ToyConfig.from_yaml, "lr: 1") == "lr is not a section (line 1). Did you mean training.lr?"


def test_overrides_win_over_the_file_and_keep_its_other_values(write):
    path = write("training: {lr: 0.5, clip_range: 0.3}\nenvironment: {kwargs: {a: 1}}\n")
    c = load_config(path, ["training.lr={start: 1, end: 0.1, env_steps: 10}", "environment.kwargs.b=2", "model="])
    assert c.settings.training.lr == Schedule(1.0, 0.1, 10)
    assert c.settings.training.clip_range == 0.3
    assert c.settings.environment.kwargs == {"a": 1, "b": 2}


# --- algorithm: and the names of configs


def test_an_algorithm_file_is_found_next_to_the_yaml_from_any_folder(write, tmp_path, monkeypatch):
    write("training: {lr: 0.5}\n")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    c = load_config("../toy.yaml")
    assert type(c) is type(load_config(tmp_path / "toy.yaml"))
    assert c.settings.algorithm == str(tmp_path / "toy.py")
    assert AlgorithmConfig.from_yaml(c.to_yaml()) == c
    assert type(c).from_yaml(c.to_yaml()) == c


def test_a_config_from_an_algorithm_file_travels_to_a_process_that_cannot_import_it(write):
    packed = cloudpickle.dumps(load_config(write("training: {lr: 0.5}\n")).settings.training.lr)
    config = cloudpickle.dumps(load_config(write("training: {lr: 0.5}\n")))
    code = f"import pickle; print(pickle.loads({packed!r}).at(0), pickle.loads({config!r}).settings.training.lr.at(0))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd="/")
    assert (done.stdout, done.stderr) == ("0.5 0.5\n", "")


def test_config_and_settings_pickle_by_name():
    c = ToyConfig().environment(Corridor).training(lr=0.1)
    assert pickle.loads(pickle.dumps(c)) == c
    assert pickle.loads(pickle.dumps(c.settings)) == c.settings


def test_a_dotted_module_is_an_algorithm(tmp_path, monkeypatch):
    (tmp_path / "toy_package").mkdir()
    (tmp_path / "toy_package" / "toy.py").write_text(TOY_FILE)
    (tmp_path / "toy_package" / "two.py").write_text(TOY_FILE + "\nclass Second(ToyConfig):\n    pass\n")
    (tmp_path / "toy_package" / "broken.py").write_text("import toy_package_needs_this\n")
    monkeypatch.syspath_prepend(tmp_path)
    c = AlgorithmConfig.from_yaml("algorithm: toy_package.toy\ntraining: {lr: 1}\n")
    assert c.settings.training.lr.at(0) == 1.0
    assert AlgorithmConfig.from_yaml(c.to_yaml()) == c
    read = AlgorithmConfig.from_yaml
    assert failure(read, "algorithm: toy_package.two") == (
        'algorithm is "toy_package.two" (line 1); its module must define exactly one AlgorithmConfig subclass '
        "and defines Second, ToyConfig."
    )
    assert failure(read, "algorithm: toy_package.none") == (
        'algorithm is "toy_package.none" (line 1); there is no module toy_package.none on the Python path.'
    )
    assert "defines none." in failure(read, "algorithm: json.decoder")
    assert "toy_package.toy" in failure(ToyConfig.from_yaml, "algorithm: toy_package.toy")
    with pytest.raises(ModuleNotFoundError, match="toy_package_needs_this"):
        read("algorithm: toy_package.broken")


def test_an_unknown_algorithm_lists_the_shipped_ones(write):
    names = ", ".join(name for name, _ in list_algorithms())
    read = AlgorithmConfig.from_yaml
    assert failure(read, "algorithm: zzz") == (
        f'algorithm is "zzz" (line 1); the shipped ones are {names}, and your own is written as pkg.module or '
        "./file.py."
    )
    assert failure(read, "training: {}") == (
        f"algorithm is not given; write algorithm: NAME, where the shipped ones are {names}."
    )
    assert failure(read, "algorithm: 3") == "algorithm is 3 (line 1); it must be a string."
    assert "no file" in failure(load_config, write(""), ["algorithm=./none.py"])


def test_an_unknown_config_lists_the_shipped_ones(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = ", ".join(name for name, _ in list_configs()) or "none"
    assert failure(load_config, "zzz") == (
        f'there is no config "zzz": it is neither a file nor one of the shipped ones ({names}).'
    )
    assert "there is no config" in failure(load_config, "elsewhere/ppo.yaml")


def test_a_shipped_config_is_found_by_name_whatever_the_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ppo").mkdir()
    first = load_config("ppo")
    assert first == load_config("ppo.yaml") == load_config("configs/ppo.yaml")
    assert first.settings.algorithm == "ppo"
    assert AlgorithmConfig.from_yaml(first.to_yaml()) == first
    assert failure(load_config, "ppp").endswith("Did you mean ppo?")


# --- validate and build


def test_grpo_becomes_ppo_on_text_by_one_line():
    grpo = load_config("grpo")
    ppo = AlgorithmConfig.from_yaml(
        resources.files("rlx.configs")
        .joinpath("grpo.yaml")
        .read_text()
        .replace("algorithm: grpo", "algorithm: rlhf_ppo")
    )
    assert (grpo.to_dict()["algorithm"], ppo.to_dict()["algorithm"]) == ("grpo", "rlhf_ppo")
    assert ppo.settings.training.kl_coef == grpo.settings.training.kl_coef == 0.1
    assert ppo.settings.prompts == grpo.settings.prompts


def test_validate_changes_nothing_and_can_be_repeated():
    c = ToyConfig().environment("CartPole-v1", kwargs={"a": [1]})
    before = c.to_yaml()
    assert c.validate() is None and c.validate() is None
    assert c.to_yaml() == before
    c.training(lr=1.0)


def test_validate_reports_the_environment_and_the_algorithms_own_check(write):
    c = ToyConfig().training(minibatch_size=2048)
    assert failure(c.validate).splitlines() == [
        "environment.id is not set; give a gymnasium id such as CartPole-v1, an import path pkg.module:Name, "
        "or in Python a class or a factory.",
        "training.minibatch_size=2048 exceeds 1024 samples.",
    ]
    assert failure(load_config(write("environment:\n  id: cartpole\n")).validate).startswith(
        'environment.id is "cartpole" (toy.yaml:3); gymnasium has no such environment. Did you mean CartPole-v1'
    )
    assert failure(load_config(write("environment:\n  id: cartpole\n")).environment("cart").validate).startswith(
        'environment.id is "cart"; gymnasium has no such environment. '
    )


def test_a_missing_package_is_named_with_the_extra_that_brings_it(monkeypatch):
    for package in ("mujoco", "ale_py", "Box2D"):
        monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
    for id, package, cure in [
        ("ALE/Pong-v5", "ale_py", "rlx[atari]"),
        ("PongNoFrameskip-v4", "ale_py", "rlx[atari]"),
        ("HalfCheetah-v5", "mujoco", "rlx[mujoco]"),
        ("LunarLander-v3", "Box2D", "gymnasium[box2d]"),
    ]:
        assert failure(ToyConfig().environment(id).validate) == (
            f"environment.id is \"{id}\"; it needs {package}, which is not installed: pip install '{cure}'."
        )


def test_an_environment_that_gymnasium_dropped_is_unknown():
    message = failure(ToyConfig().environment("HalfCheetah-v2").validate)
    assert "Did you mean HalfCheetah-v5 or HalfCheetah-v4" in message.replace(",", " or")


@pytest.mark.parametrize(
    "id", [Corridor, Corridor.Short, make_corridor, lambda: Corridor(), "gymnasium.envs.classic_control:CartPoleEnv"]
)
def test_classes_factories_and_import_paths_are_environments(id):
    ToyConfig().environment(id).validate()


@pytest.mark.parametrize(
    ("id", "message"),
    [
        ("no_such_package.envs:Maze", "there is no module no_such_package on the Python path."),
        ("gymnasium.envs.classic_control:CartPolEnv", "has no CartPolEnv. Did you mean CartPoleEnv?"),
        ("gymnasium:__version__", "it is of type str, and must be a class or a factory."),
        ("__main__:Maze", "__main__ has no Maze; put it into a module, where it can be found again."),
        ("my_envs:make.<locals>.Env", "cannot be found again by its name: move it to the top level"),
        ("no_such_package:Maze-v0", "there is no module no_such_package on the Python path."),
        ("not a module:Maze", '"not a module" is not the name of a module.'),
    ],
)
def test_an_import_path_that_leads_nowhere_says_why(id, message):
    assert message in failure(ToyConfig().environment(id).validate)


def test_a_local_environment_is_written_by_name_and_refused_when_read_back():
    def local():
        return Corridor()

    c = ToyConfig().environment(local)
    c.validate()
    again = ToyConfig.from_yaml(c.to_yaml())
    assert again.settings.environment.id.endswith(
        ":test_a_local_environment_is_written_by_name_and_refused_when_read_back.<locals>.local"
    )
    assert "cannot be found again by its name" in failure(again.validate)


def test_an_environment_instance_or_a_live_object_in_kwargs_is_refused():
    assert failure(ToyConfig().environment, Corridor()).endswith(
        "it must be a gymnasium id, an import path pkg.module:Name, an environment class or a factory () -> Env."
    )
    assert "it may hold only plain data" in failure(ToyConfig().environment, kwargs={"policy": object()})
    assert failure(ToyConfig().environment, kwargs={1: 2}) == (
        "environment.kwargs is {1: 2}; it must be a mapping whose keys are strings."
    )


def test_kwargs_are_copied_and_read_the_same_from_python_and_yaml():
    kwargs = {"sizes": (1, [2])}
    c = ToyConfig().environment(kwargs=kwargs)
    kwargs["late"] = 1
    assert c.settings.environment.kwargs == {"sizes": [1, [2]]}


def test_build_validates_freezes_and_hands_the_config_over():
    class BuiltConfig(ToyConfig):
        pass

    assert "no algorithm uses BuiltConfig" in failure(BuiltConfig().build)
    BuiltConfig.algorithm_class = lambda config, run_dir: (config, 1 / run_dir)
    with pytest.raises(ZeroDivisionError):
        BuiltConfig().environment("CartPole-v1").build(0)
    assert "environment.id is not set" in failure(BuiltConfig().build)
    c = BuiltConfig().environment("CartPole-v1")
    assert c.build(2) == (c, 0.5)
    assert "frozen" in failure(c.training, lr=1.0)


def test_a_run_needs_a_limit_only_where_it_asks_for_one():
    assert "stop sets no limit" in failure(lambda: ToyConfig().settings.stop.require_limit(10))
    ToyConfig().stop(time_s=1).settings.stop.require_limit(0)


def test_a_limit_that_no_evaluation_looks_at_is_refused():
    stop = ToyConfig().stop(evaluation_return_mean=0.5, time_s=1).settings.stop
    stop.require_limit(10)
    assert failure(lambda: stop.require_limit(0)) == (
        "stop.evaluation_return_mean=0.5 is never looked at with evaluation.interval=0; set the interval to 10, say, "
        "or the limit to null."
    )


# --- what derives from the sections


def test_json_schema_accepts_what_to_dict_writes_and_refuses_what_the_config_refuses():
    schema = ToyConfig.json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    values = ToyConfig().training(lr={"start": 1, "end": 0.5, "env_steps": 10}).to_dict()
    jsonschema.validate(values, schema)
    for section, wrong in [("training", {"lr": 0}), ("training", {"clp": 1}), ("runtime", {"engine": "rey"})]:
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate({**values, section: wrong}, schema)
    lr = schema["$defs"]["ToyTraining"]["properties"]["lr"]
    assert (lr["default"], lr["exclusiveMinimum"], lr["description"]) == (0.0003, 0, "Step size.")


def test_every_setting_has_a_help_text_and_every_number_a_range():
    free = {"stop.episode_return_mean", "stop.evaluation_return_mean"}
    for name, section in ToyConfig().settings:
        for key, field in type(section).model_fields.items() if name != "algorithm" else ():
            assert field.description or key == "epochs", f"{name}.{key}"
            words = inspect.getdoc(getattr(AlgorithmConfig, name)) or ""
            line = next((line for line in words.splitlines() if line.startswith(f"{key}: a")), "")
            assert "number" not in line or any(s in line for s in "<>") or f"{name}.{key}" in free, line


def test_listing_algorithms_and_reading_a_bad_config_load_neither_torch_nor_gymnasium(write):
    code = (
        "import sys; from rlx.config import *; list_algorithms(); list_configs()\n"
        "try: load_config(sys.argv[1])\n"
        "except ValueError as error: print(error)\n"
        "print([name for name in ('torch', 'gymnasium', 'matplotlib', 'numpy') if name in sys.modules])"
    )
    path = write("training: {lr: fast}\n")
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, timeout=60)
    assert done.stderr == ""
    assert done.stdout.splitlines() == [
        'training.lr is "fast" (toy.yaml:2); it must be a number > 0 or {start, end, env_steps}.',
        "[]",
    ]
