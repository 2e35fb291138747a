"""What is compared: the workloads with their hyper-parameters, and the systems with their options."""

from typing import Any

PPO = {
    "gamma": 0.99,
    "lambda_": 0.95,
    "clip_range": 0.2,
    "value_coef": 0.5,
    "max_grad_norm": 0.5,
    "hidden": [64, 64],
    "activation": "tanh",
}
CARTPOLE = PPO | {
    "envs": 16,
    "fragment_length": 128,
    "epochs": 4,
    "minibatch_size": 256,
    "lr": 1e-3,
    "entropy_coef": 0.01,
}
CHEETAH = PPO | {"envs": 8, "fragment_length": 256, "epochs": 10, "minibatch_size": 64, "lr": 3e-4, "entropy_coef": 0.0}
WORK: dict[str, dict[str, Any]] = {
    "cartpole": CARTPOLE | {"env": "CartPole-v1", "iterations": 100},
    "halfcheetah": CHEETAH | {"env": "HalfCheetah-v5", "iterations": 20},
    "costly": CARTPOLE | {"env": "CostlyCartPole", "iterations": 8},
}
ALONE = {"runners": 0, "threads": 1, "compile": False}
SYSTEMS: dict[str, dict[str, Any]] = {
    "rlx": ALONE,
    "rlx compiled": ALONE | {"compile": True},
    "rlx 1 runner": ALONE | {"runners": 1},
    "rlx 2 runners": ALONE | {"runners": 2},
    "sb3": ALONE,
    "sb3 2 threads": ALONE | {"threads": 2},
    "rllib": ALONE,
    "rllib 2 runners": ALONE | {"runners": 2},
    "rlox": ALONE,
}
RUNS_ONLY = {"costly": ("rlx", "rlx 1 runner", "rlx 2 runners")}
"""Workloads that ask about env runners alone, with the systems that answer."""
