"""What is compared: the workloads with their hyper-parameters, and the systems with their options."""

from typing import Any

NETS = {"hidden": [64, 64], "activation": "tanh", "gamma": 0.99, "value_coef": 0.5}
PPO = NETS | {"algorithm": "ppo", "lambda_": 0.95, "clip_range": 0.2, "max_grad_norm": 0.5}
CARTPOLE = PPO | {
    "envs": 16,
    "fragment_length": 128,
    "epochs": 4,
    "minibatch_size": 256,
    "lr": 1e-3,
    "entropy_coef": 0.01,
}
CHEETAH = PPO | {"envs": 8, "fragment_length": 256, "epochs": 10, "minibatch_size": 64, "lr": 3e-4, "entropy_coef": 0.0}
CARTPOLE_RUN = CARTPOLE | {"env": "CartPole-v1", "iterations": 100}
CHEETAH_RUN = CHEETAH | {"env": "HalfCheetah-v5", "iterations": 20}
WORK: dict[str, dict[str, Any]] = {
    "cartpole": CARTPOLE_RUN,
    "halfcheetah": CHEETAH_RUN,
    "cartpole one behind": CARTPOLE_RUN,
    "halfcheetah one behind": CHEETAH_RUN,
    "costly": CARTPOLE | {"env": "CostlyCartPole", "iterations": 8},
}
"""Of benchmarks/ppo.py."""

ALONE = {"runners": 0, "threads": 1, "compile": False}
RLX, SB3, RLLIB = (ALONE | {"script": script} for script in ("rlx_train", "sb3_ppo", "rllib_ppo"))
SYSTEMS: dict[str, dict[str, Any]] = {
    "rlx": RLX,
    "rlx compiled": RLX | {"compile": True},
    "rlx 1 runner": RLX | {"runners": 1},
    "rlx 2 runners": RLX | {"runners": 2},
    "rlx 1 runner, one behind": RLX | {"runners": 1, "max_age": 1},
    "rlx 2 runners, one behind": RLX | {"runners": 2, "max_age": 1},
    "sb3": SB3,
    "sb3 2 threads": SB3 | {"threads": 2},
    "rllib": RLLIB,
    "rllib 2 runners": RLLIB | {"runners": 2},
    "rlox": ALONE | {"script": "rlox_ppo"},
}
IN_TURNS = tuple(name for name in SYSTEMS if "one behind" not in name)
BEHIND = ("rlx 1 runner, one behind", "rlx 2 runners, one behind", "rlx", "sb3")
RUNS_ONLY = {
    "cartpole": IN_TURNS,
    "halfcheetah": IN_TURNS,
    "cartpole one behind": BEHIND,
    "halfcheetah one behind": BEHIND,
    "costly": ("rlx", "rlx 1 runner", "rlx 2 runners"),
}
"""The systems that answer what a workload asks."""

TOGETHER = NETS | {"runners": 2, "threads": 1, "compile": False, "env": "CartPole-v1", "envs": 16, "entropy_coef": 0.01}
IMPALA = TOGETHER | {
    "algorithm": "impala",
    "fragment_length": 32,
    "batch_size": 512,
    "lr": 5e-4,
    "max_grad_norm": 40.0,
}
APPO = TOGETHER | {
    "algorithm": "appo",
    "fragment_length": 128,
    "batch_size": 2048,
    "epochs": 4,
    "minibatch_size": 256,
    "lr": 1e-3,
    "lambda_": 0.95,
    "clip_range": 0.2,
    "max_grad_norm": 0.5,
}
# Every step sleeps a millisecond, as if its environment were on another machine; those of one runner ten.
SLEEPY = {"env": "SleepyCartPole", "runners": 4, "envs": 16, "fragment_length": 32, "script": "rlx_train"}
SYNCHRONOUS = CARTPOLE | SLEEPY | {"threads": 1, "compile": False}
NOBODY_WAITS = IMPALA | SLEEPY
PONG = PPO | {
    "env": "ALE/Pong-v5",
    # What Stable-Baselines3 does to an Atari game.
    "atari": {"sticky_actions": 0.0, "noop_max": 30, "fire_reset": True, "episodic_life": True},
    "envs": 8,
    "fragment_length": 128,
    "epochs": 4,
    "minibatch_size": 256,
    "lr": 2.5e-4,
    "clip_range": 0.1,
    "entropy_coef": 0.01,
}
TWO_THREADS = {"runners": 0, "threads": 2, "compile": False}
IMPALA_PONG = IMPALA | {"env": "ALE/Pong-v5", "lr": 6e-4, "runners": 1, "updates_per_iteration": 2}
HALF = {"precision": "bfloat16"}
ONE_BEHIND = {"runners": 1, "max_age": 1}
ASYNCHRONOUS: dict[str, dict[str, dict[str, Any]]] = {
    "impala": {"rlx": IMPALA | {"script": "rlx_train"}, "rllib": IMPALA | {"script": "rllib_impala"}},
    "appo": {"rlx": APPO | {"script": "rlx_train"}, "sample factory": APPO | {"script": "sample_factory_appo"}},
    "slow runner": {
        "PPO": SYNCHRONOUS | {"slow_runners": 0},
        "PPO, one slow": SYNCHRONOUS | {"slow_runners": 1},
        "IMPALA": NOBODY_WAITS | {"slow_runners": 0},
        "IMPALA, one slow": NOBODY_WAITS | {"slow_runners": 1},
    },
    "ppo pong": {
        "rlx 1 runner, one behind, bfloat16": PONG | TWO_THREADS | ONE_BEHIND | HALF | {"script": "rlx_train"},
        "rlx 1 runner, one behind": PONG | TWO_THREADS | ONE_BEHIND | {"script": "rlx_train"},
        "rlx": PONG | TWO_THREADS | {"script": "rlx_train"},
        "rlx bfloat16": PONG | TWO_THREADS | HALF | {"script": "rlx_train"},
        "sb3": PONG | TWO_THREADS | {"script": "sb3_ppo"},
    },
    "impala pong": {
        "emulator": IMPALA_PONG | {"script": "rlx_limit", "of": "emulator"},
        "arithmetic": IMPALA_PONG | {"script": "rlx_limit", "of": "arithmetic"},
        "acting": IMPALA_PONG | {"script": "rlx_limit", "of": "acting"},
        "rlx": IMPALA_PONG | {"script": "rlx_train"},
    },
}
"""Of benchmarks/asynchronous.py: by work and system."""
