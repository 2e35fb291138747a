"""rlx: reinforcement learning and LLM post-training on one learner-group and rollout-worker architecture.

Public names are loaded on first use: `import rlx` loads neither torch nor gymnasium.
"""

from __future__ import annotations

from importlib import import_module, metadata
from typing import TYPE_CHECKING, Any

from rlx import errors

if TYPE_CHECKING:
    from rlx.algorithm import Algorithm
    from rlx.callbacks import Callback, Episode
    from rlx.config import AlgorithmConfig, load_config
    from rlx.inference import TrainedPolicy, load_policy
    from rlx.schedule import Schedule
    from rlx.section import Section
    from rlx.settings import Settings, TrainingSection

__version__ = metadata.version("rlx")

_HOME = {
    "Algorithm": "rlx.algorithm",
    "AlgorithmConfig": "rlx.config",
    "Callback": "rlx.callbacks",
    "Episode": "rlx.callbacks",
    "Schedule": "rlx.schedule",
    "Section": "rlx.section",
    "Settings": "rlx.settings",
    "TrainedPolicy": "rlx.inference",
    "TrainingSection": "rlx.settings",
    "load_config": "rlx.config",
    "load_policy": "rlx.inference",
}

__all__ = [
    "Algorithm",
    "AlgorithmConfig",
    "Callback",
    "Episode",
    "Schedule",
    "Section",
    "Settings",
    "TrainedPolicy",
    "TrainingSection",
    "errors",
    "load_config",
    "load_policy",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'rlx' has no attribute {name!r}; public names: {', '.join(__all__)}")


def __dir__() -> list[str]:
    return sorted(__all__)
